//! Joins the change stream to the outbox: the only writer of the outbox.
//!
//! Capture begins where a target asks ([`CaptureHandle::begin`]) and from then on where the outbox ends; batch and
//! resume token are one synced write. Reading, cutting and fsync overlap, bounded by the reply prefetch and the outbox
//! queue. When the outbox is full, capture stops and says so: the oplog still holds the history.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::chunk::{ChunkError, Chunker, Cut, Reply};
use super::tail::{Reading, StartAt, Tail, TailError, TailStream};
use crate::model::{Epoch, Flow, Incarnation, Position, StreamHash};
use crate::outbox::{self, Commit, Disposition, Log, LogState};

/// What capture is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// No target has asked for anything yet.
    #[default]
    Waiting,
    /// Reading the change stream.
    Streaming,
    /// Trying to open it again.
    Retrying(String),
    /// The outbox is full; the oplog holds what follows.
    Full(String),
    /// No target can go on at the outbox's end; it needs a resync.
    Lost(Lost),
    /// Refused for good by the server, or the stream cannot be understood.
    Failed(String),
}

/// A history that cannot be read on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// What the server says.
    pub reason: String,
    /// The source does not know the outbox's end: it was put back to an older copy. What was captured since may be undone
    /// there. Otherwise what follows the outbox's end is gone.
    pub rewound: bool,
}

impl Lost {
    /// What to do.
    pub fn hint(&self) -> &'static str {
        if self.rewound { REWOUND } else { RESYNC }
    }
}

/// Numbers and phase for status, metrics and the progress frames.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureStatus {
    /// What it is doing.
    pub phase: Phase,
    /// Changes that are durable in the outbox, since the process started.
    pub flow: Flow,
    /// Batches they and marks came in.
    pub batches: u64,
    /// Sessions of the change stream that ended and were begun again.
    pub retries: u64,
}

/// Asks capture to (re)start the outbox at a place.
#[derive(Debug)]
struct Begin {
    at: Position,
    hash: StreamHash,
    done: oneshot::Sender<Result<(), outbox::Error>>,
}

/// Handle to a running capture.
#[derive(Clone, Debug)]
pub struct CaptureHandle {
    begin: mpsc::Sender<Begin>,
    status: watch::Receiver<CaptureStatus>,
}

impl CaptureHandle {
    /// Starts the outbox empty at `at`; what it held is dropped, the oplog is read again from there.
    ///
    /// # Errors
    /// The outbox cannot be written, or capture has ended.
    pub async fn begin(&self, at: Position, hash: StreamHash) -> Result<(), outbox::Error> {
        let (done, answer) = oneshot::channel();
        let ended = || outbox::Error::Closed;
        self.begin.send(Begin { at, hash, done }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Newest status.
    pub fn status(&self) -> watch::Receiver<CaptureStatus> {
        self.status.clone()
    }
}

/// What capture needs to know of the source's history.
#[derive(Clone, Copy, Debug)]
pub struct History {
    /// Its identity.
    pub incarnation: Incarnation,
    /// Epoch under which changes are captured.
    pub epoch: Epoch,
}

/// The capture task.
pub struct Capture<T> {
    tail: T,
    log: Log,
    history: History,
    nudge: Arc<Notify>,
    commands: mpsc::Receiver<Begin>,
    status: watch::Sender<CaptureStatus>,
}

/// Replies read ahead of cutting; each may be 16 MiB.
const PREFETCH: usize = 1;
/// Batches queued for fsync at once.
const IN_FLIGHT: usize = 32;
/// What to do about lost history.
const RESYNC: &str = "while another agent of this site ships, nothing: this one begins where the target stands when it takes over; else copy the data again: empty the target, restore a dump, declare its cluster time with apply.start_at, remove the data directories of both sites' agents; and raise the oplog's size or minimum retention here";
/// What to do about a rewound history.
const REWOUND: &str = "the source's MongoDB was put back to an older copy: what the target has of later changes cannot be undone by the stream; copy the data again: empty the target, restore a dump, declare its cluster time with apply.start_at, remove the data directories of both sites' agents";
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// The resume token is persisted so often while nothing is captured, so it never ages out of the oplog.
const TOKEN_EVERY: Duration = Duration::from_secs(1);
/// Marks come more often than this (at least every 10 s): until then the token of an event is kept, see [`Chunker`].
const QUIET: Duration = Duration::from_secs(30);

enum Outcome {
    Cancelled,
    Restart(Begin),
    Ended(EndReason),
}

/// What an oversized change made necessary was done.
struct Passed;

enum EndReason {
    Tail(TailError),
    Chunk(ChunkError),
    Outbox(outbox::Error),
}

impl<T: Tail> Capture<T> {
    /// Prepares capture into `log`.
    pub fn new(tail: T, log: Log, history: History, nudge: Arc<Notify>) -> (Self, CaptureHandle) {
        let (begin, commands) = mpsc::channel(1);
        let (status, seen) = watch::channel(CaptureStatus::default());
        (Self { tail, log, history, nudge, commands, status }, CaptureHandle { begin, status: seen })
    }

    /// Runs until cancelled.
    ///
    /// # Errors
    /// The outbox went failsafe; the process must restart.
    pub async fn run(mut self, cancel: CancellationToken) -> Result<(), outbox::Error> {
        let mut delay = RETRY_MIN;
        loop {
            let Some(state) = self.usable_state() else {
                match self.idle(&cancel, None).await {
                    Some(begin) => self.restart(begin).await,
                    None => return Ok(()),
                }
                continue;
            };
            let before = self.status.borrow().batches;
            let outcome = self.session(state, &cancel).await;
            if self.status.borrow().batches > before {
                delay = RETRY_MIN;
            }
            let wait = match outcome {
                Outcome::Cancelled => return Ok(()),
                Outcome::Restart(begin) => {
                    self.restart(begin).await;
                    continue;
                }
                Outcome::Ended(reason) => self.ended(reason, &mut delay)?,
            };
            match self.idle(&cancel, wait).await {
                Some(begin) => self.restart(begin).await,
                None if cancel.is_cancelled() => return Ok(()),
                None => {}
            }
        }
    }

    /// The outbox's state, if it belongs to this history.
    fn usable_state(&self) -> Option<LogState> {
        self.log.state().filter(|state| state.incarnation == self.history.incarnation)
    }

    /// Waits for a command, or for `wait` to pass; `None` when it passed or on cancel.
    async fn idle(&mut self, cancel: &CancellationToken, wait: Option<Duration>) -> Option<Begin> {
        tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            begin = self.commands.recv() => begin,
            () = sleep_or_forever(wait) => None,
        }
    }

    async fn restart(&self, begin: Begin) {
        let History { incarnation, epoch } = self.history;
        let result = self.log.begin(incarnation, epoch, begin.at, begin.hash, None).await;
        tracing::info!(at = %begin.at, ok = result.is_ok(), "outbox begins");
        // The asker may have gone; the next one asks again.
        drop(begin.done.send(result));
    }

    /// Decides how long to wait after a session ended; `None` means until asked to begin again.
    fn ended(&self, reason: EndReason, delay: &mut Duration) -> Result<Option<Duration>, outbox::Error> {
        let backoff = *delay;
        *delay = (*delay * 2).min(RETRY_MAX);
        let (phase, wait) = match reason {
            EndReason::Outbox(error) => match error.disposition() {
                Disposition::Wait => (Phase::Full(error.to_string()), Some(Duration::from_secs(1))),
                // The outbox was begun anew underneath: go on from its state.
                Disposition::Refused | Disposition::Recapture => (Phase::Retrying(error.to_string()), Some(backoff)),
                Disposition::Restart | Disposition::Operator => return Err(error),
            },
            EndReason::Tail(TailError::Interrupted(reason)) => (Phase::Retrying(reason), Some(backoff)),
            EndReason::Tail(error @ (TailError::HistoryLost(_) | TailError::Rewound(_))) => {
                let rewound = matches!(error, TailError::Rewound(_));
                (Phase::Lost(Lost { reason: error.to_string(), rewound }), Some(RETRY_MAX))
            }
            EndReason::Tail(error) => (Phase::Failed(error.to_string()), Some(RETRY_MAX)),
            EndReason::Chunk(error) => (Phase::Failed(error.to_string()), Some(RETRY_MAX)),
        };
        self.status.send_modify(|status| status.retries += 1);
        self.enter(phase);
        Ok(wait)
    }

    /// Logs a phase once when it is entered.
    fn enter(&self, phase: Phase) {
        if self.status.borrow().phase == phase {
            return;
        }
        match &phase {
            Phase::Waiting => {}
            Phase::Streaming => tracing::info!("change stream open"),
            Phase::Retrying(reason) => tracing::warn!(reason, "change stream interrupted, retrying"),
            Phase::Full(reason) => {
                tracing::error!(reason, hint = "bring the peer back or raise data.outbox_limit", "capture stopped")
            }
            Phase::Lost(lost) => tracing::error!(reason = lost.reason, hint = lost.hint(), "capture stopped"),
            Phase::Failed(reason) => tracing::error!(reason, "capture stopped"),
        }
        self.status.send_modify(|status| status.phase = phase);
    }

    /// Reads from where the log ends until something stops it.
    async fn session(&mut self, state: LogState, cancel: &CancellationToken) -> Outcome {
        let History { incarnation, epoch } = self.history;
        let mut at = state.token.clone().map_or(StartAt::Time(state.end.time), StartAt::After);
        let mut chunker = Chunker::new(incarnation, epoch, state.end, state.hash);
        let mut reading = Reading::Batches;
        loop {
            reading = match (self.stream(&mut chunker, &at, reading, cancel).await, reading) {
                (Err(Outcome::Ended(EndReason::Tail(TailError::TooLarge))), Reading::Batches) => Reading::Singly,
                (Err(Outcome::Ended(EndReason::Tail(TailError::TooLarge))), Reading::Singly) => {
                    tracing::warn!(after = %chunker.end(), "a change exceeds 16 MiB; it is captured without documents and fetched by the target");
                    Reading::Trimmed
                }
                (Ok(Passed), _) => Reading::Batches,
                (Err(outcome), _) => return outcome,
            };
            // What was seen may be known already and so not be in the log.
            at = chunker.idle_token().cloned().map_or(at, StartAt::After);
        }
    }

    async fn stream(
        &mut self,
        chunker: &mut Chunker,
        at: &StartAt,
        reading: Reading,
        cancel: &CancellationToken,
    ) -> Result<Passed, Outcome> {
        let stream = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(Outcome::Cancelled),
            begin = self.commands.recv() => return Err(begin.map_or(Outcome::Cancelled, Outcome::Restart)),
            stream = self.tail.open(at, reading) => stream,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return Err(Outcome::Ended(EndReason::Tail(error))),
        };
        chunker.single_change_units(stream.single_change_units());
        let (replies_in, mut replies) = mpsc::channel(PREFETCH);
        let reader = read_ahead(stream, replies_in);
        let pump = self.pump(chunker, &mut replies, reading, cancel);
        tokio::pin!(reader, pump);
        tokio::select! {
            biased;
            outcome = &mut pump => outcome,
            () = &mut reader => pump.await,
        }
    }

    /// Cuts replies and appends batches; returns when the replies end.
    async fn pump(
        &mut self,
        chunker: &mut Chunker,
        replies: &mut mpsc::Receiver<Result<Reply, TailError>>,
        reading: Reading,
        cancel: &CancellationToken,
    ) -> Result<Passed, Outcome> {
        let mut pending: VecDeque<Pending> = VecDeque::new();
        let mut token_due = tokio::time::Instant::now() + QUIET;
        loop {
            let step = tokio::select! {
                biased;
                () = cancel.cancelled() => Step::Cancelled,
                begin = self.commands.recv() => begin.map_or(Step::Cancelled, Step::Restart),
                durable = next_durable(&mut pending), if !pending.is_empty() => Step::Durable(durable),
                reply = replies.recv(), if pending.len() < IN_FLIGHT => Step::Reply(reply),
            };
            let ended = |reason| Some(Err(Outcome::Ended(reason)));
            let end = match step {
                Step::Cancelled => Some(Err(Outcome::Cancelled)),
                Step::Restart(begin) => return Err(Outcome::Restart(begin)),
                Step::Durable(result) => {
                    let written = pending.pop_front().expect("one that was waited for");
                    match result {
                        Err(error) => ended(EndReason::Outbox(error)),
                        Ok(_) => {
                            self.account(&written);
                            self.enter(Phase::Streaming);
                            None
                        }
                    }
                }
                Step::Reply(None) => ended(EndReason::Tail(TailError::Interrupted("the reader ended".into()))),
                Step::Reply(Some(Err(error))) => ended(EndReason::Tail(error)),
                Step::Reply(Some(Ok(reply))) => match chunker.cut(&reply) {
                    Err(error) => ended(EndReason::Chunk(error)),
                    Ok(cuts) => {
                        // What is read counts when it is durable: a full outbox is full until then.
                        if cuts.is_empty() && pending.is_empty() {
                            self.enter(Phase::Streaming);
                        }
                        match self.append(cuts, &mut pending).await {
                            Err(error) => ended(EndReason::Outbox(error)),
                            Ok(()) => passed(reading, &reply).then_some(Ok(Passed)),
                        }
                    }
                },
            };
            if let Some(end) = end {
                return self.finish(pending, end).await;
            }
            if chunker.unit_open() {
                self.nudge.notify_one();
            }
            let now = tokio::time::Instant::now();
            if !pending.is_empty() {
                token_due = now + QUIET;
            } else if now >= token_due {
                token_due = now + TOKEN_EVERY;
                if let Some(token) = chunker.idle_token()
                    && let Err(error) = self.log.put_token(chunker.end(), token.clone()).await
                {
                    return Err(Outcome::Ended(EndReason::Outbox(error)));
                }
            }
        }
    }

    fn account(&self, written: &Pending) {
        self.status.send_modify(|status| {
            status.flow.add(&written.flow);
            status.batches += 1;
        });
    }

    /// Lets queued writes finish, so that the next session starts from what is really durable. The first error tells why;
    /// what was queued behind it fails for it.
    async fn finish(&self, pending: VecDeque<Pending>, end: Result<Passed, Outcome>) -> Result<Passed, Outcome> {
        let mut end = end;
        for mut written in pending {
            match (&mut written.durable).await {
                Ok(_) => self.account(&written),
                Err(_) if matches!(end, Err(Outcome::Ended(EndReason::Outbox(_)))) => {}
                Err(error) => end = Err(Outcome::Ended(EndReason::Outbox(error))),
            }
        }
        end
    }

    async fn append(&self, cuts: Vec<Cut>, pending: &mut VecDeque<Pending>) -> Result<(), outbox::Error> {
        for Cut { batch, token, flow } in cuts {
            let durable = self.log.enqueue(batch, Some(token)).await?;
            pending.push_back(Pending { durable, flow });
        }
        Ok(())
    }
}

/// A batch on its way to the disk.
struct Pending {
    durable: Commit,
    flow: Flow,
}

enum Step {
    Cancelled,
    Restart(Begin),
    Durable(Result<LogState, outbox::Error>),
    Reply(Option<Result<Reply, TailError>>),
}

async fn next_durable(pending: &mut VecDeque<Pending>) -> Result<LogState, outbox::Error> {
    match pending.front_mut() {
        Some(written) => (&mut written.durable).await,
        None => std::future::pending().await,
    }
}

/// Whether the oversized change was passed, or turned out not to be there.
fn passed(reading: Reading, reply: &Reply) -> bool {
    let empty = reply.events().is_ok_and(|mut events| events.next().is_none());
    match reading {
        Reading::Batches => false,
        Reading::Singly => empty,
        Reading::Trimmed => !empty,
    }
}

async fn read_ahead<S: TailStream>(mut stream: S, replies: mpsc::Sender<Result<Reply, TailError>>) {
    loop {
        let reply = stream.next().await;
        let failed = reply.is_err();
        if replies.send(reply).await.is_err() || failed {
            return;
        }
    }
}

async fn sleep_or_forever(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use bson::raw::RawArrayBuf;
    use bson::{Binary, rawdoc, spec::BinarySubtype};
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::model::ClusterTime;
    use crate::outbox::{LogId, Logs, MemStore, Quota};
    use crate::source::chunk::tests::token_of;

    /// A change stream of one reply.
    struct One(Reply);

    struct OneStream(Option<Reply>);

    impl Tail for One {
        type Stream = OneStream;

        async fn open(&self, _at: &StartAt, _reading: Reading) -> Result<OneStream, TailError> {
            Ok(OneStream(Some(self.0.clone())))
        }
    }

    impl TailStream for OneStream {
        fn single_change_units(&self) -> bool {
            true
        }

        async fn next(&mut self) -> Result<Reply, TailError> {
            match self.0.take() {
                Some(reply) => Ok(reply),
                None => std::future::pending().await,
            }
        }
    }

    /// Changes of 1 MiB each that do not compress.
    fn reply(changes: u32) -> Reply {
        let mut batch = RawArrayBuf::new();
        let time = |n| ClusterTime::new(10 + n, 1);
        for n in 0..changes {
            let mut state = u64::from(n) + 1;
            let noise = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            });
            let bytes = noise.take(1 << 20).collect();
            let pad = Binary { subtype: BinarySubtype::Generic, bytes };
            batch.push(rawdoc! {"_id": token_of(time(n), Some(0)), "operationType": "delete", "pad": pad});
        }
        let token = token_of(time(changes - 1), Some(0));
        Reply::new(rawdoc! {"cursor": {"nextBatch": batch, "postBatchResumeToken": token}, "ok": 1})
    }

    #[tokio::test]
    async fn a_full_outbox_is_said_to_be_full_however_much_waits_behind_it() {
        let quota = Quota { limit_bytes: 4 << 20, retention_bytes: 0, retention_time: Duration::ZERO };
        let tasks = TaskTracker::new();
        let logs = Logs::start(Arc::new(MemStore::new()), quota, &tasks).expect("start");
        let history = History { incarnation: Incarnation([1; 16]), epoch: Epoch(1) };
        let (capture, handle) = Capture::new(One(reply(8)), logs.log(&LogId::Outbox), history, Arc::default());
        let cancel = CancellationToken::new();
        let running = tasks.spawn(capture.run(cancel.clone()));
        handle.begin(Position::before(ClusterTime::new(1, 0)), StreamHash::default()).await.expect("begins");
        let mut status = handle.status();
        for _ in 0..2 {
            let stopped = status.wait_for(|now| matches!(now.phase, Phase::Full(_) | Phase::Retrying(_)));
            let stopped = tokio::time::timeout(Duration::from_secs(20), stopped).await.expect("in time");
            assert!(matches!(&stopped.expect("lives").phase, Phase::Full(_)));
            status.mark_unchanged();
            let tried = tokio::time::timeout(Duration::from_secs(20), status.changed());
            tried.await.expect("tried again in time").expect("lives");
        }
        cancel.cancel();
        running.await.expect("no panic").expect("no failure");
    }
}
