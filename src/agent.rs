//! The agent: puts the modules together, in the order in which they depend on each other, and runs them until told to
//! stop.
//!
//! The originating site captures and serves; a standby receives and applies. Every agent of a site captures or receives
//! into its own disk; only the one that holds the site's lease ships and applies.

mod clients;
mod console;
mod counts;
mod credentials;
mod gate;
mod process;
mod ready;
mod release;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use farshore_api::tls::Reloading;
use mongodb::Client;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::control::ControlService;
use crate::admin::health::{self, Health, HealthServer, Heartbeat as Liveness, Latch, Readiness};
use crate::admin::metrics::Metrics;
use crate::admin::telemetry;
use crate::apply::engine::{self, Engine};
use crate::apply::mongo::MongoTarget;
use crate::apply::reconcile::reconcile;
use crate::apply::status::ApplyStatus;
use crate::config::{self, Config};
use crate::lease::{Applied, Lease};
use crate::link::{Hub, HubConfig, HubInputs, Leadership, PeerConfig, SourceProgress, TlsTransport, Transport as _};
use crate::model::{Epoch, Position, SiteName, StreamId};
use crate::mongo;
use crate::outbox::{EncryptionKey, LogId, Logs, Quota, RocksOptions, RocksStore, Store};
use crate::source::capture::{Capture, CaptureStatus, History, Phase};
use crate::source::fetch::Fetcher;
use crate::source::heartbeat::{Head, Heartbeat};
use crate::source::origin;
use crate::source::tail::MongoTail;
use crate::supervisor::{Stage, Stop, Supervisor};
use console::{AgentConsole, MongoView};

/// Until groups are stored in MongoDB there is one epoch.
pub const EPOCH: Epoch = Epoch(1);
/// Oldest MongoDB with what the agent needs (6.0: expanded events, `collectionUUID`).
const WIRE_6_0: i32 = 17;
const WATCH_MONGO: Duration = Duration::from_secs(5);

type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Runs an agent in the foreground; the verb `farshore agent`.
pub fn run(path: &Path) -> ExitCode {
    process::bound_allocator();
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::from(2);
        }
    };
    let over = std::env::var(telemetry::LEVEL_VARIABLE).ok();
    if let Err(error) = telemetry::init(config.log.format, &config.log.level, over.as_deref()) {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    process::abort_on_panic();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let stop = match runtime {
        Ok(runtime) => {
            let stop = runtime.block_on(Agent::run(Arc::new(config)));
            process::end(runtime);
            stop
        }
        Err(error) => Err(format!("cannot start the runtime: {error}")),
    };
    match stop {
        Ok(Stop::Requested) => ExitCode::SUCCESS,
        Ok(Stop::Renewed) => process::start_again(),
        Ok(Stop::Ended { task, reason }) => {
            tracing::error!(task, reason, "the agent stops");
            ExitCode::FAILURE
        }
        Err(reason) => {
            tracing::error!(reason, "the agent cannot run");
            ExitCode::FAILURE
        }
    }
}

/// What every part of the agent is made from.
struct Agent {
    config: Arc<Config>,
    tasks: TaskTracker,
    supervisor: Supervisor,
    client: Client,
    credentials: credentials::Credentials,
    logs: Arc<Logs>,
    lease: watch::Sender<Leadership>,
    /// What this agent tells the site's others through the lease, and what it hears from the one that leads.
    told: watch::Sender<Option<Applied>>,
    heard: watch::Sender<Option<Applied>>,
    /// What the link sees: leading only when the inbox is in order.
    carrying: watch::Sender<Leadership>,
    mongo: watch::Sender<MongoView>,
    head: watch::Sender<Head>,
    progress: watch::Sender<SourceProgress>,
    capture: watch::Sender<CaptureStatus>,
    applied: watch::Sender<Option<Position>>,
    apply: watch::Sender<ApplyStatus>,
}

impl Agent {
    async fn run(config: Arc<Config>) -> Result<Stop, String> {
        for warning in &config.warnings {
            tracing::warn!(key = warning.key, "{}; {}", warning.what, warning.mend);
        }
        let mut signals = process::Signals::catch()?;
        let (readiness, startup) = Readiness::new();
        let metrics = Arc::new(Metrics::new());
        let alive = Arc::new(Liveness::new(Instant::now()));
        let _health = serve_health(&config, &readiness, &alive, &metrics)?;
        let tls = Arc::new(config.open_tls().map_err(|error| format!("tls.certificate_file: {error}"))?);
        let tasks = TaskTracker::new();
        let logs = open_logs(&config, &tasks).await?;
        let connections = u32::try_from(config.apply.workers).unwrap_or(64) + 12;
        let credentials = credentials::Credentials::read(&config.mongodb)?;
        let client = clients::connect(&config.mongodb, connections).await?;
        let mut agent = Self {
            tasks,
            supervisor: Supervisor::new(),
            client,
            credentials,
            logs,
            lease: watch::Sender::default(),
            told: watch::Sender::default(),
            heard: watch::Sender::default(),
            carrying: watch::Sender::default(),
            mongo: watch::Sender::default(),
            head: watch::Sender::default(),
            progress: watch::Sender::default(),
            capture: watch::Sender::default(),
            applied: watch::Sender::default(),
            apply: watch::Sender::default(),
            config,
        };
        agent.start(tls, alive, metrics, &readiness, startup).await?;
        let stop = agent.wait(&mut signals).await;
        let _stopping = readiness.latch("stopping");
        agent.stop().await;
        // Who wants it to end gets that, whatever it was about to do.
        Ok(if signals.came() { Stop::Requested } else { stop })
    }

    fn originates(&self) -> bool {
        self.config.group.primary == self.config.site.name
    }

    /// The site whose changes are received here.
    fn source(&self) -> Option<SiteName> {
        (!self.originates()).then(|| self.config.group.primary.clone())
    }

    async fn start(
        &mut self,
        tls: Arc<Reloading>,
        alive: Arc<Liveness>,
        metrics: Arc<Metrics>,
        readiness: &Readiness,
        startup: Latch,
    ) -> Result<(), String> {
        let intake = self.supervisor.token(Stage::Intake);
        let transport = Arc::new(TlsTransport::new(tls.clone(), self.tasks.clone()));
        let listening = transport.listen(&self.config.link.listen.to_string(), intake.clone()).await;
        let listener = listening
            .map_err(|error| format!("cannot listen on {} (link.listen): {error}", self.config.link.listen))?;
        let gate = Arc::new(gate::Gate {
            client: self.client.clone(),
            outbox: self.logs.log(&LogId::Outbox),
            start_at: self.config.apply.start_at,
            source: ArcSwapOption::empty(),
        });
        let hub = Arc::new(self.start_hub(&gate, transport, intake.clone()));
        self.follow_lease(&hub);
        if self.originates() {
            self.start_source(gate);
            self.release_outbox(&hub);
        } else {
            self.watch_mongo();
        }
        if let Some(source) = self.source() {
            self.start_apply(source, hub.clone());
        }
        let console = Arc::new(self.console(hub.clone()));
        let seen = console.clone();
        metrics.observe(move || seen.observation());
        let (renewing, expiring) = (hub.clone(), tls.clone());
        let own_certificate = move || {
            metrics.own_certificate_expires(expiring.expires().saturating_mul(1000));
            renewing.renew_sessions(expiring.generation());
        };
        own_certificate();
        let control = ControlService::new(console, intake.clone()).into_server();
        let routes = tonic::service::Routes::new(control);
        let serve_until = intake.clone();
        self.supervisor.spawn(Stage::Intake, "server", async move {
            crate::link::server::serve(&hub, routes, listener, serve_until).await
        });
        self.supervisor.spawn(Stage::Intake, "certificates", async move {
            crate::link::follow_files(tls, own_certificate, intake).await;
            Ok(())
        });
        let base = self.supervisor.token(Stage::Base);
        self.supervisor.spawn(Stage::Base, "liveness", beat(alive, base.clone()));
        let ready = ready::Ready::new(readiness.clone(), self.mongo.subscribe(), self.capture.subscribe());
        self.supervisor.spawn(Stage::Base, "readiness", ready.follow(base));
        drop(startup);
        tracing::info!(site = %self.config.site.name, group = self.config.group.name, listen = %self.config.link.listen, agent = %self.logs.agent_id(), "agent started");
        Ok(())
    }

    fn start_hub(&self, gate: &Arc<gate::Gate>, transport: Arc<TlsTransport>, cancel: CancellationToken) -> Hub {
        let peer = |peer: &config::Peer| PeerConfig {
            site: peer.site.clone(),
            addresses: peer.addresses.clone(),
            dial: peer.dial,
        };
        let applied =
            self.source().map(|source| (source, self.applied.subscribe())).into_iter().collect::<BTreeMap<_, _>>();
        let agent = self.logs.agent_id();
        let config = HubConfig {
            site: self.config.site.name.clone(),
            group: self.config.group.name.clone(),
            agent,
            epoch: EPOCH,
            originates: self.originates(),
            receives: self.source().into_iter().collect(),
            peers: self.config.peers.iter().map(peer).collect(),
            credit: self.config.link.credit.0,
            seed: u64::from_le_bytes(agent.0[..8].try_into().expect("16 bytes")),
        };
        let outbox = self.logs.log(&LogId::Outbox);
        let inputs = HubInputs {
            logs: self.logs.clone(),
            leadership: self.carrying.subscribe(),
            progress: self.progress.subscribe(),
            applied,
            fetch: Arc::new(gate::Fetches { fetcher: Fetcher::new(self.client.clone()), outbox }),
            gate: gate.clone(),
            transport,
            clock: wall_clock(),
        };
        Hub::start(config, inputs, &self.tasks, cancel)
    }

    fn console(&self, hub: Arc<Hub>) -> AgentConsole {
        AgentConsole {
            config: self.config.clone(),
            logs: self.logs.clone(),
            hub,
            clock: wall_clock(),
            leadership: self.lease.subscribe(),
            mongo: self.mongo.subscribe(),
            head: self.head.subscribe(),
            progress: self.progress.subscribe(),
            capture: self.capture.subscribe(),
            apply: self.source().map(|source| (source, self.apply.subscribe())),
        }
    }

    /// Keeps the lease; when it is gained, the inbox is put in order before streams flow.
    fn follow_lease(&mut self, hub: &Arc<Hub>) {
        let lease = Lease::new(
            self.client.clone(),
            self.config.group.name.clone(),
            self.logs.agent_id(),
            self.config.lease.ttl,
            self.lease.clone(),
            self.told.subscribe(),
            self.heard.clone(),
        );
        let intake = self.supervisor.token(Stage::Intake);
        self.supervisor.spawn(
            Stage::Intake,
            "lease",
            async move { lease.run(intake).await.map_err(|e| e.to_string()) },
        );
        let mut deposed = hub.deposed();
        let intake = self.supervisor.token(Stage::Intake);
        self.supervisor.spawn(Stage::Intake, "fencing", async move {
            tokio::select! {
                () = intake.cancelled() => Ok(()),
                Ok(term) = deposed.wait_for(Option::is_some) => {
                    Err(format!("another agent of this site ships in term {}", term.unwrap_or_default()))
                }
            }
        });
        let (mut lease, carrying) = (self.lease.subscribe(), self.carrying.clone());
        let inbox = self.source().map(|source| {
            let stream = StreamId { source: source.clone(), target: self.config.site.name.clone() };
            (MongoTarget::new(self.client.clone(), stream), self.logs.log(&LogId::Inbox(source)))
        });
        let intake = self.supervisor.token(Stage::Intake);
        self.supervisor.spawn(Stage::Intake, "leadership", async move {
            loop {
                let now = *lease.borrow_and_update();
                if now.leader
                    && let Some((target, inbox)) = &inbox
                {
                    while let Err(error) = reconcile(target, inbox, EPOCH).await {
                        tracing::warn!(%error, "the inbox cannot be put in order yet, retrying");
                        tokio::select! {
                            () = intake.cancelled() => return Ok(()),
                            () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        }
                    }
                }
                carrying.send_replace(now);
                // Until something is received, an agent that has lost the lease may still begin the stream: then it goes on
                // from there, so it is looked at again.
                let fresh = now.leader && inbox.as_ref().is_some_and(|(_, inbox)| inbox.state().is_none());
                tokio::select! {
                    () = intake.cancelled() => return Ok(()),
                    changed = lease.changed() => if changed.is_err() { return Ok(()) },
                    () = tokio::time::sleep(Duration::from_secs(1)), if fresh => {}
                }
            }
        });
    }

    /// Capture and heartbeat begin when MongoDB was reached and understood for the first time.
    fn start_source(&mut self, gate: Arc<gate::Gate>) {
        let intake = self.supervisor.token(Stage::Intake);
        let parts = SourceParts {
            client: self.client.clone(),
            config: self.config.clone(),
            gate,
            outbox: self.logs.log(&LogId::Outbox),
            site: self.config.site.name.clone(),
            interval: self.config.link.heartbeat,
            leadership: self.lease.subscribe(),
            mongo: self.mongo.clone(),
            head: self.head.clone(),
            progress: self.progress.clone(),
            capture: self.capture.clone(),
        };
        self.supervisor.spawn(Stage::Intake, "capture", parts.run(intake));
    }

    /// Nothing is kept in the outbox that every target has applied, beyond what retention asks for.
    fn release_outbox(&mut self, hub: &Arc<Hub>) {
        let outbox = self.logs.log(&LogId::Outbox);
        let release = release::Release::new(&self.config, hub, outbox, &self.told, &self.heard);
        let intake = self.supervisor.token(Stage::Intake);
        self.supervisor.spawn(Stage::Intake, "release", release.run(intake));
    }

    fn watch_mongo(&mut self) {
        let (client, mongo, head) = (self.client.clone(), self.mongo.clone(), self.head.clone());
        let config = self.config.clone();
        let intake = self.supervisor.token(Stage::Intake);
        self.supervisor.spawn(Stage::Intake, "mongodb", async move {
            let mut flapping = telemetry::Flapping::default();
            loop {
                let view = look_at_mongo(&client, &config.mongodb, &mut flapping).await;
                if let Ok(Some(oldest)) = mongo::oldest_oplog_time(&client).await {
                    head.send_modify(|head| head.oldest = oldest);
                }
                if let Ok(Ok(info)) = mongo::server_info(&client).await {
                    head.send_modify(|head| head.time = head.time.max(info.majority_time));
                }
                mongo.send_replace(view.0);
                tokio::select! {
                    () = intake.cancelled() => return Ok(()),
                    () = tokio::time::sleep(WATCH_MONGO) => {}
                }
            }
        });
    }

    /// Applies while this agent leads; a lost lease ends the process, so leading is only ever gained here.
    fn start_apply(&mut self, source: SiteName, hub: Arc<Hub>) {
        let stream = StreamId { source: source.clone(), target: self.config.site.name.clone() };
        let (mut carrying, applied, apply) = (self.carrying.subscribe(), self.applied.clone(), self.apply.clone());
        let inbox = self.logs.log(&LogId::Inbox(source.clone()));
        let target = Arc::new(MongoTarget::new(self.client.clone(), stream));
        let options = engine::Options {
            workers: self.config.apply.workers,
            memory: apply_memory(self.config.memory.limit.0),
            adopted: self.config.apply.start_at.is_some(),
            clock: wall_ms,
        };
        let work = self.supervisor.token(Stage::Work);
        self.supervisor.spawn(Stage::Work, "apply", async move {
            let leading = work.run_until_cancelled(carrying.wait_for(|now| now.leader)).await;
            let Some(Ok(leading)) = leading.map(|l| l.map(|l| *l)) else { return Ok(()) };
            let fetch = Arc::new(gate::LinkFetch(hub));
            let (engine, mut status) = Engine::new(target, fetch, source, inbox, leading.term, options);
            let forward = async {
                loop {
                    let now = status.borrow_and_update().clone();
                    applied.send_if_modified(|applied| {
                        let moved = *applied != now.applied;
                        *applied = now.applied;
                        moved
                    });
                    apply.send_replace(now);
                    if status.changed().await.is_err() {
                        return;
                    }
                }
            };
            let (result, ()) = tokio::join!(engine.run(work.clone()), forward);
            result.map_err(|error| error.to_string())
        });
    }

    async fn wait(&mut self, signals: &mut process::Signals) -> Stop {
        let stop = tokio::select! {
            biased;
            () = signals.next() => Stop::Requested,
            stop = self.supervisor.failed() => stop,
            reason = self.logs.until_failed() => Stop::Ended { task: "logs", reason },
            () = self.credentials.renewed() => Stop::Renewed,
        };
        if matches!(stop, Stop::Renewed) {
            tracing::info!("the login to MongoDB was changed and works: the agent starts again with it");
        }
        tracing::info!(?stop, "stopping");
        stop
    }

    async fn stop(self) {
        self.supervisor.shut_down().await;
        self.logs.close().await;
        self.tasks.close();
        if tokio::time::timeout(Duration::from_secs(5), self.tasks.wait()).await.is_err() {
            tracing::warn!("some sessions did not end in time");
        }
        // Else its last handle, wherever that is dropped, would start to end sessions while the runtime ends.
        let ended = self.client.shutdown().immediate(true);
        drop(tokio::time::timeout(process::ENDING, async { ended.await }).await);
        tracing::info!("stopped");
    }
}

/// Part of the memory limit for changes on their way to lanes: the rest is RocksDB, rings, the link, the driver.
fn apply_memory(limit: u64) -> usize {
    usize::try_from(limit / 16).unwrap_or(usize::MAX)
}

struct SourceParts {
    client: Client,
    config: Arc<Config>,
    gate: Arc<gate::Gate>,
    outbox: crate::outbox::Log,
    site: SiteName,
    interval: Duration,
    leadership: watch::Receiver<Leadership>,
    mongo: watch::Sender<MongoView>,
    head: watch::Sender<Head>,
    progress: watch::Sender<SourceProgress>,
    capture: watch::Sender<CaptureStatus>,
}

impl SourceParts {
    async fn run(self, cancel: CancellationToken) -> Result<(), String> {
        let mut flapping = telemetry::Flapping::default();
        let started = loop {
            if let Some(started) = self.look(&mut flapping).await {
                break started;
            }
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        };
        let (history, beginning) = started;
        let nudge = Arc::new(Notify::new());
        let (capture, handle) =
            Capture::new(MongoTail::new(self.client.clone()), self.outbox.clone(), history, nudge.clone());
        let status = handle.status();
        let incarnation = history.incarnation;
        // A source that was found empty captures from there at once: whoever comes later finds it all.
        let untouched = beginning.collections.is_empty()
            && self.outbox.state().is_none_or(|state| state.incarnation != incarnation);
        let (early, at) = (handle.clone(), Position::through(beginning.at));
        let client = self.client.clone();
        let begin = async move {
            // Where the oplog no longer reaches back, only what a target has says where to begin.
            let kept =
                untouched && mongo::oldest_oplog_time(&client).await.is_ok_and(|o| o.is_some_and(|o| o <= at.time));
            if kept && let Err(error) = early.begin(at, Default::default()).await {
                tracing::debug!(%error, "the stream begins when a target asks for it");
            }
            std::future::pending().await
        };
        self.gate.source.store(Some(Arc::new(gate::Source { capture: handle, incarnation, beginning })));
        let (leader, follow_leader) = self.leader();
        let heartbeat = Heartbeat {
            client: self.client.clone(),
            site: self.site.clone(),
            epoch: EPOCH,
            interval: self.interval,
            nudge,
            leader,
            head: self.head.clone(),
        };
        tokio::select! {
            result = capture.run(cancel.clone()) => result.map_err(|error| error.to_string()),
            () = self.publish(status) => Ok(()),
            () = follow_leader => Ok(()),
            () = begin => Ok(()),
            () = async { heartbeat.run(cancel.clone()).await; std::future::pending().await } => Ok(()),
            () = self.watch(&mut flapping) => Ok(()),
        }
    }

    async fn look(&self, flapping: &mut telemetry::Flapping) -> Option<(History, origin::Beginning)> {
        let (view, info) = look_at_mongo(&self.client, &self.config.mongodb, flapping).await;
        self.mongo.send_replace(view);
        info?;
        let found = async {
            let origin = origin::load_or_create(&self.client).await?;
            let beginning = origin::beginning(&self.client, origin.incarnation).await?;
            Ok::<_, mongo::Failure>((origin, beginning))
        };
        match found.await {
            Ok((origin, beginning)) => Some((History { incarnation: origin.incarnation, epoch: EPOCH }, beginning)),
            Err(failure) => {
                flapping.warn(Instant::now(), "mongodb", &failure);
                self.mongo.send_modify(|view| (view.reachable, view.error) = (false, failure.to_string()));
                None
            }
        }
    }

    /// Keeps looking at MongoDB for the status.
    async fn watch(&self, flapping: &mut telemetry::Flapping) {
        loop {
            tokio::time::sleep(WATCH_MONGO).await;
            let (view, _) = look_at_mongo(&self.client, &self.config.mongodb, flapping).await;
            self.mongo.send_replace(view);
        }
    }

    fn leader(&self) -> (watch::Receiver<bool>, impl Future<Output = ()> + use<>) {
        let (sender, receiver) = watch::channel(false);
        let mut leadership = self.leadership.clone();
        let follow = async move {
            loop {
                sender.send_replace(leadership.borrow_and_update().leader);
                if leadership.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        (receiver, follow)
    }

    /// Joins what capture, the outbox and the heartbeat know into what the peers are told.
    async fn publish(&self, mut status: watch::Receiver<CaptureStatus>) {
        let (mut head, mut log) = (self.head.subscribe(), self.outbox.watch());
        loop {
            let (now, captured) = (status.borrow_and_update().clone(), log.borrow_and_update().as_ref().map(|s| s.end));
            let time = head.borrow_and_update().time;
            // What was captured is committed, so the head is at least there.
            let time = captured.map_or(time, |end| time.max(crate::model::ClusterTime(end.time.0.saturating_sub(1))));
            let progress = SourceProgress {
                head: time,
                captured,
                captured_changes: now.flow.changes(),
                captured_bytes: now.flow.bytes,
                lost: matches!(now.phase, Phase::Lost(_)),
            };
            self.progress.send_if_modified(|old| {
                let moved = *old != progress;
                *old = progress;
                moved
            });
            self.capture.send_replace(now);
            tokio::select! {
                Ok(()) = status.changed() => {}
                Ok(()) = head.changed() => {}
                Ok(()) = log.changed() => {}
                else => std::future::pending().await,
            }
        }
    }
}

async fn look_at_mongo(
    client: &Client,
    config: &config::MongoDb,
    flapping: &mut telemetry::Flapping,
) -> (MongoView, Option<mongo::ServerInfo>) {
    let refused = |error: String| MongoView { error, ..MongoView::default() };
    match mongo::server_info(client).await {
        Ok(Ok(info)) if info.wire_version < WIRE_6_0 => {
            let error = format!("MongoDB {} is too old: 6.0 or later is needed", info.version);
            flapping.warn(Instant::now(), "mongodb", &error);
            (refused(error), None)
        }
        Ok(Ok(info)) => {
            flapping.recovered(Instant::now(), "mongodb");
            let view = MongoView {
                reachable: true,
                replica_set: info.replica_set.clone(),
                version: info.version.clone(),
                ..MongoView::default()
            };
            (view, Some(info))
        }
        Ok(Err(reason)) => {
            flapping.warn(Instant::now(), "mongodb", &reason);
            (refused(reason.to_owned()), None)
        }
        Err(failure) => {
            let known = if failure.is_transient() { clients::diagnose(config).await } else { None };
            let error = known.unwrap_or_else(|| failure.to_string());
            flapping.warn(Instant::now(), "mongodb", &error);
            (refused(error), None)
        }
    }
}

async fn beat(alive: Arc<Liveness>, stop: CancellationToken) -> Result<(), String> {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        alive.beat(Instant::now());
    }
    Ok(())
}

fn wall_clock() -> Clock {
    Arc::new(wall_ms)
}

fn wall_ms() -> i64 {
    bson::DateTime::now().timestamp_millis()
}

fn serve_health(
    config: &Config,
    readiness: &Readiness,
    alive: &Arc<Liveness>,
    metrics: &Arc<Metrics>,
) -> Result<HealthServer, String> {
    let health = Health {
        readiness: readiness.clone(),
        heartbeat: alive.clone(),
        metrics: metrics.clone(),
        stale_after: health::STALE_AFTER,
    };
    health::serve(config.admin.listen, health).map_err(|error| error.to_string())
}

async fn open_logs(config: &Arc<Config>, tasks: &TaskTracker) -> Result<Arc<Logs>, String> {
    let key = config.data.encryption_key_file.as_deref().map(config::secret::read_encryption_key).transpose();
    let key = key.map_err(|error| error.to_string())?.map(|key| EncryptionKey::new(*key.expose()));
    let options = RocksOptions { key, ..RocksOptions::default() };
    let directory = config.data.directory.clone();
    let opened = tokio::task::spawn_blocking(move || RocksStore::open(&directory, &options)).await;
    let store = opened.map_err(|error| error.to_string())?.map_err(|error| format!("data.directory: {error}"))?;
    let store: Arc<dyn Store> = Arc::new(store);
    let quota = Quota {
        limit_bytes: config.data.outbox_limit.0,
        retention_bytes: config.data.retention.0,
        retention_time: config.data.retention_time,
    };
    Logs::start(store, quota, tasks).map_err(|error| format!("data.directory: {error}"))
}
