//! One change, as a view over the raw bytes MongoDB sent.
//!
//! Parsing is one pass over the top-level elements; values stay where they are. A field this version does not know is an
//! error where ignoring it could change a document (see [`Change::parse`]).

use bson::raw::RawDocument;

use super::raw::{self, Element};
use super::{CollectionUuid, Position};

/// A collection or view by name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace<'a> {
    /// Database.
    pub db: &'a str,
    /// Collection; empty for a change of the whole database.
    pub coll: &'a str,
}

impl std::fmt::Display for Namespace<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.coll.is_empty() { f.write_str(self.db) } else { write!(f, "{}.{}", self.db, self.coll) }
    }
}

impl std::fmt::Debug for Namespace<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// What a change does. Names are MongoDB's `operationType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    Insert,
    Update,
    Replace,
    Delete,
    Create,
    CreateIndexes,
    DropIndexes,
    Modify,
    Rename,
    Drop,
    DropDatabase,
    /// The change stream itself ends here; nothing happened to data.
    Invalidate,
    /// Sharding commands; a replica set never emits them.
    Unsupported,
}

impl Op {
    fn parse(name: &str) -> Self {
        match name {
            "insert" => Self::Insert,
            "update" => Self::Update,
            "replace" => Self::Replace,
            "delete" => Self::Delete,
            "create" => Self::Create,
            "createIndexes" => Self::CreateIndexes,
            "dropIndexes" => Self::DropIndexes,
            "modify" => Self::Modify,
            "rename" => Self::Rename,
            "drop" => Self::Drop,
            "dropDatabase" => Self::DropDatabase,
            "invalidate" => Self::Invalidate,
            _ => Self::Unsupported,
        }
    }

    /// What a change event does, without reading the rest of it.
    pub fn of(event: &RawDocument) -> Self {
        raw::get(event, "operationType").and_then(|name| name.str()).map_or(Self::Unsupported, Self::parse)
    }

    /// Whether the change concerns documents rather than the catalog.
    pub fn is_crud(self) -> bool {
        matches!(self, Self::Insert | Self::Update | Self::Replace | Self::Delete)
    }
}

/// Why bytes are not a change.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Not BSON.
    #[error("change at {position}: invalid bson")]
    Bson { position: Position },
    /// A field is missing or of another type.
    #[error("change at {position}: field '{field}' is missing or has an unexpected type")]
    Field { position: Position, field: &'static str },
    /// An update is described in a way that this version does not know.
    #[error(
        "change at {position}: the update is not a diff of version 2; upgrade this agent before the source's MongoDB"
    )]
    Diff { position: Position },
}

/// A view of one change.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Its place in the source's history.
    pub position: Position,
    /// What it does.
    pub op: Op,
    /// Where; the database only for `dropDatabase`.
    pub ns: Namespace<'a>,
    /// The source's UUID of the collection; absent for views and databases.
    pub uuid: Option<CollectionUuid>,
    /// `{_id: ...}` of the document.
    pub document_key: Option<&'a RawDocument>,
    /// The document of an insert or replace.
    pub full_document: Option<&'a RawDocument>,
    /// The diff of an update, as the oplog has it.
    pub update: Option<&'a RawDocument>,
    /// Details of a catalog change.
    pub description: Option<&'a RawDocument>,
    /// New name of a renamed collection.
    pub to: Option<Namespace<'a>>,
    /// Part of a source transaction.
    pub in_transaction: bool,
    /// Documents were left out because the event was too large; they must be fetched again.
    pub trimmed: bool,
    /// All bytes, as stored and shipped.
    pub raw: &'a RawDocument,
}

/// Name of the field that marks an event captured without its documents.
pub const TRIMMED: &str = "farshoreTrimmed";

impl<'a> Change<'a> {
    /// Reads the view.
    ///
    /// # Errors
    /// The bytes are not a change event, or lack a field its kind must have.
    pub fn parse(position: Position, raw: &'a RawDocument) -> Result<Self, ParseError> {
        let mut change = Self {
            position,
            op: Op::Unsupported,
            ns: Namespace { db: "", coll: "" },
            uuid: None,
            document_key: None,
            full_document: None,
            update: None,
            description: None,
            to: None,
            in_transaction: false,
            trimmed: false,
            raw,
        };
        let field = |field| ParseError::Field { position, field };
        for element in raw::elements(raw) {
            let element = element.map_err(|_| ParseError::Bson { position })?;
            match element.key {
                "operationType" => change.op = Op::parse(element.str().ok_or(field("operationType"))?),
                "ns" => change.ns = namespace(&element).ok_or(field("ns"))?,
                "to" => change.to = Some(namespace(&element).ok_or(field("to"))?),
                "collectionUUID" => {
                    let uuid = element.binary().and_then(CollectionUuid::from_slice);
                    change.uuid = Some(uuid.ok_or(field("collectionUUID"))?);
                }
                "documentKey" => change.document_key = Some(element.document().ok_or(field("documentKey"))?),
                "fullDocument" => change.full_document = element.document(),
                "rawUpdateDescription" => change.update = Some(diff(&element).ok_or(ParseError::Diff { position })?),
                "operationDescription" => change.description = element.document(),
                "txnNumber" => change.in_transaction = true,
                TRIMMED => change.trimmed = true,
                _ => {}
            }
        }
        change.check()
    }

    fn check(self) -> Result<Self, ParseError> {
        let need = |there: bool, field| match there {
            true => Ok(()),
            false => Err(ParseError::Field { position: self.position, field }),
        };
        need(self.op == Op::Invalidate || self.op == Op::Unsupported || !self.ns.db.is_empty(), "ns")?;
        if self.op.is_crud() {
            need(self.id().is_some(), "documentKey")?;
            need(self.uuid.is_some(), "collectionUUID")?;
        }
        if !self.trimmed {
            match self.op {
                Op::Insert | Op::Replace => need(self.full_document.is_some(), "fullDocument")?,
                Op::Update => need(self.update.is_some(), "rawUpdateDescription")?,
                _ => {}
            }
        }
        match self.op {
            Op::Rename => need(self.to.is_some(), "to")?,
            Op::CreateIndexes | Op::DropIndexes | Op::Modify => {
                need(self.description.is_some(), "operationDescription")?
            }
            _ => {}
        }
        Ok(self)
    }

    /// The `_id` of the changed document.
    pub fn id(&self) -> Option<Element<'a>> {
        self.document_key.and_then(|key| raw::get(key, "_id"))
    }

    /// Whether this is one of our marks (database `farshore`), which are never applied as data.
    pub fn is_mark(&self) -> bool {
        self.ns.db == MARKS
    }
}

/// [`Change::is_mark`] of an event, without reading the rest of it.
pub fn is_mark(event: &RawDocument) -> bool {
    let namespace = raw::get(event, "ns").and_then(|ns| ns.document());
    namespace.and_then(|ns| raw::get(ns, "db")).and_then(|db| db.str()) == Some(MARKS)
}

/// The database whose changes are Farshore's own.
const MARKS: &str = "farshore";

/// The diff in a raw description of an update.
fn diff<'a>(description: &Element<'a>) -> Option<&'a RawDocument> {
    let description = description.document()?;
    let (mut version, mut diff) = (None, None);
    for field in raw::elements(description) {
        let field = field.ok()?;
        match field.key {
            "$v" => version = field.integer(),
            "diff" => diff = field.document(),
            _ => return None,
        }
    }
    diff.filter(|_| version == Some(2))
}

fn namespace<'a>(element: &Element<'a>) -> Option<Namespace<'a>> {
    let document = element.document()?;
    let coll = raw::get(document, "coll").and_then(|c| c.str());
    Some(Namespace { db: raw::get(document, "db")?.str()?, coll: coll.unwrap_or("") })
}

#[cfg(test)]
mod tests {
    use bson::{Binary, rawdoc, spec::BinarySubtype};

    use super::*;

    fn uuid() -> Binary {
        Binary { subtype: BinarySubtype::Uuid, bytes: vec![3; 16] }
    }

    #[test]
    fn an_insert_is_read_in_place() {
        let raw = rawdoc! {
            "operationType": "insert", "collectionUUID": uuid(), "fullDocument": {"_id": 5, "x": 1},
            "ns": {"db": "shop", "coll": "items"}, "documentKey": {"_id": 5},
        };
        let change = Change::parse(Position::ZERO, &raw).expect("valid");
        assert_eq!((change.op, change.ns.db, change.ns.coll), (Op::Insert, "shop", "items"));
        assert_eq!(change.id().and_then(|id| id.integer()), Some(5));
        assert!(!change.in_transaction && !change.is_mark());
    }

    #[test]
    fn a_change_without_what_its_kind_needs_is_refused() {
        let raw = rawdoc! {"operationType": "update", "ns": {"db": "a", "coll": "b"}, "documentKey": {"_id": 1}, "collectionUUID": uuid()};
        let error = Change::parse(Position::ZERO, &raw).expect_err("no diff");
        assert!(error.to_string().contains("rawUpdateDescription"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            if let Ok(raw) = RawDocument::from_bytes(&bytes) {
                drop(Change::parse(Position::ZERO, raw));
            }
        }
    }
}
