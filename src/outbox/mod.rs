//! The durable ordered log of batches: the outbox at the source, the inboxes at the target.
//!
//! # Constraints
//! - A commit is one synced write: when it returns `Ok`, its batches, tokens and states are on disk, together or not at
//!   all.
//! - A log is a chain. A batch may overlap the log's end (another agent cut it), never leave a gap; readers hear how
//!   far to skip. Reads check the chain again: a lost file shows as corruption and never as a silent hole.
//! - Nothing above what every member released is ever removed, whatever the disk pressure: a full log refuses appends.
//! - After a failed write nothing is written any more (the state on disk is unknown) until the process starts again;
//!   reads go on.
//! - One process per directory (a lock file). Only the task that [`Logs`] starts writes.
//!
//! # On disk
//! One RocksDB per agent. Column family `state` holds small values (states of logs, meta); every log has a column
//! family of its own, whose keys only ever grow: (generation, end of the batch). A new generation starts with every
//! `begin` and `rewind`. Because keys grow, a flushed file never overlaps another one: compaction only moves files
//! between levels, nothing is written twice, and there is no tombstone anywhere. What lies below `first`, in an older
//! generation or above a rewind cannot be reached through the state; so removing is one small state write, and files go
//! afterwards, whole. Every value has an envelope: magic, version, CRC-32, optionally AES-256-GCM.
//!
//! ```text
//!   state: segments [(generation, start)], first, end, hash, token, term, counters
//!   first ................................ end
//!     | batch | batch | batch |  batch  |       ring (memory): the newest of these, at most 16 MiB
//!     released: up to here nobody needs it; below it `retention` keeps more
//! ```
//!
//! # Recovery
//! The write-ahead log is replayed to the last intact commit. A torn tail was never acknowledged. A record that cannot
//! be read is [`Error::Corrupt`], whose `position` is the last readable one. Its owner then asks [`Log::salvage`] and
//! calls [`Log::rewind`] with the answer (the good records stay), or [`Log::begin`] where the peer stands; capture
//! takes the rest from the oplog again.
//!
//! # Who may do what
//! Capture or the link appends; whoever knows all members' positions releases; only the writer task trims.

mod envelope;
mod error;
mod keys;
mod ledger;
mod log;
mod logs;
mod memory;
mod reader;
mod record;
mod retention;
mod ring;
mod rocks;
mod store;
mod writer;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod tests;

pub use envelope::{EncryptionKey, InvalidKey};
pub use error::{Disposition, Error};
pub use log::{Commit, Log};
pub use logs::{Level, Logs, Quota, Usage};
pub use memory::{Fault, MemStore};
pub use reader::Reader;
pub use record::decode_stored_value;
pub use rocks::{RocksOptions, RocksStore};
pub use store::{LogId, LogState, Mark, Store, Stored, Write};
