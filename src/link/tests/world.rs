//! Two agents' links on loopback, whose connections can be cut.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use farshore_api::replication::v1 as pb;
use farshore_api::tls::Reloading;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::pki::Pki;
use crate::link::testing::{batch_after, hash_before, incarnation, site};
use crate::link::transport::{Connection, Listener, Transport};
use crate::link::wire::Receiving;
use crate::link::{
    FetchSource, Hub, HubConfig, HubInputs, Leadership, PeerConfig, SourceProgress, StartGate, StartRefusal,
    StreamView, TlsTransport, server,
};
use crate::model::{AgentId, ClusterTime, Epoch, Position, SiteName, StreamId, Term};
use crate::outbox::{Log, LogId, Logs, MemStore, Quota};

pub(super) fn at(time: u64) -> Position {
    Position::before(ClusterTime(time))
}

/// A transport whose outgoing connections can be cut.
pub(super) struct Cutting {
    inner: TlsTransport,
    open: Mutex<Vec<AbortHandle>>,
}

impl Cutting {
    pub(super) fn cut(&self) {
        for handle in self.open.lock().expect("lock").drain(..) {
            handle.abort();
        }
    }
}

impl Transport for Cutting {
    fn connect<'a>(&'a self, address: &'a str, site: &'a SiteName) -> BoxFuture<'a, Result<Connection, String>> {
        Box::pin(async move {
            let mut far = self.inner.connect(address, site).await?;
            let peer = far.peer().clone();
            let (near, mut middle) = tokio::io::duplex(64 << 10);
            let pump = tokio::spawn(async move {
                drop(tokio::io::copy_bidirectional(&mut middle, &mut far).await);
            });
            self.open.lock().expect("lock").push(pump.abort_handle());
            Ok(Connection::new(near, peer))
        })
    }

    fn listen<'a>(&'a self, address: &'a str, cancel: CancellationToken) -> BoxFuture<'a, std::io::Result<Listener>> {
        self.inner.listen(address, cancel)
    }
}

/// Answers every fetch with the keys themselves.
struct Echo;

impl FetchSource for Echo {
    fn fetch(&self, request: pb::Fetch) -> BoxFuture<'_, pb::Fetched> {
        let error = if request.collection == "broken" { "cannot read".to_owned() } else { String::new() };
        Box::pin(async move { pb::Fetched { at: 5, documents: request.keys, error, ..Default::default() } })
    }
}

#[derive(Default)]
pub(super) struct Gate {
    pub(super) refuse: AtomicBool,
}

impl StartGate for Gate {
    fn receiving<'a>(&'a self, source: &'a SiteName) -> BoxFuture<'a, Result<Receiving, StartRefusal>> {
        Box::pin(async move { Ok(Receiving { source: source.clone(), received: None, start_at: None, empty: true }) })
    }

    fn serve_from<'a>(&'a self, _: &'a SiteName, _: &'a Receiving) -> BoxFuture<'a, Result<(), StartRefusal>> {
        Box::pin(async move {
            match self.refuse.load(Ordering::Relaxed) {
                true => Err(StartRefusal { message: "the source is not empty".into(), hint: "use start_at".into() }),
                false => Ok(()),
            }
        })
    }
}

pub(super) struct Options {
    pub(super) name: &'static str,
    pub(super) peer: &'static str,
    pub(super) originates: bool,
    pub(super) addresses: Vec<String>,
    pub(super) credit: u64,
    pub(super) limit: u64,
    /// Bytes of recent records that are not read from the store.
    pub(super) ring: usize,
    pub(super) leadership: Leadership,
    pub(super) tls: Arc<Reloading>,
}

impl Options {
    pub(super) fn north(pki: &Pki, addresses: Vec<String>) -> Self {
        Self {
            name: "north",
            peer: "south",
            originates: true,
            addresses,
            credit: 1 << 20,
            limit: 1 << 30,
            ring: 8 << 20,
            leadership: Leadership { leader: true, term: Term(5) },
            tls: pki.site("north"),
        }
    }

    pub(super) fn south(pki: &Pki) -> Self {
        let tls = pki.site("south");
        Self { name: "south", peer: "north", originates: false, tls, ..Self::north(pki, Vec::new()) }
    }
}

/// One agent's link.
pub(super) struct Agent {
    pub(super) hub: Hub,
    pub(super) logs: Arc<Logs>,
    pub(super) store: MemStore,
    pub(super) address: String,
    pub(super) gate: Arc<Gate>,
    pub(super) transport: Arc<Cutting>,
    pub(super) leadership: watch::Sender<Leadership>,
    pub(super) progress: watch::Sender<SourceProgress>,
    pub(super) applied: watch::Sender<Option<Position>>,
    stream: StreamId,
    pub(super) cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Agent {
    pub(super) async fn start(options: Options) -> Self {
        Self::listening(options).await.1
    }

    /// Also tells the address before anything is dialled.
    pub(super) async fn listening(options: Options) -> (String, Self) {
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let transport = cutting(&options, &tasks);
        let listener = transport.listen("127.0.0.1:0", cancel.clone()).await.expect("listens");
        Self::on(options, transport, listener, tasks, cancel)
    }

    /// With a transport and a listener that are there already.
    pub(super) fn on(
        options: Options,
        transport: Arc<Cutting>,
        listener: Listener,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) -> (String, Self) {
        let (own, peer) = (site(options.name), site(options.peer));
        let quota = Quota { limit_bytes: options.limit, retention_bytes: 0, retention_time: Duration::ZERO };
        let store = MemStore::new();
        let logs = Logs::start_with_ring(Arc::new(store.clone()), quota, &tasks, options.ring).expect("logs");
        let (leadership, progress, applied) = (
            watch::Sender::new(options.leadership),
            watch::Sender::new(SourceProgress::default()),
            watch::Sender::new(None),
        );
        let gate = Arc::new(Gate::default());
        let receives = if options.originates { vec![] } else { vec![peer.clone()] };
        let config = HubConfig {
            site: own.clone(),
            group: "bank".into(),
            agent: AgentId([options.name.len() as u8; 16]),
            epoch: Epoch(1),
            originates: options.originates,
            receives,
            peers: vec![PeerConfig { site: peer.clone(), addresses: options.addresses, dial: true }],
            credit: options.credit,
            seed: 7,
        };
        let inputs = HubInputs {
            logs: logs.clone(),
            leadership: leadership.subscribe(),
            progress: progress.subscribe(),
            applied: BTreeMap::from([(peer.clone(), applied.subscribe())]),
            fetch: Arc::new(Echo),
            gate: gate.clone(),
            transport: transport.clone(),
            clock: Arc::new(|| 1_000),
        };
        let hub = Hub::start(config, inputs, &tasks, cancel.clone());
        let address = listener.address.to_string();
        let (serving, stop) = (hub.clone(), cancel.clone());
        tasks.spawn(async move { server::serve(&serving, Default::default(), listener, stop).await.expect("serves") });
        let (source, target) = if options.originates { (own, peer) } else { (peer, own) };
        let stream = StreamId { source, target };
        let agent = Self {
            hub,
            logs,
            store,
            address: address.clone(),
            gate,
            transport,
            leadership,
            progress,
            applied,
            stream,
            cancel,
            tasks,
        };
        (address, agent)
    }

    pub(super) fn view(&self) -> StreamView {
        self.hub.stream_view(&self.stream).expect("its stream")
    }

    /// Waits until the stream looks like this.
    pub(super) async fn until(&self, what: &str, wanted: impl FnMut(&StreamView) -> bool) -> StreamView {
        let mut watch = self.hub.watch_stream(&self.stream).expect("its stream");
        match tokio::time::timeout(Duration::from_secs(60), watch.wait_for(wanted)).await {
            Ok(view) => view.expect("the hub lives").clone(),
            Err(_) => panic!("not {what} in time: {:?} {:?}", self.view(), self.hub.peers()),
        }
    }

    pub(super) async fn until_received(&self, time: u64) {
        self.until("received", |view| view.received == Some(at(time))).await;
    }

    /// Waits until the outbox ends there.
    pub(super) async fn until_captured(&self, time: u64) {
        until_ends(&self.logs.log(&LogId::Outbox), time).await;
    }

    /// Begins the outbox and fills it with one change a time in `from..to`, `length` in a batch.
    pub(super) async fn capture(&self, from: u64, to: u64, length: u64) {
        let log = self.logs.log(&LogId::Outbox);
        if log.state().is_none() {
            log.begin(incarnation(1), Epoch(1), at(from), hash_before(from), None).await.expect("begins");
        }
        for start in (from..to).step_by(length as usize) {
            let hash = log.state().expect("begun").hash;
            let batch = batch_after(1, start, to.min(start + length), hash);
            log.append(batch, None).await.expect("appends");
        }
    }

    /// The cluster times of all changes in the inbox.
    pub(super) async fn inbox(&self) -> Vec<u64> {
        let log = self.logs.log(&LogId::Inbox(self.stream.source.clone()));
        let state = log.state().expect("begun");
        let mut reader = log.reader(state.first);
        let mut times = Vec::new();
        while reader.position() < state.end {
            let stored = reader.next().await.expect("reads");
            let changes = stored.batch.changes().expect("good");
            times.extend(changes.shared().filter(|(p, _)| *p > stored.skip_through).map(|(p, _)| p.time.0));
        }
        times
    }

    pub(super) fn fetch(collection: &str) -> pb::Fetch {
        let keys = vec![Bytes::from_static(b"key")];
        pb::Fetch { collection: collection.into(), keys, ..Default::default() }
    }

    pub(super) async fn stop(self) {
        self.cancel.cancel();
        self.logs.close().await;
        self.tasks.close();
        tokio::time::timeout(Duration::from_secs(20), self.tasks.wait()).await.expect("all tasks end");
    }
}

/// Waits until a log ends there.
pub(super) async fn until_ends(log: &Log, time: u64) {
    let mut states = log.watch();
    let there = states.wait_for(|state| state.as_ref().is_some_and(|state| state.end == at(time)));
    let there = tokio::time::timeout(Duration::from_secs(20), there).await.map(|state| state.is_ok());
    assert_eq!(there, Ok(true), "{} is {:?}", log.id(), log.state());
}

/// A transport of which connections can be cut.
pub(super) fn cutting(options: &Options, tasks: &TaskTracker) -> Arc<Cutting> {
    Arc::new(Cutting { inner: TlsTransport::new(options.tls.clone(), tasks.clone()), open: Mutex::default() })
}
