//! What apply tells of itself: its phase and numbers that only grow while the process lives.

use std::collections::BTreeMap;

use crate::model::{ClusterTime, Position, StreamHash};

/// What apply is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was received yet.
    #[default]
    Waiting,
    /// Applying.
    Running,
    /// Trying again.
    Retrying(String),
    /// A person must look; it is tried again now and then.
    Failed { message: String, hint: &'static str },
}

/// Numbers and phase for status and metrics.
#[derive(Clone, Debug, Default)]
pub struct ApplyStatus {
    /// What it is doing.
    pub phase: Phase,
    /// Everything up to here is applied and majority-committed.
    pub applied: Option<Position>,
    /// Changes applied since the process started.
    pub changes: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Transactions committed at the target.
    pub transactions: u64,
    /// Source transactions among them.
    pub source_transactions: u64,
    /// DDL steps done.
    pub ddl: u64,
    /// Documents found different, by kind.
    pub diverged: BTreeMap<&'static str, u64>,
    /// Documents fetched again.
    pub healed: u64,
    /// Transactions tried again.
    pub retries: u64,
    /// What a person must look at, until it is out of the way.
    pub failure: Option<String>,
    /// Stored records that failed their crc.
    pub corrupt: u64,
    /// All lanes stand at one position and no unit is partly applied.
    pub at_cut: bool,
    /// While documents are ahead of their lane: where the target will be consistent again.
    pub consistent_from: Option<ClusterTime>,
    /// Collections that are not replicated, with the reason.
    pub refused: Vec<(String, String)>,
    /// Changes of refused collections that were left out.
    pub left_out: u64,
    /// Stream hash at the newest batch border applied.
    pub hash: StreamHash,
}
