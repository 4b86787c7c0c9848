//! Random BSON: values of every type, `_id`s of every type the server takes, whole documents.
//!
//! Fields have fixed roles (see `standard`), so that an update operator meets the type it needs and
//! a server error stays an error worth stopping for.

use bson::oid::ObjectId;
use bson::raw::{CString, RawDocumentBuf};
use bson::spec::BinarySubtype;
use bson::{
    Binary, Bson, DateTime, Decimal128, Document, JavaScriptCodeWithScope, RawBson, Regex, Timestamp, bson, doc, rawdoc,
};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore};

/// First day of 2025, in milliseconds: dates are drawn after it so that TTL never bites.
const EPOCH: i64 = 1_735_689_600_000;

pub(super) fn oid(rng: &mut StdRng) -> ObjectId {
    let mut bytes = [0; 12];
    rng.fill_bytes(&mut bytes);
    ObjectId::from_bytes(bytes)
}

pub(super) fn text(rng: &mut StdRng, max: usize) -> String {
    const LETTERS: &[char] = &['a', 'b', 'k', 'z', 'A', '0', '9', ' ', '.', '$', 'é', '漢', '🌊'];
    let len = rng.random_range(0..=max);
    (0..len).map(|_| LETTERS[rng.random_range(0..LETTERS.len())]).collect()
}

fn words(rng: &mut StdRng) -> String {
    const WORDS: &[&str] = &["harbour", "far", "Shore", "tide", "Pilot", "beacon", "the", "ÉTÉ"];
    let count = rng.random_range(1..6);
    let pick: Vec<_> = (0..count).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect();
    pick.join(" ")
}

fn binary(rng: &mut StdRng, subtype: u8, len: usize) -> Bson {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    Bson::Binary(Binary { subtype: BinarySubtype::from(subtype), bytes })
}

fn decimal(text: &str) -> Bson {
    Bson::Decimal128(text.parse::<Decimal128>().expect("a decimal literal"))
}

/// By its bytes: the type has no public constructor.
fn db_pointer(rng: &mut StdRng) -> Bson {
    let mut bytes = vec![30, 0, 0, 0, 0x0c, b'p', 0, 5, 0, 0, 0, b'd', b'.', b'c', b'c', 0];
    bytes.extend(oid(rng).bytes());
    bytes.push(0);
    bytes[0] = bytes.len() as u8;
    RawDocumentBuf::from_bytes(bytes)
        .ok()
        .and_then(|document| RawBson::from(document.get("p").ok()??).try_into().ok())
        .expect("a DBPointer")
}

fn cstring(text: &str) -> CString {
    CString::try_from(text).expect("a literal without zero byte")
}

pub(super) fn date(rng: &mut StdRng) -> Bson {
    Bson::DateTime(DateTime::from_millis(EPOCH + rng.random_range(0..40_000_000_000)))
}

fn array(rng: &mut StdRng, len: usize, depth: u32) -> Bson {
    Bson::Array((0..len).map(|_| value(rng, depth)).collect())
}

/// A value of any BSON type. Never an empty timestamp at the top, which the server would fill in.
pub(super) fn value(rng: &mut StdRng, depth: u32) -> Bson {
    let kinds = if depth == 0 { 24 } else { 27 };
    match rng.random_range(0..kinds) {
        0 => Bson::Int32(rng.random()),
        1 => Bson::Int64(rng.random()),
        2 => Bson::Double(rng.random_range(-1e9..1e9)),
        3 => Bson::Double([f64::NAN, -0.0, f64::INFINITY, 5e-324][rng.random_range(0..4)]),
        4 => decimal(["NaN", "-0", "0E+3", "1.50", "-Infinity", "1E-6000"][rng.random_range(0..6)]),
        5 => decimal(&format!("{}.{}", rng.random::<i32>(), rng.random::<u16>())),
        6 => Bson::String(text(rng, 30)),
        7 => Bson::String("x".repeat(rng.random_range(500..3000))),
        8 => Bson::Boolean(rng.random()),
        9 => Bson::Null,
        10 => Bson::Undefined,
        11 => Bson::ObjectId(oid(rng)),
        12 => date(rng),
        13 => Bson::DateTime(DateTime::from_millis(-rng.random_range(1..1_000_000_000_000))),
        14 => Bson::Timestamp(Timestamp { time: rng.random_range(1..u32::MAX), increment: 7 }),
        15 => Bson::RegularExpression(Regex {
            pattern: cstring("^a.*\\.b$"),
            options: cstring(["", "i", "imsx"][rng.random_range(0..3)]),
        }),
        16 => Bson::JavaScriptCode("function() { return 1 }".to_owned()),
        17 => Bson::JavaScriptCodeWithScope(JavaScriptCodeWithScope {
            code: "x + 1".to_owned(),
            scope: doc! { "x": rng.random::<i32>(), "a.b": 1 },
        }),
        18 => Bson::Symbol(text(rng, 8)),
        19 => db_pointer(rng),
        20 => {
            let subtype = [0, 1, 2, 3, 4, 5, 7, 128, 255][rng.random_range(0..9)];
            let len = if [3, 4, 5].contains(&subtype) { 16 } else { rng.random_range(0..40) };
            binary(rng, subtype, len)
        }
        21 => Bson::MinKey,
        22 => Bson::MaxKey,
        23 => bson!({ "empty": Timestamp { time: 0, increment: 0 } }),
        24 => {
            let len = rng.random_range(0..5);
            array(rng, len, depth - 1)
        }
        25 => bson!({}),
        _ => {
            let (x, y) = (value(rng, depth - 1), value(rng, depth - 1));
            bson!({ "y": x, "x": y, "0": 1, "$d": 2, "d.d": 3, "": 4 })
        }
    }
}

/// A value that is no array and no oddity: fit for hashed and compound indexes.
pub(super) fn scalar(rng: &mut StdRng) -> Bson {
    match rng.random_range(0..5) {
        0 => Bson::Int32(rng.random_range(0..1000)),
        1 => Bson::Int64(rng.random()),
        2 => Bson::String(text(rng, 12)),
        3 => Bson::Null,
        _ => date(rng),
    }
}

/// An `_id` no other call with another `n` gives, except the few values a type has only one of.
pub(super) fn id(rng: &mut StdRng, n: i64) -> Bson {
    match rng.random_range(0..30) {
        0..6 => Bson::Int32(i32::try_from(n).unwrap_or(i32::MAX)),
        6..8 => Bson::Int64(n),
        8..10 => Bson::Double(n as f64),
        10..12 => decimal(&format!("{n}")),
        12 => Bson::Double(n as f64 + 0.5),
        13 => Bson::Int64((1 << 53) + 1 + n),
        14..17 => Bson::String(format!("s{n}")),
        17 => Bson::String(format!("{}{}", if n % 2 == 0 { "Case" } else { "case" }, n / 2)),
        18..21 => Bson::ObjectId(oid(rng)),
        21 => Bson::DateTime(DateTime::from_millis(n)),
        22 => Bson::Timestamp(Timestamp { time: 5, increment: n as u32 }),
        23 => {
            let subtype = [0, 2, 5, 128][rng.random_range(0..4)];
            let mut bytes = vec![7; 8];
            bytes.extend(n.to_be_bytes());
            Bson::Binary(Binary { subtype: BinarySubtype::from(subtype), bytes })
        }
        24 => {
            let mut bytes = vec![4; 8];
            bytes.extend(n.to_be_bytes());
            Bson::Binary(Binary { subtype: BinarySubtype::Uuid, bytes })
        }
        25 => bson!({ "k": n, "in": { "b": 1, "a": [1, "x"] } }),
        26 => bson!({ "k": n as f64 }),
        27 => Bson::String(format!("{n}{}", "L".repeat(3000))),
        28 => Bson::Symbol(format!("y{n}")),
        _ => single(rng),
    }
}

/// `_id`s of which a collection can hold one each.
fn single(rng: &mut StdRng) -> Bson {
    match rng.random_range(0..9) {
        0 => Bson::Null,
        1 => Bson::Boolean(true),
        2 => Bson::Boolean(false),
        3 => Bson::MinKey,
        4 => Bson::MaxKey,
        5 => Bson::Double(f64::NAN),
        6 => decimal("NaN"),
        7 => Bson::String(String::new()),
        _ => bson!({}),
    }
}

/// The same number in another numeric type; nothing when it has no other.
pub(super) fn other_numeric(rng: &mut StdRng, id: &Bson) -> Option<Bson> {
    let n: i64 = match id {
        Bson::Int32(n) => i64::from(*n),
        Bson::Int64(n) if n.abs() < 1 << 31 => *n,
        Bson::Double(n) if n.fract() == 0.0 && n.abs() < 1e9 => *n as i64,
        Bson::Double(n) if n.is_nan() => return Some(decimal("NaN")),
        Bson::Decimal128(n) => match n.to_string().parse() {
            Ok(n) => n,
            Err(_) => return Some(Bson::Double(f64::NAN)),
        },
        _ => return None,
    };
    let forms = [
        Bson::Int32(i32::try_from(n).ok()?),
        Bson::Int64(n),
        Bson::Double(n as f64),
        decimal(&format!("{n}")),
        decimal(&format!("{n}.0")),
    ];
    let others: Vec<_> = forms.into_iter().filter(|form| form != id).collect();
    others.get(rng.random_range(0..others.len())).cloned()
}

/// True when the server holds both `_id`s equal (as far as `id` can produce such).
pub(super) fn same_id(a: &Bson, b: &Bson) -> bool {
    fn number(value: &Bson) -> Option<f64> {
        match value {
            Bson::Int32(n) => Some(f64::from(*n)),
            Bson::Int64(n) => Some(*n as f64),
            Bson::Double(n) => Some(*n),
            Bson::Decimal128(n) => n.to_string().parse().ok(),
            _ => None,
        }
    }
    match (number(a), number(b)) {
        (Some(x), Some(y)) => x == y || (x.is_nan() && y.is_nan()),
        _ => a == b,
    }
}

/// A document with every role: numbers, unique value, nested objects and arrays, geo, date, any type.
pub(super) fn standard(rng: &mut StdRng, id: Bson, group: i32, unique: i64) -> Document {
    let ints = |rng: &mut StdRng, n| (0..n).map(|_| rng.random_range(0..100)).collect::<Vec<i32>>();
    let len = rng.random_range(3..9);
    let mut fields = vec![
        ("n", Bson::Int32(rng.random_range(0..1000))),
        ("s", Bson::String(words(rng))),
        ("at", date(rng)),
        ("loc", point(rng)),
        ("h", scalar(rng)),
        ("nest", bson!({ "k": rng.random_range(0..50), "deep": { "x": 1, "y": text(rng, 9) } })),
        ("num", bson!({ "0": 1, "00": 2, "1": { "0": "zero" } })),
        ("arr", bson!(ints(rng, len))),
        ("objs", bson!([{ "k": 1, "v": "a" }, { "k": 2, "v": "b", "0": 5 }, { "k": 3, "v": "c" }])),
        ("grid", grid(rng)),
        ("v", value(rng, 2)),
    ];
    if rng.random_bool(0.3) {
        fields.push(("opt", scalar(rng)));
    }
    if rng.random_bool(0.3) {
        fields.shuffle(rng);
    }
    let mut document = doc! { "_id": id, "g": group, "u": unique };
    document.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
    document
}

/// Rows of numbers, for array updates at depth.
pub(super) fn grid(rng: &mut StdRng) -> Bson {
    let rows = rng.random_range(4..8);
    let row = |rng: &mut StdRng| {
        let len = rng.random_range(3..7);
        bson!((0..len).map(|_| rng.random_range(0..10_000)).collect::<Vec<i32>>())
    };
    Bson::Array((0..rows).map(|_| row(rng)).collect())
}

fn point(rng: &mut StdRng) -> Bson {
    let (x, y) = (rng.random_range(-170.0..170.0), rng.random_range(-80.0..80.0));
    bson!({ "type": "Point", "coordinates": [x, y] })
}

/// Field names that a path cannot say.
pub(super) const ODD_NAMES: &[&str] = &["a.b", "$c", "", ".lead", "trail.", "x..y", "$a.$b", "0.0"];

/// A document with literal dots, `$` and empty names, and both `a: {b}` and a literal `a.b`.
pub(super) fn odd(rng: &mut StdRng, id: Bson, group: i32) -> Document {
    let mut document = doc! { "_id": id, "g": group, "n": 1, "a": { "b": 1, "c.d": 2, "$e": 3 } };
    for name in ODD_NAMES {
        if *name == "a.b" || rng.random_bool(0.6) {
            document.insert(*name, rng.random_range(0..100));
        }
    }
    document
}

/// A document with more than a thousand paths.
pub(super) fn wide(id: Bson, group: i32) -> Document {
    let fields: Document = (0..1100).map(|n| (format!("f{n:04}"), Bson::Int32(n))).collect();
    doc! { "_id": id, "g": group, "n": 1, "wide": fields, "many": (0..1100).collect::<Vec<i32>>() }
}

/// A document that holds some names twice, at the top and nested.
pub(super) fn duplicate_keys(rng: &mut StdRng, id: Bson, group: i32) -> RawDocumentBuf {
    let mut nested = rawdoc! { "x": 1, "y": 2 };
    nested.append(bson::raw::cstr!("x"), rng.random_range(0..9));
    let mut document = rawdoc! { "g": group, "n": 1, "twice": 1, "once": "only" };
    document.append(bson::raw::cstr!("twice"), rng.random_range(0..9));
    document.append(bson::raw::cstr!("nest"), nested);
    document.append(bson::raw::cstr!("twice"), "third");
    let mut whole = RawDocumentBuf::new();
    let id = RawBson::try_from(id).expect("an _id without zero bytes in names");
    whole.append(bson::raw::cstr!("_id"), id);
    for (key, value) in document.iter().flatten() {
        whole.append(key, value);
    }
    whole
}
