//! The handle through which every other module uses the link.
//!
//! The hub is given what it needs at the start (logs, watches, two small traits) and owns its tasks: one dialler per peer
//! with addresses, one session per peer at most. It never looks into a change and never talks to MongoDB.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use farshore_api::replication::v1 as pb;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::dial;
use super::registry::Slot;
use super::status::{PeerStatus, StreamView, ViewCell};
use super::transport::Transport;
use super::wire::Receiving;
use crate::model::{AgentId, ClusterTime, Epoch, Position, SiteName, StreamId, Term};
use crate::outbox::{Log, LogId, Logs};

/// Whether this agent holds its site's lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// It does.
    pub leader: bool,
    /// The term it was given.
    pub term: Term,
}

/// How far the source's history and its capture have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceProgress {
    /// Newest majority-committed cluster time.
    pub head: ClusterTime,
    /// End of what is durable in the outbox.
    pub captured: Option<Position>,
    /// Changes captured since the start.
    pub captured_changes: u64,
    /// Their bytes.
    pub captured_bytes: u64,
    /// What follows the outbox is gone from the source's oplog.
    pub lost: bool,
}

/// Why a stream cannot start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StartRefusal {
    /// What is in the way.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// Reads documents at the source (rule K).
pub trait FetchSource: Send + Sync + 'static {
    /// Reads; failures are told in `Fetched::error`. The answer stays below 48 MiB.
    fn fetch(&self, request: pb::Fetch) -> BoxFuture<'_, pb::Fetched>;
}

/// Decides whether and where a stream starts.
pub trait StartGate: Send + Sync + 'static {
    /// At the target, while its inbox of `source` was never begun: what to say of it in Hello.
    fn receiving<'a>(&'a self, source: &'a SiteName) -> BoxFuture<'a, Result<Receiving, StartRefusal>>;

    /// At the source, when the outbox has not begun, does not reach back or not as far as the target is, or the target has nothing
    /// yet: makes sure the outbox serves `receiving` (capture gets there, or begins it where that stands).
    fn serve_from<'a>(
        &'a self,
        peer: &'a SiteName,
        receiving: &'a Receiving,
    ) -> BoxFuture<'a, Result<(), StartRefusal>>;
}

/// A site we have a link with.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Its name.
    pub site: SiteName,
    /// Where its agents listen.
    pub addresses: Vec<String>,
    /// Whether we open connections to them.
    pub dial: bool,
}

/// What the hub is told once.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// This site.
    pub site: SiteName,
    /// The group.
    pub group: String,
    /// This agent installation.
    pub agent: AgentId,
    /// The group's epoch.
    pub epoch: Epoch,
    /// Whether this site originates writes.
    pub originates: bool,
    /// Sites whose changes we receive.
    pub receives: Vec<SiteName>,
    /// Sites we have a link with.
    pub peers: Vec<PeerConfig>,
    /// Credit window in bytes.
    pub credit: u64,
    /// Seed of the jitter in waits.
    pub seed: u64,
}

/// What the hub works with.
#[derive(Clone)]
pub struct HubInputs {
    /// Outbox and inboxes.
    pub logs: Arc<Logs>,
    /// Streams flow only while we lead.
    pub leadership: watch::Receiver<Leadership>,
    /// For Progress frames.
    pub progress: watch::Receiver<SourceProgress>,
    /// Applied position per source, for Acks.
    pub applied: BTreeMap<SiteName, watch::Receiver<Option<Position>>>,
    /// Answers fetches of targets.
    pub fetch: Arc<dyn FetchSource>,
    /// Decides about starts.
    pub gate: Arc<dyn StartGate>,
    /// Reaches the peers.
    pub transport: Arc<dyn Transport>,
    /// Wall clock in milliseconds, for Progress frames.
    pub clock: Arc<dyn Fn() -> i64 + Send + Sync>,
}

/// Why a fetch failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The site is not among the peers.
    #[error("there is no link to site {0}; add it under [[peers]]")]
    NoSuchPeer(SiteName),
    /// The source could not read; may be tried again.
    #[error("{source_site} could not read the documents: {message}")]
    Fetch { source_site: SiteName, message: String },
    /// The hub was closed.
    #[error("the link is closed")]
    Closed,
}

pub(super) struct FetchJob {
    pub(super) request: pb::Fetch,
    pub(super) reply: oneshot::Sender<pb::Fetched>,
}

/// What the hub keeps per peer.
pub(super) struct PeerEntry {
    pub(super) config: PeerConfig,
    pub(super) slot: Slot,
    pub(super) status: watch::Sender<PeerStatus>,
    /// Our stream to the peer.
    pub(super) outgoing: ViewCell,
    /// The peer's stream to us.
    pub(super) incoming: ViewCell,
    /// The open session's queue of fetches.
    pub(super) fetch: watch::Sender<Option<mpsc::Sender<FetchJob>>>,
}

/// What sessions and diallers share.
pub(super) struct Shared {
    pub(super) config: HubConfig,
    pub(super) inputs: HubInputs,
    pub(super) peers: BTreeMap<SiteName, PeerEntry>,
    pub(super) deposed: watch::Sender<Option<Term>>,
    /// Sessions for which an earlier certificate was shown are not kept.
    pub(super) generation: AtomicU64,
    pub(super) tasks: TaskTracker,
    pub(super) cancel: CancellationToken,
}

impl Shared {
    pub(super) fn outbox(&self) -> Log {
        self.inputs.logs.log(&LogId::Outbox)
    }

    pub(super) fn inbox(&self, source: &SiteName) -> Log {
        self.inputs.logs.log(&LogId::Inbox(source.clone()))
    }

    pub(super) fn leadership(&self) -> Leadership {
        *self.inputs.leadership.borrow()
    }

    /// Bytes the logs can still take.
    pub(super) fn room(&self) -> u64 {
        let usage = self.inputs.logs.usage();
        usage.limit_bytes.saturating_sub(usage.bytes)
    }
}

/// The link of this agent.
#[derive(Clone)]
pub struct Hub {
    pub(super) shared: Arc<Shared>,
}

impl Hub {
    /// Starts the diallers on `tasks`; everything ends with `cancel`.
    pub fn start(config: HubConfig, inputs: HubInputs, tasks: &TaskTracker, cancel: CancellationToken) -> Self {
        let now = Instant::now();
        let entry = |peer: &PeerConfig| PeerEntry {
            config: peer.clone(),
            slot: Slot::default(),
            status: watch::Sender::new(PeerStatus::new(peer.site.clone(), now)),
            outgoing: watch::Sender::new(StreamView::default()),
            incoming: watch::Sender::new(StreamView::default()),
            fetch: watch::Sender::new(None),
        };
        let peers = config.peers.iter().map(|peer| (peer.site.clone(), entry(peer))).collect();
        let (deposed, tasks) = (watch::Sender::new(None), tasks.clone());
        let shared = Arc::new(Shared { config, inputs, peers, deposed, generation: AtomicU64::new(0), tasks, cancel });
        for (number, peer) in shared.peers.values().enumerate() {
            if peer.config.dial && !peer.config.addresses.is_empty() {
                let seed = shared.config.seed.wrapping_add(number as u64);
                shared.tasks.spawn(dial::keep(shared.clone(), peer.config.site.clone(), seed));
            }
        }
        Self { shared }
    }

    /// Reads documents at `source` through the link; waits for a session and asks again after a reconnect. Cancel by dropping.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn fetch(&self, source: &SiteName, request: pb::Fetch) -> Result<pb::Fetched, Error> {
        let peer = self.shared.peers.get(source).ok_or_else(|| Error::NoSuchPeer(source.clone()))?;
        let mut sessions = peer.fetch.subscribe();
        let asking = async {
            loop {
                let session = sessions.wait_for(Option::is_some).await.expect("the sender lives in the hub").clone();
                let (reply, answer) = oneshot::channel();
                let job = FetchJob { request: request.clone(), reply };
                let session = session.expect("waited for");
                if session.send(job).await.is_err() {
                    // The session has ended; its queue is taken away right after.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
                if let Ok(fetched) = answer.await {
                    return fetched;
                }
            }
        };
        let fetched = self.shared.cancel.run_until_cancelled(asking).await.ok_or(Error::Closed)?;
        match fetched.error.is_empty() {
            true => Ok(fetched),
            false => Err(Error::Fetch { source_site: source.clone(), message: fetched.error }),
        }
    }

    /// Ends the sessions on connections for which an earlier certificate of ours than `generation` was shown, whoever dialled
    /// them: each is opened again at once, with the newest. A session that is only being opened ends when it is open.
    pub fn renew_sessions(&self, generation: u64) {
        self.shared.generation.fetch_max(generation, Ordering::SeqCst);
        for peer in self.shared.peers.values() {
            peer.slot.end();
        }
    }

    /// The links.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.shared.peers.values().map(|peer| peer.status.borrow().clone()).collect()
    }

    /// Moves with the link to `peer`.
    pub fn watch_peer(&self, peer: &SiteName) -> Option<watch::Receiver<PeerStatus>> {
        Some(self.shared.peers.get(peer)?.status.subscribe())
    }

    /// One stream as seen here; `None` when neither end is this site or there is no such peer.
    pub fn stream_view(&self, stream: &StreamId) -> Option<StreamView> {
        Some(self.cell(stream)?.borrow().clone())
    }

    /// Moves with the stream.
    pub fn watch_stream(&self, stream: &StreamId) -> Option<watch::Receiver<StreamView>> {
        Some(self.cell(stream)?.subscribe())
    }

    fn cell(&self, stream: &StreamId) -> Option<&ViewCell> {
        let own = &self.shared.config.site;
        if stream.source == *own {
            Some(&self.shared.peers.get(&stream.target)?.outgoing)
        } else if stream.target == *own {
            Some(&self.shared.peers.get(&stream.source)?.incoming)
        } else {
            None
        }
    }

    /// Becomes the newer term once a peer has seen another agent of this site in a higher term than ours: this process must exit.
    pub fn deposed(&self) -> watch::Receiver<Option<Term>> {
        self.shared.deposed.subscribe()
    }
}
