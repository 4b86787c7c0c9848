//! How long something took, counted in buckets by the module that measured it (a histogram without names or labels).

use std::time::Duration;

/// Upper bounds in seconds: from the fsync of a disk with a battery to an outage.
pub const BOUNDS: [f64; 20] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
];

/// Counts of durations; they only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Durations {
    counts: [u64; BOUNDS.len() + 1],
    seconds: f64,
}

impl Durations {
    /// One more.
    pub fn record(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        self.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.seconds += seconds;
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Counts by upper bound, each on its own; the last bound is infinite.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        BOUNDS.into_iter().chain([f64::INFINITY]).zip(self.counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_under_the_smallest_bound_it_does_not_exceed() {
        let mut durations = Durations::default();
        for ms in [0, 1, 2, 400_000] {
            durations.record(Duration::from_millis(ms));
        }
        let found: Vec<_> = durations.buckets().filter(|(_, count)| *count > 0).collect();
        assert_eq!(found, [(0.0001, 1), (0.001, 1), (0.0025, 1), (f64::INFINITY, 1)]);
        assert_eq!((durations.count(), durations.seconds()), (4, 400.003));
    }
}
