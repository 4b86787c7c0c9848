//! One change, as a view over the raw bytes MongoDB sent.
//!
//! Parsing is one pass over the top-level elements; values stay where they are. A field this version does not know is an
//! error where ignoring it could change a document (see [`Change::parse`]).

use bson::raw::{RawBsonRef, RawDocument};

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

    /// Whether the change concerns documents rather than the catalog.
    pub fn is_crud(self) -> bool {
        matches!(self, Self::Insert | Self::Update | Self::Replace | Self::Delete)
    }
}

/// Why bytes are not a change.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Not BSON.
    #[error("change at {position}: invalid bson: {source}")]
    Bson { position: Position, source: bson::error::Error },
    /// A field is missing or of another type.
    #[error("change at {position}: field '{field}' is missing or has an unexpected type")]
    Field { position: Position, field: &'static str },
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
    /// The delta of an update.
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
        let bson = |source| ParseError::Bson { position, source };
        let field = |field| ParseError::Field { position, field };
        for element in raw.iter_elements() {
            let element = element.map_err(bson)?;
            let key = element.key().as_str();
            let value = || RawBsonRef::try_from(element).map_err(bson);
            match key {
                "operationType" => change.op = Op::parse(value()?.as_str().ok_or(field("operationType"))?),
                "ns" => change.ns = namespace(value()?).ok_or(field("ns"))?,
                "to" => change.to = Some(namespace(value()?).ok_or(field("to"))?),
                "collectionUUID" => {
                    let bytes = value()?.as_binary().map(|b| b.bytes);
                    change.uuid = Some(bytes.and_then(CollectionUuid::from_slice).ok_or(field("collectionUUID"))?);
                }
                "documentKey" => change.document_key = Some(value()?.as_document().ok_or(field("documentKey"))?),
                "fullDocument" => change.full_document = value()?.as_document(),
                "updateDescription" => change.update = value()?.as_document(),
                "operationDescription" => change.description = value()?.as_document(),
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
            need(self.document_key.is_some_and(|key| matches!(key.get("_id"), Ok(Some(_)))), "documentKey")?;
            need(self.uuid.is_some(), "collectionUUID")?;
        }
        if !self.trimmed {
            match self.op {
                Op::Insert | Op::Replace => need(self.full_document.is_some(), "fullDocument")?,
                Op::Update => need(self.update.is_some(), "updateDescription")?,
                _ => {}
            }
        }
        match self.op {
            Op::Rename => need(self.to.is_some(), "to"),
            Op::CreateIndexes | Op::DropIndexes | Op::Modify => need(self.description.is_some(), "operationDescription"),
            _ => Ok(()),
        }
    }

    /// The `_id` of the changed document.
    pub fn id(&self) -> Option<RawBsonRef<'a>> {
        self.document_key.and_then(|key| key.get("_id").ok().flatten())
    }

    /// Whether this is one of our marks (database `farshore`), which are never applied as data.
    pub fn is_mark(&self) -> bool {
        self.ns.db == "farshore"
    }
}

fn namespace(value: RawBsonRef<'_>) -> Option<Namespace<'_>> {
    let document = value.as_document()?;
    let db = document.get_str("db").ok()?;
    Some(Namespace { db, coll: document.get_str("coll").unwrap_or("") })
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
        assert_eq!(change.id(), Some(RawBsonRef::Int32(5)));
        assert!(!change.in_transaction && !change.is_mark());
    }

    #[test]
    fn a_change_without_what_its_kind_needs_is_refused() {
        let raw = rawdoc! {"operationType": "update", "ns": {"db": "a", "coll": "b"}, "documentKey": {"_id": 1}, "collectionUUID": uuid()};
        let error = Change::parse(Position::ZERO, &raw).expect_err("no delta");
        assert!(error.to_string().contains("updateDescription"), "{error}");
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
