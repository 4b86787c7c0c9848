//! The identity of the source's history.
//!
//! The incarnation is kept in the source's own MongoDB, so every agent of the site finds the same one. It changes only
//! when history was rewound (a restored backup); a role change is an epoch, not an incarnation.

use bson::{Binary, Document, doc, oid::ObjectId, spec::BinarySubtype};
use mongodb::Client;
use mongodb::options::{Acknowledgment, ReturnDocument, WriteConcern};

use crate::model::{ClusterTime, Incarnation};
use crate::mongo::{self, Failure};

/// The source's history and what is known of its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Identity of the history.
    pub incarnation: Incarnation,
    /// Identity of the replica set the record was made in; a record found in another set was restored there.
    pub replica_set_id: Option<ObjectId>,
}

const ID: &str = "origin";

/// Reads the site's origin, or makes it.
///
/// # Errors
/// MongoDB is unreachable or refuses.
pub async fn load_or_create(client: &Client) -> Result<Origin, Failure> {
    let current_set = replica_set_id(client).await?;
    if let Some(origin) = load(client).await?
        && (origin.replica_set_id == current_set || current_set.is_none())
    {
        return Ok(origin);
    }
    let incarnation = Binary { subtype: BinarySubtype::Generic, bytes: Incarnation::random().0.to_vec() };
    let known = doc! {"$eq": [{"$type": "$incarnation"}, "binData"]};
    let holds = match current_set {
        Some(set) => doc! {"$and": [known, {"$eq": ["$replicaSetId", set]}]},
        None => known,
    };
    let fields = doc! {"incarnation": incarnation, "replicaSetId": current_set};
    let doing = "record the source's origin";
    let record = decide(client, ID, holds, fields, doing).await?;
    parse(&record).ok_or_else(|| Failure {
        doing,
        kind: mongo::Kind::Other,
        transaction_aborted: false,
        server_code: None,
        detail: "farshore.site holds a record of another form".into(),
    })
}

/// Keeps `fields` under `id` unless what is there `holds`, and returns what is there then. One update decides at the server,
/// so agents that come at the same time agree.
async fn decide(
    client: &Client,
    id: &str,
    holds: Document,
    fields: Document,
    doing: &'static str,
) -> Result<Document, Failure> {
    let choose = |(name, value): (String, bson::Bson)| {
        let kept = format!("${name}");
        (name, doc! {"$cond": [holds.clone(), kept, {"$literal": value}]}.into())
    };
    let set: Document = fields.into_iter().map(choose).collect();
    let site = client.database("farshore").collection::<Document>("site");
    let record = site
        .find_one_and_update(doc! {"_id": id}, vec![doc! {"$set": set}])
        .upsert(true)
        .return_document(ReturnDocument::After)
        .write_concern(WriteConcern::builder().w(Acknowledgment::Majority).journal(true).build())
        .await
        .map_err(Failure::of(doing))?;
    Ok(record.unwrap_or_default())
}

async fn load(client: &Client) -> Result<Option<Origin>, Failure> {
    let found = client.database("farshore").collection::<Document>("site");
    let found = found
        .find_one(doc! {"_id": ID})
        .read_concern(mongodb::options::ReadConcern::majority())
        .await
        .map_err(Failure::of("read the source's origin"))?;
    Ok(found.as_ref().and_then(parse))
}

fn parse(record: &Document) -> Option<Origin> {
    let incarnation = Incarnation::from_slice(record.get_binary_generic("incarnation").ok()?)?;
    Some(Origin { incarnation, replica_set_id: record.get_object_id("replicaSetId").ok() })
}

async fn replica_set_id(client: &Client) -> Result<Option<ObjectId>, Failure> {
    let configuration = client.database("local").collection::<Document>("system.replset");
    let found = configuration.find_one(doc! {}).await.map_err(Failure::of("read the replica set's identity"))?;
    Ok(found.and_then(|c| c.get_document("settings").ok()?.get_object_id("replicaSetId").ok()))
}

/// How the source was found when an agent first looked at it under this incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beginning {
    /// Nothing before this time matters to a stream that starts from nothing.
    pub at: ClusterTime,
    /// User collections that were there, as `db.collection`; empty when a stream may start from nothing.
    pub collections: Vec<String>,
}

const BEGINNING: &str = "beginning";

/// Reads how the source was found, or looks now and keeps it. The collections are listed after a majority-written time is
/// taken, so that nothing falls in between.
///
/// # Errors
/// MongoDB is unreachable or refuses.
pub async fn beginning(client: &Client, incarnation: Incarnation) -> Result<Beginning, Failure> {
    let site = client.database("farshore").collection::<Document>("site");
    let id = Binary { subtype: BinarySubtype::Generic, bytes: incarnation.0.to_vec() };
    let own = doc! {"_id": BEGINNING, "incarnation": id.clone()};
    let majority = mongodb::options::ReadConcern::majority();
    let found = site.find_one(own).read_concern(majority).await.map_err(Failure::of("read the stream's beginning"))?;
    if let Some(beginning) = found.as_ref().and_then(parse_beginning) {
        return Ok(beginning);
    }
    let mark = doc! {"q": {"_id": "look"}, "u": {"$set": {"at": bson::DateTime::now()}}, "upsert": true};
    let command = doc! {"update": "site", "updates": [mark]};
    let reply = mongo::write_majority(client, "farshore", command, "write the stream's beginning").await?;
    let at = reply.get_timestamp("operationTime").map(mongo::cluster_time).unwrap_or_default();
    let collections = collection_names(client).await?;
    let holds = doc! {"$eq": ["$incarnation", {"$literal": id.clone()}]};
    let fields = doc! {"incarnation": id, "at": mongo::timestamp(at), "collections": &collections};
    let kept = decide(client, BEGINNING, holds, fields, "keep the stream's beginning").await?;
    Ok(parse_beginning(&kept).unwrap_or(Beginning { at, collections }))
}

fn parse_beginning(record: &Document) -> Option<Beginning> {
    let at = mongo::cluster_time(record.get_timestamp("at").ok()?);
    let names = record.get_array("collections").into_iter().flatten().filter_map(|n| Some(n.as_str()?.to_owned()));
    Some(Beginning { at, collections: names.collect() })
}

async fn collection_names(client: &Client) -> Result<Vec<String>, Failure> {
    let collections = mongo::user_collections(client).await?;
    Ok(collections.iter().map(|(db, entry)| format!("{db}.{}", entry.get_str("name").unwrap_or("?"))).collect())
}
