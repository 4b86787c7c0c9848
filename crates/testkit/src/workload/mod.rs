//! Seeded workloads against a real cluster: what the source of a replication sees in its worst week.
//!
//! `Workload` covers all forms of writes: a pure `Generator` turns a seed into operations (raw commands),
//! `run` sends them, through elections and lost connections. The generator believes what it generated and
//! never looks at answers, so the same seed gives the same operations. The cluster is the truth: no check
//! here depends on the outcome of a write whose answer was lost.
//!
//! `ConstantSum`, `Counters` and `Ratings` are small workloads with an invariant or a purpose of their own.

mod constant_sum;
mod counters;
mod counts;
mod crud;
mod ddl;
mod generate;
mod kind;
mod model;
mod op;
mod ratings;
mod retry;
mod run;
mod special;
mod txn;
mod updates;
mod values;

use std::time::Duration;

pub use constant_sum::ConstantSum;
pub use counters::Counters;
pub use counts::{Counts, Tally};
pub use generate::Generator;
pub use kind::{Class, Kind};
pub use op::{Mode, Op, Step};
pub use ratings::Ratings;
pub use run::{Until, Workload};

/// What a workload is made of. Shares are relative to each other.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Inserts, updates, replaces, deletes.
    pub crud: u32,
    /// Multi-document transactions.
    pub transactions: u32,
    /// Schema changes.
    pub ddl: u32,
    /// Documents of 100 KB to 15.9 MB, and events over 16 MB.
    pub large: u32,
    /// Bytes of large documents at most.
    pub large_budget: u64,
    /// Capped and time-series collections, `$out`, `$merge`.
    pub beyond_spine: bool,
    /// Concurrent writers. With more than one the order of operations is not reproducible.
    pub writers: usize,
    /// How long one command is tried again before the run fails.
    pub patience: Duration,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            crud: 85,
            transactions: 4,
            ddl: 11,
            large: 0,
            large_budget: 200 << 20,
            beyond_spine: false,
            writers: 1,
            patience: Duration::from_secs(60),
        }
    }
}

impl Profile {
    /// Document writes and transactions; the schema stays as it was set up.
    pub fn without_ddl() -> Self {
        Self { ddl: 0, ..Self::default() }
    }

    /// With some large documents among the rest.
    pub fn with_large() -> Self {
        Self { large: 2, ..Self::default() }
    }

    /// The share of a class.
    pub(crate) fn share(&self, class: Class) -> u32 {
        match class {
            Class::Crud => self.crud,
            Class::Transaction => self.transactions,
            Class::Ddl => self.ddl,
            Class::Large => self.large,
            Class::Beyond => u32::from(self.beyond_spine) * 5,
        }
    }

    /// The kinds of operation that this profile does, each of which a long run must have done.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> + '_ {
        Kind::ALL.iter().copied().filter(|kind| self.share(kind.class()) > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn ops(seed: u64, count: usize, profile: Profile) -> Vec<Op> {
        let mut generator = Generator::new(seed, profile, "t");
        let mut ops = generator.setup();
        ops.extend((0..count).map(|_| generator.next_op()));
        ops
    }

    #[test]
    fn the_same_seed_gives_the_same_operations() {
        assert!(ops(7, 2_000, Profile::default()) == ops(7, 2_000, Profile::default()));
        assert!(ops(7, 100, Profile::default()) != ops(8, 100, Profile::default()));
    }

    #[test]
    fn every_kind_of_a_profile_is_generated() {
        let profile = Profile { large: 5, beyond_spine: true, ..Profile::default() };
        let seen: BTreeSet<Kind> = ops(1, 6_000, profile).iter().map(|op| op.kind).collect();
        let missing: Vec<_> = Kind::ALL.iter().filter(|kind| !seen.contains(kind)).collect();
        assert!(missing.is_empty(), "{missing:?}");
        let seen: BTreeSet<Class> = ops(1, 3_000, Profile::default()).iter().map(|op| op.kind.class()).collect();
        assert!(!seen.contains(&Class::Large) && !seen.contains(&Class::Beyond));
    }

    #[test]
    fn large_documents_keep_to_the_budget_and_the_limit() {
        let profile = Profile { large: 50, large_budget: 40 << 20, ..Profile::default() };
        let sizes: Vec<u64> = ops(3, 1_000, profile)
            .iter()
            .filter(|op| op.kind.class() == Class::Large && op.kind != Kind::UpdateLarge)
            .flat_map(|op| op.steps.iter().map(|step| step.command.as_bytes().len() as u64))
            .collect();
        assert!(sizes.iter().sum::<u64>() < 45 << 20);
        assert!(sizes.iter().any(|size| *size > 100_000));
    }
}
