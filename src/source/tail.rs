//! Reads a cluster-wide change stream, one reply at a time.

use std::future::Future;
use std::time::Duration;

use bson::{Document, doc};
use bytes::Bytes;
use futures::StreamExt as _;
use mongodb::Client;
use mongodb::raw_batch_cursor::{RawBatch, RawBatchCursor};
use tokio::time::Instant;

use super::chunk::Reply;
use crate::model::{ClusterTime, change::TRIMMED};
use crate::mongo::{Failure, code};

/// Where a change stream starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// After the change or time of this resume token document.
    After(Bytes),
    /// At this cluster time, inclusive.
    Time(ClusterTime),
}

/// Why a change stream ended.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// Worth opening again at the same place.
    #[error("change stream interrupted: {0}")]
    Interrupted(String),
    /// The server does not have the history after this place any more.
    #[error("history lost: {0}")]
    HistoryLost(String),
    /// The server never had this place: it was put back to an older copy, or replaced.
    #[error("history rewound: {0}")]
    Rewound(String),
    /// A change of the next reply is larger than 16 MiB.
    #[error("a change exceeds 16 MiB")]
    TooLarge,
    /// The server refuses for good.
    #[error("change stream refused: {0}")]
    Refused(String),
}

impl From<Failure> for TailError {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure.code() {
            Some(code::EVENT_TOO_LARGE) => Self::TooLarge,
            Some(code::HISTORY_LOST) => Self::HistoryLost(text),
            Some(code::FATAL_CHANGE_STREAM | code::INVALID_RESUME_TOKEN) => Self::Rewound(text),
            Some(_) => Self::Refused(text),
            None if failure.is_transient() => Self::Interrupted(text),
            None => Self::Refused(text),
        }
    }
}

/// How changes are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// As many in a reply as the server likes.
    Batches,
    /// One in a reply. A reply that would hold an oversized change fails as a whole, so this is how to come right up to it.
    Singly,
    /// One in a reply, without its documents and marked as such: for the oversized change itself, and for no other, or
    /// two agents of a site would record one change differently.
    Trimmed,
}

/// Something that can be tailed: a real MongoDB or a double.
pub trait Tail: Send + Sync + 'static {
    /// An open change stream.
    type Stream: TailStream;

    /// Opens a change stream.
    fn open(&self, at: &StartAt, reading: Reading) -> impl Future<Output = Result<Self::Stream, TailError>> + Send;
}

/// An open change stream. Dropping it closes it.
pub trait TailStream: Send + 'static {
    /// Whether the server makes one change of each cluster time outside of transactions (MongoDB before 6.1), see
    /// [`super::chunk::Chunker`].
    fn single_change_units(&self) -> bool;

    /// The next reply; an empty one now and then when nothing happens. Not cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<Reply, TailError>> + Send;
}

/// `maxWireVersion` of MongoDB 6.1.
const WIRE_6_1: i32 = 18;
/// How long the server holds an idle `getMore`; bounds the age of its resume token, not the latency of changes.
const AWAIT: Duration = Duration::from_millis(500);

/// The least time between two requests. A reply, a record, its flushes and a transaction cost the same for one change as for
/// ten: a steady trickle is gathered for so long. A change after a pause is not kept waiting.
const PACE: Duration = Duration::from_millis(10);

/// The change stream of a real MongoDB.
#[derive(Clone, Debug)]
pub struct MongoTail {
    client: Client,
}

impl MongoTail {
    /// Tails the cluster behind `client`.
    pub fn new(client: Client) -> Self {
        Self { client }
    }
}

/// Only what no link will ever carry is filtered here; `admin`, `config` and `local` have no events at all.
fn pipeline(at: &StartAt, reading: Reading) -> Vec<Document> {
    let mut options = doc! {"allChangesForCluster": true, "showExpandedEvents": true, "showRawUpdateDescription": true};
    match at {
        StartAt::After(token) => {
            let token = Document::try_from(bson::RawDocument::from_bytes(token).expect("tokens are stored whole"));
            options.insert("startAfter", token.expect("a token holds text"));
        }
        StartAt::Time(time) => {
            options.insert("startAtOperationTime", crate::mongo::timestamp(*time));
        }
    }
    let ours = doc! {"$or": [{"ns.db": {"$ne": "farshore"}}, {"ns.coll": "marks"}]};
    let mut stages = vec![doc! {"$changeStream": options}, doc! {"$match": ours}];
    if reading == Reading::Trimmed {
        stages.push(doc! {"$project": {"fullDocument": 0, "rawUpdateDescription": 0}});
        stages.push(doc! {"$addFields": {TRIMMED: true}});
    }
    stages
}

impl Tail for MongoTail {
    type Stream = MongoTailStream;

    async fn open(&self, at: &StartAt, reading: Reading) -> Result<MongoTailStream, TailError> {
        let admin = self.client.database("admin");
        let mut aggregate = admin
            .aggregate(pipeline(at, reading))
            .max_await_time(AWAIT)
            .read_concern(mongodb::options::ReadConcern::majority());
        if reading != Reading::Batches {
            aggregate = aggregate.batch_size(1);
        }
        let cursor = aggregate.batch().await.map_err(Failure::of("open the change stream"))?;
        // Asked after opening: a server that is replaced by a newer one ends the stream first.
        let info = crate::mongo::server_info(&self.client).await?;
        let info = info.map_err(|reason| TailError::Refused(reason.to_owned()))?;
        let pace = if reading == Reading::Batches { PACE } else { Duration::ZERO };
        let single_change_units = info.wire_version < WIRE_6_1;
        Ok(MongoTailStream { cursor, single_change_units, pace, asked: Instant::now() })
    }
}

/// An open change stream of a real MongoDB.
pub struct MongoTailStream {
    cursor: RawBatchCursor,
    single_change_units: bool,
    pace: Duration,
    /// When the latest reply was asked for.
    asked: Instant,
}

impl std::fmt::Debug for MongoTailStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MongoTailStream")
    }
}

/// A reply in the driver's own buffer.
struct Received(RawBatch);

impl AsRef<bson::RawDocument> for Received {
    fn as_ref(&self) -> &bson::RawDocument {
        self.0.as_raw_document()
    }
}

impl TailStream for MongoTailStream {
    fn single_change_units(&self) -> bool {
        self.single_change_units
    }

    async fn next(&mut self) -> Result<Reply, TailError> {
        tokio::time::sleep_until(self.asked + self.pace).await;
        self.asked = Instant::now();
        match self.cursor.next().await {
            Some(Ok(batch)) => Ok(Reply::new(Received(batch))),
            Some(Err(error)) => Err(Failure::of("read the change stream")(error).into()),
            None => Err(TailError::Interrupted("the server closed the cursor".into())),
        }
    }
}
