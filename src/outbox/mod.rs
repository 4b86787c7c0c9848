//! The durable ordered log of batches: the outbox at the source, the inboxes at the target.
//!
//! # Constraints
//! - A commit is one synced write: when it returns `Ok`, its batches, tokens and states are on disk, together or not at all.
//! - A log is a chain. A batch may overlap the log's end (another agent cut it), never leave a gap; readers are told how
//!   far to skip. Reads check the chain again, so a lost file shows as corruption and never as a silent hole.
//! - Nothing above what was released by every member is ever removed, whatever the disk pressure: a full log refuses appends.
//! - After a failed write nothing is written any more (the state on disk is unknown) until the process starts again; reads go on.
//! - One process per directory (RocksDB's lock). Only the task inside [`Logs`] writes.
//!
//! # On disk
//! One RocksDB per agent. Column family `state` holds small values (state of each log, meta); every log has a column
//! family of its own, whose keys only ever grow: (generation, end of the batch). A new generation starts with every `begin` and `rewind`.
//! Because keys grow, a flushed file never overlaps another one: compaction only moves files between levels, nothing is
//! written twice, and there is no tombstone anywhere. What lies below `first`, in an older generation or above a rewind is
//! unreachable through the state, which is why removing is one small state write; the files go afterwards, whole.
//! Every value is wrapped as [`envelope`] describes (magic, version, CRC-32, optionally AES-256-GCM).
//!
//! ```text
//!   state: segments [(generation, start)], first, end, hash, token, term, counters
//!   first ................................ end
//!     | batch | batch | batch |  batch  |       ring (memory): the newest of these, at most 16 MiB
//!     released: up to here nobody needs it; below it `retention` keeps more
//! ```
//!
//! # Recovery
//! The write-ahead log is replayed to the last intact commit. A torn tail was never acknowledged. A record that cannot be read is
//! [`Error::Corrupt`]; its `position` is the last readable one. The owner then takes [`Log::salvage`] and [`Log::rewind`]s there (the good
//! records stay) or [`Log::begin`]s anew where the peer stands; capture fills the rest from the oplog again.
//!
//! # Who may do what
//! Capture or the link appends; whoever knows all members' positions releases; only the writer task trims.

mod envelope;
mod error;
mod keys;
mod ledger;
mod log;
mod memory;
mod reader;
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
pub use ledger::decode_stored_value;
pub use log::{Commit, Log};
pub use memory::{Fault, MemStore};
pub use reader::Reader;
pub use rocks::{RocksOptions, RocksStore};
pub use store::{LogId, LogState, Mark, Store, Stored, Write};
pub use writer::{Level, Logs, Quota, Usage};
