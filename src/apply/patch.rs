//! Applies diffs that need their documents: reads those within the transaction, changes their bytes, writes them back.

use std::collections::HashMap;

use bson::raw::RawDocumentBuf;
use futures::StreamExt as _;
use mongodb::ClientSession;

use super::catalog::Entry;
use super::diff::Diff;
use super::mongo::{MongoTarget, find_command};
use super::plan::{self, Patch};
use super::target::{Cause, CommitError, Divergence, TargetError};
use crate::model::{CollectionUuid, hash, raw};
use crate::mongo::Failure;

/// So many documents are read before their size is known.
const FIRST: usize = 8;
/// Bytes of documents to be read at once, judged by those before; as many again hold what becomes of them.
const READ_BYTES: usize = 4 << 20;

impl MongoTarget {
    /// Applies the diffs of one collection. A document that occurs several times is written once, as the last one leaves it.
    pub(super) async fn run_patch(
        &self,
        session: &mut ClientSession,
        entry: &Entry,
        collection: CollectionUuid,
        changes: &[Patch],
    ) -> Result<(), CommitError> {
        let (mut rest, mut take) = (changes, FIRST);
        while !rest.is_empty() {
            let (part, later) = rest.split_at(take.min(rest.len()));
            let read = self.patch_part(session, entry, collection, part).await?;
            rest = later;
            take = (READ_BYTES * part.len() / read.max(1)).clamp(1, take * 16);
        }
        Ok(())
    }

    /// The bytes of the documents it read.
    async fn patch_part(
        &self,
        session: &mut ClientSession,
        entry: &Entry,
        collection: CollectionUuid,
        changes: &[Patch],
    ) -> Result<usize, CommitError> {
        let mut documents = self.read_documents(session, entry, changes).await?;
        let read = documents.values().map(|document| document.as_bytes().len()).sum();
        for change in changes {
            let diverged =
                |cause| CommitError::Diverged(Divergence::Document { collection, identity: change.identity, cause });
            let document = documents.get_mut(&change.identity).ok_or_else(|| diverged(Cause::Missing))?;
            let diff = Diff::parse(&change.update)
                .map_err(|error| TargetError::Fatal { message: error.to_string(), hint: "upgrade this agent" })?;
            *document = diff.apply(document).map_err(|_| diverged(Cause::Shape))?;
            // A document is smaller than a command, but not with an `_id` of any size beside it.
            if document.as_bytes().len() + change.key.as_bytes().len() > plan::COMMAND_LIMIT {
                return Err(diverged(Cause::Large));
            }
        }
        let written: Vec<_> = changes
            .iter()
            .filter_map(|change| Some((change.key.clone(), documents.remove(&change.identity)?)))
            .collect();
        for part in split_by_bytes(&written) {
            let (body, expected) = plan::write_back(entry, part);
            self.run_step(session, &entry.db, collection, body, Some(expected)).await?;
        }
        Ok(read)
    }

    /// The documents of these changes as the transaction sees them, by canonical identity.
    async fn read_documents(
        &self,
        session: &mut ClientSession,
        entry: &Entry,
        changes: &[Patch],
    ) -> Result<HashMap<u128, RawDocumentBuf>, TargetError> {
        const DOING: &str = "read documents to patch";
        let command = find_command(entry, changes.iter().map(|change| &*change.key), false);
        let database = self.client.database(&entry.db);
        let cursor = database.run_raw_cursor_command(command).session(&mut *session).batch().await;
        let mut cursor = cursor.map_err(Failure::of(DOING))?;
        let mut found = HashMap::new();
        let mut stream = cursor.stream(session);
        while let Some(batch) = stream.next().await.transpose().map_err(Failure::of(DOING))? {
            let documents = batch.doc_slices().map_err(Failure::of(DOING))?;
            for document in documents.into_iter().filter_map(|d| d.ok()?.as_document()) {
                if let Some(id) = raw::get(document, "_id") {
                    found.insert(hash::key_identity(&id), document.to_owned());
                }
            }
        }
        Ok(found)
    }
}

fn split_by_bytes(documents: &[(RawDocumentBuf, RawDocumentBuf)]) -> Vec<&[(RawDocumentBuf, RawDocumentBuf)]> {
    let (mut parts, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, (_, document)) in documents.iter().enumerate() {
        let size = document.as_bytes().len();
        if index > start && bytes + size > plan::COMMAND_BYTES {
            parts.push(&documents[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += size;
    }
    if start < documents.len() {
        parts.push(&documents[start..]);
    }
    parts
}
