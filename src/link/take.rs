//! Shell of the [receiver](super::receiver): stores batches in the inbox in order, with many writes on their way at once, and carries
//! fetches to the source.
//!
//! A full inbox is no error: what was accepted waits here (bounded by the credit, which stops growing) and is tried again.
//! [`Take::next`] is cancel-safe, [`Take::apply`] never waits.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use farshore_api::replication::v1 as pb;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::hub::{FetchJob, PeerEntry, Shared};
use super::receiver::{self, Action, InboxView, Receiver};
use super::status::{SourceWord, note_reject};
use super::wire::{Reason, Receiving, Rejection};
use crate::model::{Batch, Epoch, Incarnation, Position, StreamHash, Term};
use crate::outbox::{Commit, Disposition, Error, Log, LogState};

/// Fetches on their way at once.
const ASKED: usize = 8;
/// A full inbox is tried again after this.
const FULL_RETRY: Duration = Duration::from_millis(500);

#[derive(Clone)]
enum Op {
    Begin { incarnation: Incarnation, epoch: Epoch, at: Position, hash: StreamHash },
    Term(Term),
    Store(Batch),
}

/// What a take waits for.
pub(super) enum Event {
    /// An operation was done or, for a batch, queued.
    Written(Result<Option<Commit>, Error>),
    Durable(Result<LogState, Error>),
    Retry,
    Applied,
    Job(FetchJob),
}

/// What comes of it.
pub(super) enum Outcome {
    Nothing,
    /// The acknowledgement has changed.
    Ack,
    /// So it has, because something became durable.
    Stored,
    /// Ask the source.
    Fetch(pb::Fetch),
    Reject(Rejection),
    Failed(String),
}

/// The target's half of a session.
pub(super) struct Take {
    shared: Arc<Shared>,
    machine: Receiver,
    /// What our Hello said is durable.
    told: Option<Position>,
    log: Log,
    ops: VecDeque<Op>,
    current: Option<Op>,
    writing: Option<BoxFuture<'static, Result<Option<Commit>, Error>>>,
    /// Batches queued in the log and not yet durable, with their commits in the same order.
    inflight: VecDeque<Batch>,
    commits: FuturesOrdered<Commit>,
    /// The log is full: nothing new is queued, and after the commits on their way have ended it is tried again at this time.
    full: Option<Instant>,
    applied: Option<watch::Receiver<Option<Position>>>,
    jobs: mpsc::Receiver<FetchJob>,
    asked: BTreeMap<u64, FetchJob>,
    next_id: u64,
}

impl Take {
    /// Starts receiving what our own Hello said.
    pub(super) fn start(shared: &Arc<Shared>, receiving: Receiving, log: Log) -> Self {
        let state = log.state();
        let inbox = state.as_ref().map(|s| InboxView { incarnation: s.incarnation, end: s.end, hash: s.hash });
        let term = state.as_ref().map_or(Term(0), |state| state.term);
        let applied = shared.inputs.applied.get(&receiving.source).cloned();
        let (sender, jobs) = mpsc::channel(ASKED);
        let told = receiving.received.map(|standing| standing.position);
        let machine = Receiver::new(receiving, inbox, shared.config.epoch, term, shared.config.credit);
        let mut take = Self {
            shared: shared.clone(),
            machine,
            told,
            log,
            ops: VecDeque::new(),
            current: None,
            writing: None,
            inflight: VecDeque::new(),
            commits: FuturesOrdered::new(),
            full: None,
            applied,
            jobs,
            asked: BTreeMap::new(),
            next_id: 1,
        };
        take.entry().incoming.send_modify(|view| {
            view.open = true;
            view.received = take.machine.durable();
        });
        take.entry().fetch.send_replace(Some(sender));
        take.measure();
        take
    }

    fn entry(&self) -> &PeerEntry {
        self.shared.peers.get(self.machine.source()).expect("sessions are with peers only")
    }

    /// Looks at the inbox again. One that was cut back (a damaged record) must be received again from its end, which only a
    /// new session asks for; the source may have nothing left to ship in this one. Hello is an acknowledgement too, and
    /// was said a while before this session began to store.
    pub(super) fn tick(&mut self) -> Outcome {
        self.measure();
        let kept = self.log.state().map(|state| state.end);
        match self.machine.durable().max(self.told) {
            Some(acknowledged) if kept < Some(acknowledged) => {
                let kept = kept.map_or("its beginning".to_owned(), |end| end.to_string());
                Outcome::Failed(format!("the inbox was cut back from {acknowledged} to {kept}; it is received again"))
            }
            _ => Outcome::Nothing,
        }
    }

    /// Looks again how much the inbox can take.
    fn measure(&mut self) {
        let room = self.shared.room();
        self.machine.on(receiver::Event::Room(room));
    }

    pub(super) fn ack(&mut self) -> pb::Ack {
        let applied = self.applied.as_mut().and_then(|applied| *applied.borrow_and_update());
        let ack = self.machine.ack(applied);
        self.entry().incoming.send_modify(|view| {
            view.received = self.machine.durable();
            view.applied = applied;
        });
        ack
    }

    pub(super) async fn next(&mut self) -> Event {
        if self.full.is_none() {
            self.begin_writing();
        }
        let retry = self.full.filter(|_| self.writing.is_none() && self.commits.is_empty());
        let (writing, applied) = (&mut self.writing, &mut self.applied);
        tokio::select! {
            biased;
            Some(state) = self.commits.next() => Event::Durable(state),
            written = async { writing.as_mut().expect("checked").await }, if writing.is_some() => Event::Written(written),
            () = tokio::time::sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => Event::Retry,
            Ok(()) = async { applied.as_mut().expect("checked").changed().await }, if applied.is_some() => Event::Applied,
            Some(job) = self.jobs.recv(), if self.asked.len() < ASKED => Event::Job(job),
            else => std::future::pending().await,
        }
    }

    fn begin_writing(&mut self) {
        if self.writing.is_some() {
            return;
        }
        let Some(op) = self.ops.pop_front() else { return };
        self.current = Some(op.clone());
        let log = self.log.clone();
        self.writing = Some(Box::pin(async move {
            match op {
                Op::Begin { incarnation, epoch, at, hash } => {
                    log.begin(incarnation, epoch, at, hash, None).await.map(|()| None)
                }
                Op::Term(term) => log.put_term(term).await.map(|()| None),
                Op::Store(batch) => log.enqueue(batch, None).await.map(Some),
            }
        }));
    }

    pub(super) fn apply(&mut self, event: Event) -> Outcome {
        match event {
            Event::Written(result) => {
                self.writing = None;
                let op = self.current.take().expect("set with `writing`");
                match (result, op) {
                    (Ok(None), _) => Outcome::Nothing,
                    (Ok(Some(commit)), Op::Store(batch)) => {
                        self.inflight.push_back(batch);
                        self.commits.push_back(commit);
                        Outcome::Nothing
                    }
                    (Ok(Some(_)), _) => unreachable!("only batches are queued"),
                    (Err(error), op) => {
                        self.ops.push_front(op);
                        self.failed(error)
                    }
                }
            }
            Event::Durable(Ok(_)) => {
                let batch = self.inflight.pop_front().expect("one per commit");
                self.stored(&batch);
                Outcome::Stored
            }
            Event::Durable(Err(error)) => self.failed(error),
            Event::Retry => self.retry(),
            Event::Applied => Outcome::Ack,
            Event::Job(job) => self.ask(job),
        }
    }

    fn stored(&mut self, batch: &Batch) {
        let (end, bytes) = (batch.header().end, batch.record().len() as u64);
        self.machine.on(receiver::Event::Stored { end, bytes });
        self.measure();
        self.entry().incoming.send_modify(|view| {
            view.counters.batches += 1;
            view.counters.bytes += bytes;
            view.received = self.machine.durable();
        });
        self.shared.link_carries(self.entry());
    }

    fn failed(&mut self, error: Error) -> Outcome {
        match error.disposition() {
            Disposition::Wait => {
                self.full = Some(Instant::now() + FULL_RETRY);
                Outcome::Nothing
            }
            // What follows a record that found no room is refused as well.
            Disposition::Refused if self.full.is_some() => Outcome::Nothing,
            _ => Outcome::Failed(error.to_string()),
        }
    }

    /// Queues again what did not become durable.
    fn retry(&mut self) -> Outcome {
        self.full = None;
        let durable = self.log.state().map_or(Position::ZERO, |state| state.end);
        let (done, left): (VecDeque<_>, VecDeque<_>) =
            self.inflight.drain(..).partition(|batch| batch.header().end <= durable);
        for batch in &done {
            self.stored(batch);
        }
        for batch in left.into_iter().rev() {
            self.ops.push_front(Op::Store(batch));
        }
        Outcome::Ack
    }

    pub(super) fn batch(&mut self, batch: pb::Batch) -> Outcome {
        let before = self.machine.credit();
        for action in self.machine.on(receiver::Event::Batch(batch)) {
            match action {
                Action::Begin { incarnation, epoch, at, hash } => {
                    self.ops.push_back(Op::Begin { incarnation, epoch, at, hash })
                }
                Action::PutTerm(term) => self.ops.push_back(Op::Term(term)),
                Action::Store(batch) => self.ops.push_back(Op::Store(batch)),
                Action::Reject(rejection) => {
                    if rejection.reason == Reason::Corrupt {
                        self.entry().incoming.send_modify(|view| view.counters.corrupt_records += 1);
                    }
                    return Outcome::Reject(rejection);
                }
            }
        }
        match self.machine.credit() > before {
            true => Outcome::Ack,
            false => Outcome::Nothing,
        }
    }

    pub(super) fn progress(&mut self, progress: &pb::Progress, now: Instant) {
        let word = SourceWord::from(progress);
        self.entry().incoming.send_modify(|view| view.progress = Some((word, now)));
    }

    fn ask(&mut self, mut job: FetchJob) -> Outcome {
        self.asked.retain(|_, job| !job.reply.is_closed());
        job.request.id = self.next_id;
        self.next_id += 1;
        let request = job.request.clone();
        self.asked.insert(request.id, job);
        Outcome::Fetch(request)
    }

    pub(super) fn fetched(&mut self, fetched: pb::Fetched) {
        if let Some(job) = self.asked.remove(&fetched.id) {
            // The asker may have gone.
            drop(job.reply.send(fetched));
        }
    }

    /// Stores what was accepted and waits for it, so that the next session starts from the truth.
    pub(super) async fn finish(&mut self) {
        self.entry().fetch.send_replace(None);
        while self.full.is_none() {
            self.begin_writing();
            let event = if let Some(writing) = &mut self.writing {
                Event::Written(writing.await)
            } else if let Some(state) = self.commits.next().await {
                Event::Durable(state)
            } else {
                return;
            };
            if let Outcome::Failed(_) = self.apply(event) {
                break;
            }
        }
        // Nothing more can be stored; what is in the log's queue must still end before another session writes.
        if let Some(writing) = self.writing.take()
            && let Ok(Some(commit)) = writing.await
        {
            self.commits.push_back(commit);
        }
        while self.commits.next().await.is_some() {}
    }

    /// The session ends.
    pub(super) fn close(&self, rejection: Option<&Rejection>, now: Instant) {
        self.entry().incoming.send_modify(|view| view.open = false);
        if let Some(rejection) = rejection {
            note_reject(&self.entry().incoming, rejection, now);
        }
    }
}
