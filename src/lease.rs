//! The lease of a site: which of its agents ships and applies.
//!
//! Kept in the site's own MongoDB, judged by the server's clock. Every process that takes it gets a higher term, and the
//! term fences whatever an earlier holder still tries; so the lease decides who works, never what is correct.
//! A process takes over at once from an earlier one of the same installation (one process per data directory), and from
//! another agent after `ttl` without renewal.

use std::time::Duration;

use bson::{Binary, DateTime, Document, doc, oid::ObjectId, spec::BinarySubtype};
use mongodb::Client;
use mongodb::options::{ReturnDocument, WriteConcern};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::link::Leadership;
use crate::model::{AgentId, Term};
use crate::mongo::{Failure, code};

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
}

/// Another agent took the lease from this one.
#[derive(Debug, thiserror::Error)]
#[error("another agent of this site holds the lease (term {0}); this process stops and starts again as its standby")]
pub struct Lost(pub Term);

impl Lease {
    /// Prepares; `state` is told about every change.
    pub fn new(client: Client, group: String, agent: AgentId, ttl: Duration, state: watch::Sender<Leadership>) -> Self {
        Self { client, group, agent, process: ObjectId::new(), ttl, state }
    }

    fn agent_id(&self) -> Binary {
        Binary { subtype: BinarySubtype::Generic, bytes: self.agent.0.to_vec() }
    }

    /// Takes or renews the lease; none when another agent holds it.
    async fn renew(&self) -> Result<Option<Term>, Failure> {
        let leases = self.client.database("farshore").collection::<Document>("leases");
        let free = doc! {"$or": [
            {"agent": self.agent_id()},
            {"$expr": {"$lt": ["$expires", "$$NOW"]}},
        ]};
        let mut filter = doc! {"_id": &self.group};
        filter.extend(free);
        let same = doc! {"$eq": ["$process", self.process]};
        let next = doc! {"$add": [{"$ifNull": ["$term", 0_i64]}, 1_i64]};
        let ttl = i64::try_from(self.ttl.as_millis()).unwrap_or(i64::MAX);
        let set = doc! {
            "term": {"$cond": [same, "$term", next]},
            "agent": self.agent_id(),
            "process": self.process,
            "expires": {"$add": ["$$NOW", ttl]},
        };
        let taken = leases
            .find_one_and_update(filter, vec![doc! {"$set": set}])
            .upsert(true)
            .return_document(ReturnDocument::After)
            .write_concern(WriteConcern::builder().w(mongodb::options::Acknowledgment::Majority).journal(true).build())
            .await
            .map_err(Failure::of("renew the lease"));
        match taken {
            Ok(lease) => Ok(lease.and_then(|l| l.get_i64("term").ok()).map(|term| Term(term as u64))),
            // The record is there and the filter did not match: somebody else holds it.
            Err(failure) if failure.code() == Some(code::DUPLICATE_KEY) => Ok(None),
            Err(failure) => Err(failure),
        }
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
                    let held = *self.state.borrow();
                    if held.leader {
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
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(self.ttl / 4) => {}
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
            return Err(Lost(term));
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
