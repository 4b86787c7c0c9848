//! Puts the changes of batches together into units and says what each may run beside (pure).
//!
//! All changes of one cluster time are one unit. It is handed on when it is known to be complete; one that outgrows
//! [`PART_BYTES`] or [`PART_CHANGES`] is handed on in parts, and the site is not at a cut until its end. DDL inside a unit
//! (a create in a transaction) comes before the unit's changes.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::catalog::Entries;
use super::ddl::dropped_by_rename;
use super::lanes::{DdlId, GateKey, Item};
use super::target::DdlStep;
use crate::model::change::ParseError;
use crate::model::{Change, Changes, ClusterTime, CollectionUuid, Namespace, Op, Position, hash};

/// A unit larger than this is applied in parts.
pub const PART_BYTES: usize = 16 << 20;
/// A unit of more changes than this is applied in parts.
pub const PART_CHANGES: usize = 20_000;

/// How much of a unit is applied as a whole.
#[derive(Clone, Copy, Debug)]
pub struct PartLimit {
    /// Bytes of changes.
    pub bytes: usize,
    /// Changes.
    pub changes: usize,
}

impl PartLimit {
    /// Small enough for any cache but a broken one; below it only what failed at this size.
    const SMALL: Self = Self { bytes: 64 << 10, changes: 16 };

    /// After so much was too large for the target.
    pub fn below(changes: usize, bytes: usize) -> Self {
        let less =
            |failed: usize, small: usize| if failed > small { (failed / 8).max(small) } else { failed.div_ceil(8) };
        Self { bytes: less(bytes, Self::SMALL.bytes), changes: less(changes, Self::SMALL.changes) }
    }

    /// After something was not too large.
    pub fn grow(&mut self) {
        self.changes = PART_CHANGES.min(self.changes + 1);
        self.bytes = PART_BYTES.min(self.bytes + (1 << 10));
    }
}

impl Default for PartLimit {
    fn default() -> Self {
        Self { bytes: PART_BYTES, changes: PART_CHANGES }
    }
}

/// What the lanes are given.
#[derive(Debug)]
pub enum Unit {
    /// A change on its own.
    Change(Item),
    /// Changes that become visible together; `whole` unless more of the same unit follow.
    Together { items: Vec<Item>, whole: bool },
    /// A DDL step and what it must run alone on.
    Ddl { id: DdlId, keys: Vec<GateKey>, step: DdlStep },
}

/// Why a change cannot be routed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// It cannot be read.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// A kind of change this version does not know; leaving it out could lose data.
    #[error("change at {position} is of an unknown kind '{kind}'")]
    Unsupported { position: Position, kind: String },
}

/// Assembles units.
#[derive(Debug, Default)]
pub struct Router {
    open: Vec<Item>,
    open_bytes: usize,
    open_time: ClusterTime,
    /// How much of a unit is handed on as a whole.
    pub limit: PartLimit,
    /// Part of the open unit was handed on already.
    split: bool,
    ddl_parts: u32,
    /// Collections whose create or adoption was handed on but may not be in the catalog yet.
    announced: BTreeSet<CollectionUuid>,
    /// Marks seen.
    pub marks: u64,
}

impl Router {
    /// Goes on behind a position; one of ordinal 0 is no part of a unit.
    pub fn behind(position: Position) -> Self {
        Self { open_time: position.time, split: position.ordinal > 0, ..Self::default() }
    }

    /// Whether no unit is partly handed on.
    pub fn at_cut(&self) -> bool {
        !self.split
    }

    /// Where everything handed on so far ends: below the open unit.
    pub fn complete(&self, end: Position) -> Position {
        if self.open.is_empty() && !self.split { end } else { Position::before(self.open_time).min(end) }
    }

    /// Routes the changes of a batch that are past `skip_through`.
    ///
    /// # Errors
    /// A change cannot be read; everything before it was handed on.
    pub fn feed(
        &mut self,
        changes: &Changes,
        skip_through: Position,
        entries: &Entries,
        units: &mut Vec<Unit>,
    ) -> Result<(), RouteError> {
        for (position, bytes) in changes.shared() {
            if position <= skip_through {
                continue;
            }
            if position.time > self.open_time {
                self.close(units);
                self.open_time = position.time;
            }
            self.route(position, &bytes, entries, units)?;
        }
        if changes.header().end.time > self.open_time {
            self.close(units);
        }
        Ok(())
    }

    fn route(
        &mut self,
        position: Position,
        bytes: &Bytes,
        entries: &Entries,
        units: &mut Vec<Unit>,
    ) -> Result<(), RouteError> {
        let raw = bson::RawDocument::from_bytes(bytes).map_err(|_| ParseError::Bson { position })?;
        let change = Change::parse(position, raw)?;
        if change.is_mark() {
            self.marks += 1;
            return Ok(());
        }
        match (change.op, change.uuid) {
            (Op::Invalidate, _) => {}
            (Op::Unsupported, _) => {
                let kind = raw.get_str("operationType").unwrap_or("?").to_owned();
                return Err(RouteError::Unsupported { position, kind });
            }
            (op, Some(uuid)) if op.is_crud() => {
                self.know(position, uuid, change.ns, entries, units);
                let id = change.id().expect("checked when parsed");
                let full = self.open.len() >= self.limit.changes || self.open_bytes + bytes.len() > self.limit.bytes;
                if full && !self.open.is_empty() {
                    self.hand_on(false, units);
                }
                self.open_bytes += bytes.len();
                self.open.push(Item {
                    position,
                    bytes: bytes.clone(),
                    op,
                    collection: uuid,
                    key: hash::key_identity(&id),
                    doc_lane: hash::lane_of(uuid, &id),
                });
            }
            _ => self.ddl(&change, bytes.clone(), entries, units),
        }
        Ok(())
    }

    /// A collection nobody announced was there before the stream began.
    fn know(
        &mut self,
        position: Position,
        uuid: CollectionUuid,
        ns: Namespace<'_>,
        entries: &Entries,
        units: &mut Vec<Unit>,
    ) {
        if entries.contains_key(&uuid) {
            self.announced.remove(&uuid);
        } else if self.announced.insert(uuid) {
            let step = DdlStep::Adopt { collection: uuid, db: ns.db.into(), coll: ns.coll.into() };
            let keys = vec![GateKey::Collection(uuid), GateKey::Database(ns.db.into())];
            let id = self.ddl_id(position);
            units.push(Unit::Ddl { id, keys, step });
        }
    }

    fn ddl(&mut self, change: &Change<'_>, bytes: Bytes, entries: &Entries, units: &mut Vec<Unit>) {
        // A lane that stands past it may have applied what comes after it: only what is to be done may close a gate again.
        let done = |uuid| entries.get(&uuid).is_some_and(|entry| entry.ddl_through >= change.position);
        if change.uuid.is_some_and(done) {
            return;
        }
        if let (Some(uuid), false) = (change.uuid, change.op == Op::Create) {
            self.know(change.position, uuid, change.ns, entries, units);
        }
        let database = |name: &str| GateKey::Database(name.to_owned());
        let mut keys: Vec<GateKey> = change.uuid.map(GateKey::Collection).into_iter().collect();
        match change.op {
            Op::CreateIndexes | Op::DropIndexes | Op::Modify if change.uuid.is_some() => {}
            Op::Rename => {
                if let (Some(dropped), Some(to)) = (dropped_by_rename(change), change.to) {
                    self.know(change.position, dropped, to, entries, units);
                    keys.push(GateKey::Collection(dropped));
                }
                keys.push(database(change.ns.db));
                keys.extend(change.to.filter(|to| to.db != change.ns.db).map(|to| database(to.db)));
            }
            _ => keys.push(database(change.ns.db)),
        }
        match change.op {
            Op::Create => self.announced.extend(change.uuid),
            // Nothing follows of what is gone.
            Op::Drop => drop(change.uuid.map(|uuid| self.announced.remove(&uuid))),
            Op::Rename => drop(dropped_by_rename(change).map(|uuid| self.announced.remove(&uuid))),
            _ => {}
        }
        let id = self.ddl_id(change.position);
        units.push(Unit::Ddl {
            id,
            keys,
            step: DdlStep::Event { position: change.position, event: Bytes::copy_from_slice(&bytes) },
        });
    }

    /// DDL stands before every change of its unit.
    fn ddl_id(&mut self, position: Position) -> DdlId {
        self.ddl_parts += 1;
        (Position::before(position.time), self.ddl_parts)
    }

    fn close(&mut self, units: &mut Vec<Unit>) {
        if !self.open.is_empty() {
            self.hand_on(true, units);
        }
        self.split = false;
        self.ddl_parts = 0;
    }

    fn hand_on(&mut self, whole: bool, units: &mut Vec<Unit>) {
        let mut items = std::mem::take(&mut self.open);
        self.open_bytes = 0;
        let single = items.len() == 1 && whole && !self.split;
        match single.then(|| items.pop()).flatten() {
            Some(item) => units.push(Unit::Change(item)),
            None => units.push(Unit::Together { items, whole }),
        }
        self.split = !whole;
    }
}

#[cfg(test)]
mod tests {
    use bson::{Binary, Document, RawDocumentBuf, doc, spec::BinarySubtype};

    use super::*;
    use crate::model::{BatchBuilder, Epoch, Incarnation, StreamHash};

    fn event(op: &str, id: i32) -> RawDocumentBuf {
        let uuid = Binary { subtype: BinarySubtype::Uuid, bytes: vec![1; 16] };
        let event = doc! {"operationType": op, "collectionUUID": uuid, "ns": {"db": "d", "coll": "c"},
        "documentKey": {"_id": id}, "fullDocument": {"_id": id}};
        RawDocumentBuf::try_from(&event).expect("encode")
    }

    fn changes(previous: u64, events: &[(u64, u32, RawDocumentBuf)], close: bool) -> Changes {
        let previous = Position::before(ClusterTime(previous));
        let mut builder = BatchBuilder::new(Incarnation([1; 16]), Epoch(1), previous, StreamHash::default());
        for (time, ordinal, event) in events {
            builder.push(Position::new(ClusterTime(*time), *ordinal), &[event.as_bytes()]);
        }
        let last = builder.last();
        builder.finish(if close { Position::through(last.time) } else { last }).changes().expect("changes")
    }

    fn known() -> Entries {
        let entry = super::super::catalog::Entry {
            db: "d".into(),
            coll: "c".into(),
            presence: super::super::catalog::Presence::Dropped,
            one_lane: false,
            collation: false,
            ddl_through: Position::ZERO,
        };
        Entries::from([(CollectionUuid([1; 16]), entry)])
    }

    #[test]
    fn a_unit_is_handed_on_when_it_is_complete() {
        let (mut router, mut units) = (Router::default(), Vec::new());
        let first = changes(1, &[(2, 1, event("insert", 1)), (2, 2, event("insert", 2))], false);
        router.feed(&first, Position::ZERO, &known(), &mut units).expect("feed");
        assert!(units.is_empty());
        assert_eq!(router.complete(first.header().end), Position::before(ClusterTime(2)));
        let rest = changes(2, &[(2, 3, event("delete", 1)), (3, 1, event("insert", 3))], true);
        router.feed(&rest, Position::ZERO, &known(), &mut units).expect("feed");
        assert!(matches!(&units[..], [Unit::Together { items, whole: true }, Unit::Change(_)] if items.len() == 3));
        assert_eq!(router.complete(rest.header().end), rest.header().end);
    }

    #[test]
    fn a_create_inside_a_transaction_comes_first_and_below_it() {
        let (mut router, mut units) = (Router::default(), Vec::new());
        let batch =
            changes(1, &[(2, 1, event("insert", 1)), (2, 2, event("create", 0)), (2, 3, event("insert", 2))], true);
        router.feed(&batch, Position::ZERO, &known(), &mut units).expect("feed");
        let [Unit::Ddl { id, .. }, Unit::Together { items, .. }] = &units[..] else { panic!("{units:?}") };
        assert!(id.0 < items[0].position);
    }

    #[test]
    fn an_unknown_collection_is_adopted_once() {
        let (mut router, mut units) = (Router::default(), Vec::new());
        let batch = changes(1, &[(2, 1, event("insert", 1)), (3, 1, event("insert", 2))], true);
        router.feed(&batch, Position::ZERO, &Entries::new(), &mut units).expect("feed");
        assert!(matches!(
            &units[..],
            [Unit::Ddl { step: DdlStep::Adopt { .. }, .. }, Unit::Change(_), Unit::Change(_)]
        ));
    }

    #[test]
    fn ddl_that_is_done_closes_no_gate_again() {
        let batch = changes(1, &[(2, 1, event("drop", 0)), (3, 1, event("insert", 1)), (4, 1, event("drop", 0))], true);
        let (mut entries, mut units) = (known(), Vec::new());
        entries.get_mut(&CollectionUuid([1; 16])).expect("known").ddl_through = Position::new(ClusterTime(2), 1);
        Router::default().feed(&batch, Position::ZERO, &entries, &mut units).expect("feed");
        let [Unit::Change(_), Unit::Ddl { id, .. }] = &units[..] else { panic!("{units:?}") };
        assert_eq!(id.0, Position::before(ClusterTime(4)));
    }

    #[test]
    fn what_a_rename_replaces_is_adopted_first() {
        let dropped = Binary { subtype: BinarySubtype::Uuid, bytes: vec![2; 16] };
        let mut rename = Document::try_from(event("rename", 0)).expect("valid");
        rename.extend(doc! {"to": {"db": "e", "coll": "x"}, "operationDescription": {"dropTarget": dropped}});
        let rename = RawDocumentBuf::try_from(&rename).expect("encode");
        let batch = changes(1, &[(2, 1, rename)], true);
        let mut units = Vec::new();
        Router::default().feed(&batch, Position::ZERO, &known(), &mut units).expect("feed");
        let [Unit::Ddl { step: DdlStep::Adopt { collection, db, coll }, .. }, Unit::Ddl { keys, .. }] = &units[..]
        else {
            panic!("{units:?}")
        };
        assert_eq!((collection.0, db.as_str(), coll.as_str()), ([2; 16], "e", "x"));
        assert!(keys.contains(&GateKey::Collection(CollectionUuid([2; 16]))), "{keys:?}");
    }

    #[test]
    fn many_collections_may_be_made_at_one_time() {
        let new = |n: u32| {
            let mut one = Document::try_from(event("insert", 1)).expect("valid");
            let bytes = n.to_be_bytes().repeat(4);
            one.insert("collectionUUID", Binary { subtype: BinarySubtype::Uuid, bytes });
            (2, n, RawDocumentBuf::try_from(&one).expect("encode"))
        };
        let events: Vec<_> = (1..=300).map(new).collect();
        let mut units = Vec::new();
        Router::default().feed(&changes(1, &events, true), Position::ZERO, &Entries::new(), &mut units).expect("feed");
        assert_eq!(units.len(), 301, "300 adoptions, then the unit");
    }

    #[test]
    fn behind_a_part_of_a_unit_there_is_no_cut_until_its_end() {
        let mut router = Router::behind(Position::new(ClusterTime(2), 2));
        assert!(!router.at_cut());
        let rest = changes(1, &[(2, 3, event("insert", 3)), (3, 1, event("insert", 4))], true);
        let mut units = Vec::new();
        router.feed(&rest, Position::new(ClusterTime(2), 2), &known(), &mut units).expect("feed");
        assert!(router.at_cut());
        assert!(matches!(&units[..], [Unit::Together { whole: true, .. }, Unit::Change(_)]), "{units:?}");
        assert!(Router::behind(Position::before(ClusterTime(2))).at_cut());
    }

    #[test]
    fn a_huge_unit_comes_in_parts_and_is_no_cut_meanwhile() {
        let (mut router, mut units) = (Router::default(), Vec::new());
        let events: Vec<_> = (0..PART_CHANGES as u32 + 5).map(|i| (2, i + 1, event("insert", i as i32))).collect();
        router.feed(&changes(1, &events, false), Position::ZERO, &known(), &mut units).expect("feed");
        assert!(matches!(&units[..], [Unit::Together { whole: false, .. }]));
        assert!(!router.at_cut());
        router
            .feed(&changes(3, &[(4, 1, event("insert", 1))], true), Position::ZERO, &known(), &mut units)
            .expect("feed");
        assert!(matches!(&units[1..], [Unit::Together { whole: true, .. }, Unit::Change(_)]));
        assert!(router.at_cut());
    }

    #[test]
    fn a_small_limit_splits_units_and_leaves_single_changes_alone() {
        let mut router = Router { limit: PartLimit::below(2, 100), ..Router::default() };
        assert_eq!((router.limit.changes, router.limit.bytes), (1, 13));
        let events: Vec<_> = (1..=3).map(|n| (2, n, event("insert", n as i32))).collect();
        let single = [(3, 1, event("insert", 9)), (4, 1, event("insert", 10)), (5, 1, event("insert", 11))];
        let mut units = Vec::new();
        let all: Vec<_> = events.into_iter().chain(single).collect();
        router.feed(&changes(1, &all, true), Position::ZERO, &known(), &mut units).expect("feed");
        let seen: Vec<_> = units
            .iter()
            .map(|unit| match unit {
                Unit::Together { items, whole } => (items.len(), *whole),
                Unit::Change(_) => (1, true),
                Unit::Ddl { .. } => panic!("{unit:?}"),
            })
            .collect();
        assert_eq!(seen, [(1, false), (1, false), (1, true), (1, true), (1, true), (1, true)]);
        assert!(matches!(&units[3..], [Unit::Change(_), Unit::Change(_), Unit::Change(_)]), "{units:?}");
        assert!(router.at_cut());
    }

    #[test]
    fn a_part_is_halved_again_and_again_and_grows_back() {
        let mut limit = PartLimit::default();
        let mut steps = 0;
        while limit.changes > 1 || limit.bytes > 1 {
            limit = PartLimit::below(limit.changes, limit.bytes);
            steps += 1;
            assert!(steps < 20, "{limit:?}");
        }
        (0..40_000).for_each(|_| limit.grow());
        assert_eq!((limit.changes, limit.bytes), (PART_CHANGES, PART_BYTES));
    }

    #[test]
    fn an_unknown_kind_of_change_is_not_left_out() {
        let batch = changes(1, &[(2, 1, event("farFuture", 1))], true);
        let error = Router::default().feed(&batch, Position::ZERO, &known(), &mut Vec::new()).expect_err("unknown");
        assert!(error.to_string().contains("farFuture"), "{error}");
    }
}
