//! What apply tells of itself: its phase and numbers that only grow while the process lives.

use std::collections::BTreeMap;

use super::target::Cause;
use crate::model::{ClusterTime, Durations, Flow, Position, StreamHash};

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
    /// Changes committed since the process started, catalog changes included. Around a new primary of the target a
    /// change may be counted twice (its commit was rolled back) or not at all (its commit went unanswered).
    pub flow: Flow,
    /// Transactions committed at the target.
    pub transactions: u64,
    /// Units of several changes among them, which became visible as one: source transactions, or parts of large ones.
    pub source_transactions: u64,
    /// Documents found different, by cause.
    pub diverged: BTreeMap<Cause, u64>,
    /// Those of them that were fetched again and committed.
    pub healed: u64,
    /// Those that are being fetched now.
    pub healing: u64,
    /// Transactions tried again, and sessions begun again.
    pub retries: u64,
    /// Errors of the target's database, by its code.
    pub errors: BTreeMap<i32, u64>,
    /// From the newest change of a batch being written at the source (its `wallTime`) to the batch being confirmed
    /// here, by this site's clock; once for every batch that holds changes.
    pub commit_to_apply: Durations,
    /// What a person must look at and its hint, until it is out of the way.
    pub failure: Option<(String, &'static str)>,
    /// It is out of the way when everything up to here is applied.
    pub failure_through: Position,
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
