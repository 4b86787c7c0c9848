//! The role of the agent's user: what the agent needs of MongoDB, and no more.

use bson::{Document, doc};

/// Actions of applying changes, of capture and of verification, on every user collection. (To create a capped one the
/// server also asks for `convertToCapped`.)
const ON_DATA: &[&str] = &[
    "bypassDocumentValidation",
    "changeStream",
    "collMod",
    "collStats",
    "createCollection",
    "createIndex",
    "dbStats",
    "dropCollection",
    "dropDatabase",
    "dropIndex",
    "find",
    "insert",
    "listCollections",
    "listIndexes",
    "remove",
    "renameCollectionSameDB",
    "update",
];

/// Actions on the cluster.
const ON_CLUSTER: &[&str] = &[
    "appendOplogNote",
    "bypassWriteBlockingMode",
    "getParameter",
    "killAnySession",
    "listDatabases",
    "replSetGetConfig",
    "replSetGetStatus",
    "serverStatus",
    "setUserWriteBlockMode",
];

/// The `createRole` command, for the database `admin`.
pub fn farshore_role() -> Document {
    doc! {
        "createRole": "farshore",
        "privileges": [
            // Every collection of every database but `local` and `config`, system collections left out.
            { "resource": { "db": "", "collection": "" }, "actions": ON_DATA },
            // Definitions of views, and stored functions, are documents in collections of their own.
            { "resource": { "db": "", "collection": "system.views" }, "actions": ["find"] },
            { "resource": { "db": "", "collection": "system.js" }, "actions": ["find", "insert", "update", "remove"] },
            { "resource": { "db": "local", "collection": "oplog.rs" }, "actions": ["find", "collStats"] },
            { "resource": { "db": "local", "collection": "system.replset" }, "actions": ["find"] },
            { "resource": { "cluster": true }, "actions": ON_CLUSTER },
        ],
        "roles": [{ "role": "readWrite", "db": "farshore" }],
    }
}
