//! The apply task of one stream: opens sessions one after another and decides what comes after each.
//!
//! Everything passing is retried here, a damaged inbox is cut back, and what a person must look at is said once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::heal::{FetchClient, RETRY_MAX, RETRY_MIN};
use super::lanes::Job;
use super::route::PartLimit;
use super::session::{End, Session};
use super::status::{ApplyStatus, Phase};
use super::target::{Target, TargetError};
use crate::model::{Position, SiteName, Term};
use crate::outbox::{self, Disposition, Log};

/// How apply works; see the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Transactions at once.
    pub workers: usize,
    /// Bytes of changes that wait in memory.
    pub memory: usize,
    /// The target equals the source where the stream begins.
    pub adopted: bool,
    /// Wall clock of this site, milliseconds since the Unix epoch.
    pub clock: fn() -> i64,
}

/// The apply task of one stream.
pub struct Engine<T, F> {
    pub(super) target: Arc<T>,
    pub(super) fetch: Arc<F>,
    pub(super) source: SiteName,
    pub(super) inbox: Log,
    pub(super) term: Term,
    pub(super) options: Options,
    pub(super) status: watch::Sender<ApplyStatus>,
    /// Catalog changes that were counted and may be done again by the next session.
    pub(super) counted_ddl: Mutex<BTreeSet<Position>>,
    /// Changes in one transaction, at most; fewer for a while after the server would not take one.
    pub(super) job_changes: AtomicUsize,
    /// What of a source transaction is applied as a whole.
    pub(super) parts: Mutex<PartLimit>,
}

/// Changes in one transaction, at most.
const JOB_CHANGES: usize = 1_000;
/// How long a failure a person must look at rests before it is tried again.
const FAILED_RETRY: Duration = Duration::from_secs(5);

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
        let (counted_ddl, job_changes, parts) = (Mutex::default(), AtomicUsize::new(JOB_CHANGES), Mutex::default());
        (Self { target, fetch, source, inbox, term, options, status, counted_ddl, job_changes, parts }, seen)
    }

    /// The server's cache does not take a job: the next ones are smaller, and so is what of a source transaction is applied
    /// as a whole when the job was that. Returns what ends the session.
    pub(super) fn too_large(&self, job: &Job, message: String) -> TargetError {
        let changes = job.items.len();
        if changes <= 1 {
            return TargetError::Fatal { message, hint: "give the target's mongod a larger WiredTiger cache" };
        }
        if job.meeting {
            let bytes = job.items.iter().map(|item| item.bytes.len()).sum();
            *self.parts.lock().expect("no holder panics") = PartLimit::below(changes, bytes);
            let hint = "give the target's mongod a larger WiredTiger cache";
            tracing::warn!(
                changes,
                bytes,
                hint,
                "a source transaction is too large for the target; it is applied in parts"
            );
        } else {
            self.job_changes.store((changes / 8).max(1), Ordering::Relaxed);
            tracing::warn!(changes, "a transaction is too large for the target; they are made smaller for a while");
        }
        TargetError::TooLarge(message)
    }

    /// A transaction was committed.
    pub(super) fn larger(&self) {
        let now = self.job_changes.load(Ordering::Relaxed);
        self.job_changes.store(JOB_CHANGES.min(now + 1), Ordering::Relaxed);
        self.parts.lock().expect("no holder panics").grow();
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
            self.status.send_modify(|status| (status.errors, status.at_cut) = (self.target.errors(), false));
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
                    self.status.send_modify(|status| status.retries += 1);
                    self.enter(Phase::Failed { message, hint });
                    FAILED_RETRY
                }
                End::Target(error) => {
                    self.status.send_modify(|status| status.retries += 1);
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
            // Without the floor nothing can be decided; the damage is met again.
            let (Some(state), Ok(Some(record))) = (self.inbox.state(), self.target.record().await) else {
                return Ok(());
            };
            // What is applied need not be received again: the source may have nothing of it left.
            match self.inbox.salvage(record.floor).await? {
                Some((end, hash)) => self.inbox.rewind(end, hash, None).await?,
                None => self.inbox.begin(record.incarnation, state.epoch, record.floor, record.hash, None).await?,
            }
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
            Phase::Failed { message, hint } if said.as_ref().map(|(said, _)| said) != Some(message) => {
                tracing::error!(source = %self.source, reason = message, hint, "apply stopped");
                let received = self.inbox.state().map_or(Position::ZERO, |state| state.end);
                self.status.send_modify(|status| {
                    (status.failure, status.failure_through) = (Some((message.clone(), *hint)), received);
                });
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
        match Session::open(self).await {
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
}
