//! The lanes of a stream: which changes may be applied next, together, and where every lane stands (pure).
//!
//! ```text
//! push ──► gate of its collection (only while DDL is pending) ──► lane queue ──► job ──► done
//! ```
//!
//! * Changes of one document are in one lane, in source order; a lane is in at most one running job.
//! * A source transaction is a *meeting*: it waits at the head of every lane it touches, then is one job for all of them.
//! * DDL closes the gate of its collections: changes before it drain, it runs alone on them, then the gate opens. The
//!   lanes go on meanwhile; a lane that passes gated changes records them as *parked*, so a restart finds them again.
//! * Positions only move forward. The floor is the position below which everything is applied.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use crate::model::{ClusterTime, CollectionUuid, LaneId, Op, Position, hash};

/// A change on its way to a lane; shares its batch's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its place in the source's history.
    pub position: Position,
    /// The change event.
    pub bytes: Bytes,
    /// What it does.
    pub op: Op,
    /// Collection at the source.
    pub collection: CollectionUuid,
    /// Canonical identity of the document within the collection.
    pub key: u128,
    /// Lane of the document while its collection uses all lanes.
    pub doc_lane: LaneId,
}

/// Names one DDL step; the second part tells apart steps made at one position.
pub type DdlId = (Position, u32);

/// What a DDL step must run alone on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GateKey {
    /// Documents and indexes of a collection.
    Collection(CollectionUuid),
    /// The names within a database.
    Database(String),
}

/// A document whose state was fetched at a later time: its changes up to that time are dropped (rule K).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Floor {
    /// Collection at the source.
    pub collection: CollectionUuid,
    /// Canonical identity of the document.
    pub key: u128,
    /// Changes up to and including this time are already in the document.
    pub at: ClusterTime,
}

/// What is stored of a lane, in the transaction that moves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneState {
    /// Everything of this lane up to here is applied, except what is parked.
    pub position: Position,
    /// Collections applied only up to an earlier position.
    pub parked: BTreeMap<CollectionUuid, Position>,
    /// Documents ahead of the lane.
    pub floors: Vec<Floor>,
}

impl LaneState {
    fn applied_through(&self, collection: CollectionUuid) -> Position {
        self.parked.get(&collection).copied().unwrap_or(self.position)
    }

    /// The state a reader may assume when everything up to `floor` is known to be applied.
    pub fn lifted(mut self, floor: Position) -> Self {
        self.position = self.position.max(floor);
        for parked in self.parked.values_mut() {
            *parked = (*parked).max(floor);
        }
        let position = self.position;
        self.parked.retain(|_, parked| *parked < position);
        self
    }

    /// Where reading must start so that nothing of this lane is missed.
    pub fn resume_from(&self) -> Position {
        self.parked.values().copied().min().unwrap_or(self.position).min(self.position)
    }
}

/// One lane's part of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneStep {
    /// Which lane.
    pub lane: LaneId,
    /// State before the job.
    pub from: LaneState,
    /// State after the job.
    pub to: LaneState,
}

/// Names a running job.
pub type JobId = u64;

/// Changes to be applied in one transaction, in position order.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// The lanes it moves.
    pub lanes: Vec<LaneStep>,
    /// The changes.
    pub items: Vec<Item>,
    /// A source transaction, or a part of one.
    pub meeting: bool,
}

/// How large a job may get.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Changes.
    pub changes: usize,
    /// Bytes of changes.
    pub bytes: usize,
    /// Lanes, so that several workers find something to do.
    pub lanes: usize,
}

#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<Entry>,
    busy: bool,
    state: LaneState,
}

#[derive(Debug)]
enum Entry {
    Change(Item),
    Meeting(Position),
}

impl Entry {
    fn position(&self) -> Position {
        match self {
            Self::Change(item) => item.position,
            Self::Meeting(position) => *position,
        }
    }

    /// Position of its first change.
    fn first(&self, meetings: &BTreeMap<Position, Meeting>) -> Position {
        match self {
            Self::Change(item) => item.position,
            Self::Meeting(position) => meetings[position].items[0].position,
        }
    }
}

#[derive(Debug, Default)]
struct Collection {
    /// Uses one lane, in source order.
    one_lane: bool,
    /// Everything up to here is applied: the last DDL that ran alone on it.
    applied_through: Position,
    /// Single changes in lanes or running; all before the first gated DDL.
    singles: usize,
    /// Transactions that touch it.
    meetings: BTreeSet<Position>,
    gate: VecDeque<Gated>,
    /// First gated change of every lane it may end up in.
    first_gated: BTreeMap<LaneId, Position>,
}

#[derive(Debug)]
enum Gated {
    Change(Item),
    Ddl(DdlId),
}

impl Collection {
    fn lane(&self, uuid: CollectionUuid, item: &Item) -> LaneId {
        if self.one_lane { hash::lane_of_collection(uuid) } else { item.doc_lane }
    }

    /// Position of the first DDL still to run.
    fn barrier(&self) -> Option<Position> {
        self.gate.iter().find_map(|gated| match gated {
            Gated::Ddl((position, _)) => Some(*position),
            Gated::Change(_) => None,
        })
    }

    /// The lanes an item may end up in: both, while DDL before it may change the laning.
    fn lanes(&self, uuid: CollectionUuid, item: &Item) -> BTreeSet<LaneId> {
        match self.barrier().is_some_and(|barrier| barrier < item.position) {
            true => BTreeSet::from([item.doc_lane, hash::lane_of_collection(uuid)]),
            false => BTreeSet::from([self.lane(uuid, item)]),
        }
    }

    fn gate(&mut self, uuid: CollectionUuid, item: Item) {
        // Gated changes may wait long: they must not hold on to their whole batch.
        let item = Item { bytes: Bytes::copy_from_slice(&item.bytes), ..item };
        for lane in self.lanes(uuid, &item) {
            self.first_gated.entry(lane).or_insert(item.position);
        }
        self.gate.push_back(Gated::Change(item));
    }
}

#[derive(Debug)]
struct Meeting {
    items: Vec<Item>,
    lanes: BTreeSet<LaneId>,
    collections: BTreeSet<CollectionUuid>,
}

#[derive(Debug)]
struct Ddl {
    keys: Vec<GateKey>,
    running: bool,
}

#[derive(Debug)]
struct Running {
    lanes: Vec<LaneStep>,
    /// Per collection the number of single changes.
    singles: BTreeMap<CollectionUuid, usize>,
    meeting: Option<(Position, BTreeSet<CollectionUuid>)>,
    first: Position,
    bytes: usize,
}

/// See the module text.
#[derive(Debug)]
pub struct Lanes {
    lanes: Vec<Lane>,
    collections: BTreeMap<CollectionUuid, Collection>,
    /// Those with changes behind their gate.
    gated: BTreeSet<CollectionUuid>,
    databases: BTreeMap<String, VecDeque<DdlId>>,
    meetings: BTreeMap<Position, Meeting>,
    ddls: BTreeMap<DdlId, Ddl>,
    running: BTreeMap<JobId, Running>,
    next_job: JobId,
    cursor: usize,
    read: Position,
    bytes: usize,
}

impl Lanes {
    /// Continues from stored states and the stored floor; reading starts at [`Self::read`]. Lanes may stand past DDL that
    /// is not done, so only the floor tells where nothing is missed.
    ///
    /// # Panics
    /// Not exactly one state per lane.
    pub fn new(states: Vec<LaneState>, floor: Position) -> Self {
        assert_eq!(states.len(), LaneId::COUNT, "one state per lane");
        let read = states.iter().map(LaneState::resume_from).min().unwrap_or_default().min(floor);
        let lanes = states.into_iter().map(|state| Lane { state, ..Lane::default() }).collect();
        Self {
            lanes,
            collections: BTreeMap::new(),
            gated: BTreeSet::new(),
            databases: BTreeMap::new(),
            meetings: BTreeMap::new(),
            ddls: BTreeMap::new(),
            running: BTreeMap::new(),
            next_job: 0,
            cursor: 0,
            read,
            bytes: 0,
        }
    }

    /// Everything up to here was pushed; reading goes on behind it.
    pub fn read(&self) -> Position {
        self.read
    }

    /// Declares how a collection's changes are laned and what is known to be applied of it.
    pub fn set_collection(&mut self, uuid: CollectionUuid, one_lane: bool, applied_through: Position) {
        let collection = self.collections.entry(uuid).or_default();
        collection.one_lane = one_lane;
        collection.applied_through = collection.applied_through.max(applied_through);
    }

    /// No change of this collection can come any more: it was dropped below the floor.
    pub fn forget_collection(&mut self, uuid: CollectionUuid) {
        let idle = |c: &Collection| c.gate.is_empty() && c.singles == 0 && c.meetings.is_empty();
        if self.collections.get(&uuid).is_some_and(idle) {
            self.collections.remove(&uuid);
        }
    }

    /// Bytes of changes that wait or run.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether everything pushed is applied.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.ddls.is_empty() && self.lanes.iter().all(|lane| lane.queue.is_empty())
    }

    fn is_applied(&self, item: &Item) -> bool {
        let collection = self.collections.get(&item.collection);
        let lane = collection.map_or(item.doc_lane, |c| c.lane(item.collection, item));
        let through = self.lanes[lane.index()].state.applied_through(item.collection);
        let ddl = collection.map_or(Position::ZERO, |c| c.applied_through);
        item.position <= through.max(ddl)
    }

    /// Whether nothing that was pushed waits, and no lane stands past what was.
    pub fn is_even(&self) -> bool {
        self.is_idle() && self.lanes.iter().all(|lane| lane.state.position <= self.read)
    }

    /// Everything at or below `position` has been pushed.
    pub fn read_through(&mut self, position: Position) {
        self.read = self.read.max(position);
    }

    /// A change that is a unit of its own.
    pub fn push(&mut self, item: Item) {
        self.read_through(item.position);
        if self.is_applied(&item) {
            return;
        }
        self.bytes += item.bytes.len();
        let uuid = item.collection;
        let collection = self.collections.entry(uuid).or_default();
        if collection.gate.is_empty() {
            let lane = collection.lane(uuid, &item);
            collection.singles += 1;
            self.lanes[lane.index()].queue.push_back(Entry::Change(item));
        } else {
            collection.gate(uuid, item);
            self.gated.insert(uuid);
        }
    }

    /// Changes that must become visible together: a source transaction, or a part of one.
    pub fn push_together(&mut self, items: Vec<Item>) {
        let Some(last) = items.last().map(|item| item.position) else { return };
        self.read_through(last);
        let items: Vec<Item> = items.into_iter().filter(|item| !self.is_applied(item)).collect();
        if items.is_empty() {
            return;
        }
        let mut meeting = Meeting { items, lanes: BTreeSet::new(), collections: BTreeSet::new() };
        for item in &meeting.items {
            self.bytes += item.bytes.len();
            let collection = self.collections.entry(item.collection).or_default();
            collection.meetings.insert(last);
            meeting.lanes.extend(collection.lanes(item.collection, item));
            meeting.collections.insert(item.collection);
        }
        for lane in &meeting.lanes {
            self.lanes[lane.index()].queue.push_back(Entry::Meeting(last));
        }
        self.meetings.insert(last, meeting);
    }

    /// A DDL step that is still to be done; what is pushed later for its keys waits behind it.
    pub fn push_ddl(&mut self, id: DdlId, keys: Vec<GateKey>) {
        self.read_through(id.0);
        for key in &keys {
            match key {
                GateKey::Collection(uuid) => self.collections.entry(*uuid).or_default().gate.push_back(Gated::Ddl(id)),
                GateKey::Database(name) => self.databases.entry(name.clone()).or_default().push_back(id),
            }
        }
        let before = self.ddls.insert(id, Ddl { keys, running: false });
        assert!(before.is_none(), "ddl {id:?} pushed twice");
    }

    /// The next DDL step that may run now.
    pub fn take_ddl(&mut self) -> Option<DdlId> {
        let ready =
            self.ddls.iter().find(|(id, ddl)| !ddl.running && ddl.keys.iter().all(|key| self.is_open(key, **id)));
        let id = ready.map(|(id, _)| *id)?;
        self.ddls.get_mut(&id).expect("just found").running = true;
        Some(id)
    }

    fn is_open(&self, key: &GateKey, id: DdlId) -> bool {
        match key {
            GateKey::Database(name) => self.databases.get(name).and_then(VecDeque::front) == Some(&id),
            GateKey::Collection(uuid) => self.collections.get(uuid).is_some_and(|collection| {
                matches!(collection.gate.front(), Some(Gated::Ddl(front)) if *front == id)
                    && collection.singles == 0
                    && collection.meetings.first().is_none_or(|first| *first > id.0)
            }),
        }
    }

    /// A DDL step is done and durable; the gates open up to the next one.
    ///
    /// # Panics
    /// The step was not running.
    pub fn ddl_done(&mut self, id: DdlId) {
        let ddl = self.ddls.remove(&id).expect("a ddl step that runs");
        for key in ddl.keys {
            match key {
                GateKey::Database(name) => {
                    if let Some(gate) = self.databases.get_mut(&name) {
                        gate.pop_front();
                    }
                    self.databases.retain(|_, gate| !gate.is_empty());
                }
                GateKey::Collection(uuid) => self.open_gate(uuid, id.0),
            }
        }
    }

    fn open_gate(&mut self, uuid: CollectionUuid, through: Position) {
        let collection = self.collections.entry(uuid).or_default();
        collection.applied_through = collection.applied_through.max(through);
        collection.gate.pop_front();
        while let Some(Gated::Change(_)) = collection.gate.front() {
            let Some(Gated::Change(item)) = collection.gate.pop_front() else { break };
            let lane = collection.lane(uuid, &item);
            collection.singles += 1;
            let queue = &mut self.lanes[lane.index()].queue;
            let at = queue.partition_point(|entry| entry.position() < item.position);
            queue.insert(at, Entry::Change(item));
        }
        let rest: Vec<(LaneId, Position)> = collection
            .gate
            .iter()
            .filter_map(|gated| match gated {
                Gated::Change(item) => Some(item),
                Gated::Ddl(_) => None,
            })
            .flat_map(|item| [item.doc_lane, hash::lane_of_collection(uuid)].map(|lane| (lane, item.position)))
            .collect();
        collection.first_gated.clear();
        for (lane, position) in rest {
            collection.first_gated.entry(lane).or_insert(position);
        }
        if collection.first_gated.is_empty() {
            self.gated.remove(&uuid);
        }
    }

    /// The next job, if any lane has work no other job holds.
    pub fn take(&mut self, limits: Limits) -> Option<Job> {
        let mut taken: Vec<(LaneId, usize)> = Vec::new();
        let (mut changes, mut bytes) = (0, 0);
        for step in 0..LaneId::COUNT {
            let index = (self.cursor + step) % LaneId::COUNT;
            let lane = &self.lanes[index];
            if lane.busy {
                continue;
            }
            if let Some(Entry::Meeting(position)) = lane.queue.front() {
                if taken.is_empty() && self.may_meet(*position) {
                    let position = *position;
                    self.cursor = (index + 1) % LaneId::COUNT;
                    return Some(self.start_meeting(position));
                }
                continue;
            }
            let mut count = 0;
            for entry in &lane.queue {
                let Entry::Change(item) = entry else { break };
                if changes > 0 && (changes >= limits.changes || bytes + item.bytes.len() > limits.bytes) {
                    break;
                }
                (changes, bytes, count) = (changes + 1, bytes + item.bytes.len(), count + 1);
            }
            if count > 0 {
                taken.push((LaneId::all().nth(index).expect("64 lanes"), count));
            }
            if taken.len() >= limits.lanes || changes >= limits.changes || bytes >= limits.bytes {
                self.cursor = (index + 1) % LaneId::COUNT;
                break;
            }
        }
        (!taken.is_empty()).then(|| self.start(&taken))
    }

    fn may_meet(&self, position: Position) -> bool {
        let meeting = &self.meetings[&position];
        let at_head = |lane: &LaneId| {
            let lane = &self.lanes[lane.index()];
            !lane.busy && matches!(lane.queue.front(), Some(Entry::Meeting(p)) if *p == position)
        };
        let open = |uuid: &CollectionUuid| self.collections[uuid].barrier().is_none_or(|barrier| barrier > position);
        meeting.lanes.iter().all(at_head) && meeting.collections.iter().all(open)
    }

    fn start_meeting(&mut self, position: Position) -> Job {
        let meeting = self.meetings.remove(&position).expect("a meeting at the head of lanes");
        for lane in &meeting.lanes {
            self.lanes[lane.index()].queue.pop_front();
        }
        let lanes = meeting.lanes.iter().map(|lane| self.step(*lane, position)).collect();
        self.begin(lanes, meeting.items, BTreeMap::new(), Some((position, meeting.collections)))
    }

    fn start(&mut self, taken: &[(LaneId, usize)]) -> Job {
        let mut items = Vec::new();
        let mut singles: BTreeMap<CollectionUuid, usize> = BTreeMap::new();
        let mut lanes = Vec::with_capacity(taken.len());
        for (lane, count) in taken {
            let mut last = Position::ZERO;
            for entry in self.lanes[lane.index()].queue.drain(..count) {
                let Entry::Change(item) = entry else { unreachable!("only changes were counted") };
                last = item.position;
                *singles.entry(item.collection).or_default() += 1;
                items.push(item);
            }
            lanes.push(self.step(*lane, last));
        }
        items.sort_unstable_by_key(|item| item.position);
        self.begin(lanes, items, singles, None)
    }

    fn begin(
        &mut self,
        lanes: Vec<LaneStep>,
        items: Vec<Item>,
        singles: BTreeMap<CollectionUuid, usize>,
        meeting: Option<(Position, BTreeSet<CollectionUuid>)>,
    ) -> Job {
        let id = self.next_job;
        self.next_job += 1;
        for step in &lanes {
            self.lanes[step.lane.index()].busy = true;
        }
        let first = items.first().expect("a job has changes").position;
        let bytes = items.iter().map(|item| item.bytes.len()).sum();
        let is_meeting = meeting.is_some();
        self.running.insert(id, Running { lanes: lanes.clone(), singles, meeting, first, bytes });
        Job { id, lanes, items, meeting: is_meeting }
    }

    /// The lane's state after everything up to `last` in its queue was taken.
    fn step(&self, lane: LaneId, last: Position) -> LaneStep {
        let Lane { queue, state, .. } = &self.lanes[lane.index()];
        let position = state.position.max(last);
        // A lane that stands where reading has not come again yet: what it parked and what is not read is not applied.
        let unread = |(uuid, through): (&CollectionUuid, &Position)| (*uuid, (*through).max(self.read));
        let mut parked: BTreeMap<_, _> = state.parked.iter().map(unread).filter(|(_, at)| *at < position).collect();
        let mut park = |collection: CollectionUuid, first: Position| {
            if first <= position {
                let through = first.predecessor();
                let entry = parked.entry(collection).or_insert(through);
                *entry = (*entry).min(through);
            }
        };
        for entry in queue.iter().take_while(|entry| entry.first(&self.meetings) <= position) {
            match entry {
                Entry::Change(item) => park(item.collection, item.position),
                Entry::Meeting(at) => {
                    for item in &self.meetings[at].items {
                        if self.collections[&item.collection].lanes(item.collection, item).contains(&lane) {
                            park(item.collection, item.position);
                        }
                    }
                }
            }
        }
        for uuid in &self.gated {
            if let Some(first) = self.collections[uuid].first_gated.get(&lane) {
                park(*uuid, *first);
            }
        }
        // A document's changes may come in another lane when its collection's laning changes: it is ahead until the whole
        // stream has passed it.
        let passed = |floor: &&Floor| floor.at < position.time && parked.is_empty() && floor.at < self.floor().time;
        let floors = state.floors.iter().filter(|floor| !passed(floor)).cloned().collect();
        LaneStep { lane, from: state.clone(), to: LaneState { position, parked, floors } }
    }

    /// A job was committed; `floors` were stored with the given lanes.
    ///
    /// # Panics
    /// The job was not running.
    pub fn done(&mut self, id: JobId, floors: Vec<(LaneId, Floor)>) {
        let running = self.running.remove(&id).expect("a job that runs");
        self.bytes -= running.bytes;
        for step in running.lanes {
            let lane = &mut self.lanes[step.lane.index()];
            assert!(step.to.position >= lane.state.position, "a lane went back");
            lane.state = step.to;
            lane.busy = false;
        }
        for (lane, floor) in floors {
            self.lanes[lane.index()].state.floors.push(floor);
        }
        for (uuid, count) in running.singles {
            self.collections.get_mut(&uuid).expect("a collection with changes").singles -= count;
        }
        if let Some((position, collections)) = running.meeting {
            for uuid in collections {
                self.collections.get_mut(&uuid).expect("a collection with changes").meetings.remove(&position);
            }
        }
    }

    /// Everything at or below is applied (as far as this process committed it).
    pub fn floor(&self) -> Position {
        let queued = self.lanes.iter().filter_map(|lane| Some(lane.queue.front()?.first(&self.meetings)));
        let running = self.running.values().map(|job| job.first);
        let gated = self.gated.iter().filter_map(|uuid| self.collections[uuid].first_gated.values().min().copied());
        let ddl = self.ddls.keys().map(|(position, _)| *position);
        let waiting = queued.chain(running).chain(gated).chain(ddl).min();
        waiting.map_or(self.read, |first| first.predecessor().min(self.read))
    }

    /// Committed position of every lane.
    pub fn positions(&self) -> Vec<Position> {
        self.lanes.iter().map(|lane| lane.state.position).collect()
    }

    /// All documents that are ahead of their lane.
    pub fn floors(&self) -> impl Iterator<Item = &Floor> {
        self.lanes.iter().flat_map(|lane| &lane.state.floors)
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
