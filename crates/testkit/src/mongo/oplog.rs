//! The oplog window: how far back it reaches, and making it roll over.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bson::{Binary, Document, Timestamp, doc, spec::BinarySubtype};
use rand::RngCore;
use tokio::time::Instant;

use super::clients::User;
use super::set::ReplicaSet;

/// Incompressible filler of one write; small against the smallest oplog.
const FILLER_BYTES: usize = 512 * 1024;

impl ReplicaSet {
    /// Oldest and newest entry of the primary's oplog.
    pub async fn oplog_window(&self) -> Result<(Timestamp, Timestamp)> {
        Ok((self.oplog_end(1).await?, self.oplog_end(-1).await?))
    }

    /// Writes filler (to `filler.filler`, dropped after) until the oplog no longer reaches `time`.
    ///
    /// Only sensible with [`super::Options::oplog_mb`] below [`super::Options::SMALL_OPLOG_MB`].
    pub async fn roll_oplog(&self, time: Timestamp, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let database = self.client(User::Root)?.database("filler");
        let filler = database.collection::<Document>("filler");
        while self.oplog_end(1).await? <= time {
            if Instant::now() >= end {
                bail!("the oplog still reaches {time} after {deadline:?}");
            }
            let mut bytes = vec![0; FILLER_BYTES];
            rand::rng().fill_bytes(&mut bytes);
            let bytes = Binary { subtype: BinarySubtype::Generic, bytes };
            filler.insert_one(doc! { "bytes": bytes }).await.context("write filler")?;
        }
        database.drop().await.context("drop the filler")
    }

    async fn oplog_end(&self, direction: i32) -> Result<Timestamp> {
        let oplog = self.client(User::Root)?.database("local").collection::<Document>("oplog.rs");
        let entry = oplog.find_one(doc! {}).sort(doc! { "$natural": direction }).await.context("read the oplog")?;
        entry.context("the oplog is empty")?.get_timestamp("ts").context("an oplog entry without a time")
    }
}
