//! One session of apply: reads the inbox, keeps the lanes busy, runs DDL, confirms what the majority has.
//!
//! One task owns all state; transactions and DDL run beside it and report back. Whatever it cannot be sure of any more
//! (an unknown commit, a new primary, a takeover) ends the session, and the next one starts from what is stored.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::catalog::{Catalog, Entry, Presence};
use super::engine::Engine;
use super::heal::{Apply, FetchClient, RETRY_MAX, RETRY_MIN};
use super::lanes::{DdlId, Floor, Job, Lanes, Limits};
use super::plan::Floors;
use super::reconcile::continue_from;
use super::route::{Router, Unit};
use super::target::{DdlStep, Election, StreamRecord, Target, TargetError};
use crate::model::{CollectionUuid, Flow, Incarnation, LaneId, Op, Position, StreamHash, raw};
use crate::outbox::{self, Reader, Stored};

/// Bytes in one transaction, at most (one change more may follow).
const JOB_BYTES: usize = 2 << 20;
/// How often the majority's state is asked while something moves. Asking makes the server flush its journal, so this is
/// also how late a majority reader sees what was committed.
const CONFIRM_EVERY: Duration = Duration::from_millis(10);
/// Tries of one DDL step before the whole session starts afresh.
const DDL_ATTEMPTS: u32 = 10;

/// What ends a session.
pub(super) enum End {
    Cancelled,
    Target(TargetError),
    Inbox(outbox::Error),
}

impl From<TargetError> for End {
    fn from(error: TargetError) -> Self {
        Self::Target(error)
    }
}

impl From<outbox::Error> for End {
    fn from(error: outbox::Error) -> Self {
        Self::Inbox(error)
    }
}

/// What a task beside the engine reports.
enum Report {
    Applied { worker: usize, job: Job, result: Result<Vec<(LaneId, Floor)>, TargetError> },
    Ddl { id: DdlId, step: DdlStep, result: Result<Vec<(CollectionUuid, Entry)>, TargetError> },
    Confirmed { floor: Position, positions: Vec<Position>, persisted: Option<Position>, result: Confirmation },
    Forgotten { through: Position, result: Result<(), TargetError> },
}

type Confirmation = Result<(Vec<Position>, Election), TargetError>;

/// The end of a batch.
struct Border {
    end: Position,
    /// Stream hash there.
    hash: StreamHash,
    /// When the batch's newest change was written at the source, milliseconds since the Unix epoch; marks do not count.
    written: Option<i64>,
}

/// See the module text.
pub(super) struct Session<'e, T, F> {
    engine: &'e Engine<T, F>,
    reader: Reader,
    lanes: Lanes,
    catalog: Catalog,
    router: Router,
    steps: BTreeMap<DdlId, DdlStep>,
    /// Where collections were dropped: each is forgotten once the stored floor is past that.
    dropped: BTreeSet<Position>,
    forgetting: bool,
    floors: Arc<Floors>,
    tasks: JoinSet<Report>,
    idle: Vec<usize>,
    /// Ends of batches read.
    borders: VecDeque<Border>,
    election: Election,
    incarnation: Incarnation,
    confirmed: Position,
    persisted: Position,
    to_persist: Option<(Position, StreamHash)>,
    confirming: bool,
    confirm_at: Instant,
    /// A change that cannot be applied was read: nothing more is, what came before it still is applied.
    unreadable: Option<TargetError>,
}

enum Event {
    Batch(Result<Stored, outbox::Error>),
    Report(Option<Result<Report, tokio::task::JoinError>>),
    Tick,
}

impl<'e, T: Target, F: FetchClient> Session<'e, T, F> {
    /// Takes hold of the stream and starts from what is stored.
    pub(super) async fn open(engine: &'e Engine<T, F>) -> Result<Self, End> {
        let mut begun = engine.inbox.watch();
        begun.wait_for(Option::is_some).await.map_err(|_| End::Cancelled)?;
        let record = match engine.target.record().await? {
            Some(record) => record,
            None => begin(engine).await?,
        };
        let state = engine.inbox.state().ok_or(End::Cancelled)?;
        if record.incarnation != state.incarnation || state.first > record.floor {
            let message = format!(
                "the inbox (from {}) does not continue what was applied (through {})",
                state.first, record.floor
            );
            return Err(TargetError::Moved(message).into());
        }
        let claim = engine.target.claim(engine.term, engine.options.workers).await?;
        // An earlier agent may have stored a later floor since the inbox was put in order, and the source may have nothing
        // from before that any more.
        continue_from(&claim.record, &engine.inbox, state.epoch).await?;
        let (_, election) = engine.target.confirm(None).await?;
        let lanes = Lanes::new(claim.lanes, claim.record.floor);
        let from = lanes.read();
        let mut session = Self {
            engine,
            reader: engine.inbox.reader(from),
            floors: Arc::new(floors_of(&lanes)),
            lanes,
            catalog: Catalog::new(claim.entries),
            router: Router::behind(from),
            steps: BTreeMap::new(),
            dropped: BTreeSet::new(),
            forgetting: false,
            tasks: JoinSet::new(),
            idle: (0..engine.options.workers).collect(),
            borders: VecDeque::new(),
            election,
            incarnation: record.incarnation,
            confirmed: claim.record.floor,
            persisted: claim.record.floor,
            to_persist: None,
            confirming: false,
            confirm_at: Instant::now(),
            unreadable: None,
        };
        // What was being healed is found again.
        engine.status.send_modify(|status| status.healing = 0);
        for (uuid, entry) in &*session.catalog.entries() {
            session.note(*uuid, entry);
        }
        session.publish_refused();
        session.publish();
        Ok(session)
    }

    /// Waits for one event and acts on it.
    pub(super) async fn step(&mut self) -> Result<(), End> {
        self.start_ddl();
        self.start_jobs();
        self.start_confirm();
        self.start_forget();
        self.publish_cut();
        let hungry = self.lanes.bytes() < self.engine.options.memory && self.unreadable.is_none();
        let behind = self.lanes.floor() > self.confirmed || self.to_persist.is_some();
        if !behind
            && !self.confirming
            && self.lanes.is_idle()
            && let Some(error) = self.unreadable.take()
        {
            return Err(error.into());
        }
        let event = tokio::select! {
            biased;
            report = self.tasks.join_next(), if !self.tasks.is_empty() => Event::Report(report),
            batch = self.reader.next(), if hungry => Event::Batch(batch),
            () = tokio::time::sleep_until(self.confirm_at), if behind && !self.confirming => Event::Tick,
        };
        match event {
            Event::Tick => Ok(()),
            Event::Batch(batch) => self.feed(&batch?),
            Event::Report(None) => Ok(()),
            Event::Report(Some(Err(error))) => Err(TargetError::Moved(format!("a worker ended: {error}")).into()),
            Event::Report(Some(Ok(report))) => self.report(report),
        }
    }

    fn feed(&mut self, stored: &Stored) -> Result<(), End> {
        let fatal = |message: String, hint| TargetError::Fatal { message, hint };
        let header = stored.batch.header().clone();
        let changes = stored
            .batch
            .changes()
            .map_err(|e| fatal(e.to_string(), "the stored batch is damaged; it is received again"))?;
        let skip = stored.skip_through.max(self.lanes.read());
        let mut units = Vec::new();
        self.router.limit = *self.engine.parts.lock().expect("no holder panics");
        let routed = self.router.feed(&changes, skip, &self.catalog.entries(), &mut units);
        let written = written(&units);
        for unit in units {
            match unit {
                Unit::Change(item) => self.lanes.push(item),
                Unit::Together { items, .. } => self.lanes.push_together(items),
                Unit::Ddl { id, keys, step } => {
                    self.lanes.push_ddl(id, keys);
                    self.steps.insert(id, step);
                }
            }
        }
        if let Err(error) = routed {
            self.unreadable = Some(fatal(error.to_string(), "the change is kept in the inbox; upgrade this agent"));
            return Ok(());
        }
        self.lanes.read_through(self.router.complete(header.end));
        self.borders.push_back(Border { end: header.end, hash: header.hash, written });
        Ok(())
    }

    fn start_jobs(&mut self) {
        let workers = self.engine.options.workers;
        let changes = self.engine.job_changes.load(Ordering::Relaxed);
        let limits = Limits { changes, bytes: JOB_BYTES, lanes: LaneId::COUNT.div_ceil(workers) };
        while let Some(worker) = self.idle.pop() {
            let Some(job) = self.lanes.take(limits) else {
                self.idle.push(worker);
                return;
            };
            let apply = Apply {
                target: Arc::clone(&self.engine.target),
                fetch: Arc::clone(&self.engine.fetch),
                source: self.engine.source.clone(),
                entries: self.catalog.entries(),
                floors: Arc::clone(&self.floors),
                status: self.engine.status.clone(),
            };
            self.tasks.spawn(async move {
                let result = apply.run(worker, &job).await;
                Report::Applied { worker, job, result }
            });
        }
    }

    /// A barrier waits until what came before it cannot be rolled back any more.
    fn start_ddl(&mut self) {
        while let Some(id) = self.lanes.take_ddl() {
            let step = self.steps.remove(&id).expect("every ddl step was kept");
            let target = Arc::clone(&self.engine.target);
            let (positions, election, entries) = (self.lanes.positions(), self.election, self.catalog.entries());
            self.tasks.spawn(async move {
                let attempt = || async {
                    check(target.confirm(None).await, &positions, election)?;
                    target.ddl(id.0, &step, &entries).await
                };
                let mut delay = RETRY_MIN;
                let mut result = attempt().await;
                for _ in 0..DDL_ATTEMPTS {
                    let Err(TargetError::Transient(reason) | TargetError::Conflict(reason)) = &result else { break };
                    tracing::debug!(reason, "ddl tried again");
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY_MAX);
                    result = attempt().await;
                }
                Report::Ddl { id, step, result }
            });
        }
    }

    fn start_forget(&mut self) {
        let through = self.persisted;
        if self.forgetting || self.dropped.first().is_none_or(|at| *at > through) {
            return;
        }
        self.forgetting = true;
        let target = Arc::clone(&self.engine.target);
        self.tasks.spawn(async move { Report::Forgotten { through, result: target.forget(through).await } });
    }

    fn start_confirm(&mut self) {
        let floor = self.lanes.floor();
        if self.confirming || Instant::now() < self.confirm_at || (floor <= self.confirmed && self.to_persist.is_none())
        {
            return;
        }
        self.confirming = true;
        let target = Arc::clone(&self.engine.target);
        let (positions, persist) = (self.lanes.positions(), self.to_persist.take());
        self.tasks.spawn(async move {
            let result = target.confirm(persist).await;
            Report::Confirmed { floor, positions, persisted: persist.map(|(position, _)| position), result }
        });
    }

    fn report(&mut self, report: Report) -> Result<(), End> {
        match report {
            Report::Applied { worker, job, result } => {
                let floors = result.map_err(|error| match error {
                    TargetError::TooLarge(message) => self.engine.too_large(&job, message),
                    other => other,
                })?;
                self.engine.larger();
                self.idle.push(worker);
                self.applied(&job, floors);
            }
            Report::Ddl { id, step, result } => {
                for (uuid, entry) in result? {
                    self.note(uuid, &entry);
                    self.catalog.put(uuid, entry);
                }
                self.lanes.ddl_done(id);
                self.count_ddl(&step);
                self.publish_refused();
                self.publish();
            }
            Report::Confirmed { floor, positions, persisted, result } => {
                check(result, &positions, self.election)?;
                self.confirm_at = Instant::now() + CONFIRM_EVERY;
                self.confirming = false;
                self.confirmed(floor, persisted);
            }
            Report::Forgotten { through, result } => {
                result?;
                self.forgetting = false;
                self.forget(through);
            }
        }
        Ok(())
    }

    /// Takes in what the catalog says of a collection.
    fn note(&mut self, uuid: CollectionUuid, entry: &Entry) {
        self.lanes.set_collection(uuid, entry.one_lane, entry.ddl_through);
        if entry.presence == Presence::Dropped {
            self.dropped.insert(entry.ddl_through);
        }
    }

    fn forget(&mut self, through: Position) {
        self.dropped.retain(|at| *at > through);
        self.catalog.forget(through).into_iter().for_each(|uuid| self.lanes.forget_collection(uuid));
    }

    /// A step that is done again after a new beginning is counted once.
    fn count_ddl(&self, step: &DdlStep) {
        let DdlStep::Event { position, event } = step else { return };
        let mut counted = self.engine.counted_ddl.lock().expect("no holder panics");
        if counted.insert(*position) {
            self.engine.status.send_modify(|status| status.flow.count(Op::Create, event.len()));
        }
    }

    fn applied(&mut self, job: &Job, floors: Vec<(LaneId, Floor)>) {
        let refloor = !floors.is_empty() || !self.floors.is_empty();
        self.lanes.done(job.id, floors);
        if refloor {
            self.floors = Arc::new(floors_of(&self.lanes));
        }
        let entries = self.catalog.entries();
        let present = |c: &CollectionUuid| entries.get(c).is_some_and(|e| matches!(e.presence, Presence::Present(_)));
        let (mut flow, mut left_out) = (Flow::default(), 0);
        for item in &job.items {
            match present(&item.collection) {
                true => flow.count(item.op, item.bytes.len()),
                false => left_out += 1,
            }
        }
        self.engine.status.send_modify(|status| {
            status.transactions += 1;
            status.source_transactions += u64::from(job.meeting);
            status.flow.add(&flow);
            status.left_out += left_out;
        });
    }

    fn confirmed(&mut self, floor: Position, persisted: Option<Position>) {
        if let Some(position) = persisted {
            self.persisted = position;
            self.engine.inbox.release(self.incarnation, position);
            self.engine.counted_ddl.lock().expect("no holder panics").retain(|at| *at > position);
        }
        self.confirmed = self.confirmed.max(floor);
        let (now, before) = ((self.engine.options.clock)(), self.engine.status.borrow().applied);
        let mut took: Vec<Duration> = Vec::new();
        while let Some(Border { end, hash, written }) = self.borders.pop_front_if(|border| border.end <= self.confirmed)
        {
            if end > self.persisted {
                self.to_persist = Some((end, hash));
            }
            // What an earlier session of this process confirmed is not measured again.
            if let Some(written) = written.filter(|_| before < Some(end)) {
                took.push(Duration::from_millis(u64::try_from(now - written).unwrap_or(0)));
            }
        }
        self.engine.status.send_modify(|status| took.into_iter().for_each(|took| status.commit_to_apply.record(took)));
        self.publish();
    }

    fn publish_cut(&self) {
        let at_cut = self.lanes.is_even() && self.router.at_cut();
        self.engine.status.send_if_modified(|status| std::mem::replace(&mut status.at_cut, at_cut) != at_cut);
    }

    fn publish_refused(&self) {
        let entries = self.catalog.entries();
        let refused = entries.values().filter_map(|entry| match &entry.presence {
            Presence::Refused(reason) => Some((format!("{}.{}", entry.db, entry.coll), reason.clone())),
            _ => None,
        });
        let refused: Vec<(String, String)> = refused.collect();
        self.engine.status.send_modify(|status| {
            // Each process says it once.
            for (collection, reason) in refused.iter().filter(|one| !status.refused.contains(one)) {
                tracing::error!(collection, reason, "a collection is not replicated");
            }
            status.refused = refused;
        });
    }

    fn publish(&self) {
        let position = self.confirmed;
        self.engine.status.send_modify(|status| {
            if position >= status.failure_through && status.failure.take().is_some() {
                tracing::info!(source = %self.engine.source, "what stopped apply is out of the way");
            }
            // A new session begins at the stored floor, which may be behind what the last one saw confirmed.
            status.applied = status.applied.max(Some(position));
            status.errors = self.engine.target.errors();
            status.consistent_from = self.floors.values().max().copied();
            if let Some((_, hash)) = self.to_persist {
                status.hash = hash;
            }
        });
    }
}

/// The stream's first record: everything before the inbox's beginning is held to be applied.
async fn begin<T: Target, F: FetchClient>(engine: &Engine<T, F>) -> Result<StreamRecord, End> {
    let state = engine.inbox.state().ok_or(End::Cancelled)?;
    let hash = if state.first == state.end {
        state.hash
    } else {
        engine.inbox.reader(state.first).next().await?.batch.header().hash_before
    };
    let record =
        StreamRecord { incarnation: state.incarnation, floor: state.first, hash, adopted: engine.options.adopted };
    engine.target.begin(&record, engine.term).await?;
    Ok(record)
}

/// When the newest of these changes was written at the source.
fn written(units: &[Unit]) -> Option<i64> {
    let newest = match units.last()? {
        Unit::Change(item) => &item.bytes,
        Unit::Together { items, .. } => &items.last()?.bytes,
        Unit::Ddl { step: DdlStep::Event { event, .. }, .. } => event,
        Unit::Ddl { step: DdlStep::Adopt { .. }, .. } => return None,
    };
    raw::get(bson::RawDocument::from_bytes(newest).ok()?, "wallTime")?.datetime()
}

fn floors_of(lanes: &Lanes) -> Floors {
    let mut floors = Floors::new();
    for floor in lanes.floors() {
        let at = floors.entry((floor.collection, floor.key)).or_insert(floor.at);
        *at = (*at).max(floor.at);
    }
    floors
}

/// What this process committed must be what the majority has, under the same primary.
fn check(confirmation: Confirmation, believed: &[Position], election: Election) -> Result<(), TargetError> {
    let (positions, now) = confirmation?;
    if now != election {
        return Err(TargetError::Moved("the target has a new primary".into()));
    }
    if positions.iter().zip(believed).any(|(stored, believed)| stored < believed) {
        return Err(TargetError::Moved("a commit was rolled back".into()));
    }
    Ok(())
}
