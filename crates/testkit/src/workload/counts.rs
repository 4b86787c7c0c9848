//! What a workload did, by kind of operation.

use std::collections::BTreeMap;
use std::fmt;

use super::kind::Kind;

/// Outcomes of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Acknowledged, and something changed.
    pub done: u64,
    /// Acknowledged, and nothing matched.
    pub idle: u64,
    /// Refused by the server with an error that this kind may meet.
    pub refused: u64,
    /// Given up with an unknown outcome.
    pub unknown: u64,
}

/// How much was done. Only `done` proves that a kind took place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub kinds: BTreeMap<Kind, Tally>,
    /// Commands sent again after an error of network or election.
    pub retries: u64,
    /// Codes of refusals, with how often.
    pub refusals: BTreeMap<(Kind, i32), u64>,
}

impl Counts {
    /// Operations of all kinds and outcomes.
    pub fn operations(&self) -> u64 {
        self.kinds.values().map(|t| t.done + t.idle + t.refused + t.unknown).sum()
    }

    /// Operations that changed something.
    pub fn done(&self) -> u64 {
        self.kinds.values().map(|tally| tally.done).sum()
    }

    /// Those of `kinds` that never changed anything.
    pub fn missing(&self, kinds: impl IntoIterator<Item = Kind>) -> Vec<&'static str> {
        kinds
            .into_iter()
            .filter(|kind| self.kinds.get(kind).is_none_or(|tally| tally.done == 0))
            .map(Kind::name)
            .collect()
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Counts) {
        for (kind, tally) in &other.kinds {
            let own = self.kinds.entry(*kind).or_default();
            own.done += tally.done;
            own.idle += tally.idle;
            own.refused += tally.refused;
            own.unknown += tally.unknown;
        }
        for (key, count) in &other.refusals {
            *self.refusals.entry(*key).or_default() += count;
        }
        self.retries += other.retries;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} operations, {} changed something, {} retries", self.operations(), self.done(), self.retries)?;
        for (kind, tally) in &self.kinds {
            write!(f, "  {:<40} {:>7}", kind.name(), tally.done)?;
            let rest = [("idle", tally.idle), ("refused", tally.refused), ("unknown", tally.unknown)];
            for (name, count) in rest {
                if count > 0 {
                    write!(f, "  {name} {count}")?;
                }
            }
            for ((_, code), count) in self.refusals.range((*kind, i32::MIN)..=(*kind, i32::MAX)) {
                write!(f, "  [{code}: {count}]")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
