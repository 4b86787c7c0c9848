//! Whole streams between two agents.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::{Rng, SeedableRng};

use super::pki::Pki;
use super::world::{Agent, Options, at, until_ends};
use crate::link::testing::site;
use crate::link::{Leadership, LinkState, SourceProgress, hub};
use crate::model::{ClusterTime, Position, Term};
use crate::outbox::LogId;

async fn pair(pki: &Pki) -> (Agent, Agent) {
    let south = Agent::start(Options::south(pki)).await;
    let north = Agent::start(Options::north(pki, vec![south.address.clone()])).await;
    (north, south)
}

#[tokio::test]
async fn a_stream_survives_five_thousand_batches_with_cuts_at_random() {
    let pki = Pki::new();
    let (north, south) = pair(&pki).await;
    let mut rng = rand::rngs::StdRng::seed_from_u64(11);
    let mut from = 10;
    while from < 10_010 {
        let to = (from + rng.random_range(200..1500)).min(10_010);
        north.capture(from, to, 2).await;
        let partly = from + rng.random_range(0..to - from);
        south.until("on its way", |view| view.received >= Some(at(partly))).await;
        north.transport.cut();
        from = to;
    }
    south.until_received(10_010).await;
    assert_eq!(south.inbox().await, (10..10_010).collect::<Vec<_>>());
    let log = south.logs.log(&LogId::Inbox(site("north"))).state().expect("begun");
    let source = north.logs.log(&LogId::Outbox).state().expect("begun");
    assert_eq!((log.hash, log.end, log.incarnation), (source.hash, source.end, source.incarnation));
    assert_eq!(log.term.0, 5, "the shipping agent's term is stored");
    let acked = north.until("acknowledged", |view| view.received == Some(at(10_010))).await;
    assert!(acked.last_reject.is_none());
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn a_slow_inbox_holds_the_source_back_within_the_credit() {
    let pki = Pki::new();
    let credit = 20_000;
    let options = Options { credit, limit: 60_000, ..Options::south(&pki) };
    let south = Agent::start(options).await;
    let north = Agent::start(Options::north(&pki, vec![south.address.clone()])).await;
    north.capture(10, 4010, 5).await;
    let inbox = south.logs.log(&LogId::Inbox(site("north")));
    let largest = 2_000;
    let mut stalls = 0;
    loop {
        let before = south.view().received;
        tokio::time::sleep(Duration::from_millis(30)).await;
        let (stored, sent) = (south.view().counters.bytes, north.view().counters.bytes);
        assert!(sent <= south.view().counters.bytes + credit + largest, "{sent} sent, {stored} stored");
        let state = inbox.state();
        assert!(state.as_ref().is_none_or(|s| s.bytes <= 60_000 + largest), "{state:?}");
        if south.view().received == Some(at(4010)) {
            break;
        }
        if before.is_some() && before == south.view().received {
            stalls += 1;
            let state = state.expect("begun");
            inbox.release(state.incarnation, state.end);
        }
    }
    assert!(stalls > 0, "the inbox was never full");
    assert!(north.view().last_reject.is_none(), "a full inbox is no reason to end a session");
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn an_inbox_that_is_cut_back_is_received_again_though_nothing_more_is_shipped() {
    let pki = Pki::new();
    let (north, south) = pair(&pki).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    let inbox = south.logs.log(&LogId::Inbox(site("north")));
    let first = inbox.reader(at(10)).next().await.expect("reads").batch.header().clone();
    assert_eq!(first.end, at(12));
    inbox.rewind(first.end, first.hash, None).await.expect("cut back");
    until_ends(&inbox, 20).await;
    assert_eq!(south.inbox().await, (10..20).collect::<Vec<_>>());
    north.stop().await;
    south.stop().await;
}

const IDLE: Leadership = Leadership { leader: false, term: Term(0) };
const LEADING: Leadership = Leadership { leader: true, term: Term(5) };

#[tokio::test]
async fn a_damaged_outbox_keeps_what_is_good_past_the_target() {
    let pki = Pki::new();
    let south = Agent::start(Options::south(&pki)).await;
    let north = Agent::start(Options { ring: 0, ..Options::north(&pki, vec![south.address.clone()]) }).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    south.leadership.send_replace(IDLE);
    north.until("closed", |view| !view.open).await;
    north.capture(20, 30, 2).await;
    // The older one is only retained.
    for end in [14, 24] {
        assert!(north.store.corrupt(&LogId::Outbox, at(end)));
    }
    south.leadership.send_replace(LEADING);
    north.until_captured(22).await;
    north.capture(22, 30, 2).await;
    south.until_received(30).await;
    // Now nothing past the target is good.
    south.leadership.send_replace(IDLE);
    north.until("closed", |view| !view.open).await;
    north.capture(30, 40, 2).await;
    assert!(north.store.corrupt(&LogId::Outbox, at(32)));
    south.leadership.send_replace(LEADING);
    north.until_captured(30).await;
    north.capture(30, 40, 2).await;
    south.until_received(40).await;
    assert_eq!(south.inbox().await, (10..40).collect::<Vec<_>>());
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn an_outbox_whose_first_record_is_damaged_begins_again_for_a_fresh_target() {
    let pki = Pki::new();
    let south = Agent::start(Options { leadership: IDLE, ..Options::south(&pki) }).await;
    let north = Agent::start(Options { ring: 0, ..Options::north(&pki, vec![south.address.clone()]) }).await;
    north.capture(10, 20, 2).await;
    assert!(north.store.corrupt(&LogId::Outbox, at(12)));
    south.leadership.send_replace(LEADING);
    north.until_captured(10).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    assert_eq!(south.inbox().await, (10..20).collect::<Vec<_>>());
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn progress_acks_and_fetches_cross_the_link_and_survive_a_cut() {
    let pki = Pki::new();
    let (north, south) = pair(&pki).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    let (head, captured) = (ClusterTime(99), Some(at(20)));
    let progress = SourceProgress { head, captured, captured_changes: 7, captured_bytes: 70, lost: false };
    north.progress.send_replace(progress);
    let seen = |head| move |view: &crate::link::StreamView| view.progress.is_some_and(|(word, _)| word.head == head);
    let word = south.until("told", seen(ClusterTime(99))).await.progress.expect("progress").0;
    assert_eq!((word.captured, word.captured_changes, word.now_ms), (Some(at(20)), 7, 1000));
    let applied = Position::new(ClusterTime(15), 1);
    south.applied.send_replace(Some(applied));
    north.until("told", |view| view.applied == Some(applied)).await;

    // Whatever the clock of the peer says, the time a ping took is ours.
    for (agent, peer) in [(&north, "south"), (&south, "north")] {
        let mut link = agent.hub.watch_peer(&site(peer)).expect("a peer");
        let measured = tokio::time::timeout(Duration::from_secs(20), link.wait_for(|link| link.rtt.is_some())).await;
        let rtt = measured.expect("in time").expect("the hub lives").rtt;
        assert!(rtt.is_some_and(|rtt| !rtt.is_zero() && rtt < Duration::from_secs(20)), "{rtt:?}");
    }
    let source = site("north");
    let fetched = south.hub.fetch(&source, Agent::fetch("items")).await.expect("fetched");
    assert_eq!((fetched.at, fetched.documents.len()), (5, 1));
    let error = south.hub.fetch(&source, Agent::fetch("broken")).await.expect_err("broken");
    assert!(matches!(error, hub::Error::Fetch { .. }), "{error}");
    let failures = |agent: &Agent| agent.hub.peers()[0].failures;
    let before = failures(&north);
    north.transport.cut();
    let fetched = south.hub.fetch(&source, Agent::fetch("items")).await.expect("asked again");
    assert!(failures(&north) > before, "the session that broke was counted");
    assert_eq!(fetched.documents.len(), 1);
    let unknown = south.hub.fetch(&site("east"), Agent::fetch("items")).await;
    assert_eq!(unknown, Err(hub::Error::NoSuchPeer(site("east"))));
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn a_refused_start_shows_its_hint_at_the_target_and_is_tried_again() {
    let pki = Pki::new();
    let south = Agent::start(Options::south(&pki)).await;
    // Nothing runs between the start and this on a runtime of one thread.
    let north = Agent::start(Options::north(&pki, vec![south.address.clone()])).await;
    north.gate.refuse.store(true, Ordering::Relaxed);
    let mut link = south.hub.watch_peer(&site("north")).expect("peer");
    let refused = tokio::time::timeout(Duration::from_secs(10), link.wait_for(|link| link.state == LinkState::Refused));
    let refused = refused.await.expect("in time").expect("lives").clone();
    assert!(refused.error.contains("not empty"), "{refused:?}");
    assert_eq!(refused.hint, "use start_at");
    assert!(south.view().received.is_none());
    north.gate.refuse.store(false, Ordering::Relaxed);
    north.capture(10, 12, 1).await;
    south.until_received(12).await;
    assert_eq!(south.hub.peers()[0].state, LinkState::Connected);
    north.stop().await;
    south.stop().await;
}
