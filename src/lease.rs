//! The lease of a site: which of its agents ships and applies.
//!
//! Kept in the site's own MongoDB, judged by the server's clock. Every process that takes it gets a higher term, and the
//! term fences whatever an earlier holder still tries; so the lease decides who works, never what is correct.
//! A process takes over at once from an earlier one of the same installation (one process per data directory), and from
//! another agent after `ttl` without renewal.
//!
//! The lease is also where the holder tells the site's other agents how far everything is applied: they have no session that
//! would tell them, and would keep for ever what they captured.

use std::time::Duration;

use bson::{Binary, Bson, DateTime, Document, doc, oid::ObjectId, spec::BinarySubtype};
use mongodb::Client;
use mongodb::options::{ReturnDocument, WriteConcern};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::link::Leadership;
use crate::model::{AgentId, Incarnation, Position, Term};
use crate::mongo::{self, Failure};

/// How often an agent that waits looks whether the lease was given back.
const WAITING: Duration = Duration::from_secs(1);

/// How far every target has applied a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The history.
    pub incarnation: Incarnation,
    /// No target needs anything at or below.
    pub position: Position,
}

impl Applied {
    fn to_document(self) -> Document {
        let incarnation = Binary { subtype: BinarySubtype::Generic, bytes: self.incarnation.0.to_vec() };
        let mut document = doc! {"incarnation": incarnation};
        document.extend(mongo::position(self.position));
        document
    }

    /// None when it is not there, or of a form that only another version knows.
    fn of(lease: &Document) -> Option<Self> {
        let applied = lease.get_document("applied").ok()?;
        let incarnation = Incarnation::from_slice(applied.get_binary_generic("incarnation").ok()?)?;
        Some(Self { incarnation, position: mongo::read_position(applied)? })
    }
}

/// Keeps or waits for the lease.
#[derive(Debug)]
pub struct Lease {
    client: Client,
    group: String,
    agent: AgentId,
    /// Tells this process from earlier ones of the same installation.
    process: ObjectId,
    ttl: Duration,
    state: watch::Sender<Leadership>,
    told: watch::Receiver<Option<Applied>>,
    heard: watch::Sender<Option<Applied>>,
}

/// The lease that this process held in a term is another's, or was meanwhile.
#[derive(Debug, thiserror::Error)]
#[error(
    "this agent lost the site's lease, which it held in term {0}; this process stops and starts again as a standby"
)]
pub struct Lost(pub Term);

impl Lease {
    /// Prepares; `state` is told about every change. While this agent holds the lease the others are `told`; while another
    /// one does, `heard` is what that one told.
    pub fn new(
        client: Client,
        group: String,
        agent: AgentId,
        ttl: Duration,
        state: watch::Sender<Leadership>,
        told: watch::Receiver<Option<Applied>>,
        heard: watch::Sender<Option<Applied>>,
    ) -> Self {
        Self { client, group, agent, process: ObjectId::new(), ttl, state, told, heard }
    }

    fn agent_id(&self) -> Binary {
        Binary { subtype: BinarySubtype::Generic, bytes: self.agent.0.to_vec() }
    }

    /// Takes or renews the lease; none when another agent holds it.
    async fn renew(&self) -> Result<Option<Term>, Failure> {
        let leases = self.client.database("farshore").collection::<Document>("leases");
        // One update decides at the server, by its clock: whoever may not have the lease leaves it as it is.
        let free = doc! {"$or": [
            {"$eq": ["$agent", self.agent_id()]},
            {"$lt": [{"$ifNull": ["$expires", DateTime::from_millis(0)]}, "$$NOW"]},
        ]};
        let same = doc! {"$eq": ["$process", self.process]};
        let next = doc! {"$add": [{"$ifNull": ["$term", 0_i64]}, 1_i64]};
        let ttl = i64::try_from(self.ttl.as_millis()).unwrap_or(i64::MAX);
        let if_free = |new: Bson, old: &str| doc! {"$cond": [free.clone(), new, old]};
        // What an earlier holder told is not repeated: its targets may have begun again since.
        let told = (*self.told.borrow()).map_or("$$REMOVE".into(), |applied| applied.to_document().into());
        let set = doc! {
            "term": if_free(doc! {"$cond": [same, "$term", next]}.into(), "$term"),
            "expires": if_free(doc! {"$add": ["$$NOW", ttl]}.into(), "$expires"),
            "process": if_free(self.process.into(), "$process"),
            "agent": if_free(self.agent_id().into(), "$agent"),
            "applied": if_free(told, "$applied"),
        };
        let lease = leases
            .find_one_and_update(doc! {"_id": &self.group}, vec![doc! {"$set": set}])
            .upsert(true)
            .return_document(ReturnDocument::After)
            .write_concern(WriteConcern::builder().w(mongodb::options::Acknowledgment::Majority).journal(true).build())
            .await
            .map_err(Failure::of("renew the lease"))?;
        let lease = lease.unwrap_or_default();
        if lease.get_object_id("process").is_ok_and(|process| process == self.process) {
            return Ok(lease.get_i64("term").ok().map(|term| Term(term as u64)));
        }
        self.heard.send_replace(Applied::of(&lease));
        Ok(None)
    }

    /// Runs until cancelled, then gives the lease back.
    ///
    /// # Errors
    /// The lease was lost to another agent.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Lost> {
        let mut flapping = crate::admin::telemetry::Flapping::default();
        let mut renewed: Option<Instant> = None;
        loop {
            let asked = Instant::now();
            match self.renew().await {
                Ok(Some(term)) => {
                    flapping.recovered(std::time::Instant::now(), "the lease");
                    renewed = Some(asked);
                    self.hold(term)?;
                }
                Ok(None) => {
                    flapping.recovered(std::time::Instant::now(), "the lease");
                    // Also when it knew already that it could not renew it: what it was told as the leader is old.
                    let held = *self.state.borrow();
                    if held.term != Term(0) {
                        return Err(Lost(held.term));
                    }
                }
                Err(failure) => {
                    flapping.warn(std::time::Instant::now(), "the lease", &failure);
                    // Nobody else can have it sooner than this: work goes on meanwhile.
                    if renewed.is_some_and(|at| at.elapsed() >= self.ttl) && self.state.borrow().leader {
                        tracing::warn!("the lease could not be renewed in time; this agent waits");
                        self.state.send_modify(|state| state.leader = false);
                    }
                }
            }
            let pause = if self.state.borrow().leader { self.ttl / 4 } else { WAITING.min(self.ttl / 4) };
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.give_back().await;
        Ok(())
    }

    fn hold(&self, term: Term) -> Result<(), Lost> {
        let before = *self.state.borrow();
        if before == (Leadership { leader: true, term }) {
            return Ok(());
        }
        // A term may not change under a running claim: start afresh.
        if before.term != Term(0) && before.term != term {
            return Err(Lost(before.term));
        }
        tracing::info!(%term, "this agent holds the site's lease");
        self.state.send_replace(Leadership { leader: true, term });
        Ok(())
    }

    async fn give_back(&self) {
        let leases = self.client.database("farshore").collection::<Document>("leases");
        let mine = doc! {"_id": &self.group, "process": self.process};
        let past = doc! {"$set": {"expires": DateTime::from_millis(0)}};
        let given = tokio::time::timeout(Duration::from_secs(2), leases.update_one(mine, past).into_future()).await;
        if !matches!(given, Ok(Ok(_))) {
            tracing::debug!("the lease was not given back; it runs out by itself");
        }
        self.state.send_modify(|state| state.leader = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ClusterTime;

    #[test]
    fn what_is_applied_keeps_its_form_in_the_lease() {
        let position = Position::new(ClusterTime::new(9, 2), 3);
        let applied = Applied { incarnation: Incarnation([7; 16]), position };
        let lease = doc! {"_id": "bank", "term": 4_i64, "applied": applied.to_document()};
        let incarnation = Binary { subtype: BinarySubtype::Generic, bytes: vec![7; 16] };
        let time = bson::Timestamp { time: 9, increment: 2 };
        assert_eq!(
            lease.get("applied"),
            Some(&doc! {"incarnation": incarnation, "time": time, "ordinal": 3_i64}.into())
        );
        assert_eq!(Applied::of(&lease), Some(applied));
        // An older agent's lease, and one of a form to come.
        assert_eq!(Applied::of(&doc! {"term": 4_i64}), None);
        assert_eq!(Applied::of(&doc! {"applied": {"time": 9_i64}}), None);
    }
}
