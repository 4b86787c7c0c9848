//! Handle of one log: what capture, the link and apply hold.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use super::logs::{Channel, Shared};
use super::{Error, LogId, LogState, Reader, Write};
use crate::model::{Batch, Epoch, Incarnation, Position, StreamHash, Term};

/// Bytes read at once while looking for damage.
const SALVAGE_BYTES: usize = 4 << 20;

/// A log of an agent. Cheap to clone.
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
    channel: Arc<Channel>,
}

/// Resolves when a queued batch is durable, with the log's newest state. Dropping it does not undo the write.
#[derive(Debug)]
pub struct Commit(oneshot::Receiver<Result<LogState, Error>>);

impl Future for Commit {
    type Output = Result<LogState, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // An unanswered command was in the queue of a writer that ended.
        Poll::Ready(ready!(Pin::new(&mut self.0).poll(cx)).unwrap_or(Err(Error::Closed)))
    }
}

impl Log {
    pub(super) fn new(shared: Arc<Shared>, channel: Arc<Channel>) -> Self {
        Self { shared, channel }
    }

    /// Its name.
    pub fn id(&self) -> &LogId {
        &self.channel.id
    }

    /// The newest durable state; `None` before the first `begin`.
    pub fn state(&self) -> Option<LogState> {
        self.channel.state.borrow().clone()
    }

    /// Follows the durable state; moves only after the fsync.
    pub fn watch(&self) -> watch::Receiver<Option<LogState>> {
        self.channel.state.subscribe()
    }

    async fn write(&self, write: Write) -> Result<LogState, Error> {
        Commit(self.shared.send(&self.channel, write).await?).await
    }

    /// (Re)starts the log empty at `at`; its readers end with `Error::Restarted`. Nothing of it counts as
    /// released until that is said again: a target may have been put back.
    ///
    /// # Errors
    /// The write failed, or the logs are closed.
    pub async fn begin(
        &self,
        incarnation: Incarnation,
        epoch: Epoch,
        at: Position,
        hash: StreamHash,
        token: Option<Bytes>,
    ) -> Result<(), Error> {
        let log = self.id().clone();
        *self.channel.released.lock().expect("no holder panics") = None;
        self.write(Write::Begin { log, incarnation, epoch, at, hash, token }).await.map(drop)
    }

    /// Appends; returns once durable. Waits for room in the queue.
    ///
    /// # Errors
    /// `Error::Full` (nothing written), a batch that does not fit, or a failed write.
    pub async fn append(&self, batch: Batch, token: Option<Bytes>) -> Result<LogState, Error> {
        self.enqueue(batch, token).await?.await
    }

    /// Queues without waiting for durability, only for room; for pipelining. A dropped call has queued nothing.
    ///
    /// # Errors
    /// The logs are closed.
    pub async fn enqueue(&self, batch: Batch, token: Option<Bytes>) -> Result<Commit, Error> {
        let write = Write::Append { log: self.id().clone(), batch, token };
        self.shared.send(&self.channel, write).await.map(Commit)
    }

    /// Replaces the resume token of a log that ends at `end`: read after it, nothing behind `end` is missed.
    ///
    /// # Errors
    /// `Error::Gap` when the log ends elsewhere by now, a failed write, or the log has not begun.
    pub async fn put_token(&self, end: Position, token: Bytes) -> Result<(), Error> {
        self.write(Write::Token { log: self.id().clone(), end, token }).await.map(drop)
    }

    /// Raises the term.
    ///
    /// # Errors
    /// The write failed, or the log has not begun.
    pub async fn put_term(&self, term: Term) -> Result<(), Error> {
        self.write(Write::Term { log: self.id().clone(), term }).await.map(drop)
    }

    /// Drops what is above `to`, which is `first` or the end of a readable record ([`Self::salvage`] names the last);
    /// readers end with `Error::Restarted`.
    ///
    /// # Errors
    /// `Error::Rewind` when no record ends there, or a failed write.
    pub async fn rewind(&self, to: Position, hash: StreamHash, token: Option<Bytes>) -> Result<(), Error> {
        self.write(Write::Rewind { log: self.id().clone(), to, hash, token }).await.map(drop)
    }

    /// Reads the records that end after `after` until something is wrong: the end and stream hash of the last good one.
    /// `None` when not even the first of them is readable. The log is at its end when nothing is wrong. What is wrong with
    /// older records does not matter.
    ///
    /// # Errors
    /// The disk cannot be read, the log has not begun, or it was begun or rewound meanwhile.
    pub async fn salvage(&self, after: Position) -> Result<Option<(Position, StreamHash)>, Error> {
        let state = self.state().ok_or_else(|| Error::NotBegun { log: self.id().clone() })?;
        let mut after = after.max(state.first);
        let mut good = (after >= state.end).then_some((state.end, state.hash));
        while after < state.end {
            let (store, log) = (Arc::clone(&self.shared.store), self.id().clone());
            let read = move || store.read_of(&log, Some(state.generation), after, SALVAGE_BYTES);
            let read = if self.shared.store.blocking() {
                self.shared.tasks.spawn_blocking(read).await.expect("the store does not panic")
            } else {
                read()
            };
            match read {
                Ok(records) => {
                    let last = records.last().expect("at least one before the end").batch.header();
                    good = Some((last.end, last.hash));
                    after = last.end;
                }
                Err(Error::Corrupt { .. }) => break,
                // Trimmed meanwhile: go on from there.
                Err(Error::Trimmed { first, .. }) => after = first,
                Err(error) => return Err(error),
            }
        }
        Ok(good)
    }

    /// Everything at or below `through` of that incarnation, and nothing above it, is no longer needed by any member: trimmed
    /// as soon as retention allows, in large steps.
    pub fn release(&self, incarnation: Incarnation, through: Position) {
        let before = self.channel.released.lock().expect("no holder panics").replace((incarnation, through));
        if before.is_none_or(|(of, position)| of != incarnation || position < through) {
            self.shared.wake();
        }
    }

    /// Reads on from `after`; a log that has not begun is waited for.
    pub fn reader(&self, after: Position) -> Reader {
        Reader::new(Arc::clone(&self.shared), Arc::clone(&self.channel), after)
    }
}
