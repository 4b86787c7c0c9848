//! The identity of the source's history.
//!
//! The incarnation is kept in the source's own MongoDB, so every agent of the site finds the same one. It changes only
//! when history was rewound (a restored backup); a role change is an epoch, not an incarnation.

use bson::{Binary, doc, oid::ObjectId, spec::BinarySubtype};
use mongodb::Client;

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
    renew(client, current_set).await
}

/// Declares a new history: what was captured before is no longer comparable.
///
/// # Errors
/// MongoDB is unreachable or refuses.
pub async fn renew(client: &Client, replica_set_id: Option<ObjectId>) -> Result<Origin, Failure> {
    let incarnation = Incarnation::random();
    let set = doc! {"incarnation": Binary { subtype: BinarySubtype::Generic, bytes: incarnation.0.to_vec() }, "replicaSetId": replica_set_id};
    let statement = doc! {"q": {"_id": ID}, "u": {"$set": set}, "upsert": true};
    mongo::run_majority(
        client,
        "farshore",
        doc! {"update": "site", "updates": [statement]},
        "record the source's origin",
    )
    .await?;
    // Two agents may have raced: the stored record decides.
    Ok(load(client).await?.unwrap_or(Origin { incarnation, replica_set_id }))
}

async fn load(client: &Client) -> Result<Option<Origin>, Failure> {
    let found = client.database("farshore").collection::<bson::Document>("site");
    let found = found
        .find_one(doc! {"_id": ID})
        .read_concern(mongodb::options::ReadConcern::majority())
        .await
        .map_err(Failure::of("read the source's origin"))?;
    Ok(found.and_then(|record| {
        let incarnation = Incarnation::from_slice(record.get_binary_generic("incarnation").ok()?)?;
        Some(Origin { incarnation, replica_set_id: record.get_object_id("replicaSetId").ok() })
    }))
}

async fn replica_set_id(client: &Client) -> Result<Option<ObjectId>, Failure> {
    let configuration = client.database("local").collection::<bson::Document>("system.replset");
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
    let site = client.database("farshore").collection::<bson::Document>("site");
    let id = Binary { subtype: BinarySubtype::Generic, bytes: incarnation.0.to_vec() };
    let own = doc! {"_id": BEGINNING, "incarnation": id.clone()};
    let majority = mongodb::options::ReadConcern::majority();
    let found = site.find_one(own).read_concern(majority).await.map_err(Failure::of("read the stream's beginning"))?;
    if let Some(found) = found
        && let Ok(at) = found.get_timestamp("at")
    {
        let names = found.get_array("collections").into_iter().flatten().filter_map(|n| Some(n.as_str()?.to_owned()));
        return Ok(Beginning { at: mongo::cluster_time(at), collections: names.collect() });
    }
    let mark = doc! {"q": {"_id": "look"}, "u": {"$set": {"at": bson::DateTime::now()}}, "upsert": true};
    let command = doc! {"update": "site", "updates": [mark]};
    let reply = mongo::run_majority(client, "farshore", command, "write the stream's beginning").await?;
    let at = reply.get_timestamp("operationTime").map(mongo::cluster_time).unwrap_or_default();
    let collections = collection_names(client).await?;
    let set = doc! {"incarnation": id, "at": mongo::timestamp(at), "collections": &collections};
    let keep = doc! {"q": {"_id": BEGINNING}, "u": {"$set": set}, "upsert": true};
    let command = doc! {"update": "site", "updates": [keep]};
    mongo::run_majority(client, "farshore", command, "keep the stream's beginning").await?;
    Ok(Beginning { at, collections })
}

async fn collection_names(client: &Client) -> Result<Vec<String>, Failure> {
    let collections = mongo::user_collections(client).await?;
    Ok(collections.iter().map(|(db, entry)| format!("{db}.{}", entry.get_str("name").unwrap_or("?"))).collect())
}
