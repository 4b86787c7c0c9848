//! Random histories with unique values, transactions and DDL, under random interleavings and crashes, against a serial
//! model.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;

/// One operation at the source. Collections 0 and 1 use all lanes; collection 2 switches to one lane when it gains a
/// unique index.
#[derive(Clone, Debug)]
enum SourceOp {
    Put {
        collection: u8,
        id: u8,
        value: u8,
    },
    Delete {
        collection: u8,
        id: u8,
    },
    /// Moves the value of one document of the unique collection to another through a temporary.
    Swap {
        a: u8,
        b: u8,
    },
    Transaction(Vec<(u8, u8, u8)>),
    ToggleUnique,
    Clear {
        collection: u8,
    },
}

fn ops() -> impl Strategy<Value = Vec<SourceOp>> {
    let op = prop_oneof![
        6 => (0u8..3, 0u8..6, any::<u8>()).prop_map(|(collection, id, value)| SourceOp::Put { collection, id, value }),
        2 => (0u8..3, 0u8..6).prop_map(|(collection, id)| SourceOp::Delete { collection, id }),
        2 => (0u8..6, 0u8..6).prop_map(|(a, b)| SourceOp::Swap { a, b }),
        2 => proptest::collection::vec((0u8..3, 0u8..6, any::<u8>()), 2..5).prop_map(SourceOp::Transaction),
        1 => Just(SourceOp::ToggleUnique),
        1 => (0u8..3).prop_map(|collection| SourceOp::Clear { collection }),
    ];
    proptest::collection::vec(op, 1..60)
}

/// A document change as the model sees it: (collection, id, new value or none).
type Write = (u8, u8, Option<u8>);

#[derive(Clone, Debug)]
enum Unit {
    Changes(Vec<(Position, Write)>),
    Unique(Position, bool),
    Clear(Position, u8),
}

#[derive(Clone, Default, Debug, PartialEq, Eq)]
struct Store {
    documents: BTreeMap<(u8, u8), u8>,
    unique: bool,
}

impl Store {
    fn write(&mut self, (collection, id, value): Write) {
        match value {
            Some(value) => {
                if self.unique && collection == 2 {
                    let clash = self.documents.iter().find(|((c, i), v)| *c == 2 && *i != id && **v == value);
                    assert!(clash.is_none(), "unique value {value} of {id} is taken: {clash:?}");
                }
                self.documents.insert((collection, id), value);
            }
            None => {
                self.documents.remove(&(collection, id));
            }
        }
    }
}

/// Runs the operations serially; impossible ones (a unique value that is taken) are left out, as the source refused them.
fn history(ops: &[SourceOp]) -> (Vec<Unit>, Store) {
    let mut store = Store::default();
    let mut units = Vec::new();
    let mut time = 1u64;
    for op in ops {
        let at = |time: u64, ordinal| Position::new(ClusterTime(time), ordinal);
        let single = |time: u64, write| Unit::Changes(vec![(at(time, 1), write)]);
        match op {
            SourceOp::Put { collection, id, value } => {
                let write = (*collection, *id, Some(*value));
                if fits(&store, &[write]) {
                    store.write(write);
                    units.push(single(time, write));
                }
            }
            SourceOp::Delete { collection, id } => {
                store.write((*collection, *id, None));
                units.push(single(time, (*collection, *id, None)));
            }
            SourceOp::Swap { a, b } => {
                let (Some(x), Some(y)) =
                    (store.documents.get(&(2, *a)).copied(), store.documents.get(&(2, *b)).copied())
                else {
                    continue;
                };
                let Some(spare) = (0..=u8::MAX).find(|v| !store.documents.values().any(|used| used == v)) else {
                    continue;
                };
                for write in [(2, *a, Some(spare)), (2, *b, Some(x)), (2, *a, Some(y))] {
                    if a != b {
                        store.write(write);
                        units.push(single(time, write));
                        time += 1;
                    }
                }
            }
            SourceOp::Transaction(writes) => {
                let writes: Vec<Write> = writes.iter().map(|(c, i, v)| (*c, *i, Some(*v))).collect();
                if fits(&store, &writes) {
                    writes.iter().for_each(|write| store.write(*write));
                    let numbered = writes.iter().enumerate().map(|(i, write)| (at(time, i as u32 + 1), *write));
                    units.push(Unit::Changes(numbered.collect()));
                }
            }
            SourceOp::ToggleUnique => {
                let values: Vec<u8> = store.documents.iter().filter(|((c, _), _)| *c == 2).map(|(_, v)| *v).collect();
                let distinct = values.iter().collect::<BTreeSet<_>>().len() == values.len();
                if store.unique || distinct {
                    store.unique = !store.unique;
                    units.push(Unit::Unique(at(time, 1), store.unique));
                }
            }
            SourceOp::Clear { collection } => {
                store.documents.retain(|(c, _), _| c != collection);
                units.push(Unit::Clear(at(time, 1), *collection));
            }
        }
        time += 1;
    }
    (units, store)
}

fn fits(store: &Store, writes: &[Write]) -> bool {
    let mut trial = store.clone();
    writes.iter().all(|(collection, id, value)| {
        let taken = trial.unique
            && *collection == 2
            && trial.documents.iter().any(|((c, i), v)| *c == 2 && i != id && Some(*v) == *value);
        if !taken {
            trial.documents.insert((*collection, *id), value.expect("a put"));
        }
        !taken
    })
}

fn uuid(collection: u8) -> CollectionUuid {
    CollectionUuid([collection + 1; 16])
}

fn item(position: Position, (collection, id, value): Write) -> Item {
    let bytes = Bytes::from(vec![collection, id, u8::from(value.is_some()), value.unwrap_or(0)]);
    // Few lanes, so that collections meet in them, also in the one lane of the collection that changes its laning.
    let lane = if id < 2 { hash::lane_of_collection(uuid(2)) } else { LaneId::of(u64::from(id % 3)) };
    Item { position, bytes, op: Op::Replace, collection: uuid(collection), key: u128::from(id), doc_lane: lane }
}

fn write_of(item: &Item) -> Write {
    (item.bytes[0], item.bytes[1], (item.bytes[2] == 1).then_some(item.bytes[3]))
}

/// The target: what transactions and DDL made durable.
struct Target {
    store: Store,
    lanes: Vec<LaneState>,
    /// Per collection the last DDL, and whether it uses one lane.
    catalog: BTreeMap<CollectionUuid, (Position, bool)>,
    applied: BTreeMap<Position, usize>,
    /// As the engine stores it: at most what the lanes called applied.
    floor: Position,
}

impl Target {
    fn commit(&mut self, job: &Job) {
        for step in &job.lanes {
            let stored = &mut self.lanes[step.lane.index()];
            assert_eq!(*stored, step.from, "the stored state is what the job expects");
            *stored = step.to.clone();
        }
        for item in &job.items {
            self.store.write(write_of(item));
            *self.applied.entry(item.position).or_default() += 1;
        }
    }

    fn restart(&self) -> Lanes {
        let lifted = self.lanes.iter().map(|lane| lane.clone().lifted(self.floor)).collect();
        let mut lanes = Lanes::new(lifted, self.floor);
        for (uuid, (through, one_lane)) in &self.catalog {
            lanes.set_collection(*uuid, *one_lane, *through);
        }
        lanes
    }
}

fn push(lanes: &mut Lanes, target: &Target, unit: &Unit) {
    let done = |uuid: CollectionUuid, position: Position| {
        target.catalog.get(&uuid).is_some_and(|(through, _)| *through >= position)
    };
    match unit {
        Unit::Changes(changes) if changes.len() == 1 => lanes.push(item(changes[0].0, changes[0].1)),
        Unit::Changes(changes) => lanes.push_together(changes.iter().map(|(p, w)| item(*p, *w)).collect()),
        Unit::Unique(position, _) if !done(uuid(2), *position) => {
            lanes.push_ddl((*position, 0), vec![GateKey::Collection(uuid(2))]);
        }
        Unit::Clear(position, collection) if !done(uuid(*collection), *position) => {
            lanes.push_ddl((*position, 0), vec![GateKey::Collection(uuid(*collection))]);
        }
        Unit::Unique(position, _) | Unit::Clear(position, _) => lanes.read_through(*position),
    }
}

fn run_ddl(target: &mut Target, lanes: &mut Lanes, units: &[Unit], (position, part): DdlId) {
    for unit in units {
        match unit {
            Unit::Unique(at, unique) if *at == position => {
                target.store.unique = *unique;
                target.catalog.insert(uuid(2), (position, *unique));
                lanes.set_collection(uuid(2), *unique, position);
            }
            Unit::Clear(at, collection) if *at == position => {
                target.store.documents.retain(|(c, _), _| c != collection);
                let one_lane = target.catalog.get(&uuid(*collection)).is_some_and(|(_, one)| *one);
                target.catalog.insert(uuid(*collection), (position, one_lane));
            }
            _ => {}
        }
    }
    lanes.ddl_done((position, part));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]
    #[test]
    fn any_interleaving_with_crashes_ends_as_the_source_did(
        ops in ops(),
        choices in proptest::collection::vec(any::<u8>(), 400),
    ) {
        let (units, expected) = history(&ops);
        let mut target = Target {
            store: Store::default(),
            lanes: vec![LaneState::default(); LaneId::COUNT],
            catalog: BTreeMap::new(),
            applied: BTreeMap::new(),
            floor: Position::ZERO,
        };
        let mut lanes = target.restart();
        let mut next = 0;
        let mut jobs: Vec<Job> = Vec::new();
        let mut ddls: Vec<DdlId> = Vec::new();
        let mut choices = choices.into_iter();
        let mut floor = Position::ZERO;
        loop {
            // When the random choices run out, everything is driven to its end.
            let choice = choices.next();
            match choice.map_or(u8::MAX, |c| c % 16) {
                0..=4 if next < units.len() => { push(&mut lanes, &target, &units[next]); next += 1; }
                5..=7 => jobs.extend(lanes.take(Limits { changes: 3, bytes: 1000, lanes: 2 })),
                8 => ddls.extend(lanes.take_ddl()),
                9..=11 if !jobs.is_empty() => {
                    let job = jobs.swap_remove(usize::from(choice.unwrap_or(0)) % jobs.len());
                    target.commit(&job);
                    lanes.done(job.id, Vec::new());
                }
                12 | 13 if !ddls.is_empty() => { let id = ddls.remove(0); run_ddl(&mut target, &mut lanes, &units, id); }
                14 => {
                    // A crash: running jobs are lost, or committed without anybody hearing of it.
                    for job in jobs.drain(..) {
                        if choice.unwrap_or(0) & 0x10 != 0 { target.commit(&job); }
                    }
                    ddls.clear();
                    lanes = target.restart();
                    for (stored, lane) in target.lanes.iter_mut().zip(LaneId::all()) {
                        *stored = lanes.lanes[lane.index()].state.clone();
                    }
                    let from = lanes.read();
                    next = units.iter().position(|unit| match unit {
                        Unit::Changes(changes) => changes.last().is_some_and(|(p, _)| *p > from),
                        Unit::Unique(p, _) | Unit::Clear(p, _) => *p > from,
                    }).unwrap_or(units.len());
                    floor = Position::ZERO;
                }
                15 => target.floor = lanes.floor(),
                u8::MAX => {
                    if next < units.len() { push(&mut lanes, &target, &units[next]); next += 1; continue; }
                    if let Some(job) = jobs.pop().or_else(|| lanes.take(Limits { changes: 3, bytes: 1000, lanes: 2 })) {
                        target.commit(&job);
                        lanes.done(job.id, Vec::new());
                        continue;
                    }
                    if let Some(id) = ddls.pop().or_else(|| lanes.take_ddl()) {
                        run_ddl(&mut target, &mut lanes, &units, id);
                        continue;
                    }
                    break;
                }
                _ => {}
            }
            let now = lanes.floor();
            prop_assert!(now >= floor, "the floor went back from {} to {}", floor, now);
            floor = now;
        }
        prop_assert!(lanes.is_idle(), "everything was applied");
        prop_assert_eq!(lanes.bytes(), 0);
        prop_assert_eq!(&target.store, &expected);
        let twice: Vec<_> = target.applied.iter().filter(|(_, n)| **n != 1).collect();
        prop_assert!(twice.is_empty(), "applied more than once: {:?}", twice);
    }
}

#[test]
fn a_long_ddl_on_one_collection_does_not_hold_back_another() {
    let mut lanes = Lanes::new(vec![LaneState::default(); LaneId::COUNT], Position::ZERO);
    let at = |time| Position::new(ClusterTime(time), 1);
    lanes.push_ddl((at(1), 0), vec![GateKey::Collection(uuid(0))]);
    assert_eq!(lanes.take_ddl(), Some((at(1), 0)));
    lanes.push(item(at(2), (0, 1, Some(1))));
    lanes.push(item(at(3), (1, 1, Some(1))));
    let job = lanes.take(Limits { changes: 10, bytes: 1000, lanes: 64 }).expect("the other collection goes on");
    assert_eq!(job.items.len(), 1);
    assert_eq!(job.items[0].collection, uuid(1));
    lanes.done(job.id, Vec::new());
    assert_eq!(lanes.floor(), at(1).predecessor(), "nothing past the ddl counts as applied");
    lanes.ddl_done((at(1), 0));
    let job = lanes.take(Limits { changes: 10, bytes: 1000, lanes: 64 }).expect("the gate opened");
    assert_eq!(job.items[0].collection, uuid(0));
}

#[test]
fn what_a_lane_parked_stays_parked_until_it_is_read_and_applied_again() {
    let at = |time| Position::new(ClusterTime(time), 1);
    let mut states = vec![LaneState::default(); LaneId::COUNT];
    let lane = item(at(1), (0, 1, None)).doc_lane;
    states[lane.index()] =
        LaneState { position: at(9), parked: BTreeMap::from([(uuid(0), at(2).predecessor())]), floors: Vec::new() };
    let mut lanes = Lanes::new(states.clone(), Position::ZERO);
    lanes.push(item(at(2), (0, 1, Some(1))));
    let limits = Limits { changes: 10, bytes: 1000, lanes: 64 };
    let job = lanes.take(limits).expect("the parked change");
    let to = &job.lanes[0].to;
    assert_eq!((to.position, to.parked.get(&uuid(0))), (at(9), Some(&at(2))), "the changes up to 9 are not read yet");

    let mut lanes = Lanes::new(states, Position::ZERO);
    lanes.push(item(at(2), (0, 1, Some(1))));
    lanes.push_together(vec![item(at(3), (0, 1, Some(2)))]);
    lanes.push(item(at(4), (0, 1, Some(3))));
    lanes.read_through(at(9));
    let job = lanes.take(limits).expect("the change before the transaction");
    assert_eq!(job.lanes[0].to.parked.get(&uuid(0)), Some(&at(3).predecessor()), "the transaction still waits");
}

#[test]
fn a_transaction_behind_ddl_stays_parked_in_every_lane_it_may_take() {
    let at = |time| Position::new(ClusterTime(time), 1);
    let one = hash::lane_of_collection(uuid(2));
    let mut states = vec![LaneState::default(); LaneId::COUNT];
    let parked = BTreeMap::from([(uuid(0), at(1)), (uuid(2), at(2))]);
    states[one.index()] = LaneState { position: at(9), parked, floors: Vec::new() };
    let mut lanes = Lanes::new(states, Position::ZERO);
    let (before, within) = (item(at(2), (0, 0, Some(1))), item(at(4), (2, 5, Some(1))));
    assert_eq!(before.doc_lane, one);
    assert_ne!(within.doc_lane, one, "until the DDL is done the transaction has another lane");
    lanes.push(before);
    lanes.push_ddl((Position::before(ClusterTime(3)), 1), vec![GateKey::Collection(uuid(2))]);
    lanes.push_together(vec![within]);
    lanes.read_through(at(9));
    let job = lanes.take(Limits { changes: 10, bytes: 1000, lanes: 64 }).expect("the change before the transaction");
    assert_eq!(job.lanes[0].to.parked.get(&uuid(2)), Some(&at(4).predecessor()), "the DDL may bring it here");
}

#[test]
fn a_document_is_ahead_until_the_whole_stream_has_passed_it() {
    let at = |time| Position::new(ClusterTime(time), 1);
    let mut states = vec![LaneState::default(); LaneId::COUNT];
    let (mine, other) = (item(at(20), (0, 2, Some(1))), item(at(3), (1, 0, Some(1))));
    let floor = Floor { collection: uuid(2), key: 2, at: ClusterTime(8) };
    states[mine.doc_lane.index()].floors.push(floor.clone());
    assert_ne!(mine.doc_lane, other.doc_lane);
    let mut lanes = Lanes::new(states, Position::ZERO);
    lanes.push(other);
    lanes.push(mine);
    let limits = Limits { changes: 10, bytes: 1000, lanes: 1 };
    let first = lanes.take(limits).expect("a job");
    let second = lanes.take(limits).expect("a job");
    let (mine, other) = if first.items[0].position == at(20) { (first, second) } else { (second, first) };
    assert_eq!(mine.lanes[0].to.floors, [floor], "a change of it may still wait in another lane");
    lanes.done(mine.id, Vec::new());
    lanes.done(other.id, Vec::new());
    lanes.push(item(at(21), (0, 2, Some(1))));
    assert_eq!(lanes.take(limits).expect("a job").lanes[0].to.floors, [], "all has passed it");
}

#[test]
fn a_transaction_waits_for_all_its_lanes_and_runs_alone_on_them() {
    let mut lanes = Lanes::new(vec![LaneState::default(); LaneId::COUNT], Position::ZERO);
    let at = |time, ordinal| Position::new(ClusterTime(time), ordinal);
    lanes.push(item(at(1, 1), (0, 1, Some(1))));
    lanes.push_together(vec![item(at(2, 1), (0, 1, Some(2))), item(at(2, 2), (1, 2, Some(2)))]);
    let limits = Limits { changes: 10, bytes: 1000, lanes: 64 };
    let before = lanes.take(limits).expect("the change before it");
    assert!(!before.meeting);
    assert!(lanes.take(limits).is_none(), "one of its lanes is busy");
    lanes.done(before.id, Vec::new());
    let meeting = lanes.take(limits).expect("now they meet");
    assert!(meeting.meeting);
    assert_eq!((meeting.items.len(), meeting.lanes.len()), (2, 2));
    assert!(meeting.lanes.iter().all(|step| step.to.position == at(2, 2)));
}
