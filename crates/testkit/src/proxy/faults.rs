//! What happens to decoded frames of one direction: pure, driven by a seed.
//!
//! Only batches, acknowledgements and fetched documents suffer; other frames pass in their order, so a session always gets as
//! far as its hellos. The same seed, faults and frames give the same result.

use bytes::{Bytes, BytesMut};
use farshore_api::replication::v1::{Frame, frame::Body};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Chances, from 0 (never) to 1 (always), per frame.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Faults {
    /// A batch is lost.
    pub batch_drop: f64,
    /// A batch comes twice.
    pub batch_repeat: f64,
    /// A batch comes after the frame that follows it.
    pub batch_swap: f64,
    /// One byte of a batch's record is changed.
    pub batch_corrupt: f64,
    /// An acknowledgement is lost.
    pub ack_drop: f64,
    /// An acknowledgement comes twice.
    pub ack_repeat: f64,
    /// An acknowledgement comes after the frame that follows it.
    pub ack_swap: f64,
    /// A position of an acknowledgement is changed.
    pub ack_corrupt: f64,
    /// One byte of fetched documents is changed.
    pub fetched_corrupt: f64,
}

/// How often each fault has happened, and how many frames went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub frames: u64,
    pub batches: u64,
    pub acks: u64,
    pub batch_drops: u64,
    pub batch_repeats: u64,
    pub batch_swaps: u64,
    pub batch_corruptions: u64,
    pub ack_drops: u64,
    pub ack_repeats: u64,
    pub ack_swaps: u64,
    pub ack_corruptions: u64,
    pub fetched_corruptions: u64,
}

/// Applies [`Faults`] to the frames of one direction of one session after another.
#[derive(Debug)]
pub struct Injector {
    faults: Faults,
    random: StdRng,
    counts: Counts,
    /// A batch or an acknowledgement that waits for the next frame to overtake it.
    held: Option<Frame>,
}

impl Injector {
    /// No faults until [`Self::set`].
    pub fn new(seed: u64) -> Self {
        Self { faults: Faults::default(), random: StdRng::seed_from_u64(seed), counts: Counts::default(), held: None }
    }

    /// Faults from the next frame on.
    pub fn set(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A new session begins: what was held for the last one is lost with it.
    pub fn reset(&mut self) {
        self.held = None;
    }

    /// What arrives when `frame` is sent, in order.
    pub fn on(&mut self, frame: Frame) -> Vec<Frame> {
        self.counts.frames += 1;
        let overtaken = self.held.take();
        let mut arriving = match &frame.body {
            Some(Body::Batch(_)) => self.on_batch(frame, overtaken.is_none()),
            Some(Body::Ack(_)) => self.on_ack(frame, overtaken.is_none()),
            Some(Body::Fetched(_)) => self.on_fetched(frame),
            _ => vec![frame],
        };
        arriving.extend(overtaken);
        arriving
    }

    fn on_batch(&mut self, mut frame: Frame, may_hold: bool) -> Vec<Frame> {
        self.counts.batches += 1;
        let faults = self.faults;
        if self.happens(faults.batch_drop) {
            self.counts.batch_drops += 1;
            return Vec::new();
        }
        if self.happens(faults.batch_corrupt) && self.corrupt(&mut frame) {
            self.counts.batch_corruptions += 1;
        }
        if self.happens(faults.batch_repeat) {
            self.counts.batch_repeats += 1;
            return vec![frame.clone(), frame];
        }
        if may_hold && self.happens(faults.batch_swap) {
            self.counts.batch_swaps += 1;
            self.held = Some(frame);
            return Vec::new();
        }
        vec![frame]
    }

    fn on_ack(&mut self, mut frame: Frame, may_hold: bool) -> Vec<Frame> {
        self.counts.acks += 1;
        let faults = self.faults;
        if self.happens(faults.ack_drop) {
            self.counts.ack_drops += 1;
            return Vec::new();
        }
        if self.happens(faults.ack_repeat) {
            self.counts.ack_repeats += 1;
            return vec![frame.clone(), frame];
        }
        if self.happens(faults.ack_corrupt) && self.corrupt(&mut frame) {
            self.counts.ack_corruptions += 1;
        }
        if may_hold && self.happens(faults.ack_swap) {
            self.counts.ack_swaps += 1;
            self.held = Some(frame);
            return Vec::new();
        }
        vec![frame]
    }

    fn on_fetched(&mut self, mut frame: Frame) -> Vec<Frame> {
        if self.happens(self.faults.fetched_corrupt) && self.corrupt(&mut frame) {
            self.counts.fetched_corruptions += 1;
        }
        vec![frame]
    }

    fn happens(&mut self, chance: f64) -> bool {
        // Drawn always, so that one chance does not shift the others of the same seed.
        self.random.random::<f64>() < chance
    }

    fn corrupt(&mut self, frame: &mut Frame) -> bool {
        let bytes = match &mut frame.body {
            Some(Body::Batch(batch)) => &mut batch.record,
            Some(Body::Fetched(fetched)) => match fetched.documents.iter_mut().find(|document| !document.is_empty()) {
                Some(document) => document,
                None => return false,
            },
            Some(Body::Ack(ack)) => {
                let Some(applied) = &mut ack.applied else { return false };
                applied.time += self.random.random_range(1..1 << 40);
                return true;
            }
            _ => return false,
        };
        if bytes.is_empty() {
            return false;
        }
        let mut changed = BytesMut::from(&bytes[..]);
        let place = self.random.random_range(0..changed.len());
        changed[place] ^= self.random.random_range(1..=u8::MAX);
        *bytes = Bytes::from(changed);
        true
    }
}

#[cfg(test)]
mod tests {
    use farshore_api::replication::v1::{Ack, Batch, Hello, Position};

    use super::*;

    fn batch(number: u8) -> Frame {
        let record = Bytes::from(vec![number; 100]);
        Frame::of(Body::Batch(Batch { record, ..Batch::default() }))
    }

    fn ack(credit: u64) -> Frame {
        let applied = Some(Position { time: credit, ordinal: 1 });
        Frame::of(Body::Ack(Ack { credit, applied, ..Ack::default() }))
    }

    fn run(seed: u64, faults: Faults) -> (Vec<Frame>, Counts) {
        let mut injector = Injector::new(seed);
        injector.set(faults);
        let frames = (0..200_u8).flat_map(|number| [batch(number), ack(number.into())]);
        let arrived = frames.flat_map(|frame| injector.on(frame)).collect();
        (arrived, injector.counts())
    }

    #[test]
    fn without_faults_everything_passes_in_order() {
        let (arrived, counts) = run(1, Faults::default());
        let sent: Vec<Frame> = (0..200_u8).flat_map(|number| [batch(number), ack(number.into())]).collect();
        assert_eq!(arrived, sent);
        assert_eq!(counts, Counts { frames: 400, batches: 200, acks: 200, ..Counts::default() });
    }

    #[test]
    fn the_same_seed_gives_the_same_faults() {
        let faults = Faults {
            batch_drop: 0.1,
            batch_repeat: 0.2,
            batch_swap: 0.3,
            batch_corrupt: 0.1,
            ack_drop: 0.2,
            ack_repeat: 0.2,
            ack_swap: 0.2,
            ack_corrupt: 0.2,
            fetched_corrupt: 0.0,
        };
        assert_eq!(run(7, faults), run(7, faults));
        assert_ne!(run(7, faults).0, run(8, faults).0);
        let counts = run(7, faults).1;
        let happened = [
            counts.batch_drops,
            counts.batch_repeats,
            counts.batch_swaps,
            counts.batch_corruptions,
            counts.ack_drops,
            counts.ack_repeats,
            counts.ack_swaps,
            counts.ack_corruptions,
        ];
        assert!(happened.iter().all(|count| *count > 5), "{counts:?}");
    }

    #[test]
    fn a_swapped_batch_comes_after_the_next_frame() {
        let mut injector = Injector::new(1);
        injector.set(Faults { batch_swap: 1.0, ..Faults::default() });
        assert!(injector.on(batch(1)).is_empty());
        assert_eq!(injector.on(batch(2)), [batch(2), batch(1)]);
        assert!(injector.on(batch(3)).is_empty());
        injector.reset();
        let hello = Frame::of(Body::Hello(Hello::default()));
        assert_eq!(injector.on(hello.clone()), [hello]);
    }

    #[test]
    fn corruption_changes_exactly_one_byte_of_the_record() {
        let (arrived, counts) = run(3, Faults { batch_corrupt: 1.0, ..Faults::default() });
        assert_eq!(counts.batch_corruptions, 200);
        for (number, frame) in arrived.iter().step_by(2).enumerate() {
            let Some(Body::Batch(batch)) = &frame.body else { panic!("not a batch: {frame:?}") };
            let changed = batch.record.iter().filter(|byte| usize::from(**byte) != number).count();
            assert_eq!((batch.record.len(), changed), (100, 1));
        }
    }
}
