//! Sends generated operations to a cluster, through elections and lost connections.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bson::raw::RawDocumentBuf;
use bson::rawdoc;
use mongodb::options::WriteConcern;
use mongodb::{Client, ClientSession};
use tokio::time::Instant;

use super::Profile;
use super::counters::Ledger;
use super::counts::Counts;
use super::generate::Generator;
use super::kind::Kind;
use super::op::{Mode, Op, Step};
use super::retry::{self, PAUSE, Reply};

/// When a run ends.
#[derive(Clone, Debug)]
pub enum Until {
    /// After this many operations.
    Operations(u64),
    /// After this long.
    Elapsed(Duration),
    /// When the flag is set.
    Flag(Arc<AtomicBool>),
}

/// Counts down to the end of a run.
pub(super) struct Stop {
    left: AtomicU64,
    deadline: Option<Instant>,
    flag: Option<Arc<AtomicBool>>,
}

impl Stop {
    pub(super) fn new(until: Until) -> Self {
        let mut stop = Self { left: AtomicU64::new(u64::MAX), deadline: None, flag: None };
        match until {
            Until::Operations(count) => stop.left = AtomicU64::new(count),
            Until::Elapsed(time) => stop.deadline = Some(Instant::now() + time),
            Until::Flag(flag) => stop.flag = Some(flag),
        }
        stop
    }

    /// True when the run shall end now, also in the middle of trying again.
    pub(super) fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            || self.flag.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    /// Takes the right to one more operation.
    pub(super) fn take(&self) -> bool {
        let take = |left: u64| left.checked_sub(1);
        !self.is_over() && self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

/// A seeded random workload over all forms of writes. One per database prefix.
///
/// With one writer the same seed gives the same operations in the same order. The state of the cluster
/// is the truth: a write of unknown outcome is tried again or let go, and nothing depends on which.
pub struct Workload {
    seed: u64,
    writers: usize,
    patience: Duration,
    database: String,
    generator: Mutex<Generator>,
    setup_done: AtomicBool,
    ledger: Mutex<Ledger>,
}

/// What the writers of one run share.
struct Run<'a> {
    workload: &'a Workload,
    client: &'a Client,
    stop: Stop,
    /// Set at the first lost outcome: from then on the generator's belief may be wrong.
    disturbed: AtomicBool,
    counts: Mutex<Counts>,
}

/// A session whose transaction numbers are ours.
struct Numbered {
    // Never given back: the driver's own, lower numbers would then be refused as too old.
    session: ManuallyDrop<ClientSession>,
    number: i64,
}

impl Numbered {
    async fn start(client: &Client) -> Result<Self> {
        // Above any number the driver has used on a session that it takes from its pool.
        let session = ManuallyDrop::new(client.start_session().await?);
        Ok(Self { session, number: 1 << 40 })
    }
}

enum Outcome {
    Done,
    Idle,
    Refused(i32),
    Unknown,
}

impl Workload {
    /// A workload on databases whose names start with `prefix`.
    pub fn new(seed: u64, profile: Profile, prefix: &str) -> Self {
        Self {
            seed,
            writers: profile.writers.max(1),
            patience: profile.patience,
            database: format!("{prefix}_a"),
            generator: Mutex::new(Generator::new(seed, profile, prefix)),
            setup_done: AtomicBool::new(false),
            ledger: Mutex::new(Ledger::default()),
        }
    }

    /// The seed, to print when something fails.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Runs until the condition is met. May be called again: it goes on where it stopped.
    pub async fn run(&self, client: &Client, until: Until) -> Result<Counts> {
        let run = Run {
            workload: self,
            client,
            stop: Stop::new(until),
            disturbed: AtomicBool::new(self.writers > 1),
            counts: Mutex::new(Counts::default()),
        };
        if !self.setup_done.swap(true, Ordering::Relaxed) {
            let ops = lock(&self.generator).setup();
            let mut numbered = Numbered::start(client).await?;
            for op in ops {
                run.operation(op, &mut numbered).await?;
            }
        }
        futures::future::try_join_all((0..self.writers).map(|_| run.writer()))
            .await
            .with_context(|| format!("workload with seed {}", self.seed))?;
        Ok(run.counts.into_inner().expect("no writer panicked"))
    }

    /// Checks the counters against what was acknowledged, on the source or on a copy of it.
    pub async fn check_counters(&self, client: &Client) -> Result<()> {
        let ledger = lock(&self.ledger).clone();
        ledger.check(client, &self.database).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no writer panicked")
}

impl Run<'_> {
    async fn writer(&self) -> Result<()> {
        let mut numbered = Numbered::start(self.client).await?;
        while self.stop.take() {
            let op = lock(&self.workload.generator).next_op();
            self.operation(op, &mut numbered).await?;
        }
        Ok(())
    }

    async fn operation(&self, op: Op, numbered: &mut Numbered) -> Result<()> {
        let outcome = match op.mode {
            Mode::Plain => self.plain(&op).await,
            Mode::Retryable => self.retryable(&op, numbered).await,
            Mode::Transaction { commit } => self.transaction(&op, commit).await,
            Mode::Counter(counter) => self.count(&op, counter).await,
        };
        let outcome = outcome.with_context(|| {
            let first = op.steps.first();
            let name = first.map(|step| retry::command_name(&step.command)).unwrap_or_default();
            format!("operation '{}' ({name} on {:?})", op.kind.name(), first.map(|s| &s.database))
        })?;
        self.tally(op.kind, outcome);
        Ok(())
    }

    fn tally(&self, kind: Kind, outcome: Outcome) {
        let mut counts = lock(&self.counts);
        let tally = counts.kinds.entry(kind).or_default();
        match outcome {
            Outcome::Done => tally.done += 1,
            Outcome::Idle => tally.idle += 1,
            Outcome::Refused(_) => tally.refused += 1,
            Outcome::Unknown => tally.unknown += 1,
        }
        if let Outcome::Refused(code) = outcome {
            *counts.refusals.entry((kind, code)).or_default() += 1;
        }
    }

    fn disturbed(&self) -> bool {
        self.disturbed.load(Ordering::Relaxed)
    }

    async fn plain(&self, op: &Op) -> Result<Outcome> {
        let mut outcome = Outcome::Idle;
        for step in &op.steps {
            let command = with_concern(step, op.majority);
            match self.insist(op, step, command, None).await? {
                Some(Reply::Done(true)) => outcome = Outcome::Done,
                Some(Reply::Refused(code)) if !matches!(outcome, Outcome::Done) => {
                    outcome = Outcome::Refused(code);
                }
                Some(_) => {}
                None => return Ok(Outcome::Unknown),
            }
        }
        Ok(outcome)
    }

    /// One statement under a transaction number: however often it is sent, it is applied once.
    async fn retryable(&self, op: &Op, numbered: &mut Numbered) -> Result<Outcome> {
        let step = op.steps.first().context("a retryable operation has one step")?;
        let mut command = with_concern(step, op.majority);
        numbered.number += 1;
        command.append(bson::raw::cstr!("txnNumber"), numbered.number);
        Ok(match self.insist(op, step, command, Some(&mut *numbered.session)).await? {
            Some(Reply::Done(true)) => Outcome::Done,
            Some(Reply::Refused(code)) => Outcome::Refused(code),
            Some(_) => Outcome::Idle,
            None => Outcome::Unknown,
        })
    }

    /// Sends until there is an answer; none when the run ends first.
    async fn insist(
        &self,
        op: &Op,
        step: &Step,
        command: RawDocumentBuf,
        mut session: Option<&mut ClientSession>,
    ) -> Result<Option<Reply>> {
        let db = self.client.database(&step.database);
        let patience = Instant::now() + self.workload.patience;
        loop {
            let session = session.as_deref_mut();
            let disturbed = self.disturbed();
            match retry::send(&db, command.clone(), session, op.expect, disturbed).await? {
                Reply::Again(reason) => {
                    if !self.pause(patience, &reason).await? {
                        return Ok(None);
                    }
                }
                reply => return Ok(Some(reply)),
            }
        }
    }

    /// Waits before another try; false when the run is over.
    async fn pause(&self, patience: Instant, reason: &str) -> Result<bool> {
        self.disturbed.store(true, Ordering::Relaxed);
        lock(&self.counts).retries += 1;
        if self.stop.is_over() {
            return Ok(false);
        }
        if Instant::now() > patience {
            bail!("no success for {:?}, last: {reason}", self.workload.patience);
        }
        tokio::time::sleep(PAUSE).await;
        Ok(true)
    }

    async fn transaction(&self, op: &Op, commit: bool) -> Result<Outcome> {
        let patience = Instant::now() + self.workload.patience;
        loop {
            let reason = match self.transaction_once(op, commit).await? {
                Ok(outcome) => return Ok(outcome),
                Err(reason) => reason,
            };
            if !self.pause(patience, &reason).await? {
                return Ok(Outcome::Unknown);
            }
        }
    }

    /// One try. The inner error is a reason to try the whole again.
    async fn transaction_once(&self, op: &Op, commit: bool) -> Result<std::result::Result<Outcome, String>> {
        let concern = if op.majority { WriteConcern::majority() } else { WriteConcern::nodes(1) };
        let mut session = self.client.start_session().await?;
        session.start_transaction().write_concern(concern).await?;
        for step in &op.steps {
            let db = self.client.database(&step.database);
            let command = step.command.clone();
            let sent = retry::send(&db, command, Some(&mut session), op.expect, self.disturbed()).await;
            let give_up = match sent? {
                Reply::Done(_) => continue,
                Reply::Refused(code) => Ok(Outcome::Refused(code)),
                Reply::Again(reason) => Err(reason),
            };
            // The server has aborted it already; an error here says just that.
            session.abort_transaction().await.ok();
            return Ok(give_up);
        }
        if !commit {
            session.abort_transaction().await.ok();
            return Ok(Ok(Outcome::Done));
        }
        Ok(match session.commit_transaction().await {
            Ok(()) => Ok(Outcome::Done),
            // The driver has sent the commit twice. Whether it took place is the cluster's business.
            Err(error) if error.contains_label(mongodb::error::UNKNOWN_TRANSACTION_COMMIT_RESULT) => {
                self.disturbed.store(true, Ordering::Relaxed);
                Ok(Outcome::Unknown)
            }
            Err(error) if retry::is_again(&error) => Err(error.to_string()),
            Err(error) => bail!(error),
        })
    }

    /// One increment, sent once.
    async fn count(&self, op: &Op, counter: i32) -> Result<Outcome> {
        let step = op.steps.first().context("a counter operation has one step")?;
        let db = self.client.database(&step.database);
        let reply = retry::send(&db, with_concern(step, true), None, op.expect, self.disturbed()).await?;
        let mut ledger = lock(&self.workload.ledger);
        Ok(match reply {
            Reply::Done(_) => {
                ledger.acknowledged(counter);
                Outcome::Done
            }
            Reply::Refused(code) => Outcome::Refused(code),
            Reply::Again(_) => {
                ledger.unknown(counter);
                self.disturbed.store(true, Ordering::Relaxed);
                Outcome::Unknown
            }
        })
    }
}

/// The step's command with its write concern.
fn with_concern(step: &Step, majority: bool) -> RawDocumentBuf {
    let mut command = step.command.clone();
    let concern = if majority {
        rawdoc! { "w": "majority" }
    } else {
        rawdoc! { "w": 1 }
    };
    command.append(bson::raw::cstr!("writeConcern"), concern);
    command
}
