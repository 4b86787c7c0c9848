//! What passed a stage of the data path: changes by what they do, and their bytes.
//!
//! Capture and apply count the same things, so that their numbers can be compared: every change MongoDB sent, marks of
//! Farshore left out, by the bytes of its event without the resume token.

use super::Op;

/// Counts of changes; they only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Documents inserted.
    pub inserts: u64,
    /// Documents updated.
    pub updates: u64,
    /// Documents replaced.
    pub replaces: u64,
    /// Documents deleted.
    pub deletes: u64,
    /// Catalog changes.
    pub ddl: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

impl Flow {
    /// One more change.
    pub fn count(&mut self, op: Op, bytes: usize) {
        let counter = match op {
            Op::Insert => &mut self.inserts,
            Op::Update => &mut self.updates,
            Op::Replace => &mut self.replaces,
            Op::Delete => &mut self.deletes,
            _ => &mut self.ddl,
        };
        *counter += 1;
        self.bytes += bytes as u64;
    }

    /// What another has counted, too.
    pub fn add(&mut self, other: &Self) {
        self.inserts += other.inserts;
        self.updates += other.updates;
        self.replaces += other.replaces;
        self.deletes += other.deletes;
        self.ddl += other.ddl;
        self.bytes += other.bytes;
    }

    /// All changes.
    pub fn changes(&self) -> u64 {
        self.by_op().into_iter().map(|(_, count)| count).sum()
    }

    /// Changes by the name of what they do.
    pub fn by_op(&self) -> [(&'static str, u64); 5] {
        [
            ("insert", self.inserts),
            ("update", self.updates),
            ("replace", self.replaces),
            ("delete", self.deletes),
            ("ddl", self.ddl),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_counted_once_under_its_name() {
        let mut flow = Flow::default();
        for op in [Op::Insert, Op::Update, Op::Update, Op::Replace, Op::Delete, Op::Create, Op::DropDatabase] {
            flow.count(op, 10);
        }
        let mut twice = flow;
        twice.add(&flow);
        let expected = [("insert", 2), ("update", 4), ("replace", 2), ("delete", 2), ("ddl", 4)];
        assert_eq!((twice.by_op(), twice.changes(), twice.bytes), (expected, 14, 140));
    }
}
