//! What is inside the envelopes: the record of a batch with its place, and the state of a log.
//!
//! ```text
//! record   skip_through (position, big-endian) | bytes before u64 | records before u64 | the batch's record
//! state    incarnation 16 | epoch u64 | first | end (positions) | hash u64 | term u64 | bytes, batches, generation,
//!          appended, appended batches u64 | segments u16 | (generation u64, start)... | token there? u8 | token
//! ```
//!
//! Integers are little-endian, positions big-endian. Decoders accept arbitrary bytes.

use bytes::{Buf, BufMut, Bytes};

use super::LogState;
use super::envelope::Sealer;
use super::ledger::{Entry, Ledger, Place, Segment};
use crate::model::{Batch, Epoch, Incarnation, Position, StreamHash, Term};

/// Bytes of a stored [`Place`].
const PLACE_LEN: usize = Position::LEN + 16;

impl Place {
    pub(super) fn to_bytes(self) -> [u8; PLACE_LEN] {
        let mut out = [0; PLACE_LEN];
        out[..12].copy_from_slice(&self.skip_through.to_bytes());
        out[12..20].copy_from_slice(&self.offset.to_le_bytes());
        out[20..].copy_from_slice(&self.index.to_le_bytes());
        out
    }
}

impl Entry {
    /// From a payload; the record itself is checked by [`Batch::decode`].
    pub(super) fn decode(mut payload: Bytes) -> Option<Self> {
        if payload.len() < PLACE_LEN {
            return None;
        }
        let skip_through = take_position(&mut payload)?;
        let place = Place { skip_through, offset: payload.get_u64_le(), index: payload.get_u64_le() };
        Some(Self { place, record: payload })
    }
}

fn take_position(payload: &mut Bytes) -> Option<Position> {
    (payload.len() >= Position::LEN).then(|| {
        let bytes = payload.split_to(Position::LEN);
        Position::from_bytes(bytes.as_ref().try_into().expect("12 bytes"))
    })
}

impl Ledger {
    /// The stored form.
    pub(super) fn encode(&self) -> Vec<u8> {
        let state = &self.state;
        let mut out = Vec::with_capacity(256);
        out.put_slice(&state.incarnation.0);
        out.put_u64_le(state.epoch.0);
        out.put_slice(&state.first.to_bytes());
        out.put_slice(&state.end.to_bytes());
        out.put_u64_le(state.hash.0);
        out.put_u64_le(state.term.0);
        for counter in [state.bytes, state.batches, state.generation, state.appended, self.appended_batches] {
            out.put_u64_le(counter);
        }
        out.put_u16_le(self.segments.len() as u16);
        for segment in &self.segments {
            out.put_u64_le(segment.generation);
            out.put_slice(&segment.start.to_bytes());
        }
        out.put_u8(u8::from(state.token.is_some()));
        out.put_slice(state.token.as_deref().unwrap_or_default());
        out
    }

    /// The inverse of [`Self::encode`]; `None` when the bytes are no consistent state.
    pub(super) fn decode(mut payload: Bytes) -> Option<Self> {
        const FIXED: usize = 16 + 8 + 12 + 12 + 8 + 8 + 5 * 8 + 2;
        if payload.len() < FIXED {
            return None;
        }
        let incarnation = Incarnation::from_slice(&payload.split_to(16))?;
        let epoch = Epoch(payload.get_u64_le());
        let (first, end) = (take_position(&mut payload)?, take_position(&mut payload)?);
        let (hash, term) = (StreamHash(payload.get_u64_le()), Term(payload.get_u64_le()));
        let [bytes, batches, generation, appended, appended_batches] = std::array::from_fn(|_| payload.get_u64_le());
        let count = usize::from(payload.get_u16_le());
        if count == 0 || payload.len() < count * (8 + Position::LEN) + 1 {
            return None;
        }
        let segments = (0..count)
            .map(|_| Some(Segment { generation: payload.get_u64_le(), start: take_position(&mut payload)? }))
            .collect::<Option<Vec<_>>>()?;
        let token = match payload.get_u8() {
            0 if payload.is_empty() => None,
            1 => Some(payload),
            _ => return None,
        };
        let ordered = segments.windows(2).all(|w| w[0].start < w[1].start && w[0].generation < w[1].generation);
        let newest = segments.last().is_some_and(|last| last.generation == generation && last.start <= end);
        let covered = segments.first().is_some_and(|oldest| oldest.start <= first) && first <= end;
        if !ordered || !newest || !covered || bytes > appended || batches > appended_batches {
            return None;
        }
        let state =
            LogState { incarnation, epoch, first, end, hash, token, term, bytes, batches, generation, appended };
        Some(Self { state, segments, appended_batches })
    }
}

/// Runs every decoder of stored values over arbitrary bytes, as a value and as a value's payload; says whether any
/// accepts them. For fuzzing.
pub fn decode_stored_value(bytes: &[u8]) -> bool {
    let decode = |payload: Bytes| {
        let record = Entry::decode(payload.clone()).and_then(|entry| Batch::decode(entry.record).ok());
        let readable = record.is_some_and(|batch| batch.changes().is_ok());
        let ledger = Ledger::decode(payload).is_some_and(|ledger| !ledger.ranges(ledger.state.first).is_empty());
        readable | ledger
    };
    let opened = Sealer::new(None).open(b"", bytes.to_vec()).is_ok_and(decode);
    opened | decode(Bytes::copy_from_slice(bytes)) | super::keys::Key::parse(bytes).is_some()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::outbox::envelope::hex;
    use crate::outbox::ledger::tests::{at, ledger};

    #[test]
    fn golden_state() {
        let encoded = ledger().encode();
        assert_eq!(
            hex(&encoded),
            "090909090909090909090909090909090200000000000000000000000000000500000000000000000000001400000000\
             030000000000000004000000000000006400000000000000020000000000000001000000000000002c01000000000000\
             06000000000000000100010000000000000000000000000000050000000001746f6b"
        );
        assert_eq!(Ledger::decode(encoded.into()), Some(ledger()));
    }

    #[test]
    fn golden_record() {
        let place = Place { skip_through: at(7), offset: 8, index: 9 };
        let mut payload = place.to_bytes().to_vec();
        assert_eq!(hex(&payload), "00000000000000070000000008000000000000000900000000000000");
        payload.extend_from_slice(b"record");
        let entry = Entry::decode(payload.into()).expect("decode");
        assert_eq!((entry.place, &entry.record[..]), (place, &b"record"[..]));
    }

    proptest! {
        #[test]
        fn a_cut_state_is_refused_or_has_a_shorter_token(cut in 0usize..170) {
            let full = ledger().encode();
            let cut = cut.min(full.len());
            if let Some(read) = Ledger::decode(Bytes::copy_from_slice(&full[..cut])) {
                prop_assert!(cut > full.len() - 4);
                prop_assert_eq!(read.segments, ledger().segments);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            decode_stored_value(&bytes);
        }

        #[test]
        fn damaged_values_never_panic(at in any::<proptest::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = ledger().encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            decode_stored_value(&bytes);
            decode_stored_value(&Sealer::new(None).seal(b"", &[&bytes]));
        }
    }
}
