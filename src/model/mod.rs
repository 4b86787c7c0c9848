//! The vocabulary of replication: ids, positions, changes, batches and the records they are stored and shipped as.
//!
//! Nothing here does I/O, reads a clock or knows an async runtime; every other module may depend on this one.

pub mod batch;
pub mod change;
pub mod durations;
pub mod flow;
pub mod hash;
pub mod ids;
pub mod raw;

pub use batch::{Batch, BatchBuilder, Changes, Header, RecordError};
pub use change::{Change, Namespace, Op};
pub use durations::Durations;
pub use farshore_api::{ClusterTime, Position};
pub use flow::Flow;
pub use hash::StreamHash;
pub use ids::{AgentId, CollectionUuid, Epoch, Incarnation, LaneId, SiteName, StreamId, Term};
