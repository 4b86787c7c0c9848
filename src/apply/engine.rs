//! The apply task of one stream: reads the inbox, keeps the lanes busy, runs DDL, confirms what the majority has.
//!
//! One task owns all state; transactions and DDL run beside it and report back. Whatever it cannot be sure of any more
//! (an unknown commit, a new primary, a takeover) ends the session, and the next one starts from what is stored.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use farshore_api::replication::v1::{Fetch, Fetched};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::catalog::{Catalog, Entries, Entry, Presence};
use super::lanes::{DdlId, Floor, Item, Job, LaneStep, Lanes, Limits};
use super::plan::{Floors, Resolved};
use super::route::{Router, Unit};
use super::target::{
    CommitError, DdlStep, Divergence, Election, StreamRecord, Suspect, Target, TargetError, Transaction,
};
use crate::model::{ClusterTime, CollectionUuid, Incarnation, LaneId, Position, SiteName, StreamHash, Term, hash, raw};
use crate::outbox::{self, Disposition, Log, Reader, Stored};

/// Fetches documents from the source (rule K).
pub trait FetchClient: Send + Sync + 'static {
    /// Answers when the source could be asked; waits while the link is down.
    fn fetch(&self, source: &SiteName, request: Fetch) -> impl Future<Output = Result<Fetched, String>> + Send;
}

/// What apply is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was received yet.
    #[default]
    Waiting,
    /// Applying.
    Running,
    /// Trying again.
    Retrying(String),
    /// A person must look; it is tried again now and then.
    Failed { message: String, hint: &'static str },
}

/// Numbers and phase for status and metrics.
#[derive(Clone, Debug, Default)]
pub struct ApplyStatus {
    /// What it is doing.
    pub phase: Phase,
    /// Everything up to here is applied and majority-committed.
    pub applied: Option<Position>,
    /// Changes applied since the process started.
    pub changes: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Transactions committed at the target.
    pub transactions: u64,
    /// Source transactions among them.
    pub source_transactions: u64,
    /// DDL steps done.
    pub ddl: u64,
    /// Documents found different, by kind.
    pub diverged: BTreeMap<&'static str, u64>,
    /// Documents fetched again.
    pub healed: u64,
    /// Transactions tried again.
    pub retries: u64,
    /// What a person must look at, until it is out of the way.
    pub failure: Option<String>,
    /// Stored records that failed their crc.
    pub corrupt: u64,
    /// All lanes stand at one position and no unit is partly applied.
    pub at_cut: bool,
    /// While documents are ahead of their lane: where the target will be consistent again.
    pub consistent_from: Option<ClusterTime>,
    /// Collections that are not replicated, with the reason.
    pub refused: Vec<(String, String)>,
    /// Changes of refused collections that were left out.
    pub left_out: u64,
    /// Stream hash at the newest batch border applied.
    pub hash: StreamHash,
}

/// How apply works; see the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Transactions at once.
    pub workers: usize,
    /// Bytes of changes that wait in memory.
    pub memory: usize,
    /// The target equals the source where the stream begins.
    pub adopted: bool,
}

/// The apply task of one stream.
pub struct Engine<T, F> {
    target: Arc<T>,
    fetch: Arc<F>,
    source: SiteName,
    inbox: Log,
    term: Term,
    options: Options,
    status: watch::Sender<ApplyStatus>,
}

/// Changes in one transaction, at most.
const JOB_CHANGES: usize = 1_000;
/// Bytes in one transaction, at most (one change more may follow).
const JOB_BYTES: usize = 2 << 20;
/// How often the majority's state is asked while something moves. Asking makes the server flush its journal, so this is
/// also how late a majority reader sees what was committed.
const CONFIRM_EVERY: Duration = Duration::from_millis(25);
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// How long a failure a person must look at rests before it is tried again.
const FAILED_RETRY: Duration = Duration::from_secs(5);
/// Tries of one DDL step before the whole session starts afresh.
const DDL_ATTEMPTS: u32 = 10;
/// Keys asked for in one fetch; the answer may hold fewer.
const FETCH_KEYS: usize = 100;

/// What ends the task.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another agent of the site has taken over.
    #[error("another agent took over (term {0}); this agent stops")]
    Deposed(Term),
    /// The inbox cannot be read any more.
    #[error("inbox: {0}")]
    Inbox(#[from] outbox::Error),
}

/// What ends a session.
enum End {
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

impl<T: Target, F: FetchClient> Engine<T, F> {
    /// Prepares applying `inbox` to `target`; the receiver shows the task's status.
    pub fn new(
        target: Arc<T>,
        fetch: Arc<F>,
        source: SiteName,
        inbox: Log,
        term: Term,
        options: Options,
    ) -> (Self, watch::Receiver<ApplyStatus>) {
        let (status, seen) = watch::channel(ApplyStatus::default());
        (Self { target, fetch, source, inbox, term, options, status }, seen)
    }

    /// Runs until cancelled.
    ///
    /// # Errors
    /// See [`Error`]; everything else is retried and shown in the status.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let mut delay = RETRY_MIN;
        loop {
            let before = self.status.borrow().transactions;
            let end = self.session(&cancel).await;
            if self.status.borrow().transactions > before {
                delay = RETRY_MIN;
            }
            let wait = match end {
                End::Cancelled => return Ok(()),
                End::Inbox(error) => {
                    self.recover(error).await?;
                    delay
                }
                End::Target(TargetError::Deposed(term)) => return Err(Error::Deposed(term)),
                End::Target(TargetError::Fatal { message, hint }) => {
                    self.enter(Phase::Failed { message, hint });
                    FAILED_RETRY
                }
                End::Target(error) => {
                    self.enter(Phase::Retrying(error.to_string()));
                    delay
                }
            };
            delay = (delay * 2).min(RETRY_MAX);
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// A damaged inbox is cut back to its last good record; the source ships the rest again.
    async fn recover(&self, error: outbox::Error) -> Result<(), Error> {
        if error.disposition() != Disposition::Recapture {
            return Err(error.into());
        }
        self.enter(Phase::Retrying(error.to_string()));
        if let outbox::Error::Corrupt { .. } = error {
            self.status.send_modify(|status| status.corrupt += 1);
            match self.inbox.salvage().await? {
                Some((end, hash)) => self.inbox.rewind(end, hash, None).await?,
                None => self.begin_inbox_again().await?,
            }
        }
        Ok(())
    }

    /// Nothing of the inbox is readable: it begins again where the stored floor is.
    async fn begin_inbox_again(&self) -> Result<(), Error> {
        if let (Some(state), Ok(Some(record))) = (self.inbox.state(), self.target.record().await) {
            self.inbox.begin(record.incarnation, state.epoch, record.floor, record.hash, None).await?;
        }
        Ok(())
    }

    /// Logs a phase once when it is entered.
    fn enter(&self, phase: Phase) {
        let before = self.status.borrow().phase.clone();
        if before == phase {
            return;
        }
        let said = self.status.borrow().failure.clone();
        match &phase {
            Phase::Running if said.is_none() => tracing::info!(source = %self.source, "applying"),
            Phase::Retrying(reason) if !matches!(before, Phase::Retrying(_)) => {
                tracing::warn!(source = %self.source, reason, "apply interrupted, retrying");
            }
            // Tried again every few seconds, said once.
            Phase::Failed { message, hint } if said.as_ref() != Some(message) => {
                tracing::error!(source = %self.source, reason = message, hint, "apply stopped");
                self.status.send_modify(|status| status.failure = Some(message.clone()));
            }
            Phase::Waiting | Phase::Running | Phase::Retrying(_) | Phase::Failed { .. } => {}
        }
        self.status.send_modify(|status| status.phase = phase);
    }

    async fn session(&self, cancel: &CancellationToken) -> End {
        tokio::select! {
            biased;
            () = cancel.cancelled() => End::Cancelled,
            end = self.work() => end,
        }
    }

    async fn work(&self) -> End {
        match self.open().await {
            Ok(mut session) => {
                self.enter(Phase::Running);
                loop {
                    if let Err(end) = session.step().await {
                        return end;
                    }
                }
            }
            Err(end) => end,
        }
    }

    async fn open(&self) -> Result<Session<'_, T, F>, End> {
        let mut begun = self.inbox.watch();
        begun.wait_for(Option::is_some).await.map_err(|_| End::Cancelled)?;
        let record = match self.target.record().await? {
            Some(record) => record,
            None => self.begin().await?,
        };
        let state = self.inbox.state().ok_or(End::Cancelled)?;
        if record.incarnation != state.incarnation || state.first > record.floor {
            let message = format!(
                "the inbox (from {}) does not continue what was applied (through {})",
                state.first, record.floor
            );
            return Err(TargetError::Moved(message).into());
        }
        let claim = self.target.claim(self.term, self.options.workers).await?;
        let (_, election) = self.target.confirm(None).await?;
        let mut lanes = Lanes::new(claim.lanes, claim.record.floor);
        for (uuid, entry) in &claim.entries {
            lanes.set_collection(*uuid, entry.one_lane, entry.ddl_through);
        }
        let from = lanes.read();
        let session = Session {
            engine: self,
            reader: self.inbox.reader(from),
            floors: Arc::new(floors_of(&lanes)),
            lanes,
            catalog: Catalog::new(claim.entries),
            router: Router::default(),
            steps: BTreeMap::new(),
            tasks: JoinSet::new(),
            idle: (0..self.options.workers).collect(),
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

    /// The stream's first record: everything before the inbox's beginning is held to be applied.
    async fn begin(&self) -> Result<StreamRecord, End> {
        let state = self.inbox.state().ok_or(End::Cancelled)?;
        let hash = if state.first == state.end {
            state.hash
        } else {
            self.inbox.reader(state.first).next().await?.batch.header().hash_before
        };
        let record =
            StreamRecord { incarnation: state.incarnation, floor: state.first, hash, adopted: self.options.adopted };
        self.target.begin(&record, self.term).await?;
        Ok(record)
    }
}

fn floors_of(lanes: &Lanes) -> Floors {
    let mut floors = Floors::new();
    for floor in lanes.floors() {
        let at = floors.entry((floor.collection, floor.key)).or_insert(floor.at);
        *at = (*at).max(floor.at);
    }
    floors
}

/// What a task beside the engine reports.
enum Report {
    Applied { worker: usize, job: Job, result: Result<Applied, TargetError> },
    Ddl { id: DdlId, result: Result<Vec<(CollectionUuid, Entry)>, TargetError> },
    Confirmed { floor: Position, positions: Vec<Position>, persisted: Option<Position>, result: Confirmation },
}

type Confirmation = Result<(Vec<Position>, Election), TargetError>;

/// What applying a job brought about besides the changes.
#[derive(Default)]
struct Applied {
    floors: Vec<(LaneId, Floor)>,
    diverged: Vec<&'static str>,
    healed: u64,
    retries: u64,
}

struct Session<'e, T, F> {
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

impl<T: Target, F: FetchClient> Session<'_, T, F> {
    async fn step(&mut self) -> Result<(), End> {
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

/// Applies one job, fetching what diverged.
struct Apply<T, F> {
    target: Arc<T>,
    fetch: Arc<F>,
    source: SiteName,
    entries: Arc<Entries>,
    floors: Arc<Floors>,
}

/// A job that keeps diverging without anything left to fetch is beyond healing by documents.
const HEAL_ROUNDS: u32 = 20;

impl<T: Target, F: FetchClient> Apply<T, F> {
    async fn run(&self, worker: usize, job: &Job) -> Result<Applied, TargetError> {
        let mut applied = Applied::default();
        let mut resolved: Vec<Resolved> = Vec::new();
        let mut delay = RETRY_MIN;
        let mut rounds = 0;
        loop {
            let lanes = self.with_floors(&job.lanes, &resolved, &mut applied.floors);
            let transaction = Transaction {
                lanes: &lanes,
                items: &job.items,
                resolved: &resolved,
                entries: &self.entries,
                floors: &self.floors,
            };
            match self.target.commit(worker, transaction).await {
                Ok(()) => {
                    applied.healed = resolved.len() as u64;
                    return Ok(applied);
                }
                Err(CommitError::Target(TargetError::Transient(reason))) => {
                    tracing::debug!(reason, "transaction tried again");
                    applied.retries += 1;
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY_MAX);
                }
                Err(CommitError::Target(error)) => return Err(error),
                Err(CommitError::Diverged(divergence)) => {
                    rounds += 1;
                    let found = self.heal(job, &divergence, &mut resolved, &mut applied).await?;
                    if found == 0 && rounds >= HEAL_ROUNDS {
                        return Err(TargetError::Fatal {
                            message: format!("changes at {} keep failing: {divergence}", job.items[0].position),
                            hint: "the target was changed by somebody else; verify and repair the collection",
                        });
                    }
                }
            }
        }
    }

    /// Whether a change is applied at all: its document may be ahead already, its collection may not be replicated, and
    /// then what is at the target says nothing about it.
    fn applies(&self, item: &Item) -> bool {
        let ahead = self.floors.get(&(item.collection, item.key)).is_some_and(|at| *at >= item.position.time);
        let entry = self.entries.get(&item.collection);
        !ahead && entry.is_some_and(|entry| matches!(entry.presence, Presence::Present(_)))
    }

    /// Fetches what diverged; returns how many documents that were.
    async fn heal(
        &self,
        job: &Job,
        divergence: &Divergence,
        resolved: &mut Vec<Resolved>,
        applied: &mut Applied,
    ) -> Result<usize, TargetError> {
        let judged: Vec<Item> = job.items.iter().filter(|item| self.applies(item)).cloned().collect();
        let suspects = self.target.examine(&judged, &self.entries, divergence).await?;
        let known: BTreeSet<_> = resolved.iter().map(|r| (r.floor.collection, r.floor.key)).collect();
        let mut wanted: BTreeMap<CollectionUuid, Vec<Suspect>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for suspect in suspects {
            let id = (suspect.collection, suspect.identity);
            if !known.contains(&id) && seen.insert(id) {
                wanted.entry(suspect.collection).or_default().push(suspect);
            }
        }
        if wanted.is_empty() {
            tokio::time::sleep(RETRY_MIN).await;
        }
        let mut count = 0;
        for (collection, suspects) in wanted {
            for suspect in &suspects {
                let key = key_text(&suspect.key);
                // Fetching is the ordinary way for what an event cannot say; everything else should not happen.
                if matches!(suspect.kind, "path" | "large") {
                    tracing::debug!(%collection, key, kind = suspect.kind, "document fetched again");
                    continue;
                }
                tracing::warn!(%collection, key, kind = suspect.kind, "document differs from the source; fetched again");
                applied.diverged.push(suspect.kind);
            }
            count += suspects.len();
            resolved.extend(self.fetch_all(collection, suspects).await?);
        }
        Ok(count)
    }

    async fn fetch_all(
        &self,
        collection: CollectionUuid,
        suspects: Vec<Suspect>,
    ) -> Result<Vec<Resolved>, TargetError> {
        let Some(entry) = self.entries.get(&collection) else { return Ok(Vec::new()) };
        let mut resolved = Vec::new();
        let mut rest = &suspects[..];
        while !rest.is_empty() {
            let part = &rest[..rest.len().min(FETCH_KEYS)];
            let request = Fetch {
                id: 0,
                database: entry.db.clone(),
                collection: entry.coll.clone(),
                collection_uuid: Bytes::copy_from_slice(&collection.0),
                keys: part.iter().map(|s| Bytes::copy_from_slice(s.key.as_bytes())).collect(),
            };
            let fetched = self.fetch.fetch(&self.source, request).await.map_err(TargetError::Transient)?;
            if !fetched.error.is_empty() {
                return Err(TargetError::Transient(format!("fetch from {}: {}", self.source, fetched.error)));
            }
            let at = ClusterTime(fetched.at);
            let answered = if fetched.collection_gone { part.len() } else { fetched.documents.len().min(part.len()) };
            if answered == 0 {
                return Err(TargetError::Transient(format!("fetch from {}: an empty answer", self.source)));
            }
            for (index, suspect) in part[..answered].iter().enumerate() {
                let document = fetched.documents.get(index).filter(|d| !d.is_empty() && !fetched.collection_gone);
                let floor = Floor { collection, key: suspect.identity, at };
                resolved.push(Resolved { floor, key: suspect.key.clone(), document: document.cloned() });
            }
            rest = &rest[answered..];
        }
        Ok(resolved)
    }

    /// The lane states to store: floors of fetched documents go to the lane their changes come in.
    fn with_floors(
        &self,
        lanes: &[LaneStep],
        resolved: &[Resolved],
        added: &mut Vec<(LaneId, Floor)>,
    ) -> Vec<LaneStep> {
        let mut lanes = lanes.to_vec();
        added.clear();
        for one in resolved {
            let collection = one.floor.collection;
            let one_lane = self.entries.get(&collection).is_some_and(|entry| entry.one_lane);
            let own = raw::get(&one.key, "_id").map(|id| hash::lane_of(collection, &id));
            let lane = if one_lane { Some(hash::lane_of_collection(collection)) } else { own };
            if let Some(step) = lanes.iter_mut().find(|step| Some(step.lane) == lane) {
                step.to.floors.push(one.floor.clone());
                added.push((step.lane, one.floor.clone()));
            }
        }
        lanes
    }
}

fn key_text(key: &bson::RawDocument) -> String {
    let value = bson::Document::try_from(key).map(|d| bson::Bson::Document(d).into_relaxed_extjson().to_string());
    let mut text = value.unwrap_or_else(|_| "unreadable".into());
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
    }
    text
}

/// Makes the inbox continue what is applied: a lost or outdated inbox begins again where the stored floor is, and the
/// source ships from there.
///
/// # Errors
/// The target or the inbox cannot be reached.
pub async fn reconcile<T: Target>(target: &T, inbox: &Log, epoch: crate::model::Epoch) -> Result<(), ReconcileError> {
    let Some(record) = target.record().await? else { return Ok(()) };
    let continues = inbox.state().is_some_and(|state| {
        state.incarnation == record.incarnation && state.first <= record.floor && state.end >= record.floor
    });
    if !continues {
        tracing::warn!(floor = %record.floor, "the inbox does not continue what is applied and begins again there");
        inbox.begin(record.incarnation, epoch, record.floor, record.hash, None).await?;
    }
    Ok(())
}

/// Why the inbox could not be reconciled.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The inbox.
    #[error(transparent)]
    Inbox(#[from] outbox::Error),
}
