//! One session of apply: reads the inbox, keeps the lanes busy, runs DDL, confirms what the majority has.
//!
//! One task owns all state; transactions and DDL run beside it and report back. Whatever it cannot be sure of any more
//! (an unknown commit, a new primary, a takeover) ends the session, and the next one starts from what is stored.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::catalog::{Catalog, Entry, Presence};
use super::engine::Engine;
use super::heal::{Applied, Apply, FetchClient, RETRY_MAX, RETRY_MIN};
use super::lanes::{DdlId, Job, Lanes, Limits};
use super::plan::Floors;
use super::route::{Router, Unit};
use super::target::{DdlStep, Election, StreamRecord, Target, TargetError};
use crate::model::{CollectionUuid, Incarnation, LaneId, Position, StreamHash};
use crate::outbox::{self, Reader, Stored};

/// Changes in one transaction, at most.
const JOB_CHANGES: usize = 1_000;
/// Bytes in one transaction, at most (one change more may follow).
const JOB_BYTES: usize = 2 << 20;
/// How often the majority's state is asked while something moves. Asking makes the server flush its journal, so this is
/// also how late a majority reader sees what was committed.
const CONFIRM_EVERY: Duration = Duration::from_millis(25);
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
    Applied { worker: usize, job: Job, result: Result<Applied, TargetError> },
    Ddl { id: DdlId, result: Result<Vec<(CollectionUuid, Entry)>, TargetError> },
    Confirmed { floor: Position, positions: Vec<Position>, persisted: Option<Position>, result: Confirmation },
}

type Confirmation = Result<(Vec<Position>, Election), TargetError>;

/// See the module text.
pub(super) struct Session<'e, T, F> {
    engine: &'e Engine<T, F>,
    reader: Reader,
    lanes: Lanes,
    catalog: Catalog,
    router: Router,
    steps: BTreeMap<DdlId, DdlStep>,
    floors: Arc<Floors>,
    tasks: JoinSet<Report>,
    idle: Vec<usize>,
    /// Ends of batches read, with the stream hash there.
    borders: VecDeque<(Position, StreamHash)>,
    election: Election,
    incarnation: Incarnation,
    confirmed: Position,
    persisted: Position,
    to_persist: Option<(Position, StreamHash)>,
    confirming: bool,
    confirm_at: Instant,
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
        let (_, election) = engine.target.confirm(None).await?;
        let mut lanes = Lanes::new(claim.lanes, claim.record.floor);
        for (uuid, entry) in &claim.entries {
            lanes.set_collection(*uuid, entry.one_lane, entry.ddl_through);
        }
        let from = lanes.read();
        let session = Self {
            engine,
            reader: engine.inbox.reader(from),
            floors: Arc::new(floors_of(&lanes)),
            lanes,
            catalog: Catalog::new(claim.entries),
            router: Router::default(),
            steps: BTreeMap::new(),
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
        };
        session.publish();
        Ok(session)
    }

    /// Waits for one event and acts on it.
    pub(super) async fn step(&mut self) -> Result<(), End> {
        self.start_ddl();
        self.start_jobs();
        self.start_confirm();
        let hungry = self.lanes.bytes() < self.engine.options.memory;
        let behind = self.lanes.floor() > self.confirmed || self.to_persist.is_some();
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
        let routed = self.router.feed(&changes, skip, &self.catalog.entries(), &mut units);
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
        routed.map_err(|e| fatal(e.to_string(), "the change is kept in the inbox; upgrade this agent"))?;
        self.lanes.read_through(self.router.complete(header.end));
        self.borders.push_back((header.end, header.hash));
        Ok(())
    }

    fn start_jobs(&mut self) {
        let workers = self.engine.options.workers;
        let limits = Limits { changes: JOB_CHANGES, bytes: JOB_BYTES, lanes: LaneId::COUNT.div_ceil(workers) };
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
                    let Err(TargetError::Transient(reason)) = &result else { break };
                    tracing::debug!(reason, "ddl tried again");
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY_MAX);
                    result = attempt().await;
                }
                Report::Ddl { id, result }
            });
        }
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
                let applied = result?;
                self.idle.push(worker);
                self.applied(&job, applied);
            }
            Report::Ddl { id, result } => {
                for (uuid, entry) in result? {
                    self.lanes.set_collection(uuid, entry.one_lane, entry.ddl_through);
                    if let Presence::Refused(reason) = &entry.presence {
                        tracing::error!(collection = %format!("{}.{}", entry.db, entry.coll), reason, "a collection is not replicated");
                    }
                    self.catalog.put(uuid, entry);
                }
                self.lanes.ddl_done(id);
                self.engine.status.send_modify(|status| status.ddl += 1);
                self.publish();
            }
            Report::Confirmed { floor, positions, persisted, result } => {
                check(result, &positions, self.election)?;
                self.confirm_at = Instant::now() + CONFIRM_EVERY;
                self.confirming = false;
                self.confirmed(floor, persisted);
            }
        }
        Ok(())
    }

    fn applied(&mut self, job: &Job, applied: Applied) {
        let refloor = !applied.floors.is_empty() || !self.floors.is_empty();
        self.lanes.done(job.id, applied.floors);
        if refloor {
            self.floors = Arc::new(floors_of(&self.lanes));
        }
        let entries = self.catalog.entries();
        let present = |c: &CollectionUuid| entries.get(c).is_some_and(|e| matches!(e.presence, Presence::Present(_)));
        let left_out = job.items.iter().filter(|item| !present(&item.collection)).count() as u64;
        self.engine.status.send_modify(|status| {
            status.transactions += 1;
            status.source_transactions += u64::from(job.meeting);
            status.changes += job.items.len() as u64 - left_out;
            status.left_out += left_out;
            status.bytes += job.items.iter().map(|item| item.bytes.len() as u64).sum::<u64>();
            status.healed += applied.healed;
            status.retries += applied.retries;
            for kind in applied.diverged {
                *status.diverged.entry(kind).or_default() += 1;
            }
        });
    }

    fn confirmed(&mut self, floor: Position, persisted: Option<Position>) {
        if let Some(position) = persisted {
            self.persisted = position;
            self.engine.inbox.release(self.incarnation, position);
        }
        self.confirmed = self.confirmed.max(floor);
        while let Some((position, hash)) = self.borders.front().copied() {
            if position > self.confirmed {
                break;
            }
            self.borders.pop_front();
            if position > self.persisted {
                self.to_persist = Some((position, hash));
            }
        }
        self.publish();
    }

    fn publish(&self) {
        let entries = self.catalog.entries();
        let refused = entries.values().filter_map(|entry| match &entry.presence {
            Presence::Refused(reason) => Some((format!("{}.{}", entry.db, entry.coll), reason.clone())),
            _ => None,
        });
        let refused = refused.collect();
        let position = self.confirmed;
        let idle = self.lanes.is_idle();
        self.engine.status.send_modify(|status| {
            if idle && status.failure.take().is_some() {
                tracing::info!(source = %self.engine.source, "what stopped apply is out of the way");
            }
            // A new session begins at the stored floor, which may be behind what the last one saw confirmed.
            status.applied = status.applied.max(Some(position));
            status.at_cut = self.lanes.is_idle() && self.router.at_cut();
            status.consistent_from = self.floors.values().max().copied();
            status.refused = refused;
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
