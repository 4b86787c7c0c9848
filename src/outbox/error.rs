//! What can go wrong with a log, and what the caller should do about it.

use std::path::PathBuf;

use super::LogId;
use crate::model::{Incarnation, Position, StreamHash};

/// Why a log operation failed. Cloneable because one failed commit answers every caller in its group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No `begin` yet.
    #[error("{log} has not begun")]
    NotBegun { log: LogId },
    /// The batch starts past the log's end: something in between is missing.
    #[error("{log} ends at {end}, the batch follows {previous}: a gap")]
    Gap { log: LogId, end: Position, previous: Position },
    /// The batch brings nothing new.
    #[error("{log} already ends at {end}, the batch ends at {batch_end}")]
    Overlap { log: LogId, end: Position, batch_end: Position },
    /// The batch belongs to another history.
    #[error("{log} holds incarnation {have}, the batch is of {got}")]
    Incarnation { log: LogId, have: Incarnation, got: Incarnation },
    /// The batch does not continue the stream hash: the two sides have seen different changes.
    #[error("{log} has stream hash {have} at {at}, the batch expects {got}: the histories differ")]
    Chain { log: LogId, at: Position, have: StreamHash, got: StreamHash },
    /// What was asked for is no longer kept.
    #[error("{log} keeps records after {first} only")]
    Trimmed { log: LogId, first: Position },
    /// The log was begun anew or rewound; readers must be made again.
    #[error("{log} was restarted")]
    Restarted { log: LogId },
    /// The log cannot be rewound to that position.
    #[error("{log} cannot be rewound to {to}: {reason}; begin it anew instead")]
    Rewind { log: LogId, to: Position, reason: &'static str },
    /// The quota is used up; nothing was written.
    #[error(
        "{log} is full: all logs hold {bytes} of {limit} bytes; let the peer catch up, \
         or raise the outbox limit (the oplog keeps the history meanwhile)"
    )]
    Full { log: LogId, bytes: u64, limit: u64 },
    /// An earlier write failed; the log only serves reads until the process starts again.
    #[error(
        "the log takes no more writes after a failed one: {reason}; free or repair the disk, then restart the agent"
    )]
    Failed { reason: String },
    /// The logs were closed.
    #[error("the log is closed")]
    Closed,
    /// A stored record cannot be used; everything up to `position` can.
    #[error("{log} is corrupt after {position}: {reason}")]
    Corrupt { log: LogId, position: Position, reason: String },
    /// The store itself is damaged.
    #[error(
        "the store is damaged ({what}): {reason}; move its directory away and restart, \
         the agent captures again from the oplog"
    )]
    Damaged { what: String, reason: String },
    /// Another process uses the directory.
    #[error(
        "{} is in use by another process; one agent per directory: stop the other one or configure another directory",
        dir.display()
    )]
    Locked { dir: PathBuf },
    /// Written by a newer version.
    #[error("the store has format version {found}, this version reads up to {supported}; upgrade this agent first")]
    Newer { found: u32, supported: u32 },
    /// The store is encrypted and no key was given.
    #[error("the store is encrypted with key {id}, and no key is configured; set the encryption key file")]
    KeyMissing { id: String },
    /// The store is encrypted with another key.
    #[error(
        "the store is encrypted with key {stored}, the configured key is {given}; configure the right key file, \
         or start with an empty directory"
    )]
    KeyWrong { stored: String, given: String },
    /// The disk or the database said no.
    #[error("{context}: {reason}")]
    Io { context: String, reason: String },
}

/// What the caller of a failed operation does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Nothing was written; look at the log's state and do the right thing.
    Refused,
    /// Try again later: room must be made.
    Wait,
    /// Make a new reader or capture again.
    Recapture,
    /// Only a restart of the process helps.
    Restart,
    /// A person must act.
    Operator,
}

impl Error {
    /// What to do next.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::NotBegun { .. }
            | Self::Gap { .. }
            | Self::Overlap { .. }
            | Self::Incarnation { .. }
            | Self::Chain { .. }
            | Self::Rewind { .. } => Disposition::Refused,
            Self::Full { .. } => Disposition::Wait,
            Self::Trimmed { .. } | Self::Restarted { .. } | Self::Corrupt { .. } => Disposition::Recapture,
            Self::Failed { .. } | Self::Closed | Self::Io { .. } => Disposition::Restart,
            Self::Damaged { .. }
            | Self::Locked { .. }
            | Self::Newer { .. }
            | Self::KeyMissing { .. }
            | Self::KeyWrong { .. } => Disposition::Operator,
        }
    }
}
