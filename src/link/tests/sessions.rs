//! Which sessions live, and what a peer may not do.

use std::sync::Arc;
use std::time::Duration;

use farshore_api::client::connect;
use farshore_api::replication::v1 as pb;
use farshore_api::replication::v1::replication_client::ReplicationClient;
use farshore_api::tls::{Expected, Reloading};
use pb::frame::Body;
use pb::reject::Reason;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::pki::Pki;
use super::world::{Agent, Options, at};
use crate::link::testing::{batch, hash_before, incarnation, site};
use crate::link::wire::{Greeting, Originating};
use crate::link::{Leadership, LinkState, REASONS};
use crate::model::{AgentId, Epoch, Term};
use crate::outbox::LogId;

/// Opens a session by hand, says these frames and returns the rejection.
async fn say(agent: &Agent, tls: Arc<Reloading>, frames: Vec<Body>) -> Result<pb::Reject, tonic::Status> {
    let channel = connect(&agent.address, tls, Expected::AnySite).await.expect("connects");
    let (out, outgoing) = mpsc::channel(8);
    for body in frames {
        out.send(pb::Frame::of(body)).await.expect("room");
    }
    let mut incoming = ReplicationClient::new(channel).session(ReceiverStream::new(outgoing)).await?.into_inner();
    while let Some(frame) = incoming.message().await? {
        if let Some(Body::Reject(reject)) = frame.body {
            return Ok(reject);
        }
    }
    panic!("the session ended without a word");
}

fn hello(name: &str, term: u64) -> Body {
    let originating = Originating { source: site(name), captured: None };
    let greeting = Greeting {
        site: site(name),
        group: "bank".into(),
        agent: AgentId([9; 16]),
        epoch: Epoch(1),
        term: Term(term),
        leader: true,
        receiving: vec![],
        originating: Some(originating),
    };
    Body::Hello(greeting.to_hello())
}

fn shipped(source: &str, from: u64) -> Body {
    let record = batch(1, from, from + 2).record().clone();
    Body::Batch(pb::Batch { source: source.into(), epoch: 1, term: 5, record, begins: from == 10 })
}

#[tokio::test]
async fn a_peer_is_held_to_its_certificate() {
    let pki = Pki::new();
    let south = Agent::start(Options::south(&pki)).await;
    let load = |name: &str, uri: &str| Arc::new(Reloading::load(pki.issue(name, uri, 9), "farshore").expect("loads"));
    let viewer = say(&south, load("v", "spiffe://farshore/viewer/jo"), vec![]).await.expect_err("denied");
    assert_eq!(viewer.code(), tonic::Code::PermissionDenied);
    assert!(viewer.message().contains("viewer/jo"), "{viewer}");
    let east = say(&south, load("e", "spiffe://farshore/site/east"), vec![]).await.expect_err("denied");
    assert!(east.message().contains("[[peers]]"), "{east}");

    let north = pki.site("north");
    let reason = async |frames| say(&south, north.clone(), frames).await.expect("told").reason();
    assert_eq!(reason(vec![hello("west", 5)]).await, Reason::Identity);
    assert_eq!(reason(vec![hello("north", 5), shipped("west", 10)]).await, Reason::Identity);
    assert_eq!(reason(vec![shipped("north", 10)]).await, Reason::Protocol);
    let mut damaged = shipped("north", 10);
    if let Body::Batch(batch) = &mut damaged {
        batch.record = batch.record.slice(..batch.record.len() - 1);
    }
    assert_eq!(reason(vec![hello("north", 5), damaged]).await, Reason::Corrupt);
    assert_eq!(south.view().counters.corrupt_records, 1);
    let peer = &south.hub.peers()[0];
    let told: Vec<_> = REASONS.iter().zip(peer.rejects).filter(|(_, count)| *count > 0).collect();
    let expected = [(Reason::Identity, 2), (Reason::Corrupt, 1), (Reason::Protocol, 1)];
    assert!(told.iter().map(|((reason, _), count)| (*reason, *count)).eq(expected), "{told:?}");
    assert_eq!(south.view().received, None);
    assert_eq!(reason(vec![hello("north", 5), shipped("north", 10), shipped("north", 14)]).await, Reason::Gap);
    south.until_received(12).await;
    assert_eq!(reason(vec![hello("north", 4)]).await, Reason::Term, "term 5 was stored with its first batch");
    south.stop().await;
}

#[tokio::test]
async fn an_inbox_that_is_cut_back_before_the_peers_hello_is_received_again() {
    let pki = Pki::new();
    let south = Agent::start(Options::south(&pki)).await;
    let inbox = south.logs.log(&LogId::Inbox(site("north")));
    let first = batch(1, 10, 12);
    inbox.begin(incarnation(1), Epoch(1), at(10), hash_before(10), None).await.expect("begins");
    for batch in [first.clone(), batch(1, 12, 20)] {
        inbox.append(batch, None).await.expect("appends");
    }
    let channel = connect(&south.address, pki.site("north"), Expected::AnySite).await.expect("connects");
    let (out, outgoing) = mpsc::channel(8);
    let mut incoming =
        ReplicationClient::new(channel).session(ReceiverStream::new(outgoing)).await.expect("opens").into_inner();
    let Some(Body::Hello(said)) = incoming.message().await.expect("a frame").and_then(|frame| frame.body) else {
        panic!("Hello comes first");
    };
    assert_eq!(said.receiving[0].received.map(Into::into), Some(at(20)));
    inbox.rewind(at(12), first.header().hash, None).await.expect("cut back");
    out.send(pb::Frame::of(hello("north", 5))).await.expect("room");
    // A peer that only waits is held to be gone after 15 s.
    let ended = async { while let Ok(Some(_)) = incoming.message().await {} };
    tokio::time::timeout(Duration::from_secs(8), ended).await.expect("the session ends at once");
    drop(out);
    let north = Agent::start(Options::north(&pki, vec![south.address.clone()])).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    assert_eq!(south.inbox().await, (10..20).collect::<Vec<_>>());
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn two_sites_that_dial_each_other_keep_one_session() {
    let pki = Pki::new();
    let prepare = async |options: Options| {
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let transport = super::world::cutting(&options, &tasks);
        let listener =
            crate::link::Transport::listen(&*transport, "127.0.0.1:0", cancel.clone()).await.expect("listens");
        (options, transport, listener, tasks, cancel)
    };
    let mut a = prepare(Options::north(&pki, vec![])).await;
    let mut b = prepare(Options::south(&pki)).await;
    a.0.addresses = vec![b.2.address.to_string()];
    b.0.addresses = vec![a.2.address.to_string()];
    let (_, north) = Agent::on(a.0, a.1, a.2, a.3, a.4);
    let (_, south) = Agent::on(b.0, b.1, b.2, b.3, b.4);
    north.capture(10, 400, 1).await;
    south.until_received(400).await;
    let since = |agent: &Agent| agent.hub.peers()[0].since;
    let settled = (since(&north), since(&south));
    for round in 0..20 {
        north.capture(400 + round * 10, 410 + round * 10, 1).await;
        south.until_received(410 + round * 10).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((since(&north), since(&south)), settled, "no session ended");
    // A cut of all connections leaves one session again, whoever dials first.
    north.transport.cut();
    south.transport.cut();
    north.capture(600, 610, 1).await;
    south.until_received(610).await;
    assert_eq!(south.inbox().await, (10..610).collect::<Vec<_>>());
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn an_agent_without_the_lease_is_passed_over_and_carries_nothing() {
    let pki = Pki::new();
    let idle = Leadership { leader: false, term: Term(0) };
    let standby = Agent::start(Options { leadership: idle, ..Options::south(&pki) }).await;
    let south = Agent::start(Options::south(&pki)).await;
    let addresses = vec![standby.address.clone(), south.address.clone()];
    let north = Agent::start(Options::north(&pki, addresses)).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    assert_eq!(standby.view().received, None);
    // The lease moves: the stream follows it to the other agent, which has its own inbox.
    south.leadership.send_replace(idle);
    standby.leadership.send_replace(Leadership { leader: true, term: Term(6) });
    standby.until_received(20).await;
    assert_eq!(north.hub.peers()[0].address, standby.address);
    north.leadership.send_replace(idle);
    let mut link = north.hub.watch_peer(&site("south")).expect("peer");
    let down = link.wait_for(|link| link.state != LinkState::Connected);
    tokio::time::timeout(Duration::from_secs(10), down).await.expect("in time").expect("lives");
    for agent in [north, south, standby] {
        agent.stop().await;
    }
}

#[tokio::test]
async fn a_stale_agent_learns_that_it_was_deposed() {
    let pki = Pki::new();
    let south = Agent::start(Options::south(&pki)).await;
    let north = Agent::start(Options::north(&pki, vec![south.address.clone()])).await;
    north.capture(10, 20, 2).await;
    south.until_received(20).await;
    let stale = Leadership { leader: true, term: Term(4) };
    let stale = Agent::start(Options { leadership: stale, ..Options::north(&pki, vec![south.address.clone()]) }).await;
    stale.capture(10, 30, 2).await;
    let mut deposed = stale.hub.deposed();
    let newer = tokio::time::timeout(Duration::from_secs(10), deposed.wait_for(Option::is_some));
    assert_eq!(*newer.await.expect("in time").expect("lives"), Some(Term(5)));
    assert_eq!(*north.hub.deposed().borrow(), None);
    north.capture(20, 22, 1).await;
    south.until_received(22).await;
    for agent in [north, south, stale] {
        agent.stop().await;
    }
}
