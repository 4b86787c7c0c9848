//! Writes a mark to the local MongoDB at an interval, so that positions move while users are idle, and watches how far
//! the source's history goes.

use std::sync::Arc;
use std::time::Duration;

use bson::{DateTime, doc};
use mongodb::Client;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::model::{ClusterTime, Epoch, SiteName};
use crate::mongo::{self, Failure};

/// What the marks writer learns of the source.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// Newest majority-committed cluster time.
    pub time: ClusterTime,
    /// Oldest cluster time in the oplog.
    pub oldest: ClusterTime,
    /// Why the source cannot be written or asked; empty when it can.
    pub error: String,
}

/// An extra mark closes an open transaction sooner than the next interval, but never more often than this.
const NUDGE_INTERVAL: Duration = Duration::from_millis(20);
/// How often the oplog's start is looked up.
const OPLOG_EVERY: u32 = 20;

/// The heartbeat of the site that originates writes.
#[derive(Debug)]
pub struct Heartbeat {
    /// Local MongoDB.
    pub client: Client,
    /// This site; also the mark's `_id`.
    pub site: SiteName,
    /// Current epoch.
    pub epoch: Epoch,
    /// Time between marks.
    pub interval: Duration,
    /// Told when a mark would complete the last unit.
    pub nudge: Arc<Notify>,
    /// Only the leaseholder writes.
    pub leader: watch::Receiver<bool>,
    /// Where findings go.
    pub head: watch::Sender<Head>,
}

impl Heartbeat {
    /// Runs until cancelled; failures are retried at the next interval and shown in `head`.
    pub async fn run(self, cancel: CancellationToken) {
        let mut count: u32 = 0;
        loop {
            let error = match self.beat(count).await {
                Ok(()) => String::new(),
                Err(failure) => failure.to_string(),
            };
            self.head.send_if_modified(|head| {
                let changed = head.error != error;
                head.error = error;
                changed
            });
            count = count.wrapping_add(1);
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(self.interval) => {}
                () = self.nudged() => {}
            }
        }
    }

    async fn nudged(&self) {
        self.nudge.notified().await;
        tokio::time::sleep(NUDGE_INTERVAL).await;
    }

    async fn beat(&self, count: u32) -> Result<(), Failure> {
        if *self.leader.borrow() {
            let set =
                doc! {"kind": "heartbeat", "epoch": self.epoch.0 as i64, "at": DateTime::now(), "n": i64::from(count)};
            let statement = doc! {"q": {"_id": self.site.as_str()}, "u": {"$set": set}, "upsert": true};
            let command = doc! {"update": "marks", "updates": [statement]};
            mongo::write_majority(&self.client, "farshore", command, "write a heartbeat mark").await?;
        }
        let hello = self.client.database("admin").run_command(doc! {"hello": 1}).await;
        let hello = hello.map_err(Failure::of("ask for the newest majority time"))?;
        let majority = hello.get_document("lastWrite").and_then(|w| w.get_document("majorityOpTime"));
        if let Some(time) = majority.ok().and_then(|m| m.get_timestamp("ts").ok()) {
            self.head.send_modify(|head| head.time = head.time.max(mongo::cluster_time(time)));
        }
        if count.is_multiple_of(OPLOG_EVERY)
            && let Some(oldest) = mongo::oldest_oplog_time(&self.client).await?
        {
            self.head.send_modify(|head| head.oldest = oldest);
        }
        Ok(())
    }
}
