//! The one task that writes: it gathers what is queued, commits it at once, then answers.
//!
//! ```text
//! append ─> room (bytes) ─> queue (count) ─> gather ─> admit ─> commit (fsync) ─> ring, watch, answers
//! ```
//!
//! - No timer and no delay: while one commit runs the next group queues up, so groups grow exactly as large as the disk is slow.
//! - At most one blocking call is in flight. Each command is checked against the state it would meet, so a bad one is
//!   refused alone and never spoils its group.
//! - After a failed commit the state on disk is unknown: the first reason is kept and every later write is refused.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ledger::size_of;
use super::retention::{self, MARK_BYTES, Pressure};
use super::ring::Ring;
use super::{Disposition, Error, Log, LogId, LogState, Mark, Store, Stored, Write};
use crate::model::{AgentId, Incarnation, Position};

/// Records of one commit; more would only delay the first one's answer.
const GROUP_RECORDS: usize = 64;
/// Bytes of one commit.
const GROUP_BYTES: usize = 8 << 20;
/// Commands waiting for a commit.
const QUEUE_COMMANDS: usize = 256;
/// Bytes waiting for a commit.
const QUEUE_BYTES: usize = 16 << 20;
/// Recent records kept in memory, per log.
const RING_BYTES: usize = 16 << 20;
/// Part of the limit that only inboxes may use: receiving must go on when capture has filled the disk, because only then
/// can both sides trim.
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
    fn limit_for(&self, log: &LogId) -> u64 {
        match log {
            LogId::Outbox => self.limit_bytes - self.limit_bytes / INBOX_RESERVE,
            LogId::Inbox(_) => self.limit_bytes,
        }
    }

    fn warns(&self, bytes: u64) -> bool {
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
    quota: Quota,
    agent_id: AgentId,
    ring_bytes: usize,
    channels: Mutex<BTreeMap<LogId, Arc<Channel>>>,
    queue: mpsc::Sender<Command>,
    room: Arc<Semaphore>,
    wake: Notify,
    stop: CancellationToken,
    failed: OnceLock<String>,
}

impl Shared {
    fn channels(&self) -> MutexGuard<'_, BTreeMap<LogId, Arc<Channel>>> {
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

    fn bytes(&self) -> u64 {
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
            failed: OnceLock::new(),
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

    /// Identity of this installation: made once, kept in the store.
    pub fn agent_id(&self) -> AgentId {
        self.shared.agent_id
    }

    /// Why writes are refused, once they are.
    pub fn failed(&self) -> Option<String> {
        self.shared.failed.get().cloned()
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

enum Event {
    Command(Command),
    Wake,
    Stop,
    Drained,
}

struct Writer {
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    /// A command that must not join the group gathered before it.
    carry: Option<Command>,
    marks: BTreeMap<LogId, VecDeque<Mark>>,
}

impl Writer {
    async fn run(mut self) {
        let mut closing = false;
        loop {
            match self.event(closing).await {
                Event::Command(first) => {
                    let group = self.gather(first);
                    self.handle(group).await;
                }
                Event::Wake => self.trim(self.pressure(0)).await,
                Event::Stop => {
                    closing = true;
                    self.commands.close();
                    self.shared.room.close();
                }
                Event::Drained => break,
            }
        }
        let store = Arc::clone(&self.shared.store);
        self.call(move || store.close()).await;
        self.shared.done.cancel();
    }

    /// Cancel-safe parts only; what it returns is handled outside.
    async fn event(&mut self, closing: bool) -> Event {
        if let Some(command) = self.carry.take() {
            return Event::Command(command);
        }
        tokio::select! {
            biased;
            () = self.shared.stop.cancelled(), if !closing => Event::Stop,
            command = self.commands.recv() => command.map_or(Event::Drained, Event::Command),
            () = self.shared.wake.notified() => Event::Wake,
        }
    }

    /// Everything already queued, up to the limits. A rewind looks at the disk and goes alone.
    fn gather(&mut self, first: Command) -> Vec<Command> {
        let alone = |command: &Command| matches!(command.write, Write::Rewind { .. });
        let bytes =
            |command: &Command| if let Write::Append { batch, .. } = &command.write { batch.record().len() } else { 0 };
        let mut total = bytes(&first);
        let mut stop = alone(&first);
        let mut group = vec![first];
        while !stop && group.len() < GROUP_RECORDS && total < GROUP_BYTES {
            let Ok(command) = self.commands.try_recv() else { break };
            if alone(&command) {
                self.carry = Some(command);
                stop = true;
            } else {
                total += bytes(&command);
                group.push(command);
            }
        }
        group
    }

    async fn handle(&mut self, group: Vec<Command>) {
        let incoming: u64 = group
            .iter()
            .map(|command| if let Write::Append { batch, .. } = &command.write { size_of(batch) } else { 0 })
            .sum();
        self.trim(self.pressure(incoming)).await;
        let admitted = self.admit(group);
        if admitted.is_empty() {
            return;
        }
        let (replies, writes): (Vec<_>, Vec<_>) = admitted
            .into_iter()
            .map(|Admitted { command, before }| ((command.channel, command.reply, command.room, before), command.write))
            .unzip();
        let (writes, result) = self.commit(writes).await;
        if let Err(error) = result {
            let error = self.shared.failed.get().map_or(error, |reason| Error::Failed { reason: reason.clone() });
            for (_, reply, _, _) in replies {
                drop(reply.send(Err(error.clone())));
            }
            return;
        }
        for ((channel, _, _, before), write) in replies.iter().zip(writes) {
            self.published(channel, before.as_ref(), write);
        }
        let states = self.refresh(replies.iter().map(|(channel, ..)| channel));
        for (channel, reply, room, _) in replies {
            drop(room);
            drop(reply.send(Ok(states[&channel.id].clone())));
        }
    }

    /// Checks every command against the state it will meet; refuses those that do not fit.
    fn admit(&self, group: Vec<Command>) -> Vec<Admitted> {
        let mut states: BTreeMap<LogId, Option<LogState>> = BTreeMap::new();
        let mut total = self.shared.bytes();
        let mut admitted = Vec::with_capacity(group.len());
        for command in group {
            let id = command.channel.id.clone();
            let state = states.entry(id).or_insert_with(|| command.channel.state.borrow().clone());
            let before = state.clone();
            match self.check(state, &mut total, &command.write) {
                Ok(()) => admitted.push(Admitted { command, before }),
                Err(error) => {
                    *state = before;
                    drop(command.reply.send(Err(error)));
                }
            }
        }
        admitted
    }

    fn check(&self, state: &mut Option<LogState>, total: &mut u64, write: &Write) -> Result<(), Error> {
        if let Some(reason) = self.shared.failed.get() {
            return Err(Error::Failed { reason: reason.clone() });
        }
        let log = write.log();
        if let Write::Begin { incarnation, epoch, at, hash, token, .. } = write {
            *total -= state.as_ref().map_or(0, |state| state.bytes);
            *state = Some(LogState::begun(state.as_ref(), *incarnation, *epoch, *at, *hash, token.clone()));
            return Ok(());
        }
        let state = state.as_mut().ok_or_else(|| Error::NotBegun { log: log.clone() })?;
        if let Write::Append { batch, .. } = write {
            let (size, limit) = (size_of(batch), self.shared.quota.limit_for(log));
            state.append(log, batch.header(), size, None)?;
            if *total + size > limit {
                return Err(Error::Full { log: log.clone(), bytes: *total, limit });
            }
            *total += size;
        }
        Ok(())
    }

    /// One synced write. A failure other than a refusal ends all writing.
    async fn commit(&self, writes: Vec<Write>) -> (Vec<Write>, Result<(), Error>) {
        if let Some(reason) = self.shared.failed.get() {
            return (writes, Err(Error::Failed { reason: reason.clone() }));
        }
        let store = Arc::clone(&self.shared.store);
        let (writes, result) = self
            .call(move || {
                let result = store.commit(&writes);
                (writes, result)
            })
            .await;
        if let Err(error) = &result
            && !matches!(error.disposition(), Disposition::Refused | Disposition::Recapture)
        {
            tracing::error!(%error, "commit to the log; it takes no more writes until the agent is restarted");
            drop(self.shared.failed.set(error.to_string()));
        }
        (writes, result)
    }

    async fn call<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        if !self.shared.store.blocking() {
            return work();
        }
        self.shared.tasks.spawn_blocking(work).await.expect("the store does not panic")
    }

    /// Puts what is now durable where readers look first; before the state moves, so that they find it.
    fn published(&mut self, channel: &Channel, before: Option<&LogState>, write: Write) {
        match write {
            Write::Append { batch, .. } => {
                let before = before.expect("appended to a log that has begun");
                let stored = Stored { batch, skip_through: before.end };
                channel.ring.lock().expect("no holder panics").push(before.generation, stored);
            }
            Write::Begin { .. } | Write::Rewind { .. } => {
                self.marks.remove(&channel.id);
            }
            _ => {}
        }
    }

    /// Moves the watches to the durable states.
    fn refresh<'c>(&mut self, channels: impl Iterator<Item = &'c Arc<Channel>>) -> BTreeMap<LogId, LogState> {
        let mut states = BTreeMap::new();
        for channel in channels {
            if states.contains_key(&channel.id) {
                continue;
            }
            let state = self.shared.store.state(&channel.id).expect("states are in memory").expect("just written");
            self.mark(&channel.id, &state);
            channel.state.send_replace(Some(state.clone()));
            states.insert(channel.id.clone(), state);
        }
        states
    }

    fn mark(&mut self, id: &LogId, state: &LogState) {
        let marks = self.marks.entry(id.clone()).or_default();
        let last = marks.back().map_or(0, |mark| mark.appended);
        if state.appended >= last + MARK_BYTES {
            marks.push_back(Mark { end: state.end, appended: state.appended });
        }
        while marks.front().is_some_and(|mark| mark.end <= state.first) {
            marks.pop_front();
        }
    }

    fn pressure(&self, incoming: u64) -> Pressure {
        let quota = &self.shared.quota;
        match self.shared.bytes() + incoming {
            bytes if bytes > quota.limit_for(&LogId::Outbox) => Pressure::Full,
            bytes if quota.warns(bytes) => Pressure::High,
            _ => Pressure::None,
        }
    }

    /// Trims every log that has enough to give back.
    async fn trim(&mut self, pressure: Pressure) {
        let channels: Vec<_> = self.shared.channels().values().cloned().collect();
        for channel in channels {
            let Some(through) = self.to_trim(&channel, pressure) else { continue };
            let write = Write::Trim { log: channel.id.clone(), through };
            let (_, result) = self.commit(vec![write]).await;
            match result {
                Ok(()) => {
                    self.refresh(std::iter::once(&channel));
                    tracing::debug!(log = %channel.id, %through, "trimmed");
                }
                Err(error) if self.shared.failed.get().is_none() => {
                    tracing::warn!(log = %channel.id, %through, %error, "trim")
                }
                Err(_) => return,
            }
        }
    }

    fn to_trim(&self, channel: &Channel, pressure: Pressure) -> Option<Position> {
        let (incarnation, released) = (*channel.released.lock().expect("no holder panics"))?;
        let state = channel.state.borrow();
        let state = state.as_ref().filter(|state| state.incarnation == incarnation)?;
        let none = VecDeque::new();
        let marks = self.marks.get(&channel.id).unwrap_or(&none);
        retention::trim_through(state, marks, released, &self.shared.quota, pressure)
    }
}

/// A command that fits, with the state it will meet.
struct Admitted {
    command: Command,
    before: Option<LogState>,
}
