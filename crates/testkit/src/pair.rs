//! Two sites, `north` (primary) and `south`: a replica set and one or two agents each, and what lies between them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::future::try_join_all;

use crate::agent::{AgentConfig, AgentProcess, get};
use crate::mongo::{self, ReplicaSet, Warm};
use crate::pki::{Pki, Role};
use crate::proxy::faults::{Counts, Faults};
use crate::proxy::grpc::GrpcProxy;
use crate::proxy::tcp::{Direction, TcpProxy};
use crate::wait;

/// One of the two sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    North,
    South,
}

impl Side {
    /// The site's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::North => "north",
            Self::South => "south",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::North => Self::South,
            Self::South => Self::North,
        }
    }
}

/// Where the replica sets come from.
#[derive(Clone)]
pub enum Sets {
    /// From the pool of the test binary.
    Warm(Warm),
    /// New ones, as the test will damage them.
    New(mongo::Options),
}

/// What lies between agents of different sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    Nothing,
    /// A TCP proxy before every agent that is dialled.
    Tcp,
    /// A gRPC proxy before every agent that is dialled, with this seed.
    Grpc(u64),
}

/// How to make a pair; `..PairOptions::default()` for the rest.
#[derive(Clone)]
pub struct PairOptions {
    pub sets: Sets,
    /// Agents of each site, 1 or 2.
    pub agents: usize,
    /// The site that opens connections; none: both do.
    pub dialler: Option<Side>,
    pub between: Between,
    /// Section, key and value as TOML, for every agent.
    pub settings: Vec<(&'static str, &'static str, String)>,
}

impl Default for PairOptions {
    fn default() -> Self {
        Self { sets: Sets::Warm(Warm::One), agents: 1, dialler: None, between: Between::Nothing, settings: Vec::new() }
    }
}

/// One site.
pub struct Site {
    pub side: Side,
    pub mongo: ReplicaSet,
    pub agents: Vec<AgentProcess>,
}

/// Two sites and their link.
pub struct Pair {
    // Agents go before the databases and proxies they use.
    pub north: Site,
    pub south: Site,
    pub link: Link,
    pub pki: Pki,
}

/// The proxies between the sites, as one.
#[derive(Default)]
pub struct Link {
    tcp: Vec<(Side, TcpProxy)>,
    grpc: Vec<(Side, GrpcProxy)>,
}

impl Pair {
    /// Starts databases, proxies and agents; see [`Self::wait_ready`].
    pub async fn start(options: &PairOptions) -> Result<Self> {
        let pki = Pki::new("farshore")?;
        let (north_set, south_set) = tokio::try_join!(options.set(), options.set())?;
        let mut north = options.configs(Side::North, &north_set, &pki)?;
        let mut south = options.configs(Side::South, &south_set, &pki)?;
        let mut link = Link::default();
        // What each side dials lies behind proxies of its own.
        let dialled_by_north = link.lay(options, Side::South, &south, &pki).await?;
        let dialled_by_south = link.lay(options, Side::North, &north, &pki).await?;
        for (configs, peer, addresses) in
            [(&mut north, Side::South, dialled_by_north), (&mut south, Side::North, dialled_by_south)]
        {
            *configs = std::mem::take(configs).into_iter().map(|config| config.peer(peer.name(), &addresses)).collect();
        }
        let north = Site { side: Side::North, mongo: north_set, agents: start(north)? };
        let south = Site { side: Side::South, mongo: south_set, agents: start(south)? };
        Ok(Self { north, south, link, pki })
    }

    /// A site by name of its side.
    pub fn site(&mut self, side: Side) -> &mut Site {
        match side {
            Side::North => &mut self.north,
            Side::South => &mut self.south,
        }
    }

    /// Waits until each site has an agent that is ready.
    pub async fn wait_ready(&self, deadline: Duration) -> Result<()> {
        try_join_all([&self.north, &self.south].map(|site| site.wait_ready(deadline))).await?;
        Ok(())
    }

    /// [`AgentProcess::check_log`] of every agent.
    pub fn check_logs(&self, expected: &[&str]) -> Result<()> {
        let mut agents = self.north.agents.iter().chain(&self.south.agents);
        agents.try_for_each(|agent| agent.check_log(expected))
    }
}

impl Site {
    /// Waits until one of its agents is ready.
    pub async fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let what = format!("an agent of {} to be ready", self.side.name());
        wait::until(&what, deadline, || async {
            let mut said = Vec::new();
            for agent in &self.agents {
                match get(agent.admin_address(), "/readyz").await {
                    Ok(reply) if reply.status == 200 => return Ok(()),
                    Ok(reply) => said.push(format!("{} {}", reply.status, reply.body.trim())),
                    Err(error) => said.push(format!("{error:#}")),
                }
            }
            bail!("{}", said.join("; "))
        })
        .await
    }
}

impl PairOptions {
    async fn set(&self) -> Result<ReplicaSet> {
        match &self.sets {
            Sets::Warm(kind) => ReplicaSet::warm(*kind).await,
            Sets::New(options) => ReplicaSet::start(options.clone()).await,
        }
    }

    fn configs(&self, side: Side, set: &ReplicaSet, pki: &Pki) -> Result<Vec<AgentConfig>> {
        let config = |_| {
            let mut config = AgentConfig::new(side.name(), Side::North.name(), set, pki)?;
            for (section, key, value) in &self.settings {
                config.set(section, key, value);
            }
            Ok(config)
        };
        (0..self.agents).map(config).collect()
    }
}

fn start(configs: Vec<AgentConfig>) -> Result<Vec<AgentProcess>> {
    configs.into_iter().map(AgentProcess::start).collect()
}

impl Link {
    /// Closes all connections and refuses new ones; a gRPC proxy only ends its sessions.
    pub async fn cut(&self) -> Result<()> {
        for (_, proxy) in &self.grpc {
            proxy.cut();
        }
        try_join_all(self.tcp.iter().map(|(_, proxy)| proxy.cut())).await.context("cut the link")?;
        Ok(())
    }

    /// Ends cuts and holds.
    pub async fn heal(&self) -> Result<()> {
        try_join_all(self.tcp.iter().map(|(_, proxy)| proxy.heal())).await.context("heal the link")?;
        Ok(())
    }

    /// Holds what flows towards a site, with connections open.
    pub fn hold(&self, towards: Side) {
        for (dialled, proxy) in &self.tcp {
            proxy.hold(direction(*dialled, towards));
        }
    }

    /// The same delay each way.
    pub fn set_delay(&self, delay: Duration) {
        for (_, proxy) in &self.tcp {
            proxy.set_delay(delay);
        }
    }

    /// The same cap each way of each proxy, bytes per second.
    pub fn set_bandwidth(&self, bandwidth: Option<u64>) {
        for (_, proxy) in &self.tcp {
            proxy.set_bandwidth(bandwidth);
        }
    }

    /// Bytes that arrived at a site through TCP proxies.
    pub fn bytes(&self, towards: Side) -> u64 {
        self.tcp.iter().map(|(dialled, proxy)| proxy.bytes(direction(*dialled, towards))).sum()
    }

    /// Faults of the frames towards a site.
    pub fn set_faults(&self, towards: Side, faults: Faults) {
        for (dialled, proxy) in &self.grpc {
            proxy.set_faults(direction(*dialled, towards), faults);
        }
    }

    /// What has happened to the frames towards a site, one entry for each gRPC proxy.
    pub fn counts(&self, towards: Side) -> Vec<Counts> {
        self.grpc.iter().map(|(dialled, proxy)| proxy.counts(direction(*dialled, towards))).collect()
    }

    /// Puts proxies before the agents of `dialled`; returns where the other site dials, nothing when it does not.
    async fn lay(
        &mut self,
        options: &PairOptions,
        dialled: Side,
        agents: &[AgentConfig],
        pki: &Pki,
    ) -> Result<Vec<SocketAddr>> {
        if options.dialler == Some(dialled) {
            return Ok(Vec::new());
        }
        let mut addresses = Vec::new();
        for agent in agents {
            let target = agent.link_address();
            addresses.push(match options.between {
                Between::Nothing => target,
                Between::Tcp => {
                    let proxy = TcpProxy::start(target).await?;
                    let address = proxy.address();
                    self.tcp.push((dialled, proxy));
                    address
                }
                Between::Grpc(seed) => {
                    let dialling = pki.identity(Role::Site, dialled.other().name())?;
                    let proxy = GrpcProxy::start(target, &dialling, agent.identity(), seed).await?;
                    let address = proxy.address();
                    self.grpc.push((dialled, proxy));
                    address
                }
            });
        }
        Ok(addresses)
    }
}

fn direction(dialled: Side, towards: Side) -> Direction {
    if dialled == towards { Direction::Forward } else { Direction::Back }
}
