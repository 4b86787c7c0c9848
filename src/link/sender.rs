//! The source's half of a stream as a state machine: decides what is read and shipped, does no I/O.
//!
//! ```text
//! AwaitingHello --Hello, outbox reaches it--------------> Streaming
//!       |                                                  ^   |
//!       +--Hello, it does not--> AwaitingGate --allowed--> |   | Trimmed, Lost, Reject, other history
//!                                   |   AwaitingOutbox ----+   v
//!                                   +--refused------------> Stopped
//! ```
//!
//! Invariants: records leave in order, each once per session, from the position the target named; a record is sent only while
//! the bytes sent are below the credit (one record may overshoot, so a record larger than any credit still
//! passes); nothing is sent after a stop.

use farshore_api::replication::v1 as pb;

use super::hub::StartRefusal;
use super::wire::{Reason, Receiving, Rejection};
use crate::model::{Batch, Epoch, Incarnation, Position, SiteName, Term};

/// The part of an outbox's state that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutboxView {
    /// The history it holds.
    pub incarnation: Incarnation,
    /// It reaches back to here.
    pub first: Position,
    /// And up to here.
    pub end: Position,
}

/// What happens to a sender.
#[derive(Debug)]
pub enum Event {
    /// The target named where it stands.
    Hello(Receiving, Option<OutboxView>),
    /// The gate's answer, with the outbox as it is then.
    Gate(Result<(), StartRefusal>, Option<OutboxView>),
    /// The outbox began or moved while nothing was there.
    Outbox(Option<OutboxView>),
    /// The next record was read.
    Record(Batch),
    /// What should be read next is no longer kept.
    Trimmed,
    /// What follows the outbox is gone at the source.
    Lost(Option<OutboxView>),
    /// Total bytes that may have been sent.
    Credit(u64),
    /// The target refuses.
    Rejected(Rejection),
}

/// What is to be done.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Ask whether and from where the target may be served.
    AskGate,
    /// Read the outbox on from here.
    ReadFrom(Position),
    /// Ship this.
    Send(pb::Batch),
    /// End the session.
    Stop(Stop),
}

/// Why a sender stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The target must be told.
    Refuse(Rejection),
    /// The target said so.
    Rejected(Rejection),
    /// The session must start again with a new Hello.
    Restart(&'static str),
}

#[derive(Debug)]
enum State {
    AwaitingHello,
    AwaitingGate(Receiving),
    AwaitingOutbox(Receiving),
    Streaming { incarnation: Incarnation, sent: Position, bytes: u64, begins: bool },
    Stopped,
}

/// The source's half of one session.
#[derive(Debug)]
pub struct Sender {
    source: SiteName,
    epoch: Epoch,
    term: Term,
    credit: u64,
    state: State,
}

impl Sender {
    /// Ships `source`'s stream under this epoch and term.
    pub fn new(source: SiteName, epoch: Epoch, term: Term) -> Self {
        Self { source, epoch, term, credit: 0, state: State::AwaitingHello }
    }

    /// Whether the next record can be sent.
    pub fn wants_record(&self) -> bool {
        matches!(self.state, State::Streaming { bytes, .. } if bytes < self.credit)
    }

    /// Whether it matters that the outbox begins.
    pub fn waits_for_outbox(&self) -> bool {
        matches!(self.state, State::AwaitingOutbox(_))
    }

    /// End of what was sent in this session (or where it began).
    pub fn sent(&self) -> Option<Position> {
        match self.state {
            State::Streaming { sent, .. } => Some(sent),
            _ => None,
        }
    }

    /// Decides. Events that come after a stop are ignored.
    pub fn on(&mut self, event: Event) -> Option<Action> {
        let state = std::mem::replace(&mut self.state, State::Stopped);
        match (state, event) {
            (State::Stopped, _) => None,
            (_, Event::Rejected(rejection)) => Some(Action::Stop(Stop::Rejected(rejection))),
            (state, Event::Credit(total)) => {
                self.credit = self.credit.max(total);
                self.stay(state)
            }
            (State::AwaitingHello, Event::Hello(receiving, outbox)) => self.greeted(receiving, outbox),
            (State::AwaitingGate(receiving), Event::Gate(Ok(()), outbox)) => self.begin(receiving, outbox),
            (State::AwaitingGate(_), Event::Gate(Err(refusal), _)) => {
                self.refuse(Reason::Start, refusal.message, refusal.hint)
            }
            (State::AwaitingOutbox(receiving), Event::Outbox(outbox)) => self.begin(receiving, outbox),
            (State::Streaming { .. }, Event::Trimmed) => self.restart("the outbox no longer holds what comes next"),
            // The gate knows what to do about a target that is ahead of what can still be captured.
            (State::Streaming { sent, .. }, Event::Lost(Some(outbox))) if sent > outbox.end => {
                self.restart("the target is ahead of the outbox, which cannot get there")
            }
            (state, Event::Lost(_)) => self.stay(state),
            (State::Streaming { incarnation, sent, bytes, begins }, Event::Record(batch)) => {
                let frame = pb::Batch {
                    source: self.source.to_string(),
                    epoch: self.epoch.0,
                    term: self.term.0,
                    record: batch.record().clone(),
                    begins,
                };
                self.ship(incarnation, sent, bytes, &batch, frame)
            }
            (state @ (State::AwaitingGate(_) | State::Streaming { .. }), Event::Outbox(_)) => self.stay(state),
            (state, event) => panic!("sender in {state:?} got {event:?}"),
        }
    }

    fn stay(&mut self, state: State) -> Option<Action> {
        self.state = state;
        None
    }

    fn refuse(&mut self, reason: Reason, message: String, hint: String) -> Option<Action> {
        self.state = State::Stopped;
        Some(Action::Stop(Stop::Refuse(Rejection::new(reason, message, hint))))
    }

    fn restart(&mut self, why: &'static str) -> Option<Action> {
        self.state = State::Stopped;
        Some(Action::Stop(Stop::Restart(why)))
    }

    fn greeted(&mut self, receiving: Receiving, outbox: Option<OutboxView>) -> Option<Action> {
        match (outbox, receiving.received) {
            (Some(outbox), Some(standing)) if outbox.incarnation != standing.incarnation => {
                self.other_history(&receiving, outbox)
            }
            (Some(outbox), Some(standing)) if (outbox.first..=outbox.end).contains(&standing.position) => {
                self.begin(receiving, Some(outbox))
            }
            _ => {
                self.state = State::AwaitingGate(receiving);
                Some(Action::AskGate)
            }
        }
    }

    fn begin(&mut self, receiving: Receiving, outbox: Option<OutboxView>) -> Option<Action> {
        let Some(outbox) = outbox else { return self.stay(State::AwaitingOutbox(receiving)) };
        if receiving.received.is_some_and(|standing| standing.incarnation != outbox.incarnation) {
            return self.other_history(&receiving, outbox);
        }
        let from = receiving.floor().unwrap_or(outbox.first);
        if outbox.first > from {
            let message = format!("the outbox reaches back to {}, the target stands at {from}", outbox.first);
            return self.refuse(Reason::Start, message, "the target needs an initial copy".into());
        }
        let begins = receiving.received.is_none();
        self.state = State::Streaming { incarnation: outbox.incarnation, sent: from, bytes: 0, begins };
        Some(Action::ReadFrom(from))
    }

    fn other_history(&mut self, receiving: &Receiving, outbox: OutboxView) -> Option<Action> {
        let at = receiving.received.map(|standing| standing.incarnation.to_string()).unwrap_or_default();
        let message = format!("the target stands in history {at}, this source is in {}", outbox.incarnation);
        self.refuse(Reason::Incarnation, message, "the source was rewound (restored?); resync the target".into())
    }

    fn ship(
        &mut self,
        incarnation: Incarnation,
        sent: Position,
        bytes: u64,
        batch: &Batch,
        frame: pb::Batch,
    ) -> Option<Action> {
        let header = batch.header();
        if header.incarnation != incarnation {
            return self.restart("the outbox was begun again in another history");
        }
        assert!(
            header.end > sent && bytes < self.credit,
            "record to {} after {sent}, {bytes} of {}",
            header.end,
            self.credit
        );
        let bytes = bytes + batch.record().len() as u64;
        self.state = State::Streaming { incarnation, sent: header.end, bytes, begins: false };
        Some(Action::Send(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::testing::{batch, incarnation, site};
    use crate::link::wire::Standing;
    use crate::model::{ClusterTime, StreamHash};

    fn sender() -> Sender {
        Sender::new(site("north"), Epoch(1), Term(3))
    }

    fn at(time: u64) -> Position {
        Position::before(ClusterTime(time))
    }

    fn standing(time: u64) -> Receiving {
        let received = Standing { position: at(time), incarnation: incarnation(1), hash: StreamHash(0) };
        Receiving { source: site("north"), received: Some(received), start_at: None, empty: false }
    }

    fn fresh(start_at: Option<u64>) -> Receiving {
        Receiving { source: site("north"), received: None, start_at: start_at.map(ClusterTime), empty: true }
    }

    fn outbox(first: u64) -> Option<OutboxView> {
        Some(OutboxView { incarnation: incarnation(1), first: at(first), end: at(20) })
    }

    fn reason(action: Option<Action>) -> Reason {
        match action {
            Some(Action::Stop(Stop::Refuse(rejection))) => rejection.reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn streams_after_what_the_target_has_within_its_credit() {
        let mut sender = sender();
        assert_eq!(sender.on(Event::Hello(standing(10), outbox(5))), Some(Action::ReadFrom(at(10))));
        assert!(!sender.wants_record(), "no credit yet");
        sender.on(Event::Credit(1));
        assert!(sender.wants_record());
        let first = batch(1, 10, 11);
        match sender.on(Event::Record(first.clone())) {
            Some(Action::Send(sent)) => assert_eq!((sent.record, sent.term), (first.record().clone(), 3)),
            other => panic!("{other:?}"),
        }
        assert!(!sender.wants_record(), "the credit is used up");
        sender.on(Event::Credit(first.record().len() as u64 + 1));
        assert!(sender.wants_record());
        sender.on(Event::Credit(0));
        assert!(sender.wants_record(), "credit never shrinks");
        assert_eq!(sender.sent(), Some(first.header().end));
    }

    #[test]
    fn a_fresh_target_always_passes_the_gate() {
        for (receiving, view, from) in [(fresh(None), outbox(5), at(5)), (fresh(Some(7)), outbox(5), at(8))] {
            let mut sender = sender();
            assert_eq!(sender.on(Event::Hello(receiving, view)), Some(Action::AskGate));
            assert_eq!(sender.on(Event::Gate(Ok(()), view)), Some(Action::ReadFrom(from)));
            sender.on(Event::Credit(u64::MAX));
            let mut begins = |from, to| match sender.on(Event::Record(batch(1, from, to))) {
                Some(Action::Send(frame)) => frame.begins,
                other => panic!("{other:?}"),
            };
            assert_eq!((begins(5, 9), begins(9, 10)), (true, false), "only the first batch begins a stream");
        }
        let mut late = sender();
        late.on(Event::Hello(fresh(Some(3)), outbox(5)));
        assert_eq!(reason(late.on(Event::Gate(Ok(()), outbox(5)))), Reason::Start);
    }

    #[test]
    fn an_outbox_that_does_not_reach_back_is_asked_for_and_awaited() {
        let mut sender = sender();
        assert_eq!(sender.on(Event::Hello(standing(4), outbox(5))), Some(Action::AskGate));
        assert_eq!(sender.on(Event::Gate(Ok(()), None)), None);
        assert!(sender.waits_for_outbox());
        assert_eq!(sender.on(Event::Outbox(None)), None);
        assert_eq!(sender.on(Event::Outbox(outbox(4))), Some(Action::ReadFrom(at(4))));
    }

    #[test]
    fn a_target_that_is_ahead_passes_the_gate_and_is_left_when_it_cannot_be_reached() {
        let mut ahead = sender();
        assert_eq!(ahead.on(Event::Hello(standing(99), outbox(10))), Some(Action::AskGate));
        assert_eq!(ahead.on(Event::Lost(outbox(10))), None, "the gate decides");
        assert_eq!(ahead.on(Event::Gate(Ok(()), outbox(10))), Some(Action::ReadFrom(at(99))));
        assert!(matches!(ahead.on(Event::Lost(outbox(10))), Some(Action::Stop(Stop::Restart(_)))));
        // The outbox's last records are shipped although nothing can follow them.
        let mut behind = sender();
        assert_eq!(behind.on(Event::Hello(standing(20), outbox(10))), Some(Action::ReadFrom(at(20))));
        assert_eq!(behind.on(Event::Lost(outbox(10))), None);
    }

    #[test]
    fn refusals_name_their_reason() {
        let mut other = sender();
        let view = OutboxView { incarnation: incarnation(2), first: at(1), end: at(20) };
        assert_eq!(reason(other.on(Event::Hello(standing(4), Some(view)))), Reason::Incarnation);
        let mut gate = sender();
        gate.on(Event::Hello(fresh(None), None));
        let refusal = StartRefusal { message: "not empty".into(), hint: "use start_at".into() };
        assert_eq!(reason(gate.on(Event::Gate(Err(refusal), None))), Reason::Start);
        assert_eq!(gate.on(Event::Gate(Ok(()), None)), None, "nothing happens after a stop");
    }

    #[test]
    fn rejections_and_lost_history_stop_it() {
        let mut deposed = sender();
        deposed.on(Event::Hello(standing(10), outbox(5)));
        let rejection = Rejection { term: Term(4), ..Rejection::new(Reason::Term, "", "") };
        let expected = Action::Stop(Stop::Rejected(rejection.clone()));
        assert_eq!(deposed.on(Event::Rejected(rejection)), Some(expected));
        assert!(!deposed.wants_record());
        let mut trimmed = sender();
        trimmed.on(Event::Hello(standing(10), outbox(5)));
        assert!(matches!(trimmed.on(Event::Trimmed), Some(Action::Stop(Stop::Restart(_)))));
    }
}
