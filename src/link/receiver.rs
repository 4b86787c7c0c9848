//! The target's half of a stream as a state machine: checks, orders and acknowledges, does no I/O.
//!
//! A batch is checked in this order: source (against the certificate), record (crc, decoding), epoch, term, incarnation, chain.
//! The record comes before epoch and term so that a damaged frame is never taken for a stale or a newer agent.
//!
//! Invariants: what is stored is a gapless prefix of one history and each change is in it once; `received` in an
//! acknowledgement is durable; credit is granted for records that are durable (or were not needed), so what waits in memory is
//! bounded by the window and one record.

use bytes::Bytes;
use farshore_api::replication::v1 as pb;

use super::wire::{Reason, Receiving, Rejection, identity, protocol, stale_epoch, stale_term};
use crate::model::batch::MAX_RAW;
use crate::model::{Batch, Epoch, Incarnation, Position, RecordError, SiteName, StreamHash, Term};

/// The part of an inbox's state that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboxView {
    /// The history it holds.
    pub incarnation: Incarnation,
    /// Everything up to here is durable.
    pub end: Position,
    /// Stream hash at `end`.
    pub hash: StreamHash,
}

/// What happens to a receiver.
#[derive(Debug)]
pub enum Event {
    /// The source shipped a batch.
    Batch(pb::Batch),
    /// A stored record is durable: the log's end and the record's bytes.
    Stored { end: Position, bytes: u64 },
    /// Bytes the inbox can still take.
    Room(u64),
}

/// What is to be done, in this order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Begin the inbox.
    Begin { incarnation: Incarnation, epoch: Epoch, at: Position, hash: StreamHash },
    /// Persist the term before anything shipped under it.
    PutTerm(Term),
    /// Append to the inbox.
    Store(Batch),
    /// Tell the source and end the session.
    Reject(Rejection),
}

#[derive(Debug)]
enum Chain {
    /// Nothing was ever received; the stream may begin here.
    Fresh,
    /// Accepted up to `end` (not all durable yet).
    At(InboxView),
    Stopped,
}

/// The target's half of one session.
#[derive(Debug)]
pub struct Receiver {
    fresh: Receiving,
    epoch: Epoch,
    term: Term,
    chain: Chain,
    durable: Option<Position>,
    /// Bytes accepted for storing and not yet durable.
    waiting: u64,
    /// Bytes that no longer take room: durable or not needed.
    done: u64,
    window: u64,
    room: u64,
    credit: u64,
}

impl Receiver {
    /// Receives the stream of `receiving.source`; `inbox` as it is now, `term` the highest one stored; at most about `window`
    /// bytes wait in memory. An inbox that was begun takes precedence over what `receiving` says.
    pub fn new(receiving: Receiving, inbox: Option<InboxView>, epoch: Epoch, term: Term, window: u64) -> Self {
        Self {
            fresh: receiving,
            epoch,
            term,
            chain: inbox.map_or(Chain::Fresh, Chain::At),
            durable: inbox.map(|inbox| inbox.end),
            waiting: 0,
            done: 0,
            window,
            room: 0,
            credit: 0,
        }
    }

    /// Whose stream it is.
    pub fn source(&self) -> &SiteName {
        &self.fresh.source
    }

    /// Everything up to here is durable.
    pub fn durable(&self) -> Option<Position> {
        self.durable
    }

    /// Total bytes the source may have sent.
    pub fn credit(&self) -> u64 {
        self.credit
    }

    /// The acknowledgement that is true now.
    pub fn ack(&self, applied: Option<Position>) -> pb::Ack {
        pb::Ack {
            source: self.fresh.source.to_string(),
            received: self.durable.map(Into::into),
            applied: applied.map(Into::into),
            verified: None,
            credit: self.credit,
        }
    }

    /// Decides. Nothing is decided after a rejection, but records on their way become durable all the same.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Batch(frame) => {
                if matches!(self.chain, Chain::Stopped) {
                    return Vec::new();
                }
                self.batch(&frame).unwrap_or_else(|rejection| {
                    self.chain = Chain::Stopped;
                    vec![Action::Reject(rejection)]
                })
            }
            Event::Stored { end, bytes } => {
                self.stored(end, bytes);
                Vec::new()
            }
            Event::Room(room) => {
                self.room = room;
                self.grant();
                Vec::new()
            }
        }
    }

    fn stored(&mut self, end: Position, bytes: u64) {
        assert!(
            self.durable.is_none_or(|durable| durable <= end),
            "durable went back from {:?} to {end}",
            self.durable
        );
        self.durable = Some(end);
        self.waiting = self.waiting.saturating_sub(bytes);
        self.done += bytes;
        self.grant();
    }

    fn grant(&mut self) {
        self.credit = self.credit.max(self.done + self.window.min(self.room));
    }

    fn batch(&mut self, frame: &pb::Batch) -> Result<Vec<Action>, Rejection> {
        if frame.source != self.fresh.source.as_str() {
            let shipped = frame.source.escape_debug();
            return Err(identity(format!("site/{} shipped a batch of '{shipped}'", self.fresh.source)));
        }
        let bytes = frame.record.len() as u64;
        if self.waiting >= self.window.saturating_add(MAX_RAW as u64) {
            return Err(protocol("more was shipped than the credit allows"));
        }
        // A slice would keep the transport's buffer, which is larger, for as long as the batch lives.
        let batch = Batch::decode(Bytes::copy_from_slice(&frame.record)).map_err(bad_record)?;
        let mut actions = Vec::new();
        let newer_term = self.fence(frame, &batch)?;
        let have = match &self.chain {
            Chain::At(view) => *view,
            Chain::Fresh => self.begin(&batch, frame.begins, &mut actions)?,
            Chain::Stopped => return Ok(Vec::new()),
        };
        let header = batch.header();
        if header.incarnation != have.incarnation {
            let message = format!("record of history {}, the target holds {}", header.incarnation, have.incarnation);
            return Err(Rejection::new(
                Reason::Incarnation,
                message,
                "the source was rewound (restored?); resync the target",
            ));
        }
        if header.previous > have.end {
            return Err(gap(header.previous, have.end));
        }
        // A log that was not begun has no place for a term; the first record stored brings both.
        if let Some(term) = newer_term.filter(|_| !actions.is_empty() || matches!(self.chain, Chain::At(_))) {
            self.term = term;
            actions.push(Action::PutTerm(term));
        }
        if header.end <= have.end {
            self.done += bytes;
            self.grant();
            return Ok(actions);
        }
        // A record may overlap what is here, as another agent cuts its batches elsewhere.
        let theirs = hash_at(&batch, have.end).map_err(bad_record)?;
        if theirs != have.hash {
            return Err(other_changes(have, theirs));
        }
        self.chain = Chain::At(InboxView { end: header.end, hash: header.hash, ..have });
        self.waiting += bytes;
        actions.push(Action::Store(batch));
        Ok(actions)
    }

    /// The term to persist, if the frame carries a newer one.
    fn fence(&mut self, frame: &pb::Batch, batch: &Batch) -> Result<Option<Term>, Rejection> {
        let (epoch, term) = (Epoch(frame.epoch), Term(frame.term));
        if epoch < self.epoch {
            return Err(stale_epoch(epoch, self.epoch));
        }
        if batch.header().epoch > epoch {
            return Err(protocol("a record of a later epoch than the frame that carries it"));
        }
        if term < self.term {
            return Err(stale_term(term, self.term));
        }
        self.epoch = epoch;
        Ok((term > self.term).then_some(term))
    }

    /// A stream begins at its first batch, or at the floor inside of it.
    fn begin(&mut self, batch: &Batch, begins: bool, actions: &mut Vec<Action>) -> Result<InboxView, Rejection> {
        let header = batch.header();
        if let Some(standing) = self.fresh.received.filter(|standing| standing.incarnation != header.incarnation) {
            let message =
                format!("record of history {}, the target stands in {}", header.incarnation, standing.incarnation);
            return Err(Rejection::new(
                Reason::Incarnation,
                message,
                "the source was rewound (restored?); resync the target",
            ));
        }
        // Without a floor nothing but the source's word tells that no batch was lost before this one.
        let Some(floor) = self.fresh.floor().or(begins.then_some(header.previous)) else {
            return Err(gap(header.previous, Position::ZERO));
        };
        if header.previous > floor {
            return Err(gap(header.previous, floor));
        }
        let hash = hash_at(batch, floor).map_err(bad_record)?;
        let view = InboxView { incarnation: header.incarnation, end: floor, hash };
        if header.end > floor {
            actions.push(Action::Begin { incarnation: view.incarnation, epoch: header.epoch, at: floor, hash });
        }
        Ok(view)
    }
}

fn other_changes(have: InboxView, theirs: StreamHash) -> Rejection {
    let message = format!("the stream hash at {} is {} here and {theirs} at the source", have.end, have.hash);
    Rejection::new(Reason::Incarnation, message, "the two sites have seen different changes; resync the target")
}

fn gap(previous: Position, have: Position) -> Rejection {
    Rejection::new(Reason::Gap, format!("batch follows {previous}, the target has {have}"), "")
}

fn bad_record(error: RecordError) -> Rejection {
    match error {
        RecordError::Newer { .. } => {
            Rejection::new(Reason::Version, error.to_string(), "upgrade the agents of the target site first")
        }
        other => Rejection::new(Reason::Corrupt, other.to_string(), ""),
    }
}

/// Stream hash at `floor`, which is at or past the batch's `previous`.
fn hash_at(batch: &Batch, floor: Position) -> Result<StreamHash, RecordError> {
    let header = batch.header();
    if floor == header.previous {
        return Ok(header.hash_before);
    }
    let mut hash = header.hash_before;
    for entry in batch.changes()?.entries() {
        let (position, document) = entry?;
        if position > floor {
            break;
        }
        hash = hash.roll(position, document.as_bytes());
    }
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::testing::{batch, hash_before, incarnation, site};
    use crate::link::wire::Standing;
    use crate::model::ClusterTime;

    const WINDOW: u64 = 1000;

    fn at(time: u64) -> Position {
        Position::before(ClusterTime(time))
    }

    fn fresh(start_at: Option<u64>) -> Receiving {
        Receiving { source: site("north"), received: None, start_at: start_at.map(ClusterTime), empty: true }
    }

    fn receiver(end: u64) -> Receiver {
        let inbox = InboxView { incarnation: incarnation(1), end: at(end), hash: hash_before(end) };
        Receiver::new(fresh(None), Some(inbox), Epoch(1), Term(2), WINDOW)
    }

    fn shipped(batch: &Batch) -> pb::Batch {
        pb::Batch { source: "north".into(), epoch: 1, term: 2, record: batch.record().clone(), begins: true }
    }

    fn reason(actions: Vec<Action>) -> Reason {
        match actions.as_slice() {
            [Action::Reject(rejection)] => rejection.reason,
            other => panic!("{other:?}"),
        }
    }

    fn rejected(change: impl FnOnce(&mut pb::Batch)) -> Reason {
        let mut frame = shipped(&batch(1, 10, 12));
        change(&mut frame);
        let mut receiver = receiver(10);
        let found = reason(receiver.on(Event::Batch(frame)));
        assert_eq!(
            receiver.on(Event::Batch(shipped(&batch(1, 10, 12)))),
            vec![],
            "nothing is stored after a rejection"
        );
        found
    }

    #[test]
    fn each_rule_has_its_reason() {
        assert_eq!(rejected(|f| f.source = "south".into()), Reason::Identity);
        assert_eq!(rejected(|f| f.epoch = 0), Reason::Epoch);
        assert_eq!(rejected(|f| f.term = 1), Reason::Term);
        assert_eq!(rejected(|f| f.record = f.record.slice(1..)), Reason::Corrupt);
        assert_eq!(rejected(|f| f.record = batch(2, 10, 12).record().clone()), Reason::Incarnation);
        assert_eq!(rejected(|f| f.record = batch(1, 11, 12).record().clone()), Reason::Gap);
        let other = crate::link::testing::batch_after(1, 10, 12, StreamHash(5));
        assert_eq!(rejected(|f| f.record = other.record().clone()), Reason::Incarnation);
        let overlapping = crate::link::testing::batch_after(1, 9, 12, StreamHash(5));
        assert_eq!(rejected(|f| f.record = overlapping.record().clone()), Reason::Incarnation);
        let damaged_and_stale = |f: &mut pb::Batch| (f.record, f.term) = (f.record.slice(1..), 1);
        assert_eq!(rejected(damaged_and_stale), Reason::Corrupt, "a damaged frame proves nothing about its sender");
    }

    #[test]
    fn duplicates_are_acknowledged_overlaps_stored_and_only_durable_is_received() {
        let mut receiver = receiver(10);
        receiver.on(Event::Room(u64::MAX));
        assert_eq!(receiver.ack(None).credit, WINDOW);
        let (old, overlap) = (batch(1, 8, 10), batch(1, 9, 12));
        assert_eq!(receiver.on(Event::Batch(shipped(&old))), vec![]);
        assert_eq!(receiver.ack(None).credit, WINDOW + old.record().len() as u64);
        assert_eq!(receiver.on(Event::Batch(shipped(&overlap))), vec![Action::Store(overlap.clone())]);
        assert_eq!(receiver.ack(None).received, Some(at(10).into()));
        receiver.on(Event::Stored { end: at(12), bytes: overlap.record().len() as u64 });
        assert_eq!(receiver.ack(None).received, Some(at(12).into()));
    }

    #[test]
    fn a_newer_term_is_persisted_before_what_it_ships() {
        let mut receiver = receiver(10);
        let (first, second) = (batch(1, 10, 12), batch(1, 12, 13));
        let of_term = |batch: &Batch, term| Event::Batch(pb::Batch { term, ..shipped(batch) });
        let expected = vec![Action::PutTerm(Term(3)), Action::Store(first.clone())];
        assert_eq!(receiver.on(of_term(&first, 3)), expected);
        assert_eq!(reason(receiver.on(of_term(&second, 2))), Reason::Term);
    }

    #[test]
    fn a_fresh_stream_begins_at_its_first_batch_or_at_its_floor() {
        let begin = |fresh: Receiving, batch: &Batch| {
            let mut receiver = Receiver::new(fresh, None, Epoch(1), Term(0), WINDOW);
            assert_eq!(receiver.ack(None).received, None);
            receiver.on(Event::Batch(shipped(batch)))
        };
        let begun = |time, batch: &Batch| {
            let (at, hash) = (at(time), hash_before(time));
            let begin = Action::Begin { incarnation: incarnation(1), epoch: Epoch(1), at, hash };
            vec![begin, Action::PutTerm(Term(2)), Action::Store(batch.clone())]
        };
        let first = batch(1, 10, 14);
        assert_eq!(begin(fresh(None), &first), begun(10, &first));
        assert_eq!(begin(fresh(Some(11)), &first), begun(12, &first), "what the target has is not applied again");
        assert_eq!(reason(begin(fresh(Some(5)), &first)), Reason::Gap);
        assert_eq!(begin(fresh(Some(20)), &first), vec![]);
        let mut lost = Receiver::new(fresh(None), None, Epoch(1), Term(0), WINDOW);
        let second = pb::Batch { begins: false, ..shipped(&first) };
        assert_eq!(reason(lost.on(Event::Batch(second))), Reason::Gap, "the first batch was lost");
        let standing = Standing { position: at(11), incarnation: incarnation(2), hash: StreamHash(0) };
        assert_eq!(reason(begin(Receiving { received: Some(standing), ..fresh(None) }, &first)), Reason::Incarnation);
    }

    #[test]
    fn credit_follows_what_is_durable_and_the_room_there_is() {
        let mut receiver = receiver(10);
        receiver.on(Event::Room(300));
        assert_eq!(receiver.ack(None).credit, 300);
        let first = batch(1, 10, 12);
        receiver.on(Event::Batch(shipped(&first)));
        assert_eq!(receiver.ack(None).credit, 300, "accepted is not durable");
        receiver.on(Event::Room(0));
        let bytes = first.record().len() as u64;
        receiver.on(Event::Stored { end: at(12), bytes });
        assert_eq!(receiver.ack(None).credit, bytes.max(300), "no room, no more credit");
        receiver.on(Event::Room(u64::MAX));
        assert_eq!(receiver.ack(None).credit, bytes + WINDOW);
    }
}
