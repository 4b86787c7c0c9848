//! Reads what exists in a cluster: collections with options, views, indexes, all normalised.
//!
//! Normalised means: without the collection's UUID, and with the top-level fields of a specification in
//! name order, because neither is chosen by the user. Everything else stays as raw bytes.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bson::raw::{RawArray, RawBsonRef, RawDocument, RawDocumentBuf};
use bson::rawdoc;
use futures::TryStreamExt;
use mongodb::{Client, Database};

use super::{Options, bytes};

/// All collections and views of a cluster, by database and name.
pub(super) struct Catalog {
    pub(super) collections: BTreeMap<(String, String), Collection>,
}

/// One collection, view or time-series collection.
pub(super) struct Collection {
    pub(super) database: String,
    pub(super) name: String,
    /// `collection`, `view` or `timeseries`.
    pub(super) kind: String,
    pub(super) capped: bool,
    /// The normalised listCollections entry.
    pub(super) metadata: RawDocumentBuf,
    /// Normalised specifications by index name.
    pub(super) indexes: BTreeMap<String, RawDocumentBuf>,
}

impl Collection {
    pub(super) fn namespace(&self) -> String {
        format!("{}.{}", self.database, self.name)
    }

    pub(super) fn has_documents(&self) -> bool {
        self.kind != "view"
    }

    pub(super) fn is_temporary(&self) -> bool {
        self.name.starts_with("tmp.agg_out.")
    }
}

impl Catalog {
    pub(super) async fn read(client: &Client, options: &Options) -> Result<Self> {
        let mut collections = BTreeMap::new();
        for database in client.list_database_names().await? {
            if !options.wants_database(&database) {
                continue;
            }
            let db = client.database(&database);
            for entry in documents(&db, rawdoc! { "listCollections": 1, "cursor": {} }).await? {
                let Some(mut collection) = parse(&database, &entry)? else {
                    continue;
                };
                if !options.wants_namespace(&collection.namespace()) {
                    continue;
                }
                if collection.has_documents() {
                    collection.indexes = indexes(&db, &collection.name).await?;
                }
                collections.insert((database.clone(), collection.name.clone()), collection);
            }
        }
        Ok(Self { collections })
    }

    pub(super) fn indexes(&self) -> u64 {
        self.collections.values().map(|collection| collection.indexes.len() as u64).sum()
    }
}

/// Server-kept collections are left out: buckets and views show up through what they serve.
fn parse(database: &str, entry: &RawDocument) -> Result<Option<Collection>> {
    let name = entry.get_str("name")?.to_owned();
    if name.starts_with("system.") && name != "system.js" {
        return Ok(None);
    }
    let options = entry.get_document("options").ok();
    let mut metadata = RawDocumentBuf::new();
    for (key, value) in entry.iter().flatten() {
        match (key.as_str(), value) {
            ("info", RawBsonRef::Document(info)) => {
                metadata.append(key, bytes::sorted(info, &["uuid"]));
            }
            ("options" | "idIndex", RawBsonRef::Document(fields)) => {
                metadata.append(key, bytes::sorted(fields, &[]));
            }
            (_, value) => metadata.append(key, value),
        }
    }
    Ok(Some(Collection {
        database: database.to_owned(),
        name,
        kind: entry.get_str("type")?.to_owned(),
        capped: options.is_some_and(|options| options.get_bool("capped").unwrap_or(false)),
        metadata,
        indexes: BTreeMap::new(),
    }))
}

async fn indexes(db: &Database, collection: &str) -> Result<BTreeMap<String, RawDocumentBuf>> {
    let specs = documents(db, rawdoc! { "listIndexes": collection, "cursor": {} })
        .await
        .with_context(|| format!("list the indexes of {}.{collection}", db.name()))?;
    specs.iter().map(|spec| Ok((spec.get_str("name")?.to_owned(), bytes::sorted(spec, &[])))).collect()
}

async fn documents(db: &Database, command: RawDocumentBuf) -> Result<Vec<RawDocumentBuf>> {
    let mut cursor = db.run_raw_cursor_command(command).batch().await?;
    let mut found = Vec::new();
    while let Some(batch) = cursor.try_next().await? {
        collect(batch.doc_slices()?, &mut found)?;
    }
    Ok(found)
}

/// Copies the documents of one reply.
pub(super) fn collect(slices: &RawArray, into: &mut impl Extend<RawDocumentBuf>) -> Result<()> {
    for value in slices {
        if let RawBsonRef::Document(document) = value? {
            into.extend([document.to_owned()]);
        }
    }
    Ok(())
}
