//! What a log store must do: the seam between the logs and the disk.

use std::fmt;

use bytes::Bytes;

use super::Error;
use crate::model::{Batch, Epoch, Incarnation, Position, SiteName, StreamHash, Term};

/// Names one log of an agent.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LogId {
    /// Changes captured here.
    Outbox,
    /// Changes received from a source site.
    Inbox(SiteName),
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outbox => f.write_str("outbox"),
            Self::Inbox(source) => write!(f, "inbox/{source}"),
        }
    }
}

impl fmt::Debug for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Durable state of one log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogState {
    /// The history its positions belong to.
    pub incarnation: Incarnation,
    /// Newest epoch of its batches (or the one it began with).
    pub epoch: Epoch,
    /// End of what precedes the oldest record kept; equals `end` when empty.
    pub first: Position,
    /// End of the newest record, or where the log began.
    pub end: Position,
    /// Stream hash at `end`.
    pub hash: StreamHash,
    /// Newest resume token, from the same synced write as its record.
    pub token: Option<Bytes>,
    /// Highest term of a shipping agent seen; survives `begin`.
    pub term: Term,
    /// Bytes kept.
    pub bytes: u64,
    /// Records kept.
    pub batches: u64,
    /// Grows with every `begin` and `rewind`; readers of an older generation end.
    pub generation: u64,
    /// Bytes appended since the log began (less what was rewound); `appended - bytes` were trimmed.
    pub appended: u64,
}

/// One part of an atomic, synced write.
#[derive(Clone, Debug)]
pub enum Write {
    /// (Re)starts the log empty at `at`; only the term is kept.
    Begin { log: LogId, incarnation: Incarnation, epoch: Epoch, at: Position, hash: StreamHash, token: Option<Bytes> },
    /// Needs `previous <= end < batch end`, the same incarnation and, where they meet exactly, the same stream hash.
    /// Without a token the old one is kept.
    Append { log: LogId, batch: Batch, token: Option<Bytes> },
    /// Replaces the resume token of a log that ends at `end`.
    Token { log: LogId, end: Position, token: Bytes },
    /// Raises the term; a lower one changes nothing.
    Term { log: LogId, term: Term },
    /// Removes records that end at or below `through`.
    Trim { log: LogId, through: Position },
    /// Removes records that end above `to`, which must be `first` or the end of a readable record; `hash` and `token`
    /// become the log's.
    Rewind { log: LogId, to: Position, hash: StreamHash, token: Option<Bytes> },
}

impl Write {
    /// The log written to.
    pub fn log(&self) -> &LogId {
        match self {
            Self::Begin { log, .. }
            | Self::Append { log, .. }
            | Self::Token { log, .. }
            | Self::Term { log, .. }
            | Self::Trim { log, .. }
            | Self::Rewind { log, .. } => log,
        }
    }
}

/// A record read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The batch as appended.
    pub batch: Batch,
    /// Changes at or below it precede this record or were already read; at least `batch.previous`.
    pub skip_through: Position,
}

/// Where a log stood after some of its bytes; finds what to trim without reading records. May be approximate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// End of a record.
    pub end: Position,
    /// [`LogState::appended`] there.
    pub appended: u64,
}

/// A durable store of logs. Calls may block (see [`Self::blocking`]); one caller commits at a time.
pub trait Store: Send + Sync + 'static {
    /// Writes all of `writes`, in order, atomically; on disk when it returns `Ok`. A refused write changes nothing.
    fn commit(&self, writes: &[Write]) -> Result<(), Error>;

    /// The log's durable state, from memory; `None` before its first `begin`.
    fn state(&self, log: &LogId) -> Result<Option<LogState>, Error>;

    /// All logs that have begun.
    fn logs(&self) -> Result<Vec<LogId>, Error>;

    /// Records with `end > after` in order: at least one if there is any, up to `max_bytes`. Every record and the chain
    /// are checked.
    /// With a generation, `Error::Restarted` when the log's is another.
    fn read_of(
        &self,
        log: &LogId,
        generation: Option<u64>,
        after: Position,
        max_bytes: usize,
    ) -> Result<Vec<Stored>, Error>;

    /// [`Self::read_of`] whatever the generation.
    fn read(&self, log: &LogId, after: Position, max_bytes: usize) -> Result<Vec<Stored>, Error> {
        self.read_of(log, None, after, max_bytes)
    }

    /// Marks of what is kept, oldest first.
    fn marks(&self, log: &LogId) -> Result<Vec<Mark>, Error>;

    /// A small named value.
    fn meta(&self, key: &str) -> Result<Option<Bytes>, Error>;

    /// Stores a small named value, synced.
    fn put_meta(&self, key: &str, value: Bytes) -> Result<(), Error>;

    /// Whether calls may block a thread and belong on a blocking one.
    fn blocking(&self) -> bool;

    /// Closes the files; later calls fail with `Error::Closed`.
    fn close(&self);
}
