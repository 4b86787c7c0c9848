//! The two machines against a hostile channel: frames are lost, repeated, held back, damaged and cut, and sessions begin anew from
//! what is durable; commits come late. Agents of the source take over whose outboxes are behind the target, and the history
//! these would need may be gone. Whatever happens, the inbox is a gapless prefix of the history, each change once, no
//! acknowledgement exceeds what is durable, and once the channel behaves everything arrives.

use std::collections::VecDeque;

use farshore_api::replication::v1 as pb;
use proptest::prelude::*;

use super::receiver::{self, Action as Take, InboxView, Receiver};
use super::sender::{self, Action as Ship, OutboxView, Sender};
use super::testing::{batch_after, hash_before, incarnation, site};
use super::wire::{Reason, Receiving, Standing};
use crate::model::{Batch, ClusterTime, Epoch, Position, StreamHash, Term};

const START: u64 = 10;
const CREDIT: u64 = 700;

fn at(time: u64) -> Position {
    Position::before(ClusterTime(time))
}

/// What the channel does to the oldest frame, or what happens beside it.
#[derive(Clone, Debug)]
enum Chaos {
    Deliver,
    Drop,
    Repeat,
    Swap,
    Flip(u16),
    LoseAck,
    Ack,
    Commit,
    Cut,
    /// The source's outbox is cut anew by another agent, in pieces of this length.
    Recut(u64),
    /// Another agent takes over whose capture is only there.
    Behind(u64),
    /// Capture goes on.
    Capture(u64),
    /// A target that is ahead of the outbox has what the oplog no longer holds.
    Lose,
}

fn chaos() -> impl Strategy<Value = Chaos> {
    prop_oneof![
        8 => Just(Chaos::Deliver),
        1 => Just(Chaos::Drop),
        1 => Just(Chaos::Repeat),
        1 => Just(Chaos::Swap),
        1 => any::<u16>().prop_map(Chaos::Flip),
        1 => Just(Chaos::LoseAck),
        4 => Just(Chaos::Ack),
        4 => Just(Chaos::Commit),
        1 => Just(Chaos::Cut),
        1 => (1u64..6).prop_map(Chaos::Recut),
        1 => (0u64..60).prop_map(Chaos::Behind),
        2 => (1u64..9).prop_map(Chaos::Capture),
        1 => Just(Chaos::Lose),
    ]
}

/// The durable side of the target: checks what a log checks.
#[derive(Default)]
struct Inbox {
    begun: Option<InboxView>,
    times: Vec<u64>,
    term: Term,
}

impl Inbox {
    fn commit(&mut self, action: Take) -> Option<receiver::Event> {
        match action {
            Take::Begin { incarnation, at, hash, .. } => {
                assert!(self.begun.is_none(), "begun twice");
                self.begun = Some(InboxView { incarnation, end: at, hash });
                None
            }
            Take::PutTerm(term) => {
                assert!(self.begun.is_some() && term > self.term);
                self.term = term;
                None
            }
            Take::Store(batch) => {
                let header = batch.header();
                let view = self.begun.as_mut().expect("begun first");
                assert!(header.previous <= view.end && view.end < header.end, "gap or overlap");
                for (position, _) in batch.changes().expect("good").shared() {
                    if position > view.end {
                        self.times.push(position.time.0);
                    }
                }
                (view.end, view.hash) = (header.end, header.hash);
                Some(receiver::Event::Stored { end: header.end, bytes: batch.record().len() as u64 })
            }
            Take::Reject(_) => None,
        }
    }

    fn receiving(&self) -> Receiving {
        let standing = |v: &InboxView| Standing { position: v.end, incarnation: v.incarnation, hash: v.hash };
        Receiving { source: site("north"), received: self.begun.as_ref().map(standing), start_at: None, empty: true }
    }
}

struct World {
    outbox: Vec<Batch>,
    /// Where the outbox begins, and how much of it is captured.
    first: u64,
    captured: u64,
    until: u64,
    /// What follows the outbox is gone.
    lost: bool,
    inbox: Inbox,
    sender: Sender,
    read_from: Position,
    receiver: Receiver,
    frames: VecDeque<pb::Batch>,
    commits: VecDeque<Take>,
    term: u64,
    waiting_most: u64,
}

fn outbox(first: u64, until: u64, length: u64) -> Vec<Batch> {
    let mut hash: StreamHash = hash_before(first);
    let cuts = (first..until).step_by(length as usize);
    cuts.map(|from| {
        let batch = batch_after(1, from, until.min(from + length), hash);
        hash = batch.header().hash;
        batch
    })
    .collect()
}

impl World {
    fn new(until: u64) -> Self {
        let inbox = Inbox::default();
        let mut world = Self {
            outbox: outbox(START, until, 3),
            first: START,
            captured: until,
            until,
            lost: false,
            sender: Sender::new(site("north"), Epoch(1), Term(1)),
            receiver: Receiver::new(inbox.receiving(), None, Epoch(1), Term(0), CREDIT),
            inbox,
            read_from: Position::ZERO,
            frames: VecDeque::new(),
            commits: VecDeque::new(),
            term: 1,
            waiting_most: 0,
        };
        world.connect();
        world
    }

    /// A new session: what was on its way to the disk ends first, as the shells do it.
    fn connect(&mut self) {
        while self.commit() {}
        self.frames.clear();
        let receiving = self.inbox.receiving();
        self.sender = Sender::new(site("north"), Epoch(1), Term(self.term));
        self.receiver = Receiver::new(receiving.clone(), self.inbox.begun, Epoch(1), self.inbox.term, CREDIT);
        self.receiver.on(receiver::Event::Room(u64::MAX));
        let mut action = self.sender.on(sender::Event::Hello(receiving, self.view()));
        if action == Some(Ship::AskGate) {
            if self.lost && self.ahead() {
                // What the gate does: capture begins where the target is.
                self.begin(self.inbox.begun.expect("it is ahead").end.time.0, 2);
            }
            action = self.sender.on(sender::Event::Gate(Ok(()), self.view()));
        }
        match action {
            Some(Ship::ReadFrom(position)) => self.read_from = position,
            other => panic!("{other:?}"),
        }
    }

    fn begin(&mut self, first: u64, length: u64) {
        self.outbox = outbox(first, self.until, length);
        (self.first, self.captured, self.lost) = (first, first, false);
    }

    /// Only whole batches are captured.
    fn end(&self) -> Position {
        let ends = self.outbox.iter().map(|batch| batch.header().end);
        ends.take_while(|end| *end <= at(self.captured)).last().unwrap_or(at(self.first))
    }

    fn view(&self) -> Option<OutboxView> {
        Some(OutboxView { incarnation: incarnation(1), first: at(self.first), end: self.end() })
    }

    fn ahead(&self) -> bool {
        self.inbox.begun.is_some_and(|view| view.end > self.end())
    }

    /// Looks whether capture can get there, as a session does again and again.
    fn look(&mut self) {
        if self.lost && self.sender.on(sender::Event::Lost(self.view())).is_some() {
            self.connect();
        }
    }

    fn ship(&mut self) {
        let captured = self.end();
        while self.sender.wants_record() {
            let next = self.outbox.iter().find(|batch| batch.header().end > self.read_from);
            let Some(next) = next.filter(|batch| batch.header().end <= captured) else { return };
            self.read_from = next.header().end;
            match self.sender.on(sender::Event::Record(next.clone())) {
                Some(Ship::Send(frame)) => self.frames.push_back(frame),
                other => panic!("{other:?}"),
            }
        }
    }

    fn ack(&mut self) {
        let ack = self.receiver.ack(None);
        let durable = self.inbox.begun.map(|view| view.end);
        assert!(ack.received.map(Position::from) <= durable, "{ack:?} is more than is durable, {durable:?}");
        self.sender.on(sender::Event::Credit(ack.credit));
    }

    fn commit(&mut self) -> bool {
        let Some(action) = self.commits.pop_front() else { return false };
        if let Some(event) = self.inbox.commit(action) {
            self.receiver.on(event);
        }
        true
    }

    fn deliver(&mut self, frame: pb::Batch) {
        let damaged = Batch::decode(frame.record.clone()).is_err();
        let actions = self.receiver.on(receiver::Event::Batch(frame));
        if let Some(Take::Reject(rejection)) = actions.last() {
            // A damaged format version looks like a newer one; both are shipped again.
            let expected: &[_] = if damaged { &[Reason::Corrupt, Reason::Version] } else { &[Reason::Gap] };
            assert!(expected.contains(&rejection.reason), "{rejection:?}");
            return self.connect();
        }
        assert!(!damaged, "a damaged record was accepted");
        self.commits.extend(actions);
        let waiting = self.commits.iter().map(|a| if let Take::Store(b) = a { b.record().len() as u64 } else { 0 });
        self.waiting_most = self.waiting_most.max(waiting.sum());
    }

    fn step(&mut self, chaos: Chaos) {
        self.look();
        self.ship();
        match chaos {
            Chaos::Deliver => {
                if let Some(frame) = self.frames.pop_front() {
                    self.deliver(frame);
                }
            }
            Chaos::Drop => drop(self.frames.pop_front()),
            Chaos::Repeat => {
                if let Some(frame) = self.frames.front().cloned() {
                    self.deliver(frame);
                }
            }
            Chaos::Swap => {
                if self.frames.len() > 1 {
                    self.frames.swap(0, 1);
                }
            }
            Chaos::Flip(bit) => {
                if let Some(frame) = self.frames.front_mut() {
                    let mut record = frame.record.to_vec();
                    let at = usize::from(bit / 8) % record.len();
                    record[at] ^= 1 << (bit % 8);
                    frame.record = record.into();
                }
            }
            Chaos::LoseAck => drop(self.receiver.ack(None)),
            Chaos::Ack => self.ack(),
            Chaos::Commit => drop(self.commit()),
            Chaos::Cut => self.connect(),
            Chaos::Recut(length) => {
                self.begin(START, length);
                self.captured = self.until;
                self.term += 1;
                self.connect();
            }
            Chaos::Behind(captured) => {
                self.begin(START, 2);
                self.captured = START + captured;
                self.term += 1;
                self.connect();
            }
            Chaos::Capture(more) if !self.lost => self.captured = self.until.min(self.captured + more),
            Chaos::Capture(_) => {}
            Chaos::Lose => self.lost |= self.ahead(),
        }
    }

    fn settle(&mut self) {
        let until = self.until;
        for _ in 0..10_000 {
            self.look();
            if !self.lost {
                self.captured = until;
            }
            self.ack();
            self.ship();
            match self.frames.pop_front() {
                Some(frame) => self.deliver(frame),
                None if self.commits.is_empty() && self.inbox.begun.is_some_and(|v| v.end == at(until)) => return,
                // A lost frame at the very end shows only with the next one; a heartbeat follows within a second.
                None if self.commits.is_empty() => self.connect(),
                None => {}
            }
            self.commit();
        }
        panic!("does not settle");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_inbox_is_always_a_gapless_prefix(steps in proptest::collection::vec(chaos(), 0..300), length in 1u64..60) {
        let until = START + length;
        let mut world = World::new(until);
        for step in steps {
            world.step(step);
            let expected: Vec<u64> = (START..).take(world.inbox.times.len()).collect();
            prop_assert_eq!(&world.inbox.times, &expected, "a gapless prefix, each change once");
        }
        world.settle();
        prop_assert_eq!(world.inbox.times.len() as u64, length);
        prop_assert_eq!(world.inbox.begun.map(|view| view.hash), Some(hash_before(until)));
        let largest = world.outbox.iter().map(|b| b.record().len() as u64).max().unwrap_or(0);
        prop_assert!(world.waiting_most <= CREDIT + 2 * largest.max(1000), "{} bytes waited", world.waiting_most);
    }
}
