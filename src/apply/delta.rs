//! An update's delta: as update statements where the server can be trusted to do exactly what happened at the source,
//! else applied here to the document's bytes (pure).
//!
//! The target's document is exactly what the source's was before the change, so a dotted path means at the target what it
//! meant at the source, except where field names hold dots, begin with `$` or are empty: MongoDB before 6.1 does not say
//! which is meant. Such paths are resolved against the document itself; what even that leaves open is
//! [`DeltaError::Ambiguous`], and the document is fetched again (rule K).

use bson::raw::{RawDocument, RawDocumentBuf};

use crate::model::raw::{Element, Invalid, Writer, elements, get};

/// Why a delta cannot be applied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeltaError {
    /// A newer server says something this version does not understand; ignoring it could change the document.
    #[error("update description has an unknown field '{0}'; upgrade this agent before the source's MongoDB")]
    UnknownField(String),
    /// Not shaped like an update description.
    #[error("update description: {0}")]
    Shape(&'static str),
    /// The path may mean more than one thing in this document.
    #[error("path '{0}' cannot be resolved in the document")]
    Ambiguous(String),
    /// The path means nothing in this document, so it is not what the source's was.
    #[error("path '{0}' leads nowhere in the document")]
    Missing(String),
}

/// A parsed update description.
#[derive(Clone, Debug, Default)]
pub struct Delta<'a> {
    set: Vec<Element<'a>>,
    unset: Vec<&'a str>,
    truncate: Vec<(&'a str, usize)>,
    /// Paths the server has spelt out (MongoDB 6.1 and later).
    disambiguated: Vec<(&'a str, Vec<Part<'a>>)>,
}

/// One component of a path the server has spelt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part<'a> {
    Name(&'a str),
    Index(usize),
}

impl<'a> Delta<'a> {
    /// Reads an update description.
    ///
    /// # Errors
    /// Unknown fields are refused, see [`DeltaError`].
    pub fn parse(description: &'a RawDocument) -> Result<Self, DeltaError> {
        let mut delta = Self::default();
        for field in elements(description) {
            let field = field?;
            match field.key {
                "updatedFields" => {
                    let fields = field.document().ok_or(DeltaError::Shape("updatedFields is not a document"))?;
                    delta.set = elements(fields).collect::<Result<_, _>>()?;
                }
                "removedFields" => delta.unset = names(&field)?,
                "truncatedArrays" => delta.truncate = truncations(&field)?,
                "disambiguatedPaths" => delta.disambiguated = disambiguated(&field)?,
                unknown => return Err(DeltaError::UnknownField(unknown.to_owned())),
            }
        }
        Ok(delta)
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.unset.is_empty() && self.truncate.is_empty()
    }

    /// Whether every path is one plain top-level name, so that no document has to be looked at. Such an update does the
    /// same whatever the fields hold; a truncation needs an array.
    pub fn is_plain(&self) -> bool {
        let mut paths = self.set.iter().map(|e| e.key).chain(self.unset.iter().copied());
        let plain = |path: &str| !path.is_empty() && !path.starts_with('$') && !path.contains('.');
        self.truncate.is_empty() && paths.all(plain)
    }

    /// The update (`u` of an update statement) for a plain delta. New fields end up in event order: `$set` appends names
    /// in lexicographic order, so a delta whose names are in another order becomes a pipeline, which keeps its own.
    pub fn plain_update(&self) -> PlainUpdate {
        debug_assert!(self.is_plain());
        let sorted = self.set.windows(2).all(|pair| pair[0].key < pair[1].key);
        let numeric = self.set.iter().any(|e| e.key.bytes().all(|b| b.is_ascii_digit()));
        if self.set.len() < 2 || (sorted && !numeric) {
            PlainUpdate::Operators(self.operators())
        } else {
            PlainUpdate::Pipeline(self.pipeline())
        }
    }

    fn operators(&self) -> RawDocumentBuf {
        let mut update = Writer::document();
        if !self.unset.is_empty() {
            update.begin_document("$unset");
            for name in &self.unset {
                update.value(name, 1_i32);
            }
            update.end();
        }
        if !self.set.is_empty() {
            update.begin_document("$set");
            for element in &self.set {
                update.copy(element);
            }
            update.end();
        }
        update.finish()
    }

    /// The stages as the fields of an array.
    fn pipeline(&self) -> RawDocumentBuf {
        let mut stages = Writer::document();
        let mut count = 0;
        if !self.unset.is_empty() {
            stages.begin_item(count);
            stages.begin_array("$unset");
            for (index, name) in self.unset.iter().enumerate() {
                stages.value(&index.to_string(), *name);
            }
            stages.end();
            stages.end();
            count += 1;
        }
        stages.begin_item(count);
        stages.begin_document("$set");
        for element in &self.set {
            stages.begin_document(element.key);
            stages.copy_as("$literal", element);
            stages.end();
        }
        stages.end();
        stages.end();
        stages.finish()
    }

    /// Applies the delta to a document, as the source's storage engine did.
    ///
    /// # Errors
    /// A path cannot be resolved in this document.
    pub fn apply(&self, document: &RawDocument) -> Result<RawDocumentBuf, DeltaError> {
        let mut edits = Vec::with_capacity(self.set.len() + self.unset.len() + self.truncate.len());
        edits.extend(self.truncate.iter().map(|(path, size)| self.edit(path, Action::Truncate(*size))));
        edits.extend(self.set.iter().map(|element| self.edit(element.key, Action::Set(element))));
        edits.extend(self.unset.iter().map(|path| self.edit(path, Action::Unset)));
        let mut out = Writer::document();
        patch_document(document, &edits, &mut out)?;
        Ok(out.finish())
    }

    fn edit<'e>(&'e self, path: &'e str, action: Action<'e>) -> Edit<'e> {
        let spelt = self.disambiguated.iter().find(|(p, _)| *p == path).map(|(_, parts)| parts.as_slice());
        Edit { whole: path, rest: spelt.map_or(Rest::Dotted(path), Rest::Spelt), action }
    }
}

/// How a plain delta is sent.
#[derive(Clone, Debug)]
pub enum PlainUpdate {
    /// One update with operators.
    Operators(RawDocumentBuf),
    /// An aggregation pipeline, given as the array's bytes.
    Pipeline(RawDocumentBuf),
}

fn names<'a>(list: &Element<'a>) -> Result<Vec<&'a str>, DeltaError> {
    const BAD: DeltaError = DeltaError::Shape("removedFields is not a list of names");
    elements(list.document().ok_or(BAD)?).map(|item| item?.str().ok_or(BAD)).collect()
}

fn truncations<'a>(list: &Element<'a>) -> Result<Vec<(&'a str, usize)>, DeltaError> {
    const BAD: DeltaError = DeltaError::Shape("truncatedArrays is malformed");
    let one = |item: Element<'a>| {
        let document = item.document()?;
        let size = get(document, "newSize")?.integer()?;
        Some((get(document, "field")?.str()?, usize::try_from(size).ok()?))
    };
    elements(list.document().ok_or(BAD)?).map(|item| one(item?).ok_or(BAD)).collect()
}

fn disambiguated<'a>(paths: &Element<'a>) -> Result<Vec<(&'a str, Vec<Part<'a>>)>, DeltaError> {
    const BAD: DeltaError = DeltaError::Shape("disambiguatedPaths is malformed");
    let part = |item: Element<'a>| match (item.str(), item.integer()) {
        (Some(name), _) => Some(Part::Name(name)),
        (None, index) => Some(Part::Index(usize::try_from(index?).ok()?)),
    };
    let mut found = Vec::new();
    for path in elements(paths.document().ok_or(BAD)?) {
        let path = path?;
        let parts = elements(path.document().ok_or(BAD)?).map(|item| part(item?).ok_or(BAD));
        found.push((path.key, parts.collect::<Result<_, _>>()?));
    }
    Ok(found)
}

impl From<Invalid> for DeltaError {
    fn from(_: Invalid) -> Self {
        Self::Shape("invalid bson")
    }
}

#[derive(Clone, Copy, Debug)]
enum Action<'a> {
    Set(&'a Element<'a>),
    Unset,
    Truncate(usize),
}

/// The part of a path still to be walked.
#[derive(Clone, Copy, Debug)]
enum Rest<'e> {
    Dotted(&'e str),
    Spelt(&'e [Part<'e>]),
}

#[derive(Clone, Copy, Debug)]
struct Edit<'e> {
    whole: &'e str,
    rest: Rest<'e>,
    action: Action<'e>,
}

/// How an edit concerns one element: it is the target itself, or lies below it.
enum Hit<'e> {
    Here(Action<'e>),
    Below(Edit<'e>),
}

impl<'e> Edit<'e> {
    fn ambiguous(&self) -> DeltaError {
        DeltaError::Ambiguous(self.whole.to_owned())
    }

    /// Why an edit that fits nothing in an object cannot be done: a name with dots may be new, or the objects it leads
    /// through may be missing here.
    fn unresolved(&self) -> DeltaError {
        match (self.action, self.rest) {
            (Action::Set(_), Rest::Dotted(_)) => self.ambiguous(),
            _ => self.missing(),
        }
    }

    fn missing(&self) -> DeltaError {
        DeltaError::Missing(self.whole.to_owned())
    }

    /// Whether the element named `key` is what the path names, or contains it.
    fn hit(&self, key: &str, container: bool) -> Option<Hit<'e>> {
        match self.rest {
            Rest::Dotted(rest) if rest == key => Some(Hit::Here(self.action)),
            Rest::Dotted(rest) => {
                let tail = rest.strip_prefix(key)?.strip_prefix('.')?;
                container.then_some(Hit::Below(Edit { rest: Rest::Dotted(tail), ..*self }))
            }
            Rest::Spelt(parts) => {
                let (first, tail) = parts.split_first()?;
                let same = match first {
                    Part::Name(name) => *name == key,
                    Part::Index(index) => key.parse() == Ok(*index),
                };
                match (same, tail.is_empty()) {
                    (false, _) => None,
                    (true, true) => Some(Hit::Here(self.action)),
                    (true, false) => container.then_some(Hit::Below(Edit { rest: Rest::Spelt(tail), ..*self })),
                }
            }
        }
    }

    /// The name of a field this edit adds to an object that does not have it.
    fn new_name(&self) -> Option<&'e str> {
        match self.rest {
            Rest::Dotted(rest) => (!rest.contains('.')).then_some(rest),
            Rest::Spelt([Part::Name(name)]) => Some(name),
            Rest::Spelt(_) => None,
        }
    }

    /// The index of an element this edit adds to an array.
    fn new_index(&self) -> Option<usize> {
        match self.rest {
            Rest::Dotted(rest) => rest.parse().ok(),
            Rest::Spelt([Part::Index(index)]) => Some(*index),
            Rest::Spelt([Part::Name(name)]) => name.parse().ok(),
            Rest::Spelt(_) => None,
        }
    }
}

/// What all edits together do to one element.
#[derive(Default)]
struct Verdict<'e> {
    here: Option<Action<'e>>,
    truncate: Option<usize>,
    below: Vec<Edit<'e>>,
}

fn verdict<'e>(element: &Element<'_>, edits: &[Edit<'e>], used: &mut [u8]) -> Result<Verdict<'e>, DeltaError> {
    let container = element.is_container();
    let mut verdict = Verdict::default();
    for (edit, used) in edits.iter().zip(used) {
        let Some(hit) = edit.hit(element.key, container) else { continue };
        // A second element that fits the same path: both readings are possible.
        if *used > 0 {
            return Err(edit.ambiguous());
        }
        *used += 1;
        match hit {
            Hit::Here(Action::Truncate(size)) => verdict.truncate = Some(size),
            Hit::Here(action) => verdict.here = Some(action),
            Hit::Below(edit) => verdict.below.push(edit),
        }
    }
    Ok(verdict)
}

fn write_element(element: &Element<'_>, verdict: Verdict<'_>, out: &mut Writer) -> Result<(), DeltaError> {
    match verdict.here {
        Some(Action::Set(value)) => out.copy_as(element.key, value),
        Some(Action::Unset | Action::Truncate(_)) => {}
        None if verdict.below.is_empty() && verdict.truncate.is_none() => out.copy(element),
        None => {
            let inner = element.document().ok_or(DeltaError::Shape("a path leads into a scalar"))?;
            if verdict.truncate.is_some() && !element.is_array() {
                return Err(DeltaError::Shape("what is to be truncated is not an array"));
            }
            if element.is_array() {
                out.begin_array(element.key);
                patch_array(inner, verdict.truncate, &verdict.below, out)?;
            } else {
                out.begin_document(element.key);
                patch_document(inner, &verdict.below, out)?;
            }
            out.end();
        }
    }
    Ok(())
}

fn patch_document(document: &RawDocument, edits: &[Edit<'_>], out: &mut Writer) -> Result<(), DeltaError> {
    let mut used = vec![0u8; edits.len()];
    for element in elements(document) {
        let element = element?;
        let verdict = verdict(&element, edits, &mut used)?;
        write_element(&element, verdict, out)?;
    }
    for (edit, used) in edits.iter().zip(used) {
        if used > 0 {
            continue;
        }
        match (edit.action, edit.new_name()) {
            (Action::Set(value), Some(name)) => out.copy_as(name, value),
            _ => return Err(edit.unresolved()),
        }
    }
    Ok(())
}

fn patch_array(
    array: &RawDocument,
    truncate: Option<usize>,
    edits: &[Edit<'_>],
    out: &mut Writer,
) -> Result<(), DeltaError> {
    let keep = truncate.unwrap_or(usize::MAX);
    let mut used = vec![0u8; edits.len()];
    let mut length = 0;
    for element in elements(array).take(keep) {
        let element = element?;
        let verdict = verdict(&element, edits, &mut used)?;
        if matches!(verdict.here, Some(Action::Unset)) {
            // Unsetting an array element leaves null behind.
            out.null_item(length);
        } else {
            write_element(&element, verdict, out)?;
        }
        length += 1;
    }
    for (edit, used) in edits.iter().zip(used) {
        if used > 0 {
            continue;
        }
        let (Action::Set(value), Some(index)) = (edit.action, edit.new_index()) else { return Err(edit.missing()) };
        if index < length {
            return Err(edit.missing());
        }
        while length < index {
            out.null_item(length);
            length += 1;
        }
        out.copy_item(length, value);
        length += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bson::{RawDocumentBuf, doc};

    use super::*;

    fn raw(document: bson::Document) -> RawDocumentBuf {
        RawDocumentBuf::try_from(&document).expect("encode")
    }

    fn applied(before: bson::Document, delta: bson::Document) -> Result<bson::Document, DeltaError> {
        let (before, delta) = (raw(before), raw(delta));
        let after = Delta::parse(&delta)?.apply(&before)?;
        Ok(bson::Document::try_from(&*after).expect("valid"))
    }

    #[test]
    fn nested_sets_unsets_and_new_fields_keep_order() {
        let after = applied(
            doc! {"_id": 1, "a": {"x": 1, "y": 2}, "b": 3},
            doc! {"updatedFields": {"a.y": 9, "z": 1, "b2": 2, "aa": 3}, "removedFields": ["a.x"]},
        );
        let after = after.expect("applies");
        assert_eq!(after, doc! {"_id": 1, "a": {"y": 9}, "b": 3, "z": 1, "b2": 2, "aa": 3});
        assert_eq!(after.keys().collect::<Vec<_>>(), ["_id", "a", "b", "z", "b2", "aa"]);
    }

    #[test]
    fn truncation_and_sets_of_one_array_together() {
        let after = applied(
            doc! {"a": [1, {"b": [5, 6, 7]}, 3, 4]},
            doc! {"truncatedArrays": [{"field": "a", "newSize": 2}, {"field": "a.1.b", "newSize": 1}],
            "updatedFields": {"a.0": 9, "a.1.b.0": 8}, "removedFields": []},
        );
        assert_eq!(after.expect("applies"), doc! {"a": [9, {"b": [8]}]});
    }

    #[test]
    fn numbers_are_names_in_objects_and_indexes_in_arrays() {
        let delta = doc! {"updatedFields": {"a.0": 5, "b.0": 6, "b.3": 7, "a.00": 8}};
        let after = applied(doc! {"a": {"0": 1}, "b": [1]}, delta).expect("applies");
        assert_eq!(after, doc! {"a": {"0": 5, "00": 8}, "b": [6, bson::Bson::Null, bson::Bson::Null, 7]});
    }

    #[test]
    fn literal_dots_dollars_and_empty_names() {
        let before = doc! {"_id": 2, "a.b": 1, "$c": 2, "": 3};
        let after = applied(before, doc! {"updatedFields": {"a.b": 7, "$c": 8, "": 9}}).expect("applies");
        assert_eq!(after, doc! {"_id": 2, "a.b": 7, "$c": 8, "": 9});
    }

    #[test]
    fn a_path_through_what_is_not_there_is_never_written_as_a_name_with_dots() {
        let delta = doc! {"updatedFields": {"a.b.c": 1}};
        for before in [doc! {"a": 5}, doc! {"a": {}}, doc! {}] {
            assert!(matches!(applied(before, delta.clone()), Err(DeltaError::Ambiguous(_))));
        }
        let spelt = doc! {"updatedFields": {"x.y": 1}, "disambiguatedPaths": {"x.y": ["x.y"]}};
        assert_eq!(applied(doc! {}, spelt).expect("applies"), doc! {"x.y": 1});
    }

    #[test]
    fn what_fits_nothing_is_missing() {
        let unset = doc! {"removedFields": ["a.b"]};
        assert_eq!(applied(doc! {"a": 5}, unset), Err(DeltaError::Missing("a.b".into())));
        let into_array = doc! {"updatedFields": {"a.0.b": 1}};
        assert!(matches!(applied(doc! {"a": [5]}, into_array), Err(DeltaError::Missing(_))));
        let shorter = doc! {"truncatedArrays": [{"field": "a", "newSize": 1}]};
        for before in [doc! {"a": {"x": 1}}, doc! {"a": 5}] {
            assert!(applied(before, shorter.clone()).is_err_and(|e| !matches!(e, DeltaError::Ambiguous(_))));
        }
    }

    #[test]
    fn a_path_with_two_readings_is_ambiguous_until_the_server_spells_it_out() {
        let before = doc! {"a": {"b": 1}, "a.b": 2};
        let delta = doc! {"updatedFields": {"a.b": 5}};
        assert_eq!(applied(before.clone(), delta), Err(DeltaError::Ambiguous("a.b".into())));
        let spelt = doc! {"updatedFields": {"a.b": 5}, "disambiguatedPaths": {"a.b": ["a.b"]}};
        assert_eq!(applied(before, spelt).expect("applies"), doc! {"a": {"b": 1}, "a.b": 5});
    }

    #[test]
    fn an_unknown_field_stops_with_a_hint() {
        let error = applied(doc! {}, doc! {"farFuture": 1}).expect_err("unknown");
        assert!(error.to_string().contains("upgrade this agent"), "{error}");
    }

    #[test]
    fn unsorted_names_become_a_pipeline_that_keeps_their_order() {
        let delta = raw(doc! {"updatedFields": {"z": 1, "b": 2}, "removedFields": ["q"]});
        let delta = Delta::parse(&delta).expect("parse");
        assert!(matches!(delta.plain_update(), PlainUpdate::Pipeline(_)));
        let delta = raw(doc! {"updatedFields": {"b": 1, "z": 2}, "removedFields": ["q"]});
        let delta = Delta::parse(&delta).expect("parse");
        let PlainUpdate::Operators(update) = delta.plain_update() else { panic!("operators") };
        let update = bson::Document::try_from(&*update).expect("valid");
        assert_eq!(update, doc! {"$unset": {"q": 1}, "$set": {"b": 1, "z": 2}});
    }
}
