//! Beginnings that go wrong, and logins that change: the agent says what is the matter, waits or refuses, and never goes on
//! with a gap.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bson::doc;
use farshore_testkit::agent::AgentProcess;
use farshore_testkit::compare::Options;
use farshore_testkit::mongo::{self, User};
use farshore_testkit::pair::{Pair, PairOptions, Sets, Side};
use farshore_testkit::scratch::Scratch;
use farshore_testkit::wait;

use crate::handover::Load;
use crate::support::{caught_up, client, equal, pair, site, status, streaming};

const DEADLINE: Duration = Duration::from_secs(60);
const SIDES: [Side; 2] = [Side::North, Side::South];

/// Replica sets of the test's own, as it does things to them.
fn own_sets(options: mongo::Options) -> PairOptions {
    PairOptions { sets: Sets::New(options), ..PairOptions::default() }
}

/// Lines of the agent's log, over all its starts, that hold the text.
fn lines(agent: &AgentProcess, text: &str) -> Result<usize> {
    Ok(agent.log()?.lines().filter(|line| line.contains(text)).count())
}

async fn logged(agent: &AgentProcess, text: &str) -> Result<()> {
    wait::until(text, DEADLINE, || async {
        ensure!(lines(agent, text)? > 0, "not in the log");
        anyhow::Ok(())
    })
    .await
}

/// Waits until `/readyz` says no and names this as what is waited for.
async fn unready(agent: &AgentProcess, what: &str) -> Result<()> {
    wait::until("an agent that is not ready", DEADLINE, || async {
        let reply = agent.get("/readyz").await?;
        ensure!(reply.status == 503 && reply.body.contains(what), "{} {}", reply.status, reply.body.trim());
        anyhow::Ok(())
    })
    .await
}

async fn ready(pair: &mut Pair, side: Side) -> Result<()> {
    pair.site(side).agents[0].wait_ready(DEADLINE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_waits_for_mongodb_and_goes_on_when_it_comes() -> Result<()> {
    let mut pair = pair(own_sets(mongo::Options::default())).await?;
    let source = client(&mut pair, Side::North)?;
    source.database("app").collection("c").insert_one(doc! {"_id": 1}).await?;
    caught_up(&mut pair).await?;
    for side in SIDES {
        ensure!(pair.site(side).agents[0].term().await?.success(), "it ends with a failure");
        pair.site(side).mongo.kill9(0)?;
    }
    let before = [lines(&pair.north.agents[0], "mongodb: failing")?, lines(&pair.south.agents[0], "mongodb: failing")?];
    ensure!(before == [0, 0], "it failed before: {before:?}");
    for side in SIDES {
        let agent = &mut pair.site(side).agents[0];
        agent.restart()?;
        logged(agent, "mongodb: failing").await?;
        unready(agent, "MongoDB").await?;
        ensure!(agent.get("/livez").await?.status == 200, "it is not alive");
        ensure!(agent.get("/startupz").await?.status == 200, "it would be restarted for a MongoDB that is away");
        let said = status(&pair.pki, &site(&pair, side).agents[0]).await?;
        let problem = said.problems.iter().find(|problem| problem.subject == "mongodb").context("no problem")?;
        println!("{}: {} ({})", side.name(), problem.message, problem.hint);
    }
    // Long enough for several attempts, of which only the first is said.
    tokio::time::sleep(Duration::from_secs(7)).await;
    for side in SIDES {
        ensure!(pair.site(side).agents[0].is_running(), "it did not wait");
        let said = lines(&site(&pair, side).agents[0], "mongodb: failing")?;
        ensure!(said == 1, "it said {said} times that MongoDB is not there");
        pair.site(side).mongo.restart(0).await?;
    }
    for side in SIDES {
        ready(&mut pair, side).await?;
        logged(&site(&pair, side).agents[0], "mongodb: recovered").await?;
    }
    streaming(&pair).await?;
    source.database("app").collection("c").insert_one(doc! {"_id": 2}).await?;
    println!("{}", equal(&mut pair, &Options::default()).await?);
    pair.check_logs(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_replica_set_or_user_is_named_and_waited_for() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let right = site(&pair, Side::South).mongo.uri();
    for (key, wrong, right, told) in [
        ("uri", right.replace("replicaSet=rs0", "replicaSet=rs-other"), right.clone(), "rs-other"),
        ("username", "nobody".to_owned(), User::Farshore.name().to_owned(), "uthentication failed"),
    ] {
        ensure!(wrong != right, "{key} is right");
        let agent = &mut pair.site(Side::South).agents[0];
        agent.config_mut().set_text("mongodb", key, &wrong);
        agent.restart()?;
        unready(agent, "MongoDB").await?;
        let said = wait::until("the problem in the status", DEADLINE, || async {
            let said = status(&pair.pki, &pair.south.agents[0]).await?;
            let problem =
                said.problems.into_iter().find(|problem| problem.subject == "mongodb").context("no problem")?;
            ensure!(problem.message.contains(told), "{}", problem.message);
            anyhow::Ok(problem)
        })
        .await?;
        println!("{key}: {} ({})", said.message, said.hint);
        ensure!(said.hint.contains("[mongodb]"), "{}", said.hint);
        let agent = &mut pair.site(Side::South).agents[0];
        ensure!(agent.is_running(), "it did not wait");
        agent.config_mut().set_text("mongodb", key, &right);
        agent.restart()?;
        agent.wait_ready(DEADLINE).await?;
    }
    streaming(&pair).await?;
    pair.check_logs(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_in_use_or_not_writable_is_refused() -> Result<()> {
    let mut pair = pair(PairOptions { agents: 2, ..PairOptions::default() }).await?;
    let taken = pair.north.agents[0].data().display().to_string();
    // Nobody, not even root, makes a directory there.
    for (directory, told) in [(taken.as_str(), "in use by another process"), ("/proc/farshore", "/proc/farshore")] {
        let agent = &mut pair.site(Side::North).agents[1];
        agent.config_mut().set_text("data", "directory", directory);
        agent.restart()?;
        let ended = agent.wait_end(DEADLINE).await?;
        ensure!(!ended.success(), "it ends with {ended}");
        let log = agent.log()?;
        let last = log.lines().last().unwrap_or_default();
        ensure!(last.contains(told) && last.contains("data.directory"), "it says {last}");
        println!("{last}");
    }
    // The rightful owner of the directory has not noticed.
    pair.site(Side::North).agents.remove(1);
    println!("{}", equal(&mut pair, &Options::default()).await?);
    pair.check_logs(&[])
}

async fn count(client: &mongodb::Client) -> Result<u64> {
    Ok(client.database("app").collection::<bson::Document>("c").count_documents(doc! {}).await?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_lost_its_history_stops_and_says_so() -> Result<()> {
    let mut pair = pair(own_sets(mongo::Options { oplog_mb: 16, ..mongo::Options::default() })).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    source.database("app").collection("c").insert_one(doc! {"_id": "before"}).await?;
    caught_up(&mut pair).await?;
    ensure!(pair.north.agents[0].term().await?.success(), "it ends with a failure");
    source.database("app").collection("c").insert_one(doc! {"_id": "while away"}).await?;
    let (_, newest) = pair.north.mongo.oplog_window().await?;
    pair.north.mongo.roll_oplog(newest, DEADLINE).await?;
    source.database("app").collection("c").insert_one(doc! {"_id": "after"}).await?;

    // With the outbox, then without: the disk of the source agent is lost too.
    for wiped in [false, true] {
        let agent = &mut pair.north.agents[0];
        if wiped {
            agent.kill9()?;
            agent.wipe_data()?;
        }
        agent.restart()?;
        let side = if wiped { Side::South } else { Side::North };
        let stream = wait::until("the stream to be given up", DEADLINE, || async {
            let said = status(&pair.pki, &site(&pair, side).agents[0]).await?;
            let stream = said.streams.into_iter().next().context("no stream")?;
            let given_up =
                matches!(stream.state.as_str(), "failed" | "refused") && stream.reason.contains("history lost");
            ensure!(given_up, "{} ({})", stream.state, stream.reason);
            ensure!(said.problems.iter().any(|problem| problem.severity == "error"), "no problem is shown");
            anyhow::Ok(stream)
        })
        .await?;
        println!("wiped {wiped}: {} at {}: {}", stream.state, side.name(), stream.reason);
        ensure!(stream.reason.contains("copy the data again"), "there is no hint");
        if !wiped {
            unready(&pair.north.agents[0], "resync").await?;
            let log = pair.north.agents[0].log()?;
            ensure!(
                log.lines().any(|line| line.contains("ERROR") && line.contains("history lost")),
                "no error is logged"
            );
        }
        // More than one attempt later it still has not gone on.
        source.database("app").collection("c").insert_one(doc! {"later": wiped}).await?;
        tokio::time::sleep(Duration::from_secs(6)).await;
        ensure!(count(&target).await? == 1, "the target went on with a gap");
    }
    ensure!(count(&source).await? == 5, "the source holds something else");
    pair.check_logs(&["history lost"])
}

async fn change_password(pair: &mut Pair, side: Side, password: &str) -> Result<()> {
    let root = client(pair, side)?;
    let command = doc! {"updateUser": User::Farshore.name(), "pwd": password, "writeConcern": {"w": "majority"}};
    root.database("admin").run_command(command).await?;
    Ok(())
}

fn change_file(pair: &mut Pair, side: Side, password: &str) -> Result<()> {
    let agent = &mut pair.site(side).agents[0];
    agent.config_mut().set_password(password);
    agent.write_files()
}

/// Waits until the agent has started a second time in the same process.
async fn started_again(pair: &mut Pair, side: Side, pid: u32) -> Result<()> {
    let agent = &mut pair.site(side).agents[0];
    wait::until("the agent to start again", DEADLINE, || {
        let (running, started) = (agent.is_running(), lines(agent, "agent started"));
        async move {
            ensure!(running, "it has ended");
            match started? {
                2 => Ok(()),
                times => bail!("it started {times} times"),
            }
        }
    })
    .await?;
    ensure!(agent.pid() == pid, "another process");
    agent.wait_ready(DEADLINE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_password_is_taken_up_while_streaming_in_either_order() -> Result<()> {
    let mut pair = pair(own_sets(mongo::Options::default())).await?;
    let source = client(&mut pair, Side::North)?;
    let load = Load::start(&source, 9);
    // The user first at the source, the file first at the target.
    let pid = pair.north.agents[0].pid();
    change_password(&mut pair, Side::North, "another-north").await?;
    change_file(&mut pair, Side::North, "another-north")?;
    started_again(&mut pair, Side::North, pid).await?;
    streaming(&pair).await?;

    let pid = pair.south.agents[0].pid();
    change_file(&mut pair, Side::South, "another-south")?;
    logged(&pair.south.agents[0], "the new MongoDB login: failing").await?;
    caught_up(&mut pair).await.context("with a file that does not fit yet")?;
    ensure!(lines(&pair.south.agents[0], "agent started")? == 1, "it started again with a password that is refused");
    change_password(&mut pair, Side::South, "another-south").await?;
    started_again(&mut pair, Side::South, pid).await?;
    streaming(&pair).await?;
    let done = load.finish(&mut pair).await?;
    println!("{done} increments");
    // The old password is of no use any more, so what runs now runs with the new one.
    for side in SIDES {
        let old = site(&pair, side).mongo.uri_as(User::Farshore);
        let refused = mongodb::Client::with_uri_str(&old).await?.database("admin").run_command(doc! {"ping": 1}).await;
        ensure!(refused.is_err(), "the old password still works");
        ensure!(pair.site(side).agents[0].term().await?.success(), "it ends with a failure");
    }
    pair.check_logs(&[])
}

/// The volume of the source's database is put back to an older snapshot: the same replica set with the same records in it,
/// but what was written since never happened, and is at the target.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_was_put_back_to_an_older_copy_is_found_out() -> Result<()> {
    for running in [true, false] {
        let mut pair = pair(own_sets(mongo::Options::default())).await?;
        let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
        let folder = Scratch::new("volume")?;
        let copy = folder.path().join("db");
        source.database("app").collection("c").insert_one(doc! {"_id": "before"}).await?;
        caught_up(&mut pair).await?;
        pair.north.mongo.terminate(0).await?;
        pair.north.mongo.save_data(0, &copy)?;
        pair.north.mongo.restart(0).await?;
        source.database("app").collection("c").insert_one(doc! {"_id": "undone"}).await?;
        caught_up(&mut pair).await?;
        if !running {
            ensure!(pair.north.agents[0].term().await?.success(), "it ends with a failure");
        }
        pair.north.mongo.terminate(0).await?;
        pair.north.mongo.restore_data(0, &copy)?;
        pair.north.mongo.restart(0).await?;
        if !running {
            pair.north.agents[0].restart()?;
        }
        let reason = wait::until("the stream to be given up", DEADLINE, || async {
            let said = status(&pair.pki, &pair.north.agents[0]).await?;
            let stream = said.streams.into_iter().next().context("no stream")?;
            ensure!(stream.state == "failed", "{} ({})", stream.state, stream.reason);
            anyhow::Ok(stream.reason)
        })
        .await?;
        println!("agent running {running}: {reason}");
        ensure!(reason.contains("history rewound"), "{reason}");
        source.database("app").collection("c").insert_one(doc! {"_id": "after"}).await?;
        logged(&pair.north.agents[0], "history rewound").await?;
        ensure!(count(&target).await? == 2, "the target went on");
        pair.check_logs(&["history rewound"])?;
    }
    Ok(())
}
