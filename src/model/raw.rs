//! Reads and writes BSON elements as bytes: no value is decoded that only passes through, so whatever `mongod` accepts
//! (duplicate names, strings that are not UTF-8, deprecated types) survives.
//!
//! Layout: the BSON specification, version 1.1 (bsonspec.org).

use bson::raw::{RawBsonRef, RawDocument, RawDocumentBuf};

const DOUBLE: u8 = 0x01;
const STRING: u8 = 0x02;
const EMBEDDED: u8 = 0x03;
const ARRAY: u8 = 0x04;
const BINARY: u8 = 0x05;
const SYMBOL: u8 = 0x0E;
const INT32: u8 = 0x10;
const DATETIME: u8 = 0x09;
const TIMESTAMP: u8 = 0x11;
const INT64: u8 = 0x12;
const DECIMAL: u8 = 0x13;

/// One element of a document, in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element<'a> {
    /// Field name.
    pub key: &'a str,
    kind: u8,
    value: &'a [u8],
}

/// Bytes that are not a BSON document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid bson")]
pub struct Invalid;

impl<'a> Element<'a> {
    /// Whether it is an object or an array.
    pub fn is_container(&self) -> bool {
        matches!(self.kind, EMBEDDED | ARRAY)
    }

    /// Whether it is an array.
    pub fn is_array(&self) -> bool {
        self.kind == ARRAY
    }

    /// The object; none for an array.
    pub fn object(&self) -> Option<&'a RawDocument> {
        self.document().filter(|_| !self.is_array())
    }

    /// The object, or the array as an object of indexes.
    pub fn document(&self) -> Option<&'a RawDocument> {
        self.is_container().then(|| RawDocument::from_bytes(self.value).ok()).flatten()
    }

    /// The text of a string.
    pub fn str(&self) -> Option<&'a str> {
        let bytes = self.value.get(4..self.value.len().checked_sub(1)?)?;
        (self.kind == STRING).then(|| std::str::from_utf8(bytes).ok()).flatten()
    }

    /// The value, decoded.
    pub fn to_bson(&self) -> Option<bson::Bson> {
        let mut one = Writer::document();
        one.copy(self);
        bson::Bson::try_from(one.finish().get(self.key).ok()??).ok()
    }

    /// The bytes of a binary value (of any subtype but the old one).
    pub fn binary(&self) -> Option<&'a [u8]> {
        (self.kind == BINARY).then(|| self.value.get(5..)).flatten()
    }

    /// The value of an integer of either size, or of a double without fraction.
    pub fn integer(&self) -> Option<i64> {
        match self.kind {
            INT32 => Some(i64::from(i32::from_le_bytes(self.value.try_into().ok()?))),
            INT64 => Some(i64::from_le_bytes(self.value.try_into().ok()?)),
            DOUBLE => {
                let value = f64::from_le_bytes(self.value.try_into().ok()?);
                (value.fract() == 0.0 && value.abs() < 9e15).then_some(value as i64)
            }
            _ => None,
        }
    }

    /// The exact value of an integer type.
    pub fn int(&self) -> Option<i64> {
        matches!(self.kind, INT32 | INT64).then(|| self.integer()).flatten()
    }

    /// The value of a decimal.
    pub fn decimal(&self) -> Option<bson::Decimal128> {
        (self.kind == DECIMAL).then_some(bson::Decimal128::from_bytes(self.value.try_into().ok()?))
    }

    /// The value of any number, as the nearest double.
    pub fn number(&self) -> Option<f64> {
        match self.kind {
            DOUBLE => Some(f64::from_le_bytes(self.value.try_into().ok()?)),
            INT32 => Some(f64::from(i32::from_le_bytes(self.value.try_into().ok()?))),
            INT64 => Some(i64::from_le_bytes(self.value.try_into().ok()?) as f64),
            _ => Some(self.decimal()?.to_string().parse().unwrap_or(f64::NAN)),
        }
    }

    /// A tag that is the same for types MongoDB compares with each other, and the value's bytes.
    pub fn canonical_bytes(&self) -> (u8, &'a [u8]) {
        (if self.kind == SYMBOL { STRING } else { self.kind }, self.value)
    }

    /// The milliseconds since the Unix epoch of a date.
    pub fn datetime(&self) -> Option<i64> {
        (self.kind == DATETIME).then_some(i64::from_le_bytes(self.value.try_into().ok()?))
    }

    /// The value of a timestamp.
    pub fn timestamp(&self) -> Option<super::ClusterTime> {
        (self.kind == TIMESTAMP).then_some(super::ClusterTime(u64::from_le_bytes(self.value.try_into().ok()?)))
    }
}

/// Whether it is a string, or one is in it.
pub fn holds_string(element: &Element<'_>) -> bool {
    let inner = || element.document().into_iter().flat_map(elements).map_while(Result::ok);
    matches!(element.kind, STRING | SYMBOL) || inner().any(|element| holds_string(&element))
}

/// The elements of a document in order; after an error the iteration ends.
pub fn elements(document: &RawDocument) -> impl Iterator<Item = Result<Element<'_>, Invalid>> {
    let bytes = document.as_bytes();
    let mut rest = &bytes[4..bytes.len() - 1];
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (element, tail) = match split_element(rest) {
            Some((element, tail)) => (Ok(element), tail),
            None => (Err(Invalid), &[][..]),
        };
        rest = tail;
        Some(element)
    })
}

/// The first element named `key`.
pub fn get<'a>(document: &'a RawDocument, key: &str) -> Option<Element<'a>> {
    elements(document).map_while(Result::ok).find(|element| element.key == key)
}

/// The element that a path of names with dots between them leads to, through objects only.
pub fn get_path<'a>(document: &'a RawDocument, path: &str) -> Option<Element<'a>> {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    let element = get(document, name)?;
    rest.map_or(Some(element), |rest| get_path(element.object()?, rest))
}

/// The first element named `key`, with the bytes before it (behind the length) and after it (with the terminator).
pub fn split_around<'a>(document: &'a RawDocument, key: &str) -> Option<(&'a [u8], Element<'a>, &'a [u8])> {
    let all = &document.as_bytes()[4..];
    let mut rest = &all[..all.len() - 1];
    while !rest.is_empty() {
        let start = all.len() - 1 - rest.len();
        let (element, tail) = split_element(rest)?;
        if element.key == key {
            return Some((&all[..start], element, &all[all.len() - 1 - tail.len()..]));
        }
        rest = tail;
    }
    None
}

fn split_element(bytes: &[u8]) -> Option<(Element<'_>, &[u8])> {
    let (kind, bytes) = bytes.split_first()?;
    let end = bytes.iter().position(|b| *b == 0)?;
    let key = std::str::from_utf8(&bytes[..end]).ok()?;
    let bytes = &bytes[end + 1..];
    let length = value_length(*kind, bytes)?;
    let (value, rest) = (bytes.get(..length)?, bytes.get(length..)?);
    Some((Element { key, kind: *kind, value }, rest))
}

fn value_length(kind: u8, bytes: &[u8]) -> Option<usize> {
    let prefix = || usize::try_from(i32::from_le_bytes(*bytes.first_chunk()?)).ok();
    let cstring = |from: usize| Some(from + bytes.get(from..)?.iter().position(|b| *b == 0)? + 1);
    match kind {
        DOUBLE | DATETIME | TIMESTAMP | INT64 => Some(8),
        STRING | 0x0D | SYMBOL => prefix()?.checked_add(4),
        EMBEDDED | ARRAY => prefix().filter(|length| *length >= 5),
        0x0F => prefix(),
        BINARY => prefix()?.checked_add(5),
        0x06 | 0x0A | 0x7F | 0xFF => Some(0),
        0x07 => Some(12),
        0x08 => Some(1),
        0x0B => cstring(cstring(0)?),
        0x0C => prefix()?.checked_add(16),
        INT32 => Some(4),
        DECIMAL => Some(16),
        _ => None,
    }
}

/// Writes a document front to back.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    open: Vec<usize>,
}

impl Writer {
    /// An empty document.
    pub fn document() -> Self {
        Self::with_capacity(256)
    }

    /// An empty document with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity + 16);
        bytes.extend_from_slice(&[0; 4]);
        Self { bytes, open: vec![0] }
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == 4
    }

    fn key(&mut self, kind: u8, key: &str) {
        self.bytes.push(kind);
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.push(0);
    }

    fn index(&mut self, kind: u8, index: usize) {
        self.bytes.push(kind);
        // Indexes are short and many: no allocation.
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        let mut rest = index;
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.bytes.extend_from_slice(&digits[at..]);
        self.bytes.push(0);
    }

    fn begin(&mut self) {
        self.open.push(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 4]);
    }

    /// Opens an object field.
    pub fn begin_document(&mut self, key: &str) {
        self.key(EMBEDDED, key);
        self.begin();
    }

    /// Opens an array field.
    pub fn begin_array(&mut self, key: &str) {
        self.key(ARRAY, key);
        self.begin();
    }

    /// Opens an object as element `index` of the open array.
    pub fn begin_item(&mut self, index: usize) {
        self.index(EMBEDDED, index);
        self.begin();
    }

    /// Adds a whole document as element `index` of the open array.
    pub fn item(&mut self, index: usize, document: &[u8]) {
        self.index(EMBEDDED, index);
        self.bytes.extend_from_slice(document);
    }

    /// Adds a null as element `index` of the open array.
    pub fn null_item(&mut self, index: usize) {
        self.index(0x0A, index);
    }

    /// Copies an element's value as element `index` of the open array.
    pub fn copy_item(&mut self, index: usize, element: &Element<'_>) {
        self.index(element.kind, index);
        self.bytes.extend_from_slice(element.value);
    }

    /// Closes what was opened last.
    pub fn end(&mut self) {
        self.bytes.push(0);
        let start = self.open.pop().expect("begin before end");
        let length = i32::try_from(self.bytes.len() - start).expect("documents are far below 2 GiB");
        self.bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// Copies an element as it is.
    pub fn copy(&mut self, element: &Element<'_>) {
        self.copy_as(element.key, element);
    }

    /// Copies an element's value under another name.
    pub fn copy_as(&mut self, key: &str, element: &Element<'_>) {
        self.key(element.kind, key);
        self.bytes.extend_from_slice(element.value);
    }

    /// Copies all fields of a document.
    pub fn copy_fields(&mut self, document: &RawDocument) {
        let bytes = document.as_bytes();
        self.bytes.extend_from_slice(&bytes[4..bytes.len() - 1]);
    }

    /// Writes an embedded document.
    pub fn embed(&mut self, key: &str, document: &RawDocument) {
        self.key(EMBEDDED, key);
        self.bytes.extend_from_slice(document.as_bytes());
    }

    /// Writes an array given as a document of indexes.
    pub fn embed_array(&mut self, key: &str, items: &RawDocument) {
        self.key(ARRAY, key);
        self.bytes.extend_from_slice(items.as_bytes());
    }

    /// Writes a UUID (binary subtype 4).
    pub fn uuid(&mut self, key: &str, uuid: [u8; 16]) {
        self.key(BINARY, key);
        self.bytes.extend_from_slice(&16_i32.to_le_bytes());
        self.bytes.push(4);
        self.bytes.extend_from_slice(&uuid);
    }

    /// Writes any value.
    pub fn value<'v>(&mut self, key: &str, value: impl Into<RawBsonRef<'v>>) {
        let mut one = RawDocumentBuf::new();
        one.append(bson::cstr!("v"), value.into());
        self.copy_as(key, &get(&one, "v").expect("just written"));
    }

    /// Closes the document.
    ///
    /// # Panics
    /// Something is still open, a programming error.
    pub fn finish(mut self) -> RawDocumentBuf {
        self.end();
        assert!(self.open.is_empty(), "something is still open");
        RawDocumentBuf::from_bytes(self.bytes).expect("length and terminator were just written")
    }
}

#[cfg(test)]
mod tests {
    use bson::{Bson, doc};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_type_survives_copying_element_by_element() {
        let all = doc! {
            "double": 1.5, "string": "s", "object": {"a": {"b": 1}}, "array": [1, [2, "x"], {}],
            "binary": Bson::Binary(bson::Binary { subtype: bson::spec::BinarySubtype::BinaryOld, bytes: vec![1, 2] }),
            "undefined": Bson::Undefined, "oid": bson::oid::ObjectId::new(), "bool": true, "date": bson::DateTime::now(),
            "null": Bson::Null, "symbol": Bson::Symbol("y".into()), "code": Bson::JavaScriptCode("1".into()), "int": 1_i32,
            "regex": Bson::RegularExpression(bson::Regex { pattern: bson::cstr!("a").into(), options: bson::cstr!("ix").into() }),
            "scope": Bson::JavaScriptCodeWithScope(bson::JavaScriptCodeWithScope { code: "x".into(), scope: doc! {"a": 1} }),
            "ts": Bson::Timestamp(bson::Timestamp { time: 1, increment: 2 }), "long": 2_i64,
            "decimal": Bson::Decimal128("NaN".parse().expect("decimal")), "min": Bson::MinKey, "max": Bson::MaxKey, "": 0,
        };
        let raw = RawDocumentBuf::try_from(&all).expect("encode");
        let (mut copied, mut rewritten) = (Writer::document(), Writer::document());
        for element in elements(&raw) {
            copied.copy(&element.expect("valid"));
        }
        for field in &*raw {
            let (key, value) = field.expect("valid");
            rewritten.value(key.as_str(), value);
        }
        assert_eq!(copied.finish().as_bytes(), raw.as_bytes());
        assert_eq!(rewritten.finish().as_bytes(), raw.as_bytes());
    }

    #[test]
    fn array_indexes_are_written_in_decimal() {
        let mut writer = Writer::document();
        writer.begin_array("a");
        for index in 0..1234 {
            writer.begin_item(index);
            writer.end();
        }
        writer.end();
        let document = writer.finish();
        let array = get(&document, "a").and_then(|a| a.document()).expect("array");
        let keys: Vec<_> = elements(array).map(|e| e.expect("valid").key.to_owned()).collect();
        assert_eq!(keys.len(), 1234);
        assert!(keys.iter().enumerate().all(|(i, key)| *key == i.to_string()));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 5..200)) {
            let length = bytes.len();
            bytes[..4].copy_from_slice(&(length as i32).to_le_bytes());
            bytes[length - 1] = 0;
            let document = RawDocument::from_bytes(&bytes).expect("framed");
            for element in elements(document).flatten() {
                let _ = (element.str(), element.binary(), element.integer(), element.timestamp(), element.document());
            }
        }
    }
}
