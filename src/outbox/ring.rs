//! The newest records of a log, in memory: a reader that keeps up never touches the disk.

use std::collections::VecDeque;

use super::Stored;
use crate::model::Position;

/// A bounded tail of one generation of a log, without holes.
pub(super) struct Ring {
    generation: u64,
    records: VecDeque<Stored>,
    bytes: usize,
    limit: usize,
}

impl Ring {
    pub(super) fn new(limit: usize) -> Self {
        Self { generation: 0, records: VecDeque::new(), bytes: 0, limit }
    }

    /// Adds the record that follows; another generation starts over.
    pub(super) fn push(&mut self, generation: u64, stored: Stored) {
        if generation != self.generation {
            self.records.clear();
            (self.generation, self.bytes) = (generation, 0);
        }
        let joined = self.records.back().is_none_or(|last| last.batch.header().end == stored.skip_through);
        assert!(joined, "a record was left out of the ring");
        self.bytes += stored.batch.record().len();
        self.records.push_back(stored);
        while self.bytes > self.limit {
            let oldest = self.records.pop_front().expect("bytes are of records");
            self.bytes -= oldest.batch.record().len();
        }
    }

    /// The record that follows `after`, if it is here.
    pub(super) fn next(&self, generation: u64, after: Position) -> Option<Stored> {
        let index = self.records.partition_point(|stored| stored.batch.header().end <= after);
        let found =
            self.records.get(index).filter(|stored| generation == self.generation && stored.skip_through <= after)?;
        Some(Stored { batch: found.batch.clone(), skip_through: after })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::tests::{at, batch_of};

    #[test]
    fn it_keeps_the_newest_and_serves_only_without_a_hole() {
        let size = batch_of(0, 1, 100).record().len();
        let mut ring = Ring::new(size * 3);
        for n in 0..5 {
            ring.push(1, Stored { batch: batch_of(n, n + 1, 100), skip_through: at(n) });
        }
        assert_eq!(ring.next(1, at(1)), None);
        assert_eq!(ring.next(1, at(2)).expect("kept").batch.header().end, at(3));
        assert_eq!(ring.next(1, at(5)), None);
        assert_eq!(ring.next(2, at(2)), None);
        ring.push(2, Stored { batch: batch_of(0, 1, 1), skip_through: at(0) });
        assert_eq!((ring.next(1, at(2)), ring.next(2, at(0)).is_some()), (None, true));
    }

    #[test]
    fn a_record_larger_than_the_ring_passes_by() {
        let mut ring = Ring::new(10);
        ring.push(1, Stored { batch: batch_of(0, 1, 100), skip_through: at(0) });
        assert_eq!((ring.next(1, at(0)), ring.bytes), (None, 0));
    }
}
