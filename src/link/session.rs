//! One session with one peer over a pair of frame streams: the shell shared by the dialling and the accepting side.
//!
//! ```text
//! greet: lease? -> Hello out -> Hello in, checked -> the only session with this peer (registry)
//! carry: { frames in, frames out, ship (we originate), take (we receive), timers } until one of them ends it
//! close: what is on its way to the disk ends there, a rejection is told, frames in hand leave
//! ```
//!
//! Reading never waits for writing (two sides that both wait to write would stop for ever): batches wait in the take within the
//! credit, our own frames in a queue to which records are added only while it is short.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use farshore_api::replication::v1 as pb;
use futures::StreamExt;
use futures::stream::BoxStream;
use pb::frame::Body;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use super::greet::{Greeted, greet};
use super::hub::{Leadership, PeerEntry, Shared};
use super::registry::Claim;
use super::sender::Stop;
use super::ship::{self, Ship};
use super::take::{self, Take};
use super::transport::Peer;
use super::wire::{Reason, Rejection, corrupt, protocol};
use crate::model::SiteName;

/// Timers have this resolution.
const TICK: Duration = Duration::from_millis(200);
/// Acks and progress are repeated so often, should one be lost or nothing change.
const REPEAT: Duration = Duration::from_secs(1);
/// A peer that carries a stream speaks every second; one that is silent for so long is gone, whatever the connection says.
const SILENCE: Duration = Duration::from_secs(15);
/// A frame on its way keeps a slow link busy: so many bytes are a sign of life, too. What HTTP/2 says by itself is far less.
const ALIVE: u64 = 16 << 10;
/// Time for the frames in hand at the end.
const CLOSING: Duration = Duration::from_secs(2);
/// Records waiting to be sent, besides those in the transport.
const QUEUE: usize = 2;

/// Both directions of a session, and who is there.
pub(super) struct Wire {
    pub(super) out: mpsc::Sender<pb::Frame>,
    pub(super) incoming: BoxStream<'static, Result<pb::Frame, String>>,
    pub(super) peer: Peer,
    pub(super) site: SiteName,
    pub(super) dialled: bool,
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// The peer closed it.
    Closed,
    /// We close.
    Cancelled,
    /// The connection broke.
    Lost(String),
    /// The peer refuses.
    Rejected(Rejection),
    /// We refuse.
    Refused(Rejection),
    /// Something of our own failed.
    Failed(String),
    /// Another session with this peer lives.
    Duplicate,
}

impl Ended {
    /// Whether one of the two refuses what only a person can change.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Rejected(rejection) | Self::Refused(rejection) if !rejection.is_transient())
    }
}

/// How a session went.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) ended: Ended,
    /// Both sides had greeted.
    pub(super) established: bool,
    /// Something was shipped or stored.
    pub(super) progressed: bool,
}

/// Runs a session to its end.
pub(super) async fn run(shared: &Arc<Shared>, mut wire: Wire) -> Summary {
    let cancel = shared.cancel.child_token();
    let entry = entry(shared, &wire.site);
    let greeted = cancel.run_until_cancelled(greet(shared, &mut wire)).await.unwrap_or(Err(Ended::Cancelled));
    let mut summary = Summary { ended: Ended::Duplicate, established: false, progressed: false };
    match greeted {
        Err(ended) => summary.ended = ended,
        Ok(greeted) => {
            let dialler = if wire.dialled { &shared.config.site } else { &wire.site };
            let claim = Claim { dialler: dialler.clone(), agent: greeted.theirs.agent, term: greeted.theirs.term };
            if let Some(_place) = entry.slot.admit(claim, cancel.clone()).await {
                if wire.peer.shown < shared.generation.load(Ordering::SeqCst) {
                    cancel.cancel();
                }
                shared.link_up(entry, &wire.peer);
                summary = Session::new(shared, &mut wire, greeted, cancel).run().await;
                shared.link_down(entry, &summary.ended);
            }
        }
    }
    shared.count_end(entry, &summary.ended);
    if let Ended::Refused(rejection) = &summary.ended {
        let frame = pb::Frame::of(Body::Reject(rejection.into()));
        drop(timeout(CLOSING, wire.out.send(frame)).await);
    }
    close(wire).await;
    summary
}

fn entry<'a>(shared: &'a Shared, site: &SiteName) -> &'a PeerEntry {
    shared.peers.get(site).expect("sessions are with peers only")
}

/// Microseconds, as pings carry them.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Lets frames in hand leave: a dialler that drops the stream of the peer's frames would reset the session.
async fn close(mut wire: Wire) {
    drop(wire.out);
    if wire.dialled {
        let ended = async { while let Some(Ok(_)) = wire.incoming.next().await {} };
        drop(timeout(CLOSING, ended).await);
    }
}

enum Event {
    Cancelled,
    Leadership,
    Tick,
    CanSend,
    Incoming(Option<Result<pb::Frame, String>>),
    Ship(ship::Event),
    Take(take::Event),
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    wire: &'a mut Wire,
    cancel: CancellationToken,
    leadership: watch::Receiver<Leadership>,
    under: Leadership,
    ship: Option<Ship>,
    take: Option<Take>,
    queue: VecDeque<pb::Frame>,
    ack: Due,
    progress: Due,
    tick: Interval,
    began: Instant,
    ping: Due,
    /// A ping of the peer that is not answered yet.
    pong: Option<pb::Pong>,
    heard: Instant,
    /// Bytes read when something was heard last.
    read: u64,
    progressed: bool,
}

/// Something that is said when it changed, and again after a while.
struct Due {
    now: bool,
    said: Instant,
}

impl Due {
    fn said(&mut self, now: Instant) {
        *self = Self { now: false, said: now };
    }
}

impl<'a> Session<'a> {
    fn new(shared: &'a Arc<Shared>, wire: &'a mut Wire, greeted: Greeted, cancel: CancellationToken) -> Self {
        let now = Instant::now();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let wanted = greeted.theirs.receiving.into_iter().find(|receiving| receiving.source == shared.config.site);
        let wanted = wanted.filter(|_| shared.config.originates);
        let ship = wanted.map(|receiving| Ship::new(shared, &wire.site, receiving, greeted.leadership.term));
        let take = greeted.own.map(|own| Take::start(shared, own, shared.inbox(&wire.site)));
        Self {
            shared,
            wire,
            cancel,
            leadership: shared.inputs.leadership.clone(),
            under: greeted.leadership,
            ship,
            take,
            queue: VecDeque::new(),
            ack: Due { now: true, said: now },
            progress: Due { now: true, said: now },
            tick,
            began: now,
            ping: Due { now: true, said: now },
            pong: None,
            heard: now,
            read: 0,
            progressed: false,
        }
    }

    async fn run(mut self) -> Summary {
        let first = self.ship.as_mut().map(Ship::start).and_then(|outcome| self.shipped(outcome));
        let ended = match first {
            Some(ended) => ended,
            None => self.carry().await,
        };
        if let Some(take) = &mut self.take {
            take.finish().await;
        }
        if matches!(ended, Ended::Cancelled | Ended::Refused(_)) {
            self.ack.now = true;
            drop(timeout(CLOSING, self.flush()).await);
        }
        let told = match &ended {
            Ended::Rejected(rejection) | Ended::Refused(rejection) => Some(rejection),
            _ => None,
        };
        let now = Instant::now();
        if let Some(ship) = &self.ship {
            ship.close(told, now);
        }
        if let Some(take) = &self.take {
            take.close(told, now);
        }
        Summary { ended, established: true, progressed: self.progressed }
    }

    async fn carry(&mut self) -> Ended {
        loop {
            let event = self.next().await;
            if let Some(ended) = self.apply(event) {
                return ended;
            }
        }
    }

    async fn flush(&mut self) {
        while let Some(frame) = self.next_frame() {
            if self.wire.out.send(frame).await.is_err() {
                return;
            }
        }
    }

    async fn next(&mut self) -> Event {
        let (something, room) = (self.has_frame(), self.queue.len() < QUEUE);
        let (ship, take) = (&mut self.ship, &mut self.take);
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Event::Cancelled,
            // An agent that ends drops the sender; that alone changes nothing here.
            Ok(()) = self.leadership.changed() => Event::Leadership,
            _ = self.tick.tick() => Event::Tick,
            // Before sending, so that the commits of one group share an acknowledgement.
            event = async { take.as_mut().expect("checked").next().await }, if take.is_some() => Event::Take(event),
            _ = self.wire.out.reserve(), if something => Event::CanSend,
            frame = self.wire.incoming.next() => Event::Incoming(frame),
            event = async { ship.as_mut().expect("checked").next(room).await }, if ship.is_some() => Event::Ship(event),
        }
    }

    fn apply(&mut self, event: Event) -> Option<Ended> {
        match event {
            Event::Cancelled => Some(Ended::Cancelled),
            Event::Leadership => self.led(),
            Event::Tick => self.ticked(),
            Event::CanSend => {
                let frame = self.next_frame()?;
                let lost = |_| Ended::Lost("the connection was closed".into());
                self.wire.out.try_send(frame).map_err(lost).err()
            }
            Event::Incoming(None) => Some(Ended::Closed),
            Event::Incoming(Some(Err(error))) => Some(Ended::Lost(error)),
            Event::Incoming(Some(Ok(frame))) => self.heard(frame),
            Event::Ship(event) => {
                let outcome = self.ship.as_mut().expect("its event").apply(event);
                self.shipped(outcome)
            }
            Event::Take(event) => {
                let outcome = self.take.as_mut().expect("its event").apply(event);
                self.taken(outcome)
            }
        }
    }

    fn led(&mut self) -> Option<Ended> {
        let now = *self.leadership.borrow_and_update();
        let message = format!("this agent of {} no longer holds its site's lease", self.shared.config.site);
        (now != self.under).then(|| Ended::Refused(Rejection::new(Reason::NotLeader, message, "")))
    }

    fn ticked(&mut self) -> Option<Ended> {
        let now = Instant::now();
        self.ack.now |= now.duration_since(self.ack.said) >= REPEAT;
        self.progress.now |= now.duration_since(self.progress.said) >= REPEAT;
        self.ping.now |= now.duration_since(self.ping.said) >= REPEAT;
        let read = self.wire.peer.read.load(Ordering::Relaxed);
        if read.saturating_sub(self.read) >= ALIVE {
            (self.heard, self.read) = (now, read);
        }
        let silent = (self.ship.is_some() || self.take.is_some()) && now.duration_since(self.heard) >= SILENCE;
        if silent {
            return Some(Ended::Lost(format!("nothing was heard for {} s", SILENCE.as_secs())));
        }
        let shipped = self.ship.as_mut().map(Ship::tick).and_then(|outcome| self.shipped(outcome));
        let taken = self.take.as_mut().map(Take::tick);
        shipped.or_else(|| self.taken(taken?))
    }

    fn has_frame(&self) -> bool {
        let ack = self.ack.now && self.take.is_some();
        let progress = self.progress.now && self.ship.is_some();
        ack || progress || self.ping.now || self.pong.is_some() || !self.queue.is_empty()
    }

    /// Acks and progress are made when they can leave, so they are always the newest.
    fn next_frame(&mut self) -> Option<pb::Frame> {
        let now = Instant::now();
        if let Some(pong) = self.pong.take() {
            return Some(pb::Frame::of(Body::Pong(pong)));
        }
        if self.ping.now {
            self.ping.said(now);
            return Some(pb::Frame::of(Body::Ping(pb::Ping { at_us: micros(now - self.began) })));
        }
        if let Some(take) = self.take.as_mut().filter(|_| self.ack.now) {
            self.ack.said(now);
            return Some(pb::Frame::of(Body::Ack(take.ack())));
        }
        if let Some(ship) = self.ship.as_ref().filter(|_| self.progress.now) {
            self.progress.said(now);
            return Some(pb::Frame::of(Body::Progress(ship.progress())));
        }
        self.queue.pop_front()
    }

    fn heard(&mut self, frame: pb::Frame) -> Option<Ended> {
        self.heard = Instant::now();
        if !frame.is_intact() {
            return Some(self.damaged());
        }
        let own = self.shared.config.site.as_str();
        let peer = self.wire.site.as_str();
        if let Some(Body::Ping(ping)) = frame.body {
            self.pong = Some(pb::Pong { at_us: ping.at_us });
            return None;
        }
        if let Some(Body::Pong(pong)) = frame.body {
            // A time of another session, or one made up, measures nothing.
            if let Some(us) = micros(self.heard - self.began).checked_sub(pong.at_us) {
                self.shared.link_measured(entry(self.shared, &self.wire.site), Duration::from_micros(us.max(1)));
            }
            return None;
        }
        match (frame.body, &mut self.ship, &mut self.take) {
            (Some(Body::Ack(ack)), Some(ship), _) if ack.source == own => {
                let outcome = ship.acked(&ack);
                self.shipped(outcome)
            }
            (Some(Body::Fetch(fetch)), Some(ship), _) => {
                let outcome = ship.fetch(fetch);
                self.shipped(outcome)
            }
            (Some(Body::Batch(batch)), _, Some(take)) => {
                let outcome = take.batch(batch);
                self.taken(outcome)
            }
            (Some(Body::Progress(progress)), _, Some(take)) if progress.source == peer => {
                take.progress(&progress, self.heard);
                None
            }
            (Some(Body::Fetched(fetched)), _, Some(take)) => {
                take.fetched(fetched);
                None
            }
            (Some(Body::Reject(reject)), ship, _) => {
                let rejection = Rejection::from(reject);
                if let Some(ship) = ship {
                    ship.rejected(rejection.clone());
                }
                Some(Ended::Rejected(rejection))
            }
            (Some(Body::Batch(_)), _, None) => {
                let message = format!("site/{peer} ships a stream that is not received from it");
                Some(Ended::Refused(super::wire::identity(message)))
            }
            // A frame of a newer kind, which an older version may skip.
            (None, _, _) => None,
            (Some(_), _, _) => Some(Ended::Refused(protocol("a frame that does not belong to this session"))),
        }
    }

    /// A frame was damaged on its way: nothing it says counts.
    fn damaged(&self) -> Ended {
        let entry = entry(self.shared, &self.wire.site);
        let view = if self.take.is_some() { &entry.incoming } else { &entry.outgoing };
        view.send_modify(|view| view.counters.corrupt_records += 1);
        Ended::Refused(corrupt())
    }

    fn shipped(&mut self, outcome: ship::Outcome) -> Option<Ended> {
        match outcome {
            ship::Outcome::Nothing => None,
            ship::Outcome::Send(body) => {
                self.progressed |= matches!(body, Body::Batch(_));
                self.queue.push_back(pb::Frame::of(body));
                None
            }
            ship::Outcome::Progress => {
                self.progress.now = true;
                None
            }
            ship::Outcome::Stop(Stop::Refuse(rejection)) => Some(Ended::Refused(rejection)),
            ship::Outcome::Stop(Stop::Rejected(rejection)) => Some(Ended::Rejected(rejection)),
            ship::Outcome::Stop(Stop::Restart(why)) => Some(Ended::Failed(why.to_owned())),
            ship::Outcome::Failed(error) => Some(Ended::Failed(error)),
        }
    }

    fn taken(&mut self, outcome: take::Outcome) -> Option<Ended> {
        match outcome {
            take::Outcome::Nothing => None,
            take::Outcome::Ack => {
                self.ack.now = true;
                None
            }
            take::Outcome::Stored => {
                (self.ack.now, self.progressed) = (true, true);
                None
            }
            take::Outcome::Fetch(fetch) => {
                self.queue.push_back(pb::Frame::of(Body::Fetch(fetch)));
                None
            }
            take::Outcome::Reject(rejection) => Some(Ended::Refused(rejection)),
            take::Outcome::Failed(error) => Some(Ended::Failed(error)),
        }
    }
}
