//! One agent process: capture, outbox, link, inbox and apply, put together as the product does.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use farshore::apply::engine::Engine;
use farshore::apply::heal::FetchClient;
use farshore::apply::reconcile::reconcile;
use farshore::link::{
    FetchSource, Hub, HubConfig, HubInputs, Leadership, PeerConfig, Receiving, SourceProgress, StartGate, StartRefusal,
    Transport as _, server,
};
use farshore::model::{
    AgentId, ClusterTime, CollectionUuid, Epoch, Incarnation, Position, SiteName, StreamHash, StreamId, hash, raw,
};
use farshore::outbox::{Log, LogId, Logs};
use farshore::source::capture::{Capture, CaptureHandle, History, Phase};
use farshore::source::serving::{self, Course};
use farshore_api::replication::v1::{Fetch, Fetched};
use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::applier::SimTarget;
use crate::net::{PORT, SimTransport};
use crate::source::{SimTail, encode};
use crate::world::{Shared, lock};

/// The hosts: two agents per site.
pub(crate) const HOSTS: [&str; 4] = ["north", "north-b", "south", "south-b"];
const EPOCH: Epoch = Epoch(1);
/// How often an agent looks at its lease.
const LEASE: Duration = Duration::from_millis(250);
const HEARTBEAT: Duration = Duration::from_millis(500);

pub(crate) fn site_of(host: &str) -> &'static str {
    if host.starts_with("north") { "north" } else { "south" }
}

pub(crate) fn site(name: &str) -> SiteName {
    SiteName::try_from(name).expect("a valid name")
}

pub(crate) fn stream() -> StreamId {
    StreamId { source: site("north"), target: site("south") }
}

/// Runs one process; it is ended from outside.
pub(crate) async fn run(world: Shared, host: &'static str) -> turmoil::Result {
    let reason = process(&world, host).await;
    lock(&world).exit(host, reason);
    std::future::pending().await
}

fn hub_config(world: &Shared, host: &str, agent: AgentId) -> HubConfig {
    let (own, peer) = (site_of(host), if site_of(host) == "north" { "south" } else { "north" });
    let world = lock(world);
    let dial = world.settings.both_dial || own == "north";
    let addresses = vec![format!("{peer}:{PORT}"), format!("{peer}-b:{PORT}")];
    HubConfig {
        site: site(own),
        group: "bank".into(),
        agent,
        epoch: EPOCH,
        originates: own == "north",
        receives: if own == "south" { vec![site("north")] } else { Vec::new() },
        peers: vec![PeerConfig { site: site(peer), addresses, dial }],
        credit: world.settings.credit,
        seed: u64::from(agent.0[0]),
    }
}

async fn process(world: &Shared, host: &'static str) -> String {
    let (store, process) = lock(world).boot(host);
    let settings = lock(world).settings;
    let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
    let logs = Logs::start_with_ring(Arc::new(store), settings.quota, &tasks, settings.ring).expect("a good store");
    let lease = watch::Sender::new(Leadership::default());
    let carrying = watch::Sender::new(Leadership::default());
    let progress = watch::Sender::new(SourceProgress::default());
    let applied = watch::Sender::new(None);
    let transport = Arc::new(SimTransport::new(site(site_of(host)), tasks.clone()));
    let listener = transport.listen("", cancel.clone()).await.expect("the port is free");
    let gate = Arc::new(SimGate { world: world.clone(), outbox: logs.log(&LogId::Outbox), capture: OnceLock::new() });
    let inputs = HubInputs {
        logs: logs.clone(),
        leadership: carrying.subscribe(),
        progress: progress.subscribe(),
        applied: BTreeMap::from([(site("north"), applied.subscribe())]),
        fetch: Arc::new(SimFetch(world.clone())),
        gate: gate.clone(),
        transport,
        clock: Arc::new(|| 0),
    };
    let hub = Hub::start(hub_config(world, host, logs.agent_id()), inputs, &tasks, cancel.clone());
    lock(world).agents.get_mut(host).expect("known").hub = Some(hub.clone());
    let mut parts: JoinSet<String> = JoinSet::new();
    parts.spawn(keep_lease(world.clone(), host, process, lease.clone()));
    let mut deposed = hub.deposed();
    parts.spawn(async move {
        let term = deposed.wait_for(Option::is_some).await.map(|term| *term);
        match term {
            Ok(term) => format!("deposed by term {term:?}"),
            Err(_) => std::future::pending().await,
        }
    });
    let serving = hub.clone();
    let until = cancel.clone();
    parts.spawn(async move {
        let ended = server::serve(&serving, Default::default(), listener, until).await;
        format!("the server ended: {ended:?}")
    });
    let target = Arc::new(SimTarget::new(world.clone(), host));
    if site_of(host) == "north" {
        let host = (host, process);
        originate(world, host, &hub, &logs, &gate, lease.subscribe(), progress, &tasks, &mut parts);
        let mut lease = lease.subscribe();
        parts.spawn(async move {
            loop {
                carrying.send_replace(*lease.borrow_and_update());
                if lease.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        });
    } else {
        let inbox = logs.log(&LogId::Inbox(site("north")));
        let applying = watch::Sender::new(Leadership::default());
        let leading = applying.subscribe();
        parts.spawn(lead(target.clone(), inbox.clone(), lease.subscribe(), carrying.clone(), applying));
        parts.spawn(apply(world.clone(), host, target, inbox, hub, leading, applied, cancel));
    }
    match parts.join_next().await {
        Some(Ok(reason)) => reason,
        other => format!("a part ended: {other:?}"),
    }
}

async fn keep_lease(world: Shared, host: &'static str, process: u64, lease: watch::Sender<Leadership>) -> String {
    loop {
        let held = *lease.borrow();
        let granted = lock(&world).renew(host, process, held);
        match granted {
            // Out of touch with its database, it goes on as it was.
            None => {}
            Some(None) if held.leader => return "another agent holds the lease".into(),
            Some(None) => {}
            Some(Some(term)) if held.leader && held.term != term => return "the lease changed hands and back".into(),
            Some(Some(term)) if !held.leader => drop(lease.send_replace(Leadership { leader: true, term })),
            Some(Some(_)) => {}
        }
        tokio::time::sleep(LEASE).await;
    }
}

/// The inbox is put in order before streams flow.
async fn lead(
    target: Arc<SimTarget>,
    inbox: Log,
    mut lease: watch::Receiver<Leadership>,
    carrying: watch::Sender<Leadership>,
    applying: watch::Sender<Leadership>,
) -> String {
    loop {
        let now = *lease.borrow_and_update();
        if now.leader {
            while reconcile(&*target, &inbox, EPOCH).await.is_err() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        carrying.send_replace(now);
        applying.send_replace(now);
        tokio::select! {
            biased;
            changed = lease.changed() => if changed.is_err() {
                std::future::pending::<()>().await;
            },
            () = tokio::time::sleep(Duration::from_secs(1)), if now.leader && inbox.state().is_none() => {}
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "what the product's agent joins, in one place")]
async fn apply(
    world: Shared,
    host: &'static str,
    target: Arc<SimTarget>,
    inbox: Log,
    hub: Hub,
    mut leading: watch::Receiver<Leadership>,
    applied: watch::Sender<Option<Position>>,
    cancel: CancellationToken,
) -> String {
    let Ok(leading) = leading.wait_for(|now| now.leader).await.map(|now| *now) else { return "closed".into() };
    let options = lock(&world).settings.options;
    let fetch = Arc::new(LinkFetch(hub, tokio::sync::Mutex::default()));
    let (engine, mut status) = Engine::new(target, fetch, site("north"), inbox, leading.term, options);
    let forward = async {
        loop {
            let now = status.borrow_and_update().clone();
            applied.send_if_modified(|applied| {
                let moved = *applied != now.applied;
                *applied = now.applied;
                moved
            });
            lock(&world).seen(host, now);
            if status.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        biased;
        ended = engine.run(cancel) => format!("apply ended: {ended:?}"),
        () = forward => unreachable!("forwarding never ends"),
    }
}

#[expect(clippy::too_many_arguments, reason = "what the product's agent joins, in one place")]
fn originate(
    world: &Shared,
    (host, process): (&'static str, u64),
    hub: &Hub,
    logs: &Logs,
    gate: &SimGate,
    lease: watch::Receiver<Leadership>,
    progress: watch::Sender<SourceProgress>,
    tasks: &TaskTracker,
    parts: &mut JoinSet<String>,
) {
    let (outbox, nudge) = (logs.log(&LogId::Outbox), Arc::new(Notify::new()));
    let history = History { incarnation: incarnation(), epoch: EPOCH };
    let (capture, handle) = Capture::new(SimTail(world.clone()), outbox.clone(), history, nudge.clone());
    let begun = lock(world).beginning;
    if outbox.state().is_none() {
        let handle = handle.clone();
        tasks.spawn(async move { drop(handle.begin(begun, StreamHash::default()).await) });
    }
    let status = handle.status();
    assert!(gate.capture.set(handle).is_ok(), "set once");
    parts.spawn(async move { format!("capture ended: {:?}", capture.run(CancellationToken::new()).await) });
    let of = world.clone();
    parts.spawn(async move {
        loop {
            if lease.borrow().leader {
                let mut world = lock(&of);
                if world.source_up().is_ok() {
                    let now = world.now;
                    world.source.mark(now);
                }
            }
            tokio::select! {
                biased;
                () = nudge.notified() => tokio::time::sleep(Duration::from_millis(20)).await,
                () = tokio::time::sleep(HEARTBEAT) => {}
            }
        }
    });
    let (of, hub) = (world.clone(), hub.clone());
    parts.spawn(async move {
        loop {
            let captured = outbox.state().map(|state| state.end);
            let lost = matches!(status.borrow().phase, Phase::Lost(_));
            let now = SourceProgress { head: lock(&of).source.clock, captured, lost, ..SourceProgress::default() };
            progress.send_if_modified(|old| std::mem::replace(old, now) != now);
            let own = hub.stream_view(&stream()).and_then(|view| view.applied);
            let applied = own.or(lock(&of).tell(host, process, own));
            if let (Some(applied), Some(state)) = (applied, outbox.state()) {
                outbox.release(state.incarnation, applied);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
    lock(world).log(format!("{host} originates"));
}

fn incarnation() -> Incarnation {
    Incarnation([0x11; 16])
}

struct SimGate {
    world: Shared,
    outbox: Log,
    capture: OnceLock<CaptureHandle>,
}

fn refusal(message: &str) -> StartRefusal {
    StartRefusal { message: message.to_owned(), hint: String::new() }
}

impl StartGate for SimGate {
    fn receiving<'a>(&'a self, source: &'a SiteName) -> BoxFuture<'a, Result<Receiving, StartRefusal>> {
        Box::pin(async move {
            let wait = lock(&self.world).latency();
            tokio::time::sleep(wait).await;
            let world = lock(&self.world);
            if world.target_is_up() && !world.target.collections.is_empty() {
                return Err(refusal("the target is not empty"));
            }
            Ok(Receiving { source: source.clone(), received: None, start_at: None, empty: true })
        })
    }

    fn serve_from<'a>(&'a self, _: &'a SiteName, receiving: &'a Receiving) -> BoxFuture<'a, Result<(), StartRefusal>> {
        Box::pin(async move {
            let capture = self.capture.get().ok_or_else(|| refusal("the source was not reached yet"))?;
            let (at, hash) = match receiving.received {
                Some(standing) => (standing.position, standing.hash),
                None => (lock(&self.world).beginning, StreamHash::default()),
            };
            match serving::settled(&self.outbox, incarnation(), capture, at).await {
                Course::Serve => return Ok(()),
                Course::Begin => {}
                Course::Lost(lost) => return Err(refusal(&lost.reason)),
                Course::Unsettled(reason) => return Err(refusal(&reason)),
            }
            {
                let world = &mut *lock(&self.world);
                if world.source.oldest > at.time {
                    // An agent that does not know yet that another has taken over may ask for what nobody needs any more.
                    if world.target.stream.as_ref().is_some_and(|stream| stream.record.floor > at) {
                        return Err(refusal("history lost"));
                    }
                    world.broken(format!("history is lost at {at}, the oplog begins at {}", world.source.oldest));
                    return Err(refusal("history lost"));
                }
                world.log(format!("the outbox begins again at {at}"));
                let lost = matches!(capture.status().borrow().phase, Phase::Lost(_));
                world.counts.begun_again += u64::from(lost);
            }
            capture.begin(at, hash).await.map_err(|error| refusal(&error.to_string()))
        })
    }
}

/// Reads documents at the source, all at one time past everything captured.
struct SimFetch(Shared);

impl FetchSource for SimFetch {
    fn fetch(&self, request: Fetch) -> BoxFuture<'_, Fetched> {
        Box::pin(async move {
            let wait = lock(&self.0).latency();
            tokio::time::sleep(wait).await;
            let mut world = lock(&self.0);
            if let Err(error) = world.source_up() {
                return Fetched { error: error.to_string(), ..Fetched::default() };
            }
            let at: ClusterTime = world.source.clock;
            let uuid = CollectionUuid::from_slice(&request.collection_uuid).expect("16 bytes");
            let Some(collection) = world.source.collections.get(&uuid) else {
                return Fetched { at: at.0, collection_gone: true, ..Fetched::default() };
            };
            let document = |key: &Bytes| {
                let key = bson::RawDocument::from_bytes(key).expect("a key");
                let identity = hash::key_identity(&raw::get(key, "_id").expect("an _id"));
                collection.documents.get(&identity).map(encode).unwrap_or_default()
            };
            let documents = request.keys.iter().map(document).collect();
            world.counts.fetches += 1;
            Fetched { at: at.0, documents, ..Fetched::default() }
        })
    }
}

/// One fetch at a time: tokio wakes those that wait for one watch in an order of its own, which would differ between
/// two runs of one seed. For the same reason no watch here has two that wait for it within one host.
struct LinkFetch(Hub, tokio::sync::Mutex<()>);

impl FetchClient for LinkFetch {
    async fn fetch(&self, source: &SiteName, request: Fetch) -> Result<Fetched, String> {
        let _turn = self.1.lock().await;
        self.0.fetch(source, request).await.map_err(|error| error.to_string())
    }
}
