//! An update's diff: as an update statement where the server can be trusted to do exactly what happened at the source,
//! else applied here to the document's bytes (pure).
//!
//! The diff is the one of the source's oplog (`$v: 2`, MongoDB 5.0 and later; its grammar and meaning are in the server's
//! `document_diff_serialization.h` and `document_diff_applier.cpp`). It names every field by itself, so that a name with
//! dots, a number as a name and a field that moves to the end of its object are what they are; an event's ordinary
//! `updateDescription` cannot tell these (ADR 2).

use bson::raw::{RawDocument, RawDocumentBuf};

use crate::model::raw::{self, Element, Invalid, Writer, elements};

/// Why a diff cannot be applied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DiffError {
    /// A newer server says something this version does not understand; ignoring it could change the document.
    #[error("diff has an unknown section '{0}'; upgrade this agent before the source's MongoDB")]
    UnknownSection(String),
    /// Not shaped like a diff.
    #[error("diff: {0}")]
    Shape(&'static str),
    /// What it changes is not there, or of another type: the document is not what the source's was.
    #[error("'{0}' is not in the document as the diff has it")]
    Missing(String),
}

/// What happened to one object.
#[derive(Clone, Debug, Default)]
pub struct Diff<'a> {
    /// By name, in order of names.
    edits: Vec<(&'a str, Edit<'a>)>,
    /// Fields that are appended, in this order; an older one of that name goes.
    inserts: Vec<Element<'a>>,
}

/// What happened to a field where it stands.
#[derive(Clone, Debug)]
enum Edit<'a> {
    Remove,
    Set(Element<'a>),
    Within(Nested<'a>),
    /// It is among the inserts.
    Moved,
}

#[derive(Clone, Debug)]
enum Nested<'a> {
    Object(Diff<'a>),
    Array(ArrayDiff<'a>),
}

#[derive(Clone, Debug, Default)]
struct ArrayDiff<'a> {
    /// Its length afterwards, where that is not only what the items make it.
    resize: Option<usize>,
    /// By index, ascending.
    items: Vec<(usize, Edit<'a>)>,
}

/// More than the levels a stored document can have.
const MAX_DEPTH: usize = 256;
/// With more fields than this, each of which the server looks for, reading the document is cheaper.
const MAX_PLAIN: usize = 64;
/// With more updates than this, reading the document is cheaper.
pub const MAX_UPDATES: usize = 5;
/// The longest array that fits into a document; a longer one is not written to find that out.
const MAX_ARRAY: usize = 4 << 20;

impl<'a> Diff<'a> {
    /// Reads the `diff` of an update.
    ///
    /// # Errors
    /// Unknown sections are refused, see [`DiffError`].
    pub fn parse(diff: &'a RawDocument) -> Result<Self, DiffError> {
        Self::at_depth(diff, 0)
    }

    fn at_depth(diff: &'a RawDocument, depth: usize) -> Result<Self, DiffError> {
        let mut parsed = Self::default();
        for section in elements(diff) {
            let section = section?;
            let fields = || {
                let fields = section.document().ok_or(DiffError::Shape("a section is not an object"))?;
                Ok::<_, DiffError>(elements(fields))
            };
            match section.key {
                "d" => {
                    for field in fields()? {
                        parsed.edits.push((field?.key, Edit::Remove));
                    }
                }
                "u" => {
                    for field in fields()? {
                        let field = field?;
                        parsed.edits.push((field.key, Edit::Set(field)));
                    }
                }
                "i" => {
                    for field in fields()? {
                        let field = field?;
                        parsed.edits.push((field.key, Edit::Moved));
                        parsed.inserts.push(field);
                    }
                }
                other => {
                    let name = other.strip_prefix('s').ok_or_else(|| unknown(other))?;
                    parsed.edits.push((name, Edit::Within(nested(&section, depth)?)));
                }
            }
        }
        parsed.edits.sort_unstable_by_key(|(name, _)| *name);
        match parsed.edits.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            true => Err(DiffError::Shape("it changes a field twice")),
            false => Ok(parsed),
        }
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.edits.is_empty()
    }

    /// Whether it adds fields, or moves them.
    pub fn appends(&self) -> bool {
        !self.inserts.is_empty()
    }

    /// Whether it only sets and removes a few top-level fields of ordinary names, so that no document has to be looked at.
    /// Such an update does the same whatever the fields hold. A pipeline may take `_id` out or move it, and the server puts
    /// it back; operators may not.
    pub fn is_plain(&self) -> bool {
        let plain = |name: &str| !matches!(name, "" | "_id") && !name.starts_with('$') && !name.contains('.');
        self.edits.len() <= MAX_PLAIN
            && self.edits.iter().all(|(name, edit)| !matches!(edit, Edit::Within(_)) && plain(name))
            && self.runs().count() < MAX_UPDATES
    }

    /// The updates (`u` of update statements, one after the other) of a plain diff. Fields end up where they are at the
    /// source: the first update sets them where they stand and removes those that are to be appended (one may move), the
    /// others append them in the order in which the server does it by itself. In between a unique index could see what the
    /// source never had.
    pub fn plain_updates(&self) -> impl Iterator<Item = PlainUpdate<'_, 'a>> {
        debug_assert!(self.is_plain());
        std::iter::once(PlainUpdate::InPlace(self)).chain(self.runs().map(PlainUpdate::Append))
    }

    /// The inserts, cut where one `$set` may append them in another order: it goes by the bytes of the names, but by length
    /// where both begin with a digit (the server's `cmpPathsAndArrayIndexes`).
    fn runs(&self) -> impl Iterator<Item = &[Element<'a>]> {
        let digit = |new: &Element<'_>| new.key.starts_with(|first: char| first.is_ascii_digit());
        self.inserts.chunk_by(move |a, b| a.key < b.key && !digit(a) && !digit(b))
    }

    /// Applies the diff to a document, as the source's storage engine did.
    ///
    /// # Errors
    /// The document is not what the source's was.
    pub fn apply(&self, document: &RawDocument) -> Result<RawDocumentBuf, DiffError> {
        let mut out = Writer::with_capacity(document.as_bytes().len() + 256);
        patch_object(document, self, &mut out)?;
        let after = out.finish();
        match self.edits.binary_search_by_key(&"_id", |(name, _)| name) {
            Ok(_) => with_id_first(document, &after),
            Err(_) => Ok(after),
        }
    }

    /// The new value of a field, given as a path of names with dots between them, as far as the diff says.
    pub fn value(&self, path: &str) -> Option<Element<'a>> {
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let edit = self.edits.binary_search_by_key(&name, |(name, _)| name).ok().map(|at| &self.edits[at].1)?;
        let whole = match edit {
            Edit::Remove => return None,
            Edit::Within(Nested::Object(diff)) => return diff.value(rest?),
            Edit::Within(Nested::Array(_)) => return None,
            Edit::Set(value) => *value,
            Edit::Moved => *self.inserts.iter().find(|new| new.key == name)?,
        };
        rest.map_or(Some(whole), |rest| raw::get_path(whole.object()?, rest))
    }
}

/// One update of a plain diff.
#[derive(Clone, Copy, Debug)]
pub enum PlainUpdate<'d, 'a> {
    /// Removes fields, and sets them where they stand.
    InPlace(&'d Diff<'a>),
    /// Appends fields.
    Append(&'d [Element<'a>]),
}

impl PlainUpdate<'_, '_> {
    /// Writes the operators of the update.
    pub fn write(self, out: &mut Writer) {
        match self {
            Self::InPlace(diff) => {
                let removed = |edit: &Edit<'_>| matches!(edit, Edit::Remove | Edit::Moved);
                let set = |edit: &Edit<'_>| matches!(edit, Edit::Set(_));
                if diff.edits.iter().any(|(_, edit)| removed(edit)) {
                    out.begin_document("$unset");
                    for (name, _) in diff.edits.iter().filter(|(_, edit)| removed(edit)) {
                        out.value(name, 1_i32);
                    }
                    out.end();
                }
                if diff.edits.iter().any(|(_, edit)| set(edit)) {
                    out.begin_document("$set");
                    for (_, edit) in &diff.edits {
                        if let Edit::Set(value) = edit {
                            out.copy(value);
                        }
                    }
                    out.end();
                }
            }
            Self::Append(fields) => {
                out.begin_document("$set");
                for field in fields {
                    out.copy(field);
                }
                out.end();
            }
        }
    }
}

fn unknown(section: &str) -> DiffError {
    DiffError::UnknownSection(section.to_owned())
}

fn nested<'a>(section: &Element<'a>, depth: usize) -> Result<Nested<'a>, DiffError> {
    let diff = section.document().ok_or(DiffError::Shape("a section is not an object"))?;
    if depth > MAX_DEPTH {
        return Err(DiffError::Shape("nested too deep"));
    }
    let array = elements(diff).next().is_some_and(|first| first.is_ok_and(|first| first.key == "a"));
    Ok(if array {
        Nested::Array(array_diff(diff, depth + 1)?)
    } else {
        Nested::Object(Diff::at_depth(diff, depth + 1)?)
    })
}

fn array_diff(diff: &RawDocument, depth: usize) -> Result<ArrayDiff<'_>, DiffError> {
    let mut parsed = ArrayDiff::default();
    for section in elements(diff).skip(1) {
        let section = section?;
        if section.key == "l" {
            let length = section.integer().and_then(|length| usize::try_from(length).ok());
            parsed.resize = Some(length.ok_or(DiffError::Shape("the length of an array is not a number"))?);
            continue;
        }
        let (kind, index) = section.key.split_at_checked(1).ok_or_else(|| unknown(section.key))?;
        let index: usize = index.parse().map_err(|_| unknown(section.key))?;
        let edit = match kind {
            "u" => Edit::Set(section),
            "s" => Edit::Within(nested(&section, depth)?),
            _ => return Err(unknown(section.key)),
        };
        parsed.items.push((index, edit));
    }
    let longest = parsed.items.last().map_or(0, |(index, _)| index + 1).max(parsed.resize.unwrap_or(0));
    match (parsed.items.windows(2).all(|pair| pair[0].0 < pair[1].0), longest <= MAX_ARRAY) {
        (true, true) => Ok(parsed),
        (false, _) => Err(DiffError::Shape("the indexes of an array do not ascend")),
        (true, false) => Err(DiffError::Shape("an array is too long")),
    }
}

impl From<Invalid> for DiffError {
    fn from(_: Invalid) -> Self {
        Self::Shape("invalid bson")
    }
}

/// Writes an object or array as its diff leaves it.
fn patch(element: &Element<'_>, nested: &Nested<'_>, out: &mut Writer) -> Result<(), DiffError> {
    let missing = || DiffError::Missing(element.key.to_owned());
    let inner = element.document().ok_or_else(missing)?;
    match nested {
        Nested::Object(diff) if !element.is_array() => {
            out.begin_document(element.key);
            patch_object(inner, diff, out)?;
        }
        Nested::Array(diff) if element.is_array() => {
            out.begin_array(element.key);
            patch_array(inner, diff, out)?;
        }
        _ => return Err(missing()),
    }
    out.end();
    Ok(())
}

/// What the server makes of a document whose `_id` was taken out or moved.
fn with_id_first(before: &RawDocument, after: &RawDocument) -> Result<RawDocumentBuf, DiffError> {
    let mut out = Writer::with_capacity(after.as_bytes().len() + 16);
    if let Some(id) = raw::get(after, "_id").or_else(|| raw::get(before, "_id")) {
        out.copy(&id);
    }
    for element in elements(after) {
        let element = element?;
        if element.key != "_id" {
            out.copy(&element);
        }
    }
    Ok(out.finish())
}

fn patch_object(object: &RawDocument, diff: &Diff<'_>, out: &mut Writer) -> Result<(), DiffError> {
    let mut done = vec![false; diff.edits.len()];
    for element in elements(object) {
        let element = element?;
        let edit = diff.edits.binary_search_by_key(&element.key, |(name, _)| name).ok();
        // Of fields that have the same name operators change the first.
        let edit = edit.filter(|at| !std::mem::replace(&mut done[*at], true));
        match edit.map(|at| &diff.edits[at].1) {
            None => out.copy(&element),
            Some(Edit::Remove | Edit::Moved) => {}
            Some(Edit::Set(value)) => out.copy(value),
            Some(Edit::Within(nested)) => patch(&element, nested, out)?,
        }
    }
    let missing = |((_, edit), done): &(&(&str, Edit<'_>), bool)| !done && !matches!(edit, Edit::Moved);
    if let Some(((name, _), _)) = diff.edits.iter().zip(done).find(missing) {
        return Err(DiffError::Missing((*name).to_owned()));
    }
    for new in &diff.inserts {
        out.copy(new);
    }
    Ok(())
}

fn patch_array(array: &RawDocument, diff: &ArrayDiff<'_>, out: &mut Writer) -> Result<(), DiffError> {
    let mut edits = diff.items.iter().peekable();
    let mut length = 0;
    for element in elements(array).take(diff.resize.unwrap_or(usize::MAX)) {
        let element = element?;
        match edits.next_if(|(index, _)| *index == length).map(|(_, edit)| edit) {
            Some(Edit::Set(value)) => out.copy_item(length, value),
            Some(Edit::Within(nested)) => patch(&element, nested, out)?,
            _ => out.copy_item(length, &element),
        }
        length += 1;
    }
    while length < diff.resize.unwrap_or(0) || edits.peek().is_some() {
        match edits.next_if(|(index, _)| *index == length).map(|(_, edit)| edit) {
            None => out.null_item(length),
            Some(Edit::Set(value)) => out.copy_item(length, value),
            Some(_) => return Err(DiffError::Missing(length.to_string())),
        }
        length += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bson::{Bson, doc};

    use super::*;

    fn encoded(document: bson::Document) -> RawDocumentBuf {
        RawDocumentBuf::try_from(&document).expect("encode")
    }

    fn applied(before: bson::Document, diff: bson::Document) -> Result<bson::Document, DiffError> {
        let (before, diff) = (encoded(before), encoded(diff));
        let after = Diff::parse(&diff)?.apply(&before)?;
        Ok(bson::Document::try_from(&*after).expect("valid"))
    }

    fn order(document: &bson::Document) -> Vec<&str> {
        document.keys().map(String::as_str).collect()
    }

    #[test]
    fn fields_are_set_where_they_stand_and_added_at_the_end() {
        let after = applied(
            doc! {"_id": 1, "a": {"x": 1, "y": 2}, "b": 3, "c": 4},
            doc! {"d": {"c": false}, "i": {"z": 1, "b2": 2, "aa": 3}, "sa": {"d": {"x": false}, "u": {"y": 9}}},
        );
        let after = after.expect("applies");
        assert_eq!(after, doc! {"_id": 1, "a": {"y": 9}, "b": 3, "z": 1, "b2": 2, "aa": 3});
        assert_eq!(order(&after), ["_id", "a", "b", "z", "b2", "aa"]);
    }

    #[test]
    fn a_field_that_is_inserted_again_moves_to_the_end() {
        let after = applied(doc! {"_id": 1, "a": 1, "b": 2}, doc! {"i": {"a": 3}}).expect("applies");
        assert_eq!(order(&after), ["_id", "b", "a"]);
        assert_eq!(after, doc! {"_id": 1, "b": 2, "a": 3});
    }

    #[test]
    fn arrays_are_cut_grown_and_changed_inside() {
        let inner = doc! {"a": true, "l": 1, "u0": 8};
        let after = applied(
            doc! {"a": [1, {"b": [5, 6, 7]}, 3, 4], "g": [1], "h": [[1, 2], 3]},
            doc! {"sa": {"a": true, "l": 2, "u0": 9, "s1": {"sb": inner}}, "sg": {"a": true, "u3": 4},
            "sh": {"a": true, "s0": {"a": true, "u1": 5}}},
        );
        let expected = doc! {"a": [9, {"b": [8]}], "g": [1, Bson::Null, Bson::Null, 4], "h": [[1, 5], 3]};
        assert_eq!(after.expect("applies"), expected);
        let longer = applied(doc! {"a": [1]}, doc! {"sa": {"a": true, "l": 3}}).expect("applies");
        assert_eq!(longer, doc! {"a": [1, Bson::Null, Bson::Null]});
    }

    #[test]
    fn every_name_is_what_it_is() {
        let before = doc! {"_id": 2, "a.b": 1, "a": {"b": 2, "0": 3, "00": 4}, "$c": 5, "": 6};
        let diff = doc! {"u": {"a.b": 7, "$c": 8, "": 9}, "i": {"x.y": 1}, "sa": {"u": {"0": 1, "00": 2}}};
        let after = applied(before, diff).expect("applies");
        let expected = doc! {"_id": 2, "a.b": 7, "a": {"b": 2, "0": 1, "00": 2}, "$c": 8, "": 9, "x.y": 1};
        assert_eq!(after, expected);
        let beside = applied(doc! {"a": {"b": 1}}, doc! {"i": {"a.b": 2}}).expect("applies");
        assert_eq!(beside, doc! {"a": {"b": 1}, "a.b": 2});
    }

    #[test]
    fn the_id_stays_first_whatever_a_pipeline_did_to_it() {
        for diff in [doc! {"d": {"_id": false}}, doc! {"i": {"_id": 1}}, doc! {"u": {"_id": 1_i64}}] {
            let after = applied(doc! {"_id": 1, "a": 2}, diff).expect("applies");
            assert_eq!((order(&after).join(" "), after.get_i32("a").ok()), ("_id a".to_owned(), Some(2)));
        }
    }

    #[test]
    fn of_fields_of_one_name_the_first_is_changed() {
        let mut before = encoded(doc! {"t": 1, "n": {}});
        before.append(bson::raw::cstr!("t"), 2);
        let diff = encoded(doc! {"u": {"t": 5}, "sn": {"i": {"a": 1}}});
        let after = Diff::parse(&diff).expect("parse").apply(&before).expect("applies");
        let mut expected = encoded(doc! {"t": 5, "n": {"a": 1}});
        expected.append(bson::raw::cstr!("t"), 2);
        assert_eq!(after.as_bytes(), expected.as_bytes());
        let gone = encoded(doc! {"u": {"t": 5}, "d": {"b": false}});
        assert_eq!(Diff::parse(&gone).expect("parse").apply(&before), Err(DiffError::Missing("b".into())));
    }

    #[test]
    fn a_document_that_is_not_the_sources_is_found_out() {
        let within = doc! {"sa": {"u": {"b": 1}}};
        for before in [doc! {"a": 5}, doc! {"a": [1]}, doc! {"a": {}}, doc! {}] {
            assert!(matches!(applied(before, within.clone()), Err(DiffError::Missing(_))));
        }
        let array = doc! {"sa": {"a": true, "s1": {"u": {"b": 1}}}};
        for before in [doc! {"a": {"1": {"b": 2}}}, doc! {"a": [1]}, doc! {"a": [1, 2]}] {
            assert!(matches!(applied(before, array.clone()), Err(DiffError::Missing(_))));
        }
        assert_eq!(applied(doc! {}, doc! {"d": {"a": false}}), Err(DiffError::Missing("a".into())));
    }

    #[test]
    fn what_is_not_understood_stops_with_a_hint() {
        for diff in [doc! {"b": {}}, doc! {"sa": {"a": true, "x1": 1}}, doc! {"sa": {"a": true, "ü1": 1}}] {
            let error = applied(doc! {"a": [1]}, diff).expect_err("unknown");
            assert!(error.to_string().contains("upgrade this agent"), "{error}");
        }
        for diff in [
            doc! {"d": 1},
            doc! {"d": {"a": false}, "u": {"a": 1}},
            doc! {"sa": {"a": true, "l": "x"}},
            doc! {"sa": {"a": true, "u2": 1, "u1": 1}},
            doc! {"sa": {"a": true, "l": i64::MAX}},
        ] {
            assert!(matches!(applied(doc! {"a": [1]}, diff), Err(DiffError::Shape(_))));
        }
        let deep = (0..2_000).fold(doc! {}, |inner, _| doc! {"sa": inner});
        assert_eq!(Diff::parse(&encoded(deep)).map(|_| ()), Err(DiffError::Shape("nested too deep")));
    }

    fn updates(diff: bson::Document) -> Option<Vec<bson::Document>> {
        let diff = encoded(diff);
        let diff = Diff::parse(&diff).expect("parse");
        let update = |update: PlainUpdate<'_, '_>| {
            let mut out = Writer::document();
            update.write(&mut out);
            bson::Document::try_from(&*out.finish()).expect("valid")
        };
        diff.is_plain().then(|| diff.plain_updates().map(update).collect())
    }

    #[test]
    fn a_plain_diff_becomes_updates_that_keep_the_order_of_fields() {
        let in_place = updates(doc! {"d": {"q": false}, "u": {"z": 1, "b": 2}});
        assert_eq!(in_place, Some(vec![doc! {"$unset": {"q": 1}, "$set": {"b": 2, "z": 1}}]));
        let appending = updates(doc! {"u": {"m": 1}, "i": {"b": 1, "z": 2, "aa": 3, "24h": 4, "7d": 5}});
        let first = doc! {"$unset": {"24h": 1, "7d": 1, "aa": 1, "b": 1, "z": 1}, "$set": {"m": 1}};
        let runs = [doc! {"b": 1, "z": 2}, doc! {"aa": 3}, doc! {"24h": 4}, doc! {"7d": 5}];
        let appended = runs.map(|fields| doc! {"$set": fields});
        assert_eq!(appending, Some([vec![first], appended.to_vec()].concat()));
        assert_eq!(updates(doc! {"i": {"e": 1, "d": 1, "c": 1, "b": 1, "a": 1}}), None);
        for name in ["a.b", "$a", "", "_id"] {
            assert_eq!(updates(doc! {"u": {name: 1}}), None);
        }
    }

    #[test]
    fn new_values_are_found_by_path() {
        let diff = encoded(doc! {"u": {"a": {"b": {"c": 1}}}, "i": {"n": 2}, "d": {"x": false}, "so": {"u": {"p": 3}}});
        let diff = Diff::parse(&diff).expect("parse");
        let value = |path| diff.value(path).and_then(|value| value.integer());
        assert_eq!([value("a.b.c"), value("n"), value("o.p")], [Some(1), Some(2), Some(3)]);
        assert_eq!([value("a.b.d"), value("x"), value("o.q"), value("o")], [None; 4]);
    }
}
