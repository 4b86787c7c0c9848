//! What apply needs of the target's database. The real one is [`super::mongo::MongoTarget`]; simulations use a double.

use std::collections::BTreeMap;
use std::future::Future;

use bson::raw::RawDocumentBuf;
use bytes::Bytes;

use super::catalog::{Entries, Entry};
use super::lanes::{Item, LaneState, LaneStep};
use super::plan::{Floors, Resolved};
use crate::model::{CollectionUuid, Incarnation, Position, StreamHash, Term};

/// Why the target did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The same request may succeed later.
    #[error("{0}")]
    Transient(String),
    /// Another agent of this site has taken over; this process must stop.
    #[error("another agent took over (term {0}); this agent stops")]
    Deposed(Term),
    /// What this process believes of the stored state is out of date: claim again and go on from there.
    #[error("the target's state moved: {0}")]
    Moved(String),
    /// Another operation is in the way of this one, or the server's cache is full; the same request may succeed later.
    #[error("{0}")]
    Conflict(String),
    /// The server's cache does not take so large a transaction.
    #[error("{0}")]
    TooLarge(String),
    /// A person must look.
    #[error("{message}")]
    Fatal { message: String, hint: &'static str },
}

/// Why a transaction was not committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Not about the changes themselves.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A change did not find its document as the source had it.
    #[error("diverged: {0}")]
    Diverged(Divergence),
}

/// What was found to be different from the source.
#[derive(Clone, Debug, PartialEq)]
pub enum Divergence {
    /// Some update, replace or delete of these changes matched nothing, or an inserted `_id` was there.
    Somewhere,
    /// This change cannot be applied to the document as it is.
    Document { collection: CollectionUuid, identity: u128, cause: Cause },
    /// A document blocks a unique value: the fields that collide.
    Unique { collection: CollectionUuid, fields: RawDocumentBuf },
    /// Documents of a collection with a collation are ahead of these changes, which may be about the same `_id`s in other
    /// letters.
    Ahead { collection: CollectionUuid },
}

impl std::fmt::Display for Divergence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Somewhere => "a change did not match its document",
            Self::Document { .. } => "a change cannot be applied to its document",
            Self::Unique { .. } => "a document blocks a unique value",
            Self::Ahead { .. } => "others of its collection are ahead",
        })
    }
}

/// Why a document must be fetched again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// An update, replacement or delete matched nothing.
    Missing,
    /// An insert found its `_id` taken.
    Exists,
    /// It holds a unique value that another document needs.
    Unique,
    /// It is not of the shape that its update needs.
    Shape,
    /// Its change was captured without documents, for it was too large.
    Large,
    /// Others of its collection are ahead.
    Ahead,
}

impl Cause {
    /// Those that tell of a difference between the sites.
    pub const DIVERGENCES: [Self; 4] = [Self::Missing, Self::Exists, Self::Unique, Self::Shape];

    /// Whether the sites differed. Otherwise fetching is the ordinary way for what an event cannot say.
    pub fn is_divergence(self) -> bool {
        Self::DIVERGENCES.contains(&self)
    }

    /// Its name in the log and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Exists => "exists",
            Self::Unique => "unique",
            Self::Shape => "shape",
            Self::Large => "large",
            Self::Ahead => "ahead",
        }
    }
}

/// A document that must be fetched again.
#[derive(Clone, Debug, PartialEq)]
pub struct Suspect {
    /// Collection at the source.
    pub collection: CollectionUuid,
    /// Canonical identity.
    pub identity: u128,
    /// `{_id: ...}`.
    pub key: RawDocumentBuf,
    /// Why.
    pub cause: Cause,
}

/// What is stored of a stream at its target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRecord {
    /// The history its positions belong to.
    pub incarnation: Incarnation,
    /// Everything up to here is applied and majority-committed; a batch border.
    pub floor: Position,
    /// Stream hash at `floor`.
    pub hash: StreamHash,
    /// The target had the source's data when the stream began (`start_at`).
    pub adopted: bool,
}

/// What a claim found.
#[derive(Debug)]
pub struct Claim {
    /// The stream.
    pub record: StreamRecord,
    /// All lanes in order, lifted to the floor.
    pub lanes: Vec<LaneState>,
    /// The catalog.
    pub entries: Entries,
}

/// A DDL step to be done.
#[derive(Clone, Debug)]
pub enum DdlStep {
    /// A DDL event of the source, at its own position (several may share one cluster time).
    Event { position: Position, event: Bytes },
    /// A collection that was at the target when the stream began: find it by name.
    Adopt { collection: CollectionUuid, db: String, coll: String },
}

/// One transaction.
#[derive(Clone, Copy, Debug)]
pub struct Transaction<'a> {
    /// Lanes it moves.
    pub lanes: &'a [LaneStep],
    /// Its changes.
    pub items: &'a [Item],
    /// Documents fetched for it.
    pub resolved: &'a [Resolved],
    /// Collections as of now.
    pub entries: &'a Entries,
    /// Documents ahead of their lane.
    pub floors: &'a Floors,
}

/// Identity of the primary's election; a change means that commits may have been rolled back.
pub type Election = Option<bson::oid::ObjectId>;

/// See the module text. All methods may be called concurrently, `commit` with distinct workers.
pub trait Target: Send + Sync + 'static {
    /// The stream's record, if the stream has ever begun here.
    fn record(&self) -> impl Future<Output = Result<Option<StreamRecord>, TargetError>> + Send;

    /// Begins the stream; a record that is there already stays.
    fn begin(&self, record: &StreamRecord, term: Term) -> impl Future<Output = Result<(), TargetError>> + Send;

    /// Takes the stream over: frees what an earlier agent left open, bumps the term everywhere, then reads the state.
    fn claim(&self, term: Term, workers: usize) -> impl Future<Output = Result<Claim, TargetError>> + Send;

    /// Commits changes and lane states in one transaction, or neither.
    fn commit(
        &self,
        worker: usize,
        transaction: Transaction<'_>,
    ) -> impl Future<Output = Result<(), CommitError>> + Send;

    /// Which documents of a diverged transaction must be fetched.
    fn examine(
        &self,
        items: &[Item],
        entries: &Entries,
        divergence: &Divergence,
    ) -> impl Future<Output = Result<Vec<Suspect>, TargetError>> + Send;

    /// Stores `floor`, waits until everything committed before is majority-committed, and returns the lanes' positions
    /// as the majority has them.
    fn confirm(
        &self,
        floor: Option<(Position, StreamHash)>,
    ) -> impl Future<Output = Result<(Vec<Position>, Election), TargetError>> + Send;

    /// Removes what is stored of collections that were dropped at or before `through`, which the stored floor has reached: no
    /// replay mentions them any more.
    fn forget(&self, through: Position) -> impl Future<Output = Result<(), TargetError>> + Send;

    /// Errors of the database since the process began, by its code.
    fn errors(&self) -> BTreeMap<i32, u64> {
        BTreeMap::new()
    }

    /// Does one DDL step; done already counts as done. Returns the catalog entries that changed.
    fn ddl(
        &self,
        position: Position,
        step: &DdlStep,
        entries: &Entries,
    ) -> impl Future<Output = Result<Vec<(CollectionUuid, Entry)>, TargetError>> + Send;
}
