//! Raw BSON as comparison needs it: canonical forms, field-order-blind equality, short rendering.
//!
//! Nothing here decodes a whole document into a map: duplicate keys must survive.

use bson::raw::{RawBsonRef, RawDocument, RawDocumentBuf};

/// Type byte and value bytes of a value: equal exactly when the stored bytes are equal.
pub(super) fn value_bytes(value: RawBsonRef<'_>) -> Vec<u8> {
    let mut holder = RawDocumentBuf::new();
    holder.append(bson::raw::cstr!(""), value);
    // Leave out the length in front and the terminator behind.
    let bytes = holder.as_bytes();
    bytes.get(4..bytes.len() - 1).unwrap_or_default().to_vec()
}

/// The bytes of `_id`, or nothing when the document has none.
pub(super) fn id_bytes(document: &RawDocument) -> Vec<u8> {
    match document.get("_id") {
        Ok(Some(id)) => value_bytes(id),
        _ => Vec::new(),
    }
}

/// `_id` as canonical extended JSON.
pub(super) fn id_text(document: &RawDocument) -> String {
    let mut out = Text::new(300);
    match document.get("_id") {
        Ok(Some(id)) => out.value(id),
        _ => out.push("(none)"),
    }
    out.finish()
}

/// A key that is equal for numeric `_id`s which the server holds equal (1, 1L, 1.0, NumberDecimal(1)).
pub(super) fn numeric_key(document: &RawDocument) -> Option<u64> {
    let number = match document.get("_id").ok()?? {
        RawBsonRef::Int32(v) => f64::from(v),
        RawBsonRef::Int64(v) => v as f64,
        RawBsonRef::Double(v) => v,
        RawBsonRef::Decimal128(v) => v.to_string().parse().ok()?,
        _ => return None,
    };
    Some(if number.is_nan() { f64::NAN.to_bits() } else { (number + 0.0).to_bits() })
}

/// The same top-level fields sorted by name, except those in `drop`.
pub(super) fn sorted(document: &RawDocument, drop: &[&str]) -> RawDocumentBuf {
    let mut fields: Vec<_> = document.iter().flatten().filter(|(key, _)| !drop.contains(&key.as_str())).collect();
    fields.sort_by_key(|(key, _)| key.as_str());
    fields.into_iter().collect()
}

/// True when two documents differ at most in the order of their fields, at any depth.
pub(super) fn same_but_for_order(a: &RawDocument, b: &RawDocument) -> bool {
    a.as_bytes().len() == b.as_bytes().len() && canonical(RawBsonRef::Document(a)) == canonical(RawBsonRef::Document(b))
}

fn canonical(value: RawBsonRef<'_>) -> Vec<u8> {
    match value {
        RawBsonRef::Document(document) => {
            let mut fields: Vec<Vec<u8>> = document
                .iter()
                .flatten()
                .map(|(key, value)| {
                    let mut field = key.as_str().as_bytes().to_vec();
                    field.push(0);
                    field.extend(canonical(value));
                    field
                })
                .collect();
            fields.sort();
            framed(3, fields)
        }
        RawBsonRef::Array(array) => framed(4, array.into_iter().flatten().map(canonical).collect()),
        scalar => value_bytes(scalar),
    }
}

fn framed(tag: u8, parts: Vec<Vec<u8>>) -> Vec<u8> {
    let mut out = vec![tag];
    for part in parts {
        out.extend((part.len() as u64).to_be_bytes());
        out.extend(part);
    }
    out
}

/// The path of the first difference of two documents, with both values.
pub(super) fn first_difference(a: &RawDocument, b: &RawDocument) -> String {
    let mut left = a.iter().flatten();
    let mut right = b.iter().flatten();
    loop {
        return match (left.next(), right.next()) {
            (Some((ka, va)), Some((kb, vb))) if ka == kb => {
                if value_bytes(va) == value_bytes(vb) {
                    continue;
                }
                describe(ka.as_str(), va, vb)
            }
            (Some((ka, _)), Some((kb, _))) => {
                format!("field {:?} / {:?}", ka.as_str(), kb.as_str())
            }
            (Some((ka, _)), None) => format!("field {:?} / (end)", ka.as_str()),
            (None, Some((kb, _))) => format!("field (end) / {:?}", kb.as_str()),
            (None, None) => "no field".to_owned(),
        };
    }
}

fn describe(key: &str, a: RawBsonRef<'_>, b: RawBsonRef<'_>) -> String {
    match (a, b) {
        (RawBsonRef::Document(a), RawBsonRef::Document(b)) => {
            format!("{key:?} > {}", first_difference(a, b))
        }
        (RawBsonRef::Array(a), RawBsonRef::Array(b)) => {
            let a = RawDocument::from_bytes(a.as_bytes());
            let b = RawDocument::from_bytes(b.as_bytes());
            match (a, b) {
                (Ok(a), Ok(b)) => format!("{key:?} > {}", first_difference(a, b)),
                _ => format!("{key:?}"),
            }
        }
        (a, b) => {
            let text = |value| {
                let mut out = Text::new(80);
                out.value(value);
                out.finish()
            };
            format!("{key:?} ({} / {})", text(a), text(b))
        }
    }
}

/// Canonical extended JSON of a document, cut after about `limit` bytes.
pub(super) fn shorten(document: &RawDocument, limit: usize) -> String {
    let mut out = Text::new(limit);
    out.document(document);
    let cut = out.full;
    let mut text = out.finish();
    if cut {
        text.push_str(&format!(" ({} bytes)", document.as_bytes().len()));
    }
    text
}

/// Renders by hand, because a map would lose duplicate keys and a 16 MB document must stay cheap.
struct Text {
    out: String,
    limit: usize,
    full: bool,
}

impl Text {
    fn new(limit: usize) -> Self {
        Self { out: String::new(), limit, full: false }
    }

    fn push(&mut self, text: &str) {
        if self.full {
            return;
        }
        let room = self.limit.saturating_sub(self.out.len());
        if text.len() <= room {
            self.out.push_str(text);
        } else {
            self.out.extend(text.chars().take(room));
            self.out.push_str("...");
            self.full = true;
        }
    }

    fn document(&mut self, document: &RawDocument) {
        self.push("{");
        for (n, (key, value)) in document.iter().flatten().enumerate() {
            if self.full {
                return;
            }
            let comma = if n == 0 { "" } else { "," };
            self.push(&format!("{comma}{:?}:", key.as_str()));
            self.value(value);
        }
        self.push("}");
    }

    fn value(&mut self, value: RawBsonRef<'_>) {
        match value {
            RawBsonRef::Document(document) => self.document(document),
            RawBsonRef::Array(array) => {
                self.push("[");
                for (n, value) in array.into_iter().flatten().enumerate() {
                    if self.full {
                        return;
                    }
                    self.push(if n == 0 { "" } else { "," });
                    self.value(value);
                }
                self.push("]");
            }
            RawBsonRef::String(text) if text.len() > self.limit => {
                let head: String = text.chars().take(self.limit).collect();
                self.push(&format!("{head:?}"));
            }
            scalar => self.push(&scalar_text(scalar)),
        }
    }

    fn finish(self) -> String {
        self.out
    }
}

/// Canonical extended JSON of a scalar.
fn scalar_text(value: RawBsonRef<'_>) -> String {
    match value {
        RawBsonRef::Int32(n) => format!(r#"{{"$numberInt":"{n}"}}"#),
        RawBsonRef::Int64(n) => format!(r#"{{"$numberLong":"{n}"}}"#),
        RawBsonRef::Double(n) => format!(r#"{{"$numberDouble":"{n:?}"}}"#),
        RawBsonRef::Decimal128(n) => format!(r#"{{"$numberDecimal":"{n}"}}"#),
        RawBsonRef::String(text) => format!("{text:?}"),
        RawBsonRef::Symbol(text) => format!(r#"{{"$symbol":{text:?}}}"#),
        RawBsonRef::JavaScriptCode(code) => format!(r#"{{"$code":{code:?}}}"#),
        RawBsonRef::JavaScriptCodeWithScope(code) => {
            let scope = shorten(code.scope, 200);
            format!(r#"{{"$code":{:?},"$scope":{scope}}}"#, code.code)
        }
        RawBsonRef::Boolean(value) => value.to_string(),
        RawBsonRef::Null => "null".to_owned(),
        RawBsonRef::Undefined => r#"{"$undefined":true}"#.to_owned(),
        RawBsonRef::MinKey => r#"{"$minKey":1}"#.to_owned(),
        RawBsonRef::MaxKey => r#"{"$maxKey":1}"#.to_owned(),
        RawBsonRef::ObjectId(id) => format!(r#"{{"$oid":"{}"}}"#, id.to_hex()),
        RawBsonRef::DateTime(date) => {
            let millis = date.timestamp_millis();
            format!(r#"{{"$date":{{"$numberLong":"{millis}"}}}}"#)
        }
        RawBsonRef::Timestamp(t) => {
            format!(r#"{{"$timestamp":{{"t":{},"i":{}}}}}"#, t.time, t.increment)
        }
        RawBsonRef::RegularExpression(regex) => format!(
            r#"{{"$regularExpression":{{"pattern":{:?},"options":{:?}}}}}"#,
            regex.pattern.as_str(),
            regex.options.as_str()
        ),
        RawBsonRef::Binary(binary) => {
            // Hexadecimal, not base64: it is read by people who compare two of them.
            let head: String = binary.bytes.iter().take(32).map(|b| format!("{b:02x}")).collect();
            let (subtype, len) = (u8::from(binary.subtype), binary.bytes.len());
            format!(r#"{{"$binary":{{"hex":"{head}","bytes":{len},"subType":"{subtype:02x}"}}}}"#)
        }
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;

    use super::*;

    #[test]
    fn field_order_is_seen_apart_from_content() {
        let a = rawdoc! { "x": 1, "y": { "p": 1, "q": [1, 2] } };
        let b = rawdoc! { "y": { "q": [1, 2], "p": 1 }, "x": 1 };
        let c = rawdoc! { "y": { "q": [2, 1], "p": 1 }, "x": 1 };
        assert!(same_but_for_order(&a, &b));
        assert!(!same_but_for_order(&a, &c));
    }

    #[test]
    fn numeric_types_differ_in_bytes_and_meet_in_key() {
        let int = rawdoc! { "_id": 1 };
        let double = rawdoc! { "_id": 1.0 };
        assert_ne!(id_bytes(&int), id_bytes(&double));
        assert_eq!(numeric_key(&int), numeric_key(&double));
        assert_eq!(numeric_key(&rawdoc! { "_id": "1" }), None);
    }

    #[test]
    fn duplicate_keys_survive_rendering() {
        let mut document = rawdoc! { "a": 1 };
        document.append(bson::raw::cstr!("a"), 2);
        assert_eq!(shorten(&document, 100), r#"{"a":{"$numberInt":"1"},"a":{"$numberInt":"2"}}"#);
    }

    #[test]
    fn long_documents_are_cut_and_sized() {
        let document = rawdoc! { "a": "x".repeat(10_000) };
        let text = shorten(&document, 50);
        assert!(text.len() < 100, "{text}");
        assert!(text.ends_with("bytes)"), "{text}");
    }

    #[test]
    fn the_first_difference_is_named_by_path() {
        let a = rawdoc! { "x": 1, "y": { "p": [1, { "z": 1 }] } };
        let b = rawdoc! { "x": 1, "y": { "p": [1, { "z": 1.0 }] } };
        let text = first_difference(&a, &b);
        assert!(text.starts_with(r#""y" > "p" > "1" > "z""#), "{text}");
    }
}
