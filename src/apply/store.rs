//! The documents apply keeps in the target's database `farshore`, and their format.
//!
//! | collection | `_id` | contents |
//! |---|---|---|
//! | `streams` | `<source>/<target>` | record version, incarnation, term, floor, hash, sessions of the claimant |
//! | `lanes` | `<source>/<target>/<lane>` | term, position, parked collections, floors of fetched documents |
//! | `catalog` | `{stream, collection}` | name, UUID here, laning, position of the last DDL |
//!
//! Positions are `{time: Timestamp, ordinal: Long}`, so the server compares them in log order.

use std::collections::BTreeMap;

use bson::{Binary, Bson, Document, doc, spec::BinarySubtype};

use super::catalog::{Entry, Presence};
use super::lanes::{Floor, LaneState};
use super::target::StreamRecord;
use crate::model::{CollectionUuid, Incarnation, Position, StreamHash};
use crate::mongo;

/// Version of these documents; a newer one is refused.
pub const VERSION: i32 = 1;

/// Why a stored document cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StoreError {
    /// Written by a newer version.
    #[error("farshore.{collection} holds version {found}, this agent reads up to {VERSION}; upgrade this agent first")]
    Newer { collection: &'static str, found: i32 },
    /// A field is missing or of another type.
    #[error("farshore.{collection}: field '{field}' is missing or malformed")]
    Field { collection: &'static str, field: &'static str },
}

/// A position as stored.
pub fn position(position: Position) -> Bson {
    Bson::Document(mongo::position(position))
}

fn read_position(value: Option<&Bson>) -> Option<Position> {
    mongo::read_position(value?.as_document()?)
}

/// A collection UUID as stored.
pub fn uuid(uuid: CollectionUuid) -> Bson {
    Bson::Binary(Binary { subtype: BinarySubtype::Uuid, bytes: uuid.0.to_vec() })
}

fn read_uuid(value: Option<&Bson>) -> Option<CollectionUuid> {
    match value? {
        Bson::Binary(binary) => CollectionUuid::from_slice(&binary.bytes),
        _ => None,
    }
}

fn generic(bytes: &[u8]) -> Bson {
    Bson::Binary(Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() })
}

fn version(collection: &'static str, document: &Document) -> Result<(), StoreError> {
    match document.get_i32("version").unwrap_or(VERSION) {
        found if found > VERSION => Err(StoreError::Newer { collection, found }),
        _ => Ok(()),
    }
}

/// The fields of a lane that a transaction sets; parked and floors only where they change.
pub fn lane_fields(from: &LaneState, to: &LaneState) -> Document {
    let mut fields = doc! {"position": position(to.position)};
    if from.parked != to.parked {
        let parked = to.parked.iter().map(|(c, p)| doc! {"collection": uuid(*c), "position": position(*p)});
        fields.insert("parked", parked.collect::<Vec<_>>());
    }
    if from.floors != to.floors {
        let floor = |f: &Floor| {
            doc! {"collection": uuid(f.collection), "key": generic(&f.key.to_be_bytes()), "at": mongo::timestamp(f.at)}
        };
        fields.insert("floors", to.floors.iter().map(floor).collect::<Vec<_>>());
    }
    fields
}

/// Reads a lane.
///
/// # Errors
/// The document is malformed or newer.
pub fn read_lane(document: &Document) -> Result<LaneState, StoreError> {
    version("lanes", document)?;
    let bad = |field| StoreError::Field { collection: "lanes", field };
    let mut lane = LaneState {
        position: read_position(document.get("position")).ok_or(bad("position"))?,
        parked: BTreeMap::new(),
        floors: Vec::new(),
    };
    for parked in document.get_array("parked").into_iter().flatten() {
        let parked = parked.as_document().ok_or(bad("parked"))?;
        let uuid = read_uuid(parked.get("collection")).ok_or(bad("parked"))?;
        lane.parked.insert(uuid, read_position(parked.get("position")).ok_or(bad("parked"))?);
    }
    for floor in document.get_array("floors").into_iter().flatten() {
        lane.floors.push(floor.as_document().and_then(read_floor).ok_or(bad("floors"))?);
    }
    Ok(lane)
}

fn read_floor(document: &Document) -> Option<Floor> {
    let key = document.get_binary_generic("key").ok()?.as_slice().try_into().ok()?;
    Some(Floor {
        collection: read_uuid(document.get("collection"))?,
        key: u128::from_be_bytes(key),
        at: mongo::cluster_time(document.get_timestamp("at").ok()?),
    })
}

/// The fields of a stream that do not depend on who holds it.
pub fn stream_fields(record: &StreamRecord) -> Document {
    doc! {
        "version": VERSION,
        "incarnation": generic(&record.incarnation.0),
        "floor": position(record.floor),
        "hash": record.hash.0 as i64,
        "adopted": record.adopted,
    }
}

/// Reads a stream.
///
/// # Errors
/// The document is malformed or newer.
pub fn read_stream(document: &Document) -> Result<StreamRecord, StoreError> {
    version("streams", document)?;
    let bad = |field| StoreError::Field { collection: "streams", field };
    let incarnation = document.get_binary_generic("incarnation").ok().and_then(|b| Incarnation::from_slice(b));
    Ok(StreamRecord {
        incarnation: incarnation.ok_or(bad("incarnation"))?,
        floor: read_position(document.get("floor")).ok_or(bad("floor"))?,
        hash: StreamHash(document.get_i64("hash").map_err(|_| bad("hash"))? as u64),
        adopted: document.get_bool("adopted").unwrap_or(false),
    })
}

/// A catalog entry as stored, without its `_id`.
pub fn entry_fields(entry: &Entry) -> Document {
    let mut fields = doc! {
        "version": VERSION,
        "db": &entry.db,
        "coll": &entry.coll,
        "oneLane": entry.one_lane,
        "collation": entry.collation,
        "ddlThrough": position(entry.ddl_through),
    };
    match &entry.presence {
        Presence::Present(target) => {
            fields.insert("state", "present");
            fields.insert("target", uuid(*target));
        }
        Presence::Dropped => {
            fields.insert("state", "dropped");
        }
        Presence::Refused(reason) => {
            fields.insert("state", "refused");
            fields.insert("reason", reason);
        }
    }
    fields
}

/// Reads a catalog entry; none for a mere intent.
///
/// # Errors
/// The document is malformed or newer.
pub fn read_entry(document: &Document) -> Result<Option<(CollectionUuid, Entry)>, StoreError> {
    version("catalog", document)?;
    let bad = |field| StoreError::Field { collection: "catalog", field };
    let Ok(state) = document.get_str("state") else { return Ok(None) };
    let source = document.get_document("_id").ok().and_then(|id| read_uuid(id.get("collection")));
    let presence = match state {
        "present" => Presence::Present(read_uuid(document.get("target")).ok_or(bad("target"))?),
        "dropped" => Presence::Dropped,
        "refused" => Presence::Refused(document.get_str("reason").unwrap_or("").to_owned()),
        _ => return Err(bad("state")),
    };
    let one_lane = document.get_bool("oneLane").unwrap_or(true);
    let entry = Entry {
        db: document.get_str("db").map_err(|_| bad("db"))?.to_owned(),
        coll: document.get_str("coll").map_err(|_| bad("coll"))?.to_owned(),
        presence,
        one_lane,
        collation: document.get_bool("collation").unwrap_or(one_lane),
        ddl_through: read_position(document.get("ddlThrough")).ok_or(bad("ddlThrough"))?,
    };
    Ok(Some((source.ok_or(bad("_id"))?, entry)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ClusterTime;

    fn at(n: u64) -> Position {
        Position::new(ClusterTime(n), 1)
    }

    #[test]
    fn lanes_round_trip() {
        let lane = LaneState {
            position: at(9),
            parked: BTreeMap::from([(CollectionUuid([1; 16]), at(5))]),
            floors: vec![Floor { collection: CollectionUuid([2; 16]), key: 7, at: ClusterTime(8) }],
        };
        let stored = lane_fields(&LaneState::default(), &lane);
        assert_eq!(read_lane(&stored).expect("read"), lane);
        assert_eq!(lane_fields(&lane, &lane).len(), 1, "only the position when nothing else changed");
    }

    #[test]
    fn streams_and_entries_round_trip() {
        let record = StreamRecord {
            incarnation: Incarnation([3; 16]),
            floor: at(4),
            hash: StreamHash(u64::MAX - 1),
            adopted: true,
        };
        assert_eq!(read_stream(&stream_fields(&record)).expect("read"), record);
        for presence in [Presence::Present(CollectionUuid([4; 16])), Presence::Dropped, Presence::Refused("why".into())]
        {
            let entry = Entry {
                db: "d".into(),
                coll: "c".into(),
                presence,
                one_lane: true,
                collation: true,
                ddl_through: at(3),
            };
            let mut stored = entry_fields(&entry);
            stored.insert("_id", doc! {"stream": "a/b", "collection": uuid(CollectionUuid([5; 16]))});
            assert_eq!(read_entry(&stored).expect("read"), Some((CollectionUuid([5; 16]), entry)));
        }
    }

    #[test]
    fn newer_documents_are_refused_with_a_hint() {
        let error = read_lane(&doc! {"version": VERSION + 1}).expect_err("newer");
        assert!(error.to_string().contains("upgrade this agent first"), "{error}");
    }

    /// The stored form is a contract with older and newer agents.
    #[test]
    fn the_stored_form_is_fixed() {
        let lane = LaneState { position: at(9), parked: BTreeMap::new(), floors: Vec::new() };
        let text = lane_fields(&LaneState::default(), &lane).to_string();
        assert_eq!(text, r#"{ "position": { "time": Timestamp(0, 9), "ordinal": 1 } }"#);
    }
}
