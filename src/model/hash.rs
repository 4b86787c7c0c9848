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
    canonical(&mut hasher, id, Numbers::Nearest);
    LaneId::of(hasher.digest())
}

/// The lane all changes of a one-lane collection use.
pub fn lane_of_collection(uuid: CollectionUuid) -> LaneId {
    LaneId::of(xxh3_64_with_seed(&uuid.0, 0))
}

/// A 128-bit canonical identity of a document key within a collection, used to order changes of one document.
pub fn key_identity(id: &Element<'_>) -> u128 {
    let mut hasher = Xxh3::new();
    canonical(&mut hasher, id, Numbers::Exact);
    hasher.digest128()
}

/// How numbers are told apart. Those that compare equal have equal doubles.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Numbers {
    /// By the nearest double: distinct ones may share it, which only puts them into one lane.
    Nearest,
    /// By their values.
    Exact,
}

fn canonical(hasher: &mut Xxh3, element: &Element<'_>, numbers: Numbers) {
    if let Some(value) = element.number() {
        let value = if value == 0.0 { 0.0 } else { value };
        let bits = if value.is_nan() { f64::NAN.to_bits() } else { value.to_bits() };
        hasher.update(b"n");
        hasher.update(&bits.to_le_bytes());
        if numbers == Numbers::Exact {
            beyond_double(hasher, element, value);
        }
    } else if let Some(document) = element.document() {
        hasher.update(if element.is_array() { b"a" } else { b"o" });
        for inner in raw::elements(document).map_while(Result::ok) {
            sized(hasher, b'k', inner.key.as_bytes());
            canonical(hasher, &inner, numbers);
        }
        hasher.update(b".");
    } else {
        let (tag, bytes) = element.canonical_bytes();
        sized(hasher, tag, bytes);
    }
}

/// What a number is beyond its nearest double: nothing when that is its value.
fn beyond_double(hasher: &mut Xxh3, element: &Element<'_>, double: f64) {
    let integer = |hasher: &mut Xxh3, value: i64| {
        if double as i128 != i128::from(value) {
            hasher.update(b"i");
            hasher.update(&value.to_le_bytes());
        }
    };
    if let Some(value) = element.int() {
        integer(hasher, value);
    } else if let Some(text) = element.decimal().map(|decimal| decimal.to_string())
        && !text.contains(['N', 'I'])
    {
        let digits = plain(&text);
        match digits.parse::<i64>() {
            Ok(value) => integer(hasher, value),
            // A double has at most 1,074 digits behind the point.
            Err(_) if digits != plain(&format!("{double:.1074}")) => sized(hasher, b'd', digits.as_bytes()),
            Err(_) => {}
        }
    }
}

/// A number as digits with a point but no exponent, and no zeros that mean nothing.
fn plain(text: &str) -> String {
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let exponent: i64 = exponent.parse().unwrap_or(0);
    let (sign, mantissa) = mantissa.strip_prefix('-').map_or(("", mantissa), |rest| ("-", rest));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [whole, fraction].concat();
    let stripped = digits.trim_start_matches('0');
    let significant = stripped.trim_end_matches('0');
    // The value is 0.SIGNIFICANT times ten to the power of this.
    let point = whole.len() as i64 + exponent - (digits.len() - stripped.len()) as i64;
    let zeros = |count: i64| "0".repeat(usize::try_from(count).unwrap_or(0));
    let length = significant.len() as i64;
    if significant.is_empty() {
        "0".to_owned()
    } else if point <= 0 {
        format!("{sign}0.{}{significant}", zeros(-point))
    } else if point >= length {
        format!("{sign}{significant}{}", zeros(point - length))
    } else {
        let (before, behind) = significant.split_at(point as usize);
        format!("{sign}{before}.{behind}")
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

    fn identity(value: Bson) -> u128 {
        let document = bson::RawDocumentBuf::try_from(&bson::doc! {"_id": value}).expect("encode");
        key_identity(&raw::get(&document, "_id").expect("present"))
    }

    fn decimal(text: &str) -> Bson {
        Bson::Decimal128(text.parse().expect("decimal"))
    }

    #[test]
    fn distinct_numbers_are_distinct_documents_however_large() {
        let large = 1_i64 << 60;
        let mut seen = std::collections::BTreeSet::new();
        for id in (large - 300..large + 300).chain([i64::MAX, i64::MAX - 1, i64::MIN, i64::MIN + 1, -large - 1]) {
            assert!(seen.insert(identity(Bson::Int64(id))), "{id}");
            assert_eq!(identity(Bson::Int64(id)), identity(decimal(&id.to_string())), "{id}");
        }
        assert!(seen.insert(identity(Bson::Document(bson::doc! {"a": large + 1}))));
        assert!(seen.insert(identity(Bson::Document(bson::doc! {"a": large + 2}))));
        for text in
            ["0.1", "0.10000000000000000001", "1E+40", "1.0000000000000000000001E+40", "1E-6000", "1E+6000", "Infinity"]
        {
            assert!(seen.insert(identity(decimal(text))), "{text}");
        }
        assert!(seen.insert(identity(Bson::Double(0.1))), "not what the decimal 0.1 is");
    }

    #[test]
    fn equal_numbers_are_one_document_whatever_their_types() {
        let large = 1_i64 << 60;
        for (a, b) in [
            (Bson::Int64(large), Bson::Double(large as f64)),
            (Bson::Int32(5), decimal("5.000")),
            (Bson::Int32(500), decimal("5E+2")),
            (Bson::Double(0.5), decimal("0.50")),
            (Bson::Double(-1.25), decimal("-125E-2")),
            (Bson::Double(1e22), decimal("1E+22")),
            (Bson::Double(-0.0), decimal("-0E+3")),
            (Bson::Double(f64::NAN), decimal("NaN")),
            (Bson::Double(f64::INFINITY), decimal("Infinity")),
        ] {
            assert_eq!(identity(a.clone()), identity(b.clone()), "{a} {b}");
        }
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
