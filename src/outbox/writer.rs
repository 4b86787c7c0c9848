//! The one task that writes: it gathers what is queued, commits it at once, then answers.
//!
//! ```text
//! append ─> room (bytes) ─> queue (count) ─> gather ─> admit ─> commit (fsync) ─> ring, watch, answers
//! ```
//!
//! - No timer and no delay: while one commit runs the next group queues up, so groups grow exactly as large as the disk
//!   is slow.
//! - At most one blocking call is in flight. Each command is checked against the state it would meet, so a bad one is
//!   refused alone and never spoils its group.
//! - After a failed commit the state on disk is unknown: the first reason is kept and every later write is refused.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::ledger::size_of;
use super::logs::{Channel, Command, Shared};
use super::retention::{self, MARK_BYTES, Pressure};
use super::{Disposition, Error, LogId, LogState, Mark, Stored, Write};
use crate::model::Position;

/// Records of one commit; more would only delay the first one's answer.
const GROUP_RECORDS: usize = 64;
/// Bytes of one commit.
const GROUP_BYTES: usize = 8 << 20;
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack, taken apart at once")]
enum Event {
    Command(Command),
    Wake,
    Stop,
    Drained,
}

/// The writing task's own state.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: mpsc::Receiver<Command>,
    /// A command that must not join the group gathered before it.
    pub(super) carry: Option<Command>,
    pub(super) marks: BTreeMap<LogId, VecDeque<Mark>>,
}

impl Writer {
    /// Until the logs are closed.
    pub(super) async fn run(mut self) {
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
        let (writes, result, took) = self
            .call(move || {
                let began = Instant::now();
                let result = store.commit(&writes);
                (writes, result, began.elapsed())
            })
            .await;
        self.shared.commits.lock().expect("no holder panics").record(took);
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
