//! Finds the documents that hold a value another document needs.

use std::collections::BTreeSet;

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{Document, doc};
use futures::StreamExt as _;
use mongodb::options::Collation;

use super::catalog::Entry;
use super::diff::Diff;
use super::lanes::Item;
use super::mongo::MongoTarget;
use super::target::TargetError;
use crate::model::{Change, CollectionUuid, hash, raw};
use crate::mongo::Failure;

impl MongoTarget {
    /// The documents that hold these values of a unique index. Of values under a collation the server tells only their sort
    /// keys, so the values of the changes themselves are looked for.
    pub(super) async fn holders(
        &self,
        entry: &Entry,
        collection: CollectionUuid,
        fields: &RawDocument,
        items: &[Item],
    ) -> Result<Vec<(u128, RawDocumentBuf)>, TargetError> {
        const DOING: &str = "find a blocking document";
        let documents = self.client.database(&entry.db).collection::<RawDocumentBuf>(&entry.coll);
        let told = Document::try_from(fields).map_err(|e| Failure::of("read a duplicate key")(e.into()))?;
        let collation = self.collation_of(entry, &told).await?;
        let (filters, own): (Vec<Document>, BTreeSet<u128>) = match &collation {
            None => (vec![told], BTreeSet::new()),
            Some(_) => {
                let items = items.iter().filter(|item| item.collection == collection);
                items.filter_map(|item| Some((values_of(item, &told)?, item.key))).unzip()
            }
        };
        let mut found = Vec::new();
        if filters.is_empty() {
            return Ok(found);
        }
        let mut find = documents.find(doc! {"$or": filters}).projection(doc! {"_id": 1});
        if let Some(collation) = collation {
            find = find.collation(collation);
        }
        let mut cursor = find.await.map_err(Failure::of(DOING))?;
        while let Some(document) = cursor.next().await.transpose().map_err(Failure::of(DOING))? {
            let identity = raw::get(&document, "_id").map(|id| hash::key_identity(&id));
            if let Some(identity) = identity.filter(|identity| !own.contains(identity)) {
                found.push((identity, document));
            }
        }
        Ok(found)
    }

    /// The collation of the unique index on the fields of `told`, if it has one.
    async fn collation_of(&self, entry: &Entry, told: &Document) -> Result<Option<Collation>, TargetError> {
        let doing = || Failure::of("list the indexes");
        let mut cursor =
            self.client.database(&entry.db).collection::<Document>(&entry.coll).list_indexes().await.map_err(doing())?;
        while let Some(index) = cursor.next().await.transpose().map_err(doing())? {
            let Some(options) = index.options.filter(|options| options.unique == Some(true)) else { continue };
            if options.collation.is_some() && index.keys.keys().eq(told.keys()) {
                return Ok(options.collation);
            }
        }
        Ok(None)
    }
}

/// What a change gives the fields of `told`, as far as it says.
fn values_of(item: &Item, told: &Document) -> Option<Document> {
    let event = RawDocument::from_bytes(&item.bytes).ok()?;
    let change = Change::parse(item.position, event).ok()?;
    let updated = change.update.and_then(|diff| Diff::parse(diff).ok());
    let value = |path: &str| match change.full_document {
        Some(document) => raw::get_path(document, path),
        None => updated.as_ref()?.value(path),
    };
    let values: Document = told.keys().filter_map(|path| Some((path.clone(), value(path)?.to_bson()?))).collect();
    (!values.is_empty()).then_some(values)
}
