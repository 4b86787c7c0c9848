//! Agents in pairs: a stopped one is replaced, and what it does when it wakes up changes nothing. And a link that loses,
//! repeats, reorders and corrupts frames.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bson::spec::BinarySubtype;
use bson::{Binary, Document, doc};
use farshore_api::Position;
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{Between, Pair, PairOptions, Side};
use farshore_testkit::proxy::faults::{Counts, Faults};
use farshore_testkit::wait;
use farshore_testkit::workload::{Profile, Until, Workload};
use rand::RngCore as _;

use crate::support::{caught_up, client, equal, leader, now_at, pair, status, stream};

const DEADLINE: Duration = Duration::from_secs(60);

async fn stale_agent(side: Side) -> Result<()> {
    let settings = vec![("lease", "ttl", "\"2s\"".to_owned())];
    let mut pair = pair(PairOptions { agents: 2, settings, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let workload = Workload::new(11, Profile::without_ddl(), "app");
    workload.run(&source, Until::Operations(300)).await?;
    let mut leader = None;
    for index in 0..2 {
        let agent = &pair.site(side).agents[index];
        let address = agent.link_address();
        let said = {
            let pair = &pair;
            let site = if side == Side::North { &pair.north } else { &pair.south };
            status(&pair.pki, &site.agents[index]).await?
        };
        ensure!(said.site == side.name(), "{address} is {}", said.site);
        if said.leader {
            leader = Some((index, said.term));
        }
    }
    let (old, term) = leader.expect("one agent leads");
    // Stopped in the middle of its work, just before a collection is dropped and made again.
    let during = workload.run(&source, Until::Operations(100));
    let stopping = pair.site(side).agents[old].stop();
    during.await?;
    stopping?;
    source.database("app_drop").collection("gone").insert_one(doc! {"_id": 1}).await?;
    source.database("app_drop").collection::<bson::Document>("gone").drop().await?;
    source.database("app_drop").collection("gone").insert_one(doc! {"_id": 2}).await?;
    let shared = &pair;
    wait::until("the other agent to take over", DEADLINE, || async {
        let site = if side == Side::North { &shared.north } else { &shared.south };
        let said = status(&shared.pki, &site.agents[1 - old]).await?;
        if said.leader && said.term > term { Ok(()) } else { bail!("leader {}, term {}", said.leader, said.term) }
    })
    .await?;
    workload.run(&source, Until::Operations(300)).await?;
    pair.site(side).agents[old].cont()?;
    workload.run(&source, Until::Operations(300)).await?;
    let ended = pair.site(side).agents[old].wait_end(DEADLINE).await?;
    ensure!(!ended.success(), "an agent that lost its lease ends with a failure");
    let comparison = equal_on(&mut pair, side, old).await?;
    println!("stale {}: term {term}, {comparison}", side.name());
    Ok(())
}

/// The stopped agent has ended: it must not be asked.
async fn equal_on(pair: &mut Pair, side: Side, gone: usize) -> Result<farshore_testkit::compare::Comparison> {
    pair.site(side).agents.remove(gone);
    equal(pair, &Options::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_source_agent_changes_nothing() -> Result<()> {
    stale_agent(Side::North).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_target_agent_changes_nothing() -> Result<()> {
    stale_agent(Side::South).await
}

/// More than an outbox may hold.
const TOO_MUCH: i32 = 96;

/// No target ever talks to the standby; still it keeps nothing that is applied, so it goes on capturing and can take over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outbox_of_a_standby_gives_back_what_is_applied() -> Result<()> {
    let settings = vec![
        ("lease", "ttl", "\"2s\"".to_owned()),
        ("data", "outbox_limit", "\"64MiB\"".to_owned()),
        ("data", "retention", "\"1MiB\"".to_owned()),
        ("data", "retention_time", "\"1s\"".to_owned()),
    ];
    let mut pair = pair(PairOptions { agents: 2, settings, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let leading = leader(&pair, Side::North).await?;
    let large = source.database("app").collection("large");
    for n in 0..TOO_MUCH {
        // Nothing that can be compressed.
        let mut bytes = vec![0; 1 << 20];
        rand::rng().fill_bytes(&mut bytes);
        let bytes = Binary { subtype: BinarySubtype::Generic, bytes };
        large.insert_one(doc! {"_id": n, "bytes": bytes}).await?;
        if n % 8 == 7 {
            room_in_every_outbox(&pair).await?;
        }
    }
    let now = Position::before(now_at(&source).await?);
    let shared = &pair;
    wait::until("the standby to have captured everything", DEADLINE, || async {
        let status = status(&shared.pki, &shared.north.agents[1 - leading]).await?;
        ensure!(!status.leader, "it leads");
        let reasons = status.streams.iter().map(|stream| stream.reason.as_str()).collect::<Vec<_>>().join("; ");
        match status.outbox.and_then(|log| log.last).map(Position::from) {
            Some(last) if last >= now => Ok(()),
            last => bail!("captured {last:?} of {now} ({reasons})"),
        }
    })
    .await?;
    pair.north.agents[leading].kill9()?;
    large.insert_one(doc! {"_id": "after"}).await?;
    println!("{}", equal_on(&mut pair, Side::North, leading).await?);
    pair.check_logs(&[])
}

/// Until what was written is given back again, whatever the speed of the disk: an agent whose outbox is full stops for a
/// while, and says so.
async fn room_in_every_outbox(pair: &Pair) -> Result<()> {
    wait::until("room in the outboxes", DEADLINE, || async {
        for agent in &pair.north.agents {
            let log = status(&pair.pki, agent).await?.outbox.context("an outbox")?;
            ensure!(log.bytes < log.limit_bytes / 4 * 3, "{} holds {} bytes", agent.link_address(), log.bytes);
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_corrupts_and_loses_frames_loses_nothing() -> Result<()> {
    let options = PairOptions { between: Between::Grpc(5), dialler: Some(Side::North), ..PairOptions::default() };
    let mut pair = pair(options).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    // What is gone at the target is fetched again over the same link.
    let gone = source.database("shop").collection::<Document>("gone");
    gone.insert_many((0..60).map(|id| doc! {"_id": id, "text": "t".repeat(500)})).await?;
    caught_up(&mut pair).await?;
    target.database("shop").collection::<Document>("gone").delete_many(doc! {}).await?;
    let to_target = Faults {
        batch_drop: 0.01,
        batch_repeat: 0.02,
        batch_swap: 0.02,
        batch_corrupt: 0.03,
        fetched_corrupt: 0.5,
        ..Faults::default()
    };
    let to_source = Faults { ack_drop: 0.3, ack_repeat: 0.1, ack_swap: 0.1, ack_corrupt: 0.02, ..Faults::default() };
    pair.link.set_faults(Side::South, to_target);
    pair.link.set_faults(Side::North, to_source);
    for id in 0..60 {
        gone.update_one(doc! {"_id": id}, doc! {"$set": {"n": id}}).await?;
    }
    let workload = Workload::new(11, Profile::without_ddl(), "app");
    workload.run(&source, Until::Operations(1_500)).await?;
    let shared = &pair;
    wait::until("a corrupted record to be noticed", DEADLINE, || async {
        let noticed = stream(shared).await?.corrupt_records;
        let sum = |side, of: fn(&Counts) -> u64| shared.link.counts(side).iter().map(of).sum::<u64>();
        let corrupted = [
            sum(Side::South, |counts| counts.batch_corruptions),
            sum(Side::South, |counts| counts.fetched_corruptions),
            sum(Side::North, |counts| counts.ack_corruptions),
        ];
        workload.run(&source, Until::Operations(20)).await?;
        ensure!(corrupted.iter().all(|count| *count > 0) && noticed > 1, "{corrupted:?} corrupted, {noticed} noticed");
        Ok(())
    })
    .await?;
    pair.link.set_faults(Side::South, Faults::default());
    pair.link.set_faults(Side::North, Faults::default());
    let comparison = equal(&mut pair, &Options::default()).await?;
    println!("{:?}\n{:?}\n{comparison}", pair.link.counts(Side::South), pair.link.counts(Side::North));
    Ok(())
}
