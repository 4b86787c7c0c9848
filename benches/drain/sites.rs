//! Two sites with their agents, and a backlog drained from one to the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bson::{Timestamp, doc};
use farshore_api::control::v1::control_client::ControlClient;
use farshore_api::control::v1::{StatusRequest, StreamStatus};
use farshore_api::tls::{Expected, Reloading, TlsFiles};
use farshore_api::{ClusterTime, Position};
use farshore_testkit::agent::AgentProcess;
use farshore_testkit::mongo::{Options, User};
use farshore_testkit::pair::{Pair, PairOptions, Sets, Side};
use farshore_testkit::pki::{Identity, Role};
use farshore_testkit::process::Usage;
use farshore_testkit::wait;
use mongodb::Client;

use crate::load::Load;
use crate::report::Drained;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(900);
/// Between two looks at a drain: short against it, and cheap for the agent that is asked.
const LOOK: Duration = Duration::from_millis(20);

/// What runs while the backlog is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// No agent: capturing and shipping are part of the drain.
    BothStopped,
    /// The source agent: the drain begins with a filled outbox.
    Prefilled,
}

/// Servers big enough to measure with.
pub(crate) fn servers(members: usize) -> Options {
    Options { members, cache_gb: 3.0, oplog_mb: 12 * 1024, ..Options::default() }
}

pub(crate) struct Sites {
    pub(crate) pair: Pair,
    operator: Identity,
}

/// Usage of the four processes.
#[derive(Clone, Copy)]
pub(crate) struct Usages {
    pub(crate) source_mongod: Usage,
    pub(crate) target_mongod: Usage,
    pub(crate) source: Option<Usage>,
    pub(crate) target: Option<Usage>,
}

impl Sites {
    /// Starts empty sites and waits until the stream between them flows.
    pub(crate) async fn start() -> Result<Self> {
        let options = PairOptions { sets: Sets::New(servers(1)), ..PairOptions::default() };
        let pair = Pair::start(&options).await?;
        pair.wait_ready(Duration::from_secs(60)).await?;
        let operator = pair.pki.identity(Role::Operator, "bench")?;
        let sites = Self { pair, operator };
        let watch = sites.watch(Side::South).await?;
        wait::until("the stream to begin", Duration::from_secs(60), || async {
            let stream = watch.stream().await?;
            ensure!(stream.state == "streaming", "{} {}", stream.state, stream.reason);
            Ok(())
        })
        .await?;
        Ok(sites)
    }

    pub(crate) fn source(&self) -> Result<Client> {
        self.pair.north.mongo.client(User::Root)
    }

    pub(crate) fn agent(&mut self, side: Side) -> &mut AgentProcess {
        &mut self.pair.site(side).agents[0]
    }

    /// Connects to an agent's control service, as soon as it listens.
    pub(crate) async fn watch(&self, side: Side) -> Result<Watch> {
        let site = if side == Side::North { &self.pair.north } else { &self.pair.south };
        let address = site.agents[0].link_address().to_string();
        let files = TlsFiles {
            certificate: self.operator.certificate_file.clone(),
            key: self.operator.key_file.clone(),
            ca: self.operator.ca_file.clone(),
        };
        let tls = Arc::new(Reloading::load(files, "farshore")?);
        wait::until("the agent to listen", Duration::from_secs(60), || async {
            let channel = farshore_api::client::connect(&address, tls.clone(), Expected::AnySite).await?;
            anyhow::Ok(Watch { control: ControlClient::new(channel) })
        })
        .await
    }

    /// Waits until the target has everything the source has now.
    pub(crate) async fn settle(&self) -> Result<()> {
        let statement = doc! {"q": {"_id": "now"}, "u": {"$inc": {"n": 1}}, "upsert": true};
        let command = doc! {"update": "test", "updates": [statement], "writeConcern": {"w": "majority"}};
        let reply = self.source()?.database("farshore").run_command(command).await?;
        let now = Position::before(cluster_time(reply.get_timestamp("operationTime")?));
        let watch = self.watch(Side::South).await?;
        wait::until("the target to catch up", DEADLINE, || async {
            let stream = watch.stream().await?;
            let applied = stream.applied.map(Position::from);
            ensure!(applied >= Some(now), "{} {}: applied {applied:?} of {now}", stream.state, stream.reason);
            Ok(())
        })
        .await
    }

    /// Waits until the source agent has captured through `end`.
    pub(crate) async fn captured(&self, end: Position) -> Result<()> {
        let watch = self.watch(Side::North).await?;
        wait::until("the source agent to capture", DEADLINE, || async {
            let captured = watch.stream().await?.captured.map(Position::from);
            ensure!(captured >= Some(end), "captured {captured:?} of {end}");
            Ok(())
        })
        .await
    }

    pub(crate) fn usages(&mut self) -> Result<Usages> {
        Ok(Usages {
            source_mongod: self.pair.north.mongo.usage(0)?,
            target_mongod: self.pair.south.mongo.usage(0)?,
            source: self.agent(Side::North).usage().ok(),
            target: self.agent(Side::South).usage().ok(),
        })
    }

    /// Writes a backlog with agents stopped, then measures how it drains.
    pub(crate) async fn drain(&mut self, load: &Load, mode: Mode) -> Result<Drained> {
        let source = self.source()?;
        load.prepare(&source).await?;
        self.settle().await?;
        let ended = self.agent(Side::South).term().await?;
        ensure!(ended.success(), "the target agent ended with {ended}");
        if mode == Mode::BothStopped {
            let ended = self.agent(Side::North).term().await?;
            ensure!(ended.success(), "the source agent ended with {ended}");
        }
        let idle = self.usages()?;
        let end = Position::new(cluster_time(load.write(&source).await?), 1);
        if mode == Mode::Prefilled {
            self.captured(end).await?;
        }
        let before = self.usages()?;
        let start = Instant::now();
        self.agent(Side::South).restart()?;
        if mode == Mode::BothStopped {
            self.agent(Side::North).restart()?;
        }
        let watch = self.watch(Side::South).await?;
        let (first, done) = watch.drained(start, end).await?;
        let after = self.usages()?;
        let mut drained = Drained::new(load.changes, done - start, done - first, &before, &after);
        if mode == Mode::Prefilled {
            // Capture was before the clock started; the agent's price is still for both.
            drained.price_source_from(&idle, &after);
        }
        load.finish(&source).await?;
        self.settle().await?;
        Ok(drained)
    }
}

/// A connection to an agent's control service.
pub(crate) struct Watch {
    control: ControlClient<tonic::transport::Channel>,
}

impl Watch {
    /// The status of the stream.
    pub(crate) async fn stream(&self) -> Result<StreamStatus> {
        let asked = tokio::time::timeout(Duration::from_secs(5), self.control.clone().status(StatusRequest {})).await;
        asked.context("status")??.into_inner().streams.into_iter().next().context("no stream")
    }

    /// When the last look saw nothing applied yet, and when `end` was applied.
    pub(crate) async fn drained(&self, start: Instant, end: Position) -> Result<(Instant, Instant)> {
        let mut first = start;
        loop {
            let asked = Instant::now();
            let stream = self.stream().await?;
            if stream.changes == 0 {
                first = asked;
            }
            if stream.applied.map(Position::from) >= Some(end) {
                return Ok((first, Instant::now()));
            }
            if start.elapsed() > DEADLINE {
                bail!("not drained: {} {}, applied {:?} of {end}", stream.state, stream.reason, stream.applied);
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

pub(crate) fn cluster_time(time: Timestamp) -> ClusterTime {
    ClusterTime::new(time.time, time.increment)
}
