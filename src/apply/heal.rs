//! Applies one job: commits it, and fetches what the target has otherwise than its changes need (rule K).
//!
//! A job is tried until it commits or only a new session can help. Documents fetched on the way are written in the same
//! transaction as the changes, with the floor below which later changes of theirs are dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bson::raw::{RawDocument, RawDocumentBuf};
use bytes::Bytes;
use farshore_api::replication::v1::{Fetch, Fetched};
use tokio::sync::watch;
use tokio::time::Instant;

use super::catalog::{Entries, Presence};
use super::lanes::{Floor, Item, Job, LaneStep};
use super::plan::{Floors, Resolved};
use super::status::ApplyStatus;
use super::suspects::key_of;
use super::target::{Cause, CommitError, Divergence, Suspect, Target, TargetError, Transaction};
use crate::model::raw::{self, Writer};
use crate::model::{ClusterTime, CollectionUuid, LaneId, SiteName, hash};

/// Fetches documents from the source (rule K).
pub trait FetchClient: Send + Sync + 'static {
    /// Answers when the source could be asked; waits while the link is down.
    fn fetch(&self, source: &SiteName, request: Fetch) -> impl Future<Output = Result<Fetched, String>> + Send;
}

pub(super) const RETRY_MIN: Duration = Duration::from_millis(10);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(1);
/// A transaction that was tried for so long without success is told as what holds the stream.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nobody else writes what a transaction writes. One that conflicted for so long is too large for the server's cache: not
/// every version of MongoDB says so.
const CONFLICTS: Duration = Duration::from_secs(20);
/// Keys asked for in one fetch; the answer may hold fewer.
const FETCH_KEYS: usize = 100;
/// A job that keeps diverging without anything left to fetch is beyond healing by documents.
const HEAL_ROUNDS: u32 = 20;

/// Applies one job, fetching what diverged.
pub(super) struct Apply<T, F> {
    pub(super) target: Arc<T>,
    pub(super) fetch: Arc<F>,
    pub(super) source: SiteName,
    pub(super) entries: Arc<Entries>,
    pub(super) floors: Arc<Floors>,
    pub(super) status: watch::Sender<ApplyStatus>,
}

impl<T: Target, F: FetchClient> Apply<T, F> {
    /// Returns when the job is committed, with the floors stored in its lanes.
    pub(super) async fn run(&self, worker: usize, job: &Job) -> Result<Vec<(LaneId, Floor)>, TargetError> {
        let (mut floors, mut diverged) = (Vec::new(), BTreeSet::new());
        let mut resolved: Vec<Resolved> = Vec::new();
        let mut delay = RETRY_MIN;
        let mut rounds = 0;
        let began = Instant::now();
        let mut conflicting: Option<Instant> = None;
        loop {
            let lanes = self.with_floors(&job.lanes, &resolved, &mut floors);
            let transaction = Transaction {
                lanes: &lanes,
                items: &job.items,
                resolved: &resolved,
                entries: &self.entries,
                floors: &self.floors,
            };
            let failed = match self.target.commit(worker, transaction).await {
                Ok(()) => {
                    self.healed(diverged.len() as u64);
                    return Ok(floors);
                }
                Err(CommitError::Target(error)) => error,
                Err(CommitError::Diverged(divergence)) => {
                    rounds += 1;
                    conflicting = None;
                    match self.heal(job, &divergence, &mut resolved, &mut diverged).await {
                        Ok(0) if rounds >= HEAL_ROUNDS => TargetError::Fatal {
                            message: format!("changes at {} keep failing: {divergence}", job.items[0].position),
                            hint: "the target was changed by somebody else; verify and repair the collection",
                        },
                        Ok(_) => continue,
                        Err(error) => error,
                    }
                }
            };
            if matches!(failed, TargetError::Conflict(_)) {
                conflicting.get_or_insert_with(Instant::now);
            }
            let conflicted = conflicting.map(|since| since.elapsed());
            let patient = began.elapsed() < PATIENCE || conflicted.is_some_and(|elapsed| elapsed < CONFLICTS);
            match failed {
                TargetError::Conflict(reason)
                    if conflicted.is_some_and(|elapsed| elapsed >= CONFLICTS) && job.items.len() > 1 =>
                {
                    return Err(TargetError::TooLarge(reason));
                }
                TargetError::Conflict(reason) | TargetError::Transient(reason) if patient => {
                    tracing::debug!(reason, "transaction tried again");
                    self.status.send_modify(|status| status.retries += 1);
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY_MAX);
                }
                // No passing thing any more: it is tried again, but a person must know.
                TargetError::Conflict(reason) | TargetError::Transient(reason) => {
                    return Err(TargetError::Fatal {
                        message: format!("changes at {} cannot be applied: {reason}", job.items[0].position),
                        hint: "see the reason; they are tried again by themselves",
                    });
                }
                error => return Err(error),
            }
        }
    }

    fn healed(&self, documents: u64) {
        if documents > 0 {
            self.status.send_modify(|status| {
                status.healed += documents;
                status.healing = status.healing.saturating_sub(documents);
            });
        }
    }

    /// Whether a change is applied at all: its document may be ahead already, its collection may not be replicated, and
    /// then what is at the target says nothing about it.
    fn applies(&self, item: &Item) -> bool {
        let ahead = self.floors.get(&(item.collection, item.key)).is_some_and(|at| *at >= item.position.time);
        let entry = self.entries.get(&item.collection);
        !ahead && entry.is_some_and(|entry| matches!(entry.presence, Presence::Present(_)))
    }

    /// Fetches what diverged; returns how many documents that were which had not been fetched before.
    async fn heal(
        &self,
        job: &Job,
        divergence: &Divergence,
        resolved: &mut Vec<Resolved>,
        diverged: &mut BTreeSet<(CollectionUuid, u128)>,
    ) -> Result<usize, TargetError> {
        let judged: Vec<Item> = job.items.iter().filter(|item| self.applies(item)).cloned().collect();
        let suspects = self.target.examine(&judged, &self.entries, divergence).await?;
        if suspects.iter().any(|suspect| suspect.cause.is_divergence()) {
            self.must_stand(&job.lanes).await?;
        }
        let known: BTreeSet<_> = resolved.iter().map(|r| (r.floor.collection, r.floor.key)).collect();
        let mut wanted: BTreeMap<CollectionUuid, Vec<Suspect>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for suspect in suspects {
            let id = (suspect.collection, suspect.identity);
            if !known.contains(&id) && seen.insert(id) {
                wanted.entry(suspect.collection).or_default().push(suspect);
            }
        }
        if wanted.is_empty() {
            for collection in self.collections_ahead(&judged, divergence) {
                let through = match divergence {
                    Divergence::Ahead { .. } => self.newest(collection, resolved).unwrap_or_default(),
                    _ => ClusterTime(u64::MAX),
                };
                let judged: Vec<Item> = judged.iter().filter(|item| item.position.time <= through).cloned().collect();
                self.bring_ahead(&judged, collection, resolved, &mut wanted);
            }
            tokio::time::sleep(RETRY_MIN).await;
        }
        let mut count = 0;
        for (collection, suspects) in wanted {
            for suspect in &suspects {
                let (key, cause) = (key_text(&suspect.key), suspect.cause);
                if !cause.is_divergence() {
                    tracing::debug!(%collection, key, kind = cause.as_str(), "document fetched again");
                    continue;
                }
                if !diverged.insert((collection, suspect.identity)) {
                    continue;
                }
                tracing::warn!(%collection, key, kind = cause.as_str(), "document differs from the source; fetched again");
                self.status.send_modify(|status| {
                    *status.diverged.entry(cause).or_default() += 1;
                    status.healing += 1;
                });
            }
            count += suspects.iter().filter(|s| !known.contains(&(s.collection, s.identity))).count();
            let at = match divergence {
                Divergence::Ahead { collection: ahead } if *ahead == collection => self.newest(collection, resolved),
                _ => None,
            };
            let fetched = self.fetch_all(collection, suspects, at).await?;
            let again: BTreeSet<u128> = fetched.iter().map(|one| one.floor.key).collect();
            resolved.retain(|one| one.floor.collection != collection || !again.contains(&one.floor.key));
            resolved.extend(fetched);
        }
        Ok(count)
    }

    /// The collections whose documents must all be as new as those that are ahead: where a unique value is held by one
    /// that was fetched, and where `_id`s that differ may be the same to the server.
    fn collections_ahead(&self, judged: &[Item], divergence: &Divergence) -> BTreeSet<CollectionUuid> {
        let folds = |uuid: &CollectionUuid| self.entries.get(uuid).is_some_and(|entry| entry.collation);
        match divergence {
            Divergence::Unique { collection, .. } | Divergence::Ahead { collection } => BTreeSet::from([*collection]),
            Divergence::Somewhere => judged.iter().map(|item| item.collection).filter(folds).collect(),
            Divergence::Document { .. } => BTreeSet::new(),
        }
    }

    /// What was lost by a failover of the target is no divergence: nothing is said of documents before it is sure that the
    /// commits they build on are there.
    async fn must_stand(&self, lanes: &[LaneStep]) -> Result<(), TargetError> {
        let (positions, _) = self.target.confirm(None).await?;
        match lanes.iter().all(|step| positions[step.lane.index()] == step.from.position) {
            true => Ok(()),
            false => Err(TargetError::Moved("the lanes are not where this transaction begins".into())),
        }
    }

    /// What collides with a document that is ahead must be as new. So everything the job does to that collection is
    /// fetched; and when that was done already, at times that do not fit together, all of it once more.
    fn bring_ahead(
        &self,
        judged: &[Item],
        collection: CollectionUuid,
        resolved: &mut Vec<Resolved>,
        wanted: &mut BTreeMap<CollectionUuid, Vec<Suspect>>,
    ) {
        let ahead = |identity, key| Suspect { collection, identity, key, cause: Cause::Ahead };
        let mut keys: BTreeMap<u128, Suspect> = BTreeMap::new();
        for item in judged.iter().filter(|item| item.collection == collection) {
            if let Some(key) = key_of(item) {
                keys.insert(item.key, ahead(item.key, key));
            }
        }
        let mine: BTreeSet<u128> =
            resolved.iter().filter(|r| r.floor.collection == collection).map(|r| r.floor.key).collect();
        if keys.keys().all(|key| mine.contains(key)) {
            let again = resolved.extract_if(.., |r| r.floor.collection == collection);
            keys = again.map(|r| (r.floor.key, ahead(r.floor.key, r.key))).collect();
        } else {
            keys.retain(|key, _| !mine.contains(key));
        }
        if !keys.is_empty() {
            wanted.insert(collection, keys.into_values().collect());
        }
    }

    /// The newest time a document of the collection is ahead as of.
    fn newest(&self, collection: CollectionUuid, resolved: &[Resolved]) -> Option<ClusterTime> {
        let stored = self.floors.range((collection, u128::MIN)..=(collection, u128::MAX)).map(|(_, at)| *at);
        let now = resolved.iter().filter(|one| one.floor.collection == collection).map(|one| one.floor.at);
        stored.chain(now).max()
    }

    /// Documents as of one time: `at`, where the source still knows it, else as of now.
    async fn fetch_all(
        &self,
        collection: CollectionUuid,
        suspects: Vec<Suspect>,
        at: Option<ClusterTime>,
    ) -> Result<Vec<Resolved>, TargetError> {
        let Some(entry) = self.entries.get(&collection) else { return Ok(Vec::new()) };
        let mut resolved: BTreeMap<u128, Resolved> = BTreeMap::new();
        let mut rest = &suspects[..];
        while !rest.is_empty() {
            let part = &rest[..rest.len().min(FETCH_KEYS)];
            let request = Fetch {
                id: 0,
                database: entry.db.clone(),
                collection: entry.coll.clone(),
                collection_uuid: Bytes::copy_from_slice(&collection.0),
                at: at.map_or(0, |at| at.0),
                keys: part.iter().map(|s| Bytes::copy_from_slice(s.key.as_bytes())).collect(),
            };
            let fetched = self.fetch.fetch(&self.source, request).await.map_err(TargetError::Transient)?;
            if !fetched.error.is_empty() {
                return Err(TargetError::Transient(format!("fetch from {}: {}", self.source, fetched.error)));
            }
            let at = ClusterTime(fetched.at);
            let answered = if fetched.collection_gone { part.len() } else { fetched.documents.len().min(part.len()) };
            if answered == 0 {
                return Err(TargetError::Transient(format!("fetch from {}: an empty answer", self.source)));
            }
            for (index, suspect) in part[..answered].iter().enumerate() {
                let document = fetched.documents.get(index).filter(|d| !d.is_empty() && !fetched.collection_gone);
                for one in answers(collection, suspect, document, at)? {
                    // What is there already must not go back, whoever answers.
                    let newer = self.floors.get(&(collection, one.floor.key)).is_some_and(|newer| *newer > at);
                    if newer && !fetched.collection_gone {
                        return Err(TargetError::Transient(format!("fetch from {}: an old state", self.source)));
                    }
                    resolved.insert(one.floor.key, one);
                }
            }
            rest = &rest[answered..];
        }
        Ok(resolved.into_values().collect())
    }

    /// The lane states to store: floors of fetched documents go to the lane their changes come in.
    fn with_floors(
        &self,
        lanes: &[LaneStep],
        resolved: &[Resolved],
        added: &mut Vec<(LaneId, Floor)>,
    ) -> Vec<LaneStep> {
        let mut lanes = lanes.to_vec();
        added.clear();
        for one in resolved {
            let collection = one.floor.collection;
            let one_lane = self.entries.get(&collection).is_some_and(|entry| entry.one_lane);
            let own = raw::get(&one.key, "_id").map(|id| hash::lane_of(collection, &id));
            let lane = if one_lane { Some(hash::lane_of_collection(collection)) } else { own };
            if let Some(step) = lanes.iter_mut().find(|step| Some(step.lane) == lane) {
                step.to.floors.push(one.floor.clone());
                added.push((step.lane, one.floor.clone()));
            }
        }
        lanes
    }
}

/// What the source's answer says of a document. Under a collation it may be the one with another `_id` that is the same to
/// the server: then that one is there, in the place of the one asked for.
fn answers(
    collection: CollectionUuid,
    asked: &Suspect,
    document: Option<&Bytes>,
    at: ClusterTime,
) -> Result<Vec<Resolved>, TargetError> {
    let resolved = |identity, key: &RawDocumentBuf, document| {
        let floor = Floor { collection, key: identity, at };
        Resolved { floor, key: key.clone(), document }
    };
    let Some(bytes) = document else { return Ok(vec![resolved(asked.identity, &asked.key, None)]) };
    let id = RawDocument::from_bytes(bytes).ok().and_then(|document| raw::get(document, "_id"));
    let id = id.ok_or_else(|| TargetError::Transient("fetch: a document without `_id` came back".into()))?;
    let identity = hash::key_identity(&id);
    if identity == asked.identity {
        return Ok(vec![resolved(identity, &asked.key, Some(bytes.clone()))]);
    }
    let mut key = Writer::document();
    key.copy(&id);
    Ok(vec![resolved(asked.identity, &asked.key, None), resolved(identity, &key.finish(), Some(bytes.clone()))])
}

fn key_text(key: &RawDocument) -> String {
    let value = bson::Document::try_from(key).map(|d| bson::Bson::Document(d).into_relaxed_extjson().to_string());
    let mut text = value.unwrap_or_else(|_| "unreadable".into());
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
    }
    text
}
