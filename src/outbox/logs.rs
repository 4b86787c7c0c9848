//! All logs of an agent over one store: opening, quota, shared state of the handles.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SetOnce, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ring::Ring;
use super::writer::Writer;
use super::{Error, Log, LogId, LogState, Store, Write};
use crate::model::{AgentId, Durations, Incarnation, Position};

/// Commands waiting for a commit.
const QUEUE_COMMANDS: usize = 256;
/// Bytes waiting for a commit.
const QUEUE_BYTES: usize = 16 << 20;
/// Recent records kept in memory, per log.
const RING_BYTES: usize = 8 << 20;
/// Part of the limit that only inboxes may use: receiving must go on when capture has filled the disk, because only
/// then can both sides trim.
const INBOX_RESERVE: u64 = 10;
/// Warn from this share of the limit, in percent.
const WARN_PERCENT: u64 = 80;
const AGENT_ID: &str = "agent_id";

/// Limits of disk use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of all logs together.
    pub limit_bytes: u64,
    /// Released bytes to keep per log.
    pub retention_bytes: u64,
    /// How long to keep released records, by the source's time.
    pub retention_time: Duration,
}

/// How full the logs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Below 80 %.
    Ok,
    /// From 80 %: retention is given up.
    Warn,
    /// The outbox takes no more.
    Full,
}

/// Disk use of all logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes kept.
    pub bytes: u64,
    /// The configured limit.
    pub limit_bytes: u64,
    /// What that means.
    pub level: Level,
}

impl Quota {
    pub(super) fn limit_for(&self, log: &LogId) -> u64 {
        match log {
            LogId::Outbox => self.limit_bytes - self.limit_bytes / INBOX_RESERVE,
            LogId::Inbox(_) => self.limit_bytes,
        }
    }

    pub(super) fn warns(&self, bytes: u64) -> bool {
        bytes >= self.limit_bytes / 100 * WARN_PERCENT
    }
}

/// What a log's handles, readers and the writer share.
pub(super) struct Channel {
    pub(super) id: LogId,
    pub(super) state: watch::Sender<Option<LogState>>,
    pub(super) ring: Mutex<Ring>,
    /// What no member needs any more.
    pub(super) released: Mutex<Option<(Incarnation, Position)>>,
}

/// A queued write; its room frees itself when it is answered.
pub(super) struct Command {
    pub(super) channel: Arc<Channel>,
    pub(super) write: Write,
    pub(super) reply: oneshot::Sender<Result<LogState, Error>>,
    pub(super) room: Option<OwnedSemaphorePermit>,
}

/// What all handles share.
pub(super) struct Shared {
    pub(super) store: Arc<dyn Store>,
    pub(super) tasks: TaskTracker,
    pub(super) done: CancellationToken,
    pub(super) quota: Quota,
    agent_id: AgentId,
    ring_bytes: usize,
    channels: Mutex<BTreeMap<LogId, Arc<Channel>>>,
    queue: mpsc::Sender<Command>,
    pub(super) room: Arc<Semaphore>,
    pub(super) wake: Notify,
    pub(super) stop: CancellationToken,
    pub(super) failed: SetOnce<String>,
    /// How long synced writes took.
    pub(super) commits: Mutex<Durations>,
}

impl Shared {
    pub(super) fn channels(&self) -> MutexGuard<'_, BTreeMap<LogId, Arc<Channel>>> {
        self.channels.lock().expect("no holder panics")
    }

    fn channel(&self, id: &LogId) -> Arc<Channel> {
        let mut channels = self.channels();
        let channel = channels.entry(id.clone()).or_insert_with(|| {
            let state = watch::Sender::new(None);
            let ring = Mutex::new(Ring::new(self.ring_bytes));
            Arc::new(Channel { id: id.clone(), state, ring, released: Mutex::new(None) })
        });
        Arc::clone(channel)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.channels().values().map(|channel| channel.state.borrow().as_ref().map_or(0, |state| state.bytes)).sum()
    }

    fn refusal(&self) -> Error {
        self.failed.get().map_or(Error::Closed, |reason| Error::Failed { reason: reason.clone() })
    }

    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Queues a write, waiting for room. Cancel-safe: a dropped call has queued nothing.
    pub(super) async fn send(
        &self,
        channel: &Arc<Channel>,
        write: Write,
    ) -> Result<oneshot::Receiver<Result<LogState, Error>>, Error> {
        let room = match &write {
            Write::Append { batch, .. } => {
                let bytes = batch.record().len().min(QUEUE_BYTES);
                let bytes = u32::try_from(bytes).expect("the queue is far below 4 GiB");
                Some(Arc::clone(&self.room).acquire_many_owned(bytes).await.map_err(|_| self.refusal())?)
            }
            _ => None,
        };
        let (reply, answer) = oneshot::channel();
        let command = Command { channel: Arc::clone(channel), write, reply, room };
        self.queue.send(command).await.map_err(|_| self.refusal())?;
        Ok(answer)
    }
}

/// Owns the write side of a store: one task, group commit, failsafe after a failed write.
pub struct Logs {
    shared: Arc<Shared>,
}

impl Logs {
    /// Reads the states and starts the writer in `tasks`; it ends with [`Self::close`].
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn start(store: Arc<dyn Store>, quota: Quota, tasks: &TaskTracker) -> Result<Arc<Self>, Error> {
        Self::start_with_ring(store, quota, tasks, RING_BYTES)
    }

    /// [`Self::start`] with another size of the rings of recent records.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn start_with_ring(
        store: Arc<dyn Store>,
        quota: Quota,
        tasks: &TaskTracker,
        ring_bytes: usize,
    ) -> Result<Arc<Self>, Error> {
        let (queue, commands) = mpsc::channel(QUEUE_COMMANDS);
        let shared = Arc::new(Shared {
            agent_id: agent_id(store.as_ref())?,
            store,
            tasks: tasks.clone(),
            done: CancellationToken::new(),
            quota,
            ring_bytes,
            channels: Mutex::default(),
            queue,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
            wake: Notify::new(),
            stop: CancellationToken::new(),
            failed: SetOnce::new(),
            commits: Mutex::default(),
        });
        let mut marks = BTreeMap::new();
        for id in shared.store.logs()? {
            shared.channel(&id).state.send_replace(shared.store.state(&id)?);
            marks.insert(id.clone(), shared.store.marks(&id)?.into());
        }
        let writer = Writer { shared: Arc::clone(&shared), commands, carry: None, marks };
        tasks.spawn(writer.run());
        Ok(Arc::new(Self { shared }))
    }

    /// A cheap handle; the log may not have begun yet.
    pub fn log(&self, id: &LogId) -> Log {
        Log::new(Arc::clone(&self.shared), self.shared.channel(id))
    }

    /// Refuses new writes, finishes the queued ones, closes the store. Waiting readers end with `Error::Closed`.
    pub async fn close(&self) {
        self.shared.stop.cancel();
        self.shared.done.cancelled().await;
    }

    /// Bytes of all logs against the limit.
    pub fn usage(&self) -> Usage {
        let (bytes, quota) = (self.shared.bytes(), &self.shared.quota);
        let level = match bytes {
            bytes if bytes >= quota.limit_for(&LogId::Outbox) => Level::Full,
            bytes if quota.warns(bytes) => Level::Warn,
            _ => Level::Ok,
        };
        Usage { bytes, limit_bytes: quota.limit_bytes, level }
    }

    /// How long synced writes took, since the start.
    pub fn commits(&self) -> Durations {
        *self.shared.commits.lock().expect("no holder panics")
    }

    /// Identity of this installation: made once, kept in the store.
    pub fn agent_id(&self) -> AgentId {
        self.shared.agent_id
    }

    /// Why writes are refused, once they are.
    pub fn failed(&self) -> Option<String> {
        self.shared.failed.get().cloned()
    }

    /// [`Self::failed`], when it is so: the process must start again.
    pub async fn until_failed(&self) -> String {
        self.shared.failed.wait().await.clone()
    }
}

fn agent_id(store: &dyn Store) -> Result<AgentId, Error> {
    if let Some(stored) = store.meta(AGENT_ID)? {
        let damaged = || Error::Damaged { what: AGENT_ID.to_owned(), reason: "it is not 16 bytes".to_owned() };
        return AgentId::from_slice(&stored).ok_or_else(damaged);
    }
    let id = AgentId::random();
    store.put_meta(AGENT_ID, Bytes::copy_from_slice(&id.0))?;
    Ok(id)
}
