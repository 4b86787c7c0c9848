//! Decides whether and where a stream starts, and answers fetches: what the link asks of this site's MongoDB.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use farshore_api::replication::v1::{Fetch, Fetched};
use futures::future::BoxFuture;
use mongodb::Client;

use crate::link::{FetchSource, Receiving, StartGate, StartRefusal};
use crate::model::{ClusterTime, Incarnation, Position, SiteName, StreamHash};
use crate::mongo::{self, Failure};
use crate::outbox::Log;
use crate::source::capture::CaptureHandle;
use crate::source::fetch::Fetcher;
use crate::source::origin::Beginning;
use crate::source::serving::{self, Course};

/// The source as far as it is known yet.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) capture: CaptureHandle,
    pub(super) incarnation: Incarnation,
    pub(super) beginning: Beginning,
}

/// See the module text.
pub(super) struct Gate {
    pub(super) client: Client,
    pub(super) outbox: Log,
    pub(super) start_at: Option<ClusterTime>,
    /// Filled when MongoDB was reached for the first time.
    pub(super) source: ArcSwapOption<Source>,
}

fn refusal(message: impl Into<String>, hint: &str) -> StartRefusal {
    StartRefusal { message: message.into(), hint: hint.to_owned() }
}

fn unreachable(failure: &Failure) -> StartRefusal {
    refusal(format!("MongoDB cannot be asked: {failure}"), "it is tried again by itself; see the log of that site")
}

impl Gate {
    async fn target_state(&self, source: &SiteName) -> Result<Receiving, StartRefusal> {
        let collections = mongo::user_collections(&self.client).await.map_err(|f| unreachable(&f))?;
        let empty = collections.is_empty();
        if !empty && self.start_at.is_none() {
            let message = format!(
                "the target is not empty: it has {} collections, among them {}.{}",
                collections.len(),
                collections[0].0,
                collections[0].1.get_str("name").unwrap_or("?")
            );
            let hint = "empty it, or, if it equals the source at some cluster time, declare that with apply.start_at";
            return Err(refusal(message, hint));
        }
        Ok(Receiving { source: source.clone(), received: None, start_at: self.start_at, empty })
    }

    async fn serve(&self, receiving: &Receiving) -> Result<(), StartRefusal> {
        let source = self.source.load_full();
        let waiting = || {
            refusal("the source's MongoDB was not reached yet", "it is tried again by itself; see the log of that site")
        };
        let source = source.ok_or_else(waiting)?;
        let (at, hash) = match (receiving.received, receiving.start_at) {
            (Some(standing), _) if standing.incarnation != source.incarnation => {
                return Err(refusal(
                    "the target follows another history of the source (it was restored or replaced)",
                    "copy the data again: empty the target and remove the agent's data directory there",
                ));
            }
            (Some(standing), _) => (standing.position, standing.hash),
            (None, Some(time)) => (Position::through(time), StreamHash::default()),
            (None, None) => {
                if let [first, ..] = &source.beginning.collections[..] {
                    let message = format!(
                        "the source had {} collections when it was first seen, among them {first}",
                        source.beginning.collections.len()
                    );
                    let hint = "the initial copy is not built yet: restore a dump at the target and declare its cluster time with apply.start_at";
                    return Err(refusal(message, hint));
                }
                (Position::through(source.beginning.at), StreamHash::default())
            }
        };
        match serving::settled(&self.outbox, source.incarnation, &source.capture, at).await {
            Course::Serve => return Ok(()),
            Course::Lost(lost) => return Err(refusal(&*lost.reason, lost.hint())),
            Course::Unsettled(doing) => {
                let message =
                    format!("the target has more than this agent's outbox, and capture is not running: {doing}");
                return Err(refusal(message, "it is tried again by itself; see the log of that site"));
            }
            Course::Begin => {}
        }
        self.check_oplog(at.time).await?;
        let begun = source.capture.begin(at, hash).await;
        begun.map_err(|error| refusal(format!("the outbox cannot begin: {error}"), "see the log of that site"))
    }

    /// Whether the oplog reaches back to there, and has come as far: a time alone does not tell that history was rewound.
    async fn check_oplog(&self, time: ClusterTime) -> Result<(), StartRefusal> {
        let info = mongo::server_info(&self.client).await.map_err(|f| unreachable(&f))?;
        let info = info.map_err(|reason| refusal(reason, "look at the source's MongoDB"))?;
        // A position may lie one tick past what was seen.
        if time.0.saturating_sub(1) > info.majority_time.0 {
            let newest = info.majority_time;
            return Err(refusal(
                format!("history rewound: the source's newest write is of {newest}, the target has those up to {time}"),
                "if the source's MongoDB was put back to an older copy, copy the data again; it is tried again by itself",
            ));
        }
        let oldest = mongo::oldest_oplog_time(&self.client).await.map_err(|f| unreachable(&f))?;
        match oldest {
            Some(oldest) if oldest > time => Err(refusal(
                format!("history lost: the oplog begins at {oldest}, the target needs it from {time}"),
                "copy the data again, and raise the oplog's size or minimum retention at the source",
            )),
            _ => Ok(()),
        }
    }
}

impl StartGate for Gate {
    fn receiving<'a>(&'a self, source: &'a SiteName) -> BoxFuture<'a, Result<Receiving, StartRefusal>> {
        Box::pin(self.target_state(source))
    }

    fn serve_from<'a>(
        &'a self,
        _peer: &'a SiteName,
        receiving: &'a Receiving,
    ) -> BoxFuture<'a, Result<(), StartRefusal>> {
        Box::pin(self.serve(receiving))
    }
}

/// Answers fetches at or past everything captured.
pub(super) struct Fetches {
    pub(super) fetcher: Fetcher,
    pub(super) outbox: Log,
}

impl FetchSource for Fetches {
    fn fetch(&self, request: Fetch) -> BoxFuture<'_, Fetched> {
        Box::pin(async move {
            let captured = self.outbox.state().map(|state| state.end.time).unwrap_or_default();
            // The end may lie one tick past the newest change, in the future.
            let not_before = ClusterTime(captured.0.saturating_sub(1));
            self.fetcher.fetch(&request, not_before).await
        })
    }
}

/// The link as apply sees it.
pub(super) struct LinkFetch(pub(super) Arc<crate::link::Hub>);

impl crate::apply::heal::FetchClient for LinkFetch {
    async fn fetch(&self, source: &SiteName, request: Fetch) -> Result<Fetched, String> {
        self.0.fetch(source, request).await.map_err(|error| error.to_string())
    }
}
