//! What the target knows of the source's collections: their UUIDs here, how they are laned, what was done to them.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::model::{CollectionUuid, Position};

/// Whether a collection is replicated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It exists at the target under this UUID.
    Present(CollectionUuid),
    /// It was dropped; kept until no replay can mention it.
    Dropped,
    /// It is not replicated, with the reason; its changes are counted and left out.
    Refused(String),
}

/// One collection of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Database.
    pub db: String,
    /// Collection name after the last DDL.
    pub coll: String,
    /// Whether and where it is at the target.
    pub presence: Presence,
    /// Has a unique index other than `_id`, or a collation: one lane, in source order.
    pub one_lane: bool,
    /// Has a collation: `_id`s that differ may be one and the same to the server.
    pub collation: bool,
    /// Position of the last DDL applied to it.
    pub ddl_through: Position,
}

impl Entry {
    /// The same collection after it was dropped.
    pub fn dropped(&self, through: Position) -> Self {
        Self { presence: Presence::Dropped, ddl_through: through, ..self.clone() }
    }
}

/// All collections by their UUID at the source.
pub type Entries = BTreeMap<CollectionUuid, Entry>;

/// The entries as shared by workers; DDL replaces them as a whole.
#[derive(Debug, Default)]
pub struct Catalog(ArcSwap<Entries>);

impl Catalog {
    /// Starts with what is stored.
    pub fn new(entries: Entries) -> Self {
        Self(ArcSwap::from_pointee(entries))
    }

    /// The entries as of now.
    pub fn entries(&self) -> Arc<Entries> {
        self.0.load_full()
    }

    /// Replaces one entry. Only the engine's task calls this.
    pub fn put(&self, uuid: CollectionUuid, entry: Entry) {
        let mut entries = (*self.entries()).clone();
        entries.insert(uuid, entry);
        self.0.store(Arc::new(entries));
    }

    /// Leaves out what was dropped at or before `through`, and returns it. Only the engine's task calls this.
    pub fn forget(&self, through: Position) -> Vec<CollectionUuid> {
        let mut entries = (*self.entries()).clone();
        let gone = |entry: &Entry| entry.presence == Presence::Dropped && entry.ddl_through <= through;
        let forgotten = entries.extract_if(.., |_, entry| gone(entry)).map(|(uuid, _)| uuid).collect();
        self.0.store(Arc::new(entries));
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ClusterTime;

    #[test]
    fn only_what_was_dropped_long_ago_is_forgotten() {
        let at = |time| Position::new(ClusterTime(time), 1);
        let entry = |presence, time| Entry {
            db: "d".into(),
            coll: "c".into(),
            presence,
            one_lane: true,
            collation: false,
            ddl_through: at(time),
        };
        let refused = Presence::Refused("made again after it was dropped".into());
        let all = [
            (1, entry(Presence::Dropped, 4)),
            (2, entry(Presence::Dropped, 6)),
            (3, entry(refused, 4)),
            (4, entry(Presence::Present(CollectionUuid([9; 16])), 4)),
        ];
        let catalog = Catalog::new(all.map(|(n, entry)| (CollectionUuid([n; 16]), entry)).into());
        assert_eq!(catalog.forget(at(5)), [CollectionUuid([1; 16])]);
        assert_eq!(catalog.entries().len(), 3);
    }
}
