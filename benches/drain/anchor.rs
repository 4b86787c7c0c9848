//! What the figures are held against: a secondary of the same MongoDB that was away while the same backlog was written.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bson::{Bson, Document, Timestamp, doc};
use farshore_testkit::mongo::{ReplicaSet, User};
use farshore_testkit::wait;
use mongodb::Client;

use crate::load::Load;
use crate::report::CaughtUp;
use crate::sites::servers;

const DEADLINE: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(5);

/// A primary and a secondary without a vote, so that writes go on while it is away.
pub(crate) struct Anchor {
    set: ReplicaSet,
    primary: usize,
    secondary: usize,
}

impl Anchor {
    pub(crate) async fn start() -> Result<Self> {
        let set = ReplicaSet::start(servers(3)).await?;
        let primary = set.wait_primary(Duration::from_secs(30)).await?;
        let [secondary, third] = [(primary + 1) % 3, (primary + 2) % 3];
        let admin = set.member_client(primary, User::Root)?.database("admin");
        let reply = admin.run_command(doc! {"replSetGetConfig": 1}).await.context("read the configuration")?;
        let mut config = reply.get_document("config")?.clone();
        let id = |member: &Document| member.get_i32("_id").unwrap_or(-1) as usize;
        let members = config.get_array("members")?.iter().filter_map(Bson::as_document);
        let kept = members.filter(|member| id(member) != third).cloned().map(|mut member| {
            if id(&member) == secondary {
                member.extend(doc! {"votes": 0, "priority": 0});
            }
            member
        });
        let kept: Vec<Document> = kept.collect();
        let version = config.get_i32("version")?;
        config.extend(doc! {"members": kept, "version": version + 1});
        admin.run_command(doc! {"replSetReconfig": config, "force": true}).await.context("take the vote away")?;
        set.kill9(third)?;
        Ok(Self { set, primary, secondary })
    }

    /// The same backlog while the secondary is away, then how it catches up.
    pub(crate) async fn drain(&self, load: &Load) -> Result<CaughtUp> {
        let client = self.set.member_client(self.primary, User::Root)?;
        load.prepare(&client).await?;
        let prepared = optime(&client).await?;
        let secondary = self.set.member_client(self.secondary, User::Root)?;
        wait::until("the secondary to follow", DEADLINE, || async {
            ensure!(optime(&secondary).await? >= prepared, "it is behind");
            Ok(())
        })
        .await?;
        self.set.terminate(self.secondary).await?;
        let end = load.write(&client).await?;
        let primary_before = self.set.usage(self.primary)?;
        let start = Instant::now();
        self.set.restart(self.secondary).await?;
        let (mut first, mut base) = (start, self.set.usage(self.secondary)?);
        loop {
            let asked = Instant::now();
            match optime(&secondary).await {
                Ok(time) if time >= end => break,
                Ok(time) if time > prepared && first > start => {}
                // It has not begun: what it used so far is for starting.
                _ => (first, base) = (asked, self.set.usage(self.secondary)?),
            }
            ensure!(start.elapsed() < DEADLINE, "the secondary does not catch up");
            tokio::time::sleep(LOOK).await;
        }
        let done = Instant::now();
        let secondary_cpu = self.set.usage(self.secondary)?.cpu.saturating_sub(base.cpu);
        let primary_cpu = self.set.usage(self.primary)?.cpu.saturating_sub(primary_before.cpu);
        load.finish(&client).await?;
        Ok(CaughtUp {
            changes: load.changes,
            since_start: done - start,
            draining: done - first,
            secondary_cpu,
            primary_cpu,
        })
    }
}

/// The time of the last operation a member has applied.
async fn optime(client: &Client) -> Result<Timestamp> {
    let hello = client.database("admin").run_command(doc! {"hello": 1}).await.context("hello")?;
    let last = hello.get_document("lastWrite")?.get_document("opTime")?;
    Ok(last.get_timestamp("ts")?)
}
