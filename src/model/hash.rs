//! The stream hash, and the canonical hash that gives a document its lane.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::raw::{self, Element};
use super::{CollectionUuid, LaneId, Position};

/// A hash that rolls over (position, bytes) of every change of a stream in position order, independent of batch borders.
/// Two sites whose hashes agree at one position have seen the same changes up to it. It guards against our own mistakes
/// and against corruption, not against an adversary.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamHash(pub u64);

impl StreamHash {
    /// The hash after one more change.
    #[must_use]
    pub fn roll(self, position: Position, bytes: &[u8]) -> Self {
        let seed =
            self.0.rotate_left(23) ^ position.time.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(position.ordinal);
        Self(xxh3_64_with_seed(bytes, seed))
    }
}

impl std::fmt::Display for StreamHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl std::fmt::Debug for StreamHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The lane of a document: values that MongoDB holds equal (1, 1L, 1.0) land together.
pub fn lane_of(uuid: CollectionUuid, id: &Element<'_>) -> LaneId {
    let mut hasher = Xxh3::new();
    hasher.update(&uuid.0);
    canonical(&mut hasher, id);
    LaneId::of(hasher.digest())
}

/// The lane all changes of a one-lane collection use.
pub fn lane_of_collection(uuid: CollectionUuid) -> LaneId {
    LaneId::of(xxh3_64_with_seed(&uuid.0, 0))
}

/// A 128-bit canonical identity of a document key within a collection, used to order changes of one document.
pub fn key_identity(id: &Element<'_>) -> u128 {
    let mut hasher = Xxh3::new();
    canonical(&mut hasher, id);
    hasher.digest128()
}

fn canonical(hasher: &mut Xxh3, element: &Element<'_>) {
    if let Some(value) = element.number() {
        // Numbers that compare equal have equal doubles, so their double stands for them; distinct numbers may share
        // one, which only puts them into one lane.
        let value = if value == 0.0 { 0.0 } else { value };
        let bits = if value.is_nan() { f64::NAN.to_bits() } else { value.to_bits() };
        hasher.update(b"n");
        hasher.update(&bits.to_le_bytes());
    } else if let Some(document) = element.document() {
        hasher.update(if element.is_array() { b"a" } else { b"o" });
        for inner in raw::elements(document).map_while(Result::ok) {
            sized(hasher, b'k', inner.key.as_bytes());
            canonical(hasher, &inner);
        }
        hasher.update(b".");
    } else {
        let (tag, bytes) = element.canonical_bytes();
        sized(hasher, tag, bytes);
    }
}

fn sized(hasher: &mut Xxh3, tag: u8, bytes: &[u8]) {
    hasher.update(&[tag]);
    hasher.update(&(bytes.len() as u32).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
mod tests {
    use bson::{Bson, rawdoc};

    use super::*;

    fn lane(value: Bson) -> LaneId {
        let document = bson::RawDocumentBuf::try_from(&bson::doc! {"_id": value}).expect("encode");
        lane_of(CollectionUuid([7; 16]), &raw::get(&document, "_id").expect("present"))
    }

    #[test]
    fn values_that_mongodb_holds_equal_share_a_lane() {
        let one: bson::Decimal128 = "1.0".parse().expect("decimal");
        for equal in [Bson::Int64(1), Bson::Double(1.0), Bson::Decimal128(one)] {
            assert_eq!(lane(Bson::Int32(1)), lane(equal));
        }
        let nested = |v: Bson| lane(Bson::Document(bson::doc! {"a": [v]}));
        assert_eq!(nested(Bson::Int32(3)), nested(Bson::Double(3.0)));
        assert_eq!(lane(Bson::Double(-0.0)), lane(Bson::Int32(0)));
        assert_eq!(lane(Bson::String("x".into())), lane(Bson::Symbol("x".into())));
    }

    #[test]
    fn lanes_are_used_evenly() {
        let mut counts = [0u32; LaneId::COUNT];
        for id in 0..6400 {
            counts[lane(Bson::Int32(id)).index()] += 1;
        }
        assert!(counts.iter().all(|&n| (50..160).contains(&n)), "{counts:?}");
    }

    #[test]
    fn the_stream_hash_depends_on_order_position_and_bytes() {
        let at = |o| Position::new(farshore_api::ClusterTime(9), o);
        let (a, b) = (rawdoc! {"x": 1}, rawdoc! {"x": 2});
        let ab = StreamHash::default().roll(at(1), a.as_bytes()).roll(at(2), b.as_bytes());
        let ba = StreamHash::default().roll(at(1), b.as_bytes()).roll(at(2), a.as_bytes());
        let moved = StreamHash::default().roll(at(1), a.as_bytes()).roll(at(3), b.as_bytes());
        assert!(ab != ba && ab != moved && ba != moved);
    }
}
