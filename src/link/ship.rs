//! Shell of the [sender](super::sender): reads the outbox, asks the gate, answers fetches.
//!
//! [`Ship::next`] waits for what comes next and is cancel-safe; [`Ship::apply`] decides and never waits.

use std::sync::Arc;

use farshore_api::replication::v1 as pb;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use pb::frame::Body;
use prost::Message;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::hub::{PeerEntry, Shared, SourceProgress, StartRefusal};
use super::sender::{self, Action, OutboxView, Sender, Stop};
use super::wire::Receiving;
use crate::model::{Epoch, Position, SiteName, StreamHash, Term};
use crate::outbox::{Error, Log, LogState, Reader, Stored};

/// Fetches that may wait for their answers.
const FETCHES: usize = 64;
/// Of those so many are read at once: each answer may be large, and waits here until it is sent.
const READS: usize = 2;
/// Records of one read from the outbox are small in number, but one may be large: an answer above this cannot be sent.
const LARGEST_ANSWER: usize = 60 << 20;

/// What a ship waits for.
pub(super) enum Event {
    Gate(Result<(), StartRefusal>),
    OutboxMoved,
    Record(Result<Stored, Error>),
    Answer(pb::Fetched),
    Progress,
}

/// What comes of it.
pub(super) enum Outcome {
    Nothing,
    Send(Body),
    /// Send the newest progress soon.
    Progress,
    Stop(Stop),
    Failed(String),
}

/// The source's half of a session.
pub(super) struct Ship {
    shared: Arc<Shared>,
    peer: SiteName,
    machine: Sender,
    receiving: Receiving,
    outbox: Log,
    moved: watch::Receiver<Option<LogState>>,
    reader: Option<Reader>,
    gate: Option<BoxFuture<'static, Result<(), StartRefusal>>>,
    reads: FuturesUnordered<BoxFuture<'static, pb::Fetched>>,
    turns: Arc<Semaphore>,
    progress: watch::Receiver<SourceProgress>,
    /// The target has acknowledged something in this session.
    heard: bool,
}

fn view(state: Option<&LogState>) -> Option<OutboxView> {
    state.map(|state| OutboxView { incarnation: state.incarnation, first: state.first, end: state.end })
}

impl Ship {
    /// For a peer whose Hello said `receiving`.
    pub(super) fn new(shared: &Arc<Shared>, peer: &SiteName, receiving: Receiving, term: Term) -> Self {
        let outbox = shared.outbox();
        let moved = outbox.watch();
        let mut progress = shared.inputs.progress.clone();
        progress.mark_unchanged();
        Self {
            shared: shared.clone(),
            peer: peer.clone(),
            machine: Sender::new(shared.config.site.clone(), shared.config.epoch, term),
            receiving,
            outbox,
            moved,
            reader: None,
            gate: None,
            reads: FuturesUnordered::new(),
            turns: Arc::new(Semaphore::new(READS)),
            progress,
            heard: false,
        }
    }

    /// Starts serving.
    pub(super) fn start(&mut self) -> Outcome {
        let receiving = self.receiving.clone();
        self.entry().outgoing.send_modify(|view| {
            view.open = true;
            view.received = receiving.received.map(|standing| standing.position);
        });
        let outbox = view(self.moved.borrow_and_update().as_ref());
        self.decide(sender::Event::Hello(receiving, outbox))
    }

    fn entry(&self) -> &PeerEntry {
        self.shared.peers.get(&self.peer).expect("sessions are with peers only")
    }

    /// Waits for the next event; `room`: whether a record may be read now.
    pub(super) async fn next(&mut self, room: bool) -> Event {
        let read = room && self.machine.wants_record() && self.reader.is_some();
        let (gate, reader) = (&mut self.gate, &mut self.reader);
        tokio::select! {
            biased;
            Some(answer) = self.reads.next(), if room => Event::Answer(answer),
            answer = async { gate.as_mut().expect("checked").await }, if gate.is_some() => Event::Gate(answer),
            Ok(()) = self.progress.changed() => Event::Progress,
            Ok(()) = self.moved.changed(), if self.machine.waits_for_outbox() => Event::OutboxMoved,
            record = async { reader.as_mut().expect("checked").next().await }, if read => Event::Record(record),
            else => std::future::pending().await,
        }
    }

    pub(super) fn apply(&mut self, event: Event) -> Outcome {
        match event {
            Event::Answer(fetched) => Outcome::Send(Body::Fetched(fetched)),
            Event::Progress => Outcome::Progress,
            Event::Gate(answer) => {
                self.gate = None;
                let outbox = view(self.moved.borrow_and_update().as_ref());
                self.decide(sender::Event::Gate(answer, outbox))
            }
            Event::OutboxMoved => {
                let outbox = view(self.moved.borrow_and_update().as_ref());
                self.decide(sender::Event::Outbox(outbox))
            }
            Event::Record(Ok(stored)) => self.decide(sender::Event::Record(stored.batch)),
            Event::Record(Err(Error::Trimmed { .. } | Error::Restarted { .. })) => self.decide(sender::Event::Trimmed),
            Event::Record(Err(error)) => {
                if let Error::Corrupt { .. } = error {
                    self.repair();
                }
                Outcome::Failed(error.to_string())
            }
        }
    }

    /// Looks whether capture can still reach the target.
    pub(super) fn tick(&mut self) -> Outcome {
        if !self.progress.borrow().lost {
            return Outcome::Nothing;
        }
        let outbox = view(self.outbox.state().as_ref());
        self.decide(sender::Event::Lost(outbox))
    }

    /// A damaged record is never shipped: capture reads it from the source's oplog once more. The session starts anew
    /// meanwhile.
    fn repair(&self) {
        self.entry().outgoing.send_modify(|view| view.counters.corrupt_records += 1);
        let (outbox, receiving, epoch) = (self.outbox.clone(), self.receiving.clone(), self.shared.config.epoch);
        let received = self.entry().outgoing.borrow().received;
        self.shared.tasks.spawn(async move {
            match repair(&outbox, &receiving, received, epoch).await {
                Ok(None) => {}
                Ok(Some(end)) => {
                    tracing::warn!(%end, "the outbox held a damaged record; what follows is captured again")
                }
                Err(error) => tracing::error!(%error, "the outbox holds a damaged record and cannot be repaired"),
            }
        });
    }

    pub(super) fn acked(&mut self, ack: &pb::Ack) -> Outcome {
        // One that was overtaken says less; the first one of a session says what holds.
        let first = !std::mem::replace(&mut self.heard, true);
        self.entry().outgoing.send_modify(|view| {
            let before = if first { None } else { view.applied };
            view.received = view.received.max(ack.received.map(Into::into));
            view.applied = before.max(ack.applied.map(Into::into));
            view.heard = Some(Instant::now());
        });
        self.shared.link_carries(self.entry());
        self.decide(sender::Event::Credit(ack.credit))
    }

    pub(super) fn rejected(&mut self, rejection: super::wire::Rejection) {
        self.decide(sender::Event::Rejected(rejection));
    }

    /// Starts a read for the target.
    pub(super) fn fetch(&mut self, request: pb::Fetch) -> Outcome {
        let id = request.id;
        let refused = move |error: &str| pb::Fetched { id, error: error.into(), ..Default::default() };
        if self.reads.len() >= FETCHES {
            return Outcome::Send(Body::Fetched(refused("too many reads at once")));
        }
        let (source, turns) = (self.shared.inputs.fetch.clone(), self.turns.clone());
        self.reads.push(Box::pin(async move {
            let _turn = turns.acquire().await.expect("never closed");
            let fetched = source.fetch(request).await;
            match fetched.encoded_len() > LARGEST_ANSWER {
                true => refused("the documents are too large for one answer; ask for fewer"),
                false => pb::Fetched { id, ..fetched },
            }
        }));
        Outcome::Nothing
    }

    pub(super) fn progress(&self) -> pb::Progress {
        let progress = *self.progress.borrow();
        pb::Progress {
            source: self.shared.config.site.to_string(),
            head: progress.head.0,
            captured: progress.captured.map(Into::into),
            captured_changes: progress.captured_changes,
            captured_bytes: progress.captured_bytes,
            now_ms: (self.shared.inputs.clock)(),
        }
    }

    fn decide(&mut self, event: sender::Event) -> Outcome {
        match self.machine.on(event) {
            None => Outcome::Nothing,
            Some(Action::AskGate) => {
                let (gate, peer, receiving) =
                    (self.shared.inputs.gate.clone(), self.peer.clone(), self.receiving.clone());
                self.gate = Some(Box::pin(async move { gate.serve_from(&peer, &receiving).await }));
                Outcome::Nothing
            }
            Some(Action::ReadFrom(position)) => {
                self.reader = Some(self.outbox.reader(position));
                Outcome::Nothing
            }
            Some(Action::Send(batch)) => {
                let (sent, bytes) = (self.machine.sent(), batch.record.len() as u64);
                self.entry().outgoing.send_modify(|view| {
                    view.sent = sent;
                    view.counters.batches += 1;
                    view.counters.bytes += bytes;
                });
                Outcome::Send(Body::Batch(batch))
            }
            Some(Action::Stop(stop)) => Outcome::Stop(stop),
        }
    }

    /// The session ends.
    pub(super) fn close(&self, rejection: Option<&super::wire::Rejection>, now: Instant) {
        self.entry().outgoing.send_modify(|view| view.open = false);
        if let Some(rejection) = rejection {
            super::status::note_reject(&self.entry().outgoing, rejection, now);
        }
    }
}

/// Cuts the outbox back to its last good record past what the target has, or begins it again where the target is: what the
/// target has may be damaged, and may be gone from the oplog. The new end, if something was done.
async fn repair(
    outbox: &Log,
    receiving: &Receiving,
    received: Option<Position>,
    epoch: Epoch,
) -> Result<Option<Position>, Error> {
    let Some(state) = outbox.state() else { return Ok(None) };
    let begins = || receiving.floor().unwrap_or(state.first);
    let (end, hash) = match outbox.salvage(received.unwrap_or_else(begins)).await {
        // Another session has done it.
        Err(Error::Restarted { .. }) => return Ok(None),
        Err(error) => return Err(error),
        Ok(Some((end, _))) if end == state.end => return Ok(None),
        Ok(Some((end, hash))) => return outbox.rewind(end, hash, None).await.map(|()| Some(end)),
        Ok(None) => match receiving.received {
            None => (begins(), StreamHash::default()),
            Some(standing) if Some(standing.position) >= received => (standing.position, standing.hash),
            // Only Hello tells the hash; the next session's says where the target is now.
            Some(_) => return Ok(None),
        },
    };
    outbox.begin(state.incarnation, epoch, end, hash, None).await.map(|()| Some(end))
}
