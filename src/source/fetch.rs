//! Reads documents for a target that needs them again (rule K): as the source has them at one cluster time.

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{Binary, doc, spec::BinarySubtype};
use bytes::Bytes;
use farshore_api::replication::v1::{Fetch, Fetched};
use futures::StreamExt as _;
use mongodb::Client;

use crate::model::raw::Writer;
use crate::model::{ClusterTime, CollectionUuid};
use crate::mongo::{self, Failure, code};

/// An answer carries fewer documents than keys when it would grow past this; the target asks again for the rest.
const ANSWER_BYTES: usize = 32 << 20;

/// Answers fetches from the local MongoDB.
#[derive(Clone, Debug)]
pub struct Fetcher {
    client: Client,
}

enum Read {
    Document(Option<RawDocumentBuf>, ClusterTime),
    /// It is not of this name.
    Moved,
    /// There is no such collection.
    Gone,
}

fn out_of_history(failure: &Failure) -> bool {
    matches!(failure.server_code, Some(code::SNAPSHOT_TOO_OLD | code::SNAPSHOT_UNAVAILABLE))
}

impl Fetcher {
    /// Reads from the cluster behind `client`.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Answers one request; `not_before` is at or past everything shipped to the target.
    pub async fn fetch(&self, request: &Fetch, not_before: ClusterTime) -> Fetched {
        match self.read(request, not_before).await {
            Ok(fetched) => fetched,
            Err(failure) => Fetched { id: request.id, error: failure.to_string(), ..Fetched::default() },
        }
    }

    async fn read(&self, request: &Fetch, not_before: ClusterTime) -> Result<Fetched, Failure> {
        let mut answer = Fetched { id: request.id, ..Fetched::default() };
        let Some(uuid) = CollectionUuid::from_slice(&request.collection_uuid) else {
            answer.error = "collection uuid is not 16 bytes".into();
            return Ok(answer);
        };
        let mut name = request.collection.clone();
        let mut asked = (request.at != 0).then_some(ClusterTime(request.at));
        let mut at = asked;
        let mut bytes = 0;
        for key in &request.keys {
            let Ok(key) = RawDocument::from_bytes(key) else {
                answer.error = "a key is not a document".into();
                return Ok(answer);
            };
            let mut read = self.read_named(request, &mut name, uuid, key, at, not_before).await;
            // At the time asked for it may be out of the history the server keeps, which a rename ends, too.
            let unknown = match &read {
                Ok(read) => !matches!(read, Read::Document(..)),
                Err(failure) => out_of_history(failure),
            };
            if unknown && asked.take().is_some() {
                at = None;
                read = self.read_named(request, &mut name, uuid, key, at, not_before).await;
            }
            let read = read?;
            if matches!(read, Read::Gone) {
                answer.collection_gone = true;
                answer.at = at.unwrap_or(not_before).0;
                return Ok(answer);
            }
            let Read::Document(document, time) = read else {
                answer.error = "the collection is being renamed".into();
                return Ok(answer);
            };
            (asked, at) = (None, Some(time));
            bytes += document.as_ref().map_or(0, |d| d.as_bytes().len());
            answer.documents.push(document.map_or_else(Bytes::new, |d| Bytes::from(d.into_bytes())));
            if bytes >= ANSWER_BYTES {
                break;
            }
        }
        answer.at = at.unwrap_or(not_before).0;
        Ok(answer)
    }

    /// Reads under the name the collection has, which may be another than the target knows.
    async fn read_named(
        &self,
        request: &Fetch,
        name: &mut String,
        uuid: CollectionUuid,
        key: &RawDocument,
        at: Option<ClusterTime>,
        not_before: ClusterTime,
    ) -> Result<Read, Failure> {
        let read = self.read_one(&request.database, name, uuid, key, at, not_before).await?;
        if !matches!(read, Read::Moved) {
            return Ok(read);
        }
        match self.name_of(&request.database, uuid).await? {
            None => Ok(Read::Gone),
            Some(current) => {
                *name = current;
                self.read_one(&request.database, name, uuid, key, at, not_before).await
            }
        }
    }

    async fn read_one(
        &self,
        database: &str,
        name: &str,
        uuid: CollectionUuid,
        key: &RawDocument,
        at: Option<ClusterTime>,
        not_before: ClusterTime,
    ) -> Result<Read, Failure> {
        let mut concern = doc! {"level": "snapshot"};
        match at {
            Some(at) => concern.insert("atClusterTime", mongo::timestamp(at)),
            None => concern.insert("afterClusterTime", mongo::timestamp(not_before)),
        };
        let concern = RawDocumentBuf::try_from(&concern).expect("documents of our own encode");
        let mut command = Writer::document();
        command.value("find", name);
        command.embed("filter", key);
        command.value("limit", 1_i32);
        command.value("singleBatch", true);
        command.uuid("collectionUUID", uuid.0);
        command.embed("readConcern", &concern);
        let command = command.finish();
        let cursor = self.client.database(database).run_raw_cursor_command(command).batch().await;
        let mut cursor = match cursor.map_err(Failure::of("fetch a document")) {
            Err(failure) if matches!(failure.code(), Some(code::UUID_MISMATCH | code::NAMESPACE_NOT_FOUND)) => {
                return Ok(Read::Moved);
            }
            cursor => cursor?,
        };
        let Some(reply) = cursor.next().await.transpose().map_err(Failure::of("fetch a document"))? else {
            return Ok(Read::Document(None, not_before));
        };
        let time = reply.as_raw_document().get_document("cursor").and_then(|c| c.get_timestamp("atClusterTime"));
        let time = time.map(mongo::cluster_time).unwrap_or(not_before);
        let documents = reply.doc_slices().map_err(Failure::of("fetch a document"))?;
        let first = documents.into_iter().next().and_then(|d| Some(d.ok()?.as_document()?.to_owned()));
        Ok(Read::Document(first, time))
    }

    async fn name_of(&self, database: &str, uuid: CollectionUuid) -> Result<Option<String>, Failure> {
        let uuid = Binary { subtype: BinarySubtype::Uuid, bytes: uuid.0.to_vec() };
        let found = mongo::list_collections(&self.client, database, doc! {"info.uuid": uuid}).await?;
        Ok(found.first().and_then(|entry| Some(entry.get_str("name").ok()?.to_owned())))
    }
}
