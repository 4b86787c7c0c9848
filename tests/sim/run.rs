//! Drives one seed: workload and faults for a while, then calm, until both sites are equal.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, SystemTime};

use farshore::outbox::{LogId, Store as _};
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::{SeedableRng as _, seq::IndexedRandom as _};
use turmoil::{Builder, Sim};

use crate::agents::{HOSTS, run as agent, site, stream};
use crate::applier::compare;
use crate::target::Done;
use crate::workload;
use crate::world::{Counts, Shared, World, lock};

const TICK: Duration = Duration::from_millis(5);
/// Time after the last fault in which both sites must have become equal: a dead connection is noticed after 15 s.
const CONVERGE: Duration = Duration::from_secs(120);

/// What one or more runs did.
#[derive(Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) counts: Counts,
    pub(crate) done: Done,
    events: usize,
    simulated: Duration,
    pub(crate) trace: Vec<String>,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: &Self) {
        let (a, b) = (&mut self.counts, &other.counts);
        a.crashes += b.crashes;
        a.exits += b.exits;
        a.partitions += b.partitions;
        a.failovers += b.failovers;
        a.takeovers += b.takeovers;
        a.fetches += b.fetches;
        a.corruptions += b.corruptions;
        a.truncations += b.truncations;
        a.begun_again += b.begun_again;
        a.too_large += b.too_large;
        a.forgotten += b.forgotten;
        let (a, b) = (&mut self.done, &other.done);
        a.commits += b.commits;
        a.changes += b.changes;
        a.transactions += b.transactions;
        a.rolled_back += b.rolled_back;
        self.events += other.events;
        self.simulated += other.simulated;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { counts: c, done: d, .. } = self;
        write!(
            f,
            "{} simulated s, {} events, {} changes in {} commits ({} rolled back), {} source transactions, {} fetches; \
             {} crashes, {} exits, {} partitions, {} failovers, {} takeovers, {} damaged records, {} truncations of the \
             oplog ({} outboxes began again for it); {} transactions too large for the cache, {} dropped collections forgotten",
            self.simulated.as_secs(),
            self.events,
            d.changes,
            d.commits,
            d.rolled_back,
            d.transactions,
            c.fetches,
            c.crashes,
            c.exits,
            c.partitions,
            c.failovers,
            c.takeovers,
            c.corruptions,
            c.truncations,
            c.begun_again,
            c.too_large,
            c.forgotten
        )
    }
}

/// A seed that broke a promise.
pub(crate) struct Failure {
    pub(crate) reason: String,
    pub(crate) trace: Vec<String>,
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Panics inside simulated tasks would otherwise be told to nobody.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with(|panics| panics.borrow_mut().push(info.to_string()));
            print(info);
        }));
    });
    PANICS.with(|panics| panics.borrow_mut().clear());
}

enum Later {
    Bounce(&'static str),
    Release(&'static str, &'static str),
    RepairOneway(&'static str, &'static str),
    Latency,
    Loss(&'static str, &'static str),
}

struct Driver<'s> {
    sim: Sim<'s>,
    world: Shared,
    dice: StdRng,
    later: BTreeMap<(Duration, u64), Later>,
    sequence: u64,
    down: Vec<&'static str>,
}

/// Runs one seed.
pub(crate) fn run(seed: u64) -> Result<Outcome, Failure> {
    watch_panics();
    let world: Shared = Arc::new(Mutex::new(World::new(seed)));
    let mut builder = Builder::new();
    builder
        .rng_seed(seed)
        .epoch(SystemTime::UNIX_EPOCH)
        .tick_duration(TICK)
        .simulation_duration(Duration::from_secs(3600))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(4096);
    let mut sim = builder.build();
    for host in HOSTS {
        let world = world.clone();
        sim.host(host, move || agent(world.clone(), host));
    }
    let dice = StdRng::seed_from_u64(seed ^ 0xD1CE);
    let mut driver = Driver { sim, world, dice, later: BTreeMap::new(), sequence: 0, down: Vec::new() };
    let result = driver.run();
    for agent in lock(&driver.world).agents.values_mut() {
        agent.hub = None;
    }
    let Driver { sim, world, .. } = driver;
    let simulated = sim.elapsed();
    drop(sim);
    let mut world = lock(&world);
    let trace = std::mem::take(&mut world.trace);
    match result {
        Ok(()) => {
            Ok(Outcome { counts: world.counts, done: world.target.done, events: world.source.len(), simulated, trace })
        }
        Err(reason) => Err(Failure { reason, trace }),
    }
}

impl Driver<'_> {
    fn run(&mut self) -> Result<(), String> {
        let stormy = Duration::from_secs(self.dice.random_range(10..25));
        while self.sim.elapsed() < stormy {
            self.work();
            self.faults();
            self.step()?;
        }
        self.calm();
        let goal = lock(&self.world).source.end();
        let deadline = self.sim.elapsed() + CONVERGE;
        loop {
            for _ in 0..40 {
                self.step()?;
            }
            let world = lock(&self.world);
            let there = world.target.stream.as_ref().is_some_and(|stream| stream.record.floor >= goal);
            let differences = if there { compare(&world) } else { vec![format!("the floor is below {goal}")] };
            if differences.is_empty() {
                return Ok(());
            }
            if there || self.sim.elapsed() > deadline {
                let state = self.describe(&world);
                return Err(format!("not equal at the end: {}; {state}", differences.join("; ")));
            }
        }
    }

    fn describe(&self, world: &World) -> String {
        let floor = world.target.stream.as_ref().map(|stream| stream.record.floor);
        let leaders = (world.leader("north"), world.leader("south"));
        let agents = world.agents.iter().map(|(host, agent)| {
            let states = agent.store.logs().unwrap_or_default().into_iter().filter_map(|log| {
                let state = agent.store.state(&log).ok()??;
                Some(format!("{log} {}..{} {} bytes", state.first, state.end, state.bytes))
            });
            let peers = agent
                .hub
                .iter()
                .flat_map(|hub| hub.peers())
                .map(|p| format!("{:?} {} {}", p.state, p.address, p.error));
            let (states, peers) = (states.collect::<Vec<_>>(), peers.collect::<Vec<_>>());
            format!("\n  {host}: {states:?} {peers:?} applied {:?} {:?}", agent.status.applied, agent.status.phase)
        });
        let agents: String = agents.collect();
        format!("floor {floor:?}, leaders {leaders:?}, {:?}{agents}", world.settings)
    }

    fn step(&mut self) -> Result<(), String> {
        lock(&self.world).now = self.sim.elapsed();
        while let Some(entry) = self.later.first_entry()
            && entry.key().0 <= self.sim.elapsed()
        {
            let later = entry.remove();
            self.undo(later);
        }
        self.sim.step().map_err(|error| error.to_string())?;
        self.restart_exited();
        let panicked = PANICS.with(|panics| panics.borrow().first().cloned());
        if let Some(panic) = panicked {
            return Err(panic);
        }
        self.check()
    }

    /// What is acknowledged is durable, what is applied was received.
    fn check(&self) -> Result<(), String> {
        let world = &mut *lock(&self.world);
        for agent in world.agents.values() {
            // A damaged record may be cut away within a step in which it was acknowledged; then what the source has
            // captured is the bound.
            let log = if world.counts.corruptions == 0 { LogId::Inbox(site("north")) } else { LogId::Outbox };
            if let Ok(Some(state)) = agent.store.state(&log) {
                world.durable = world.durable.max(state.end);
            }
        }
        if let Some(violation) = &world.violation {
            return Err(violation.clone());
        }
        for (host, agent) in &world.agents {
            let view = agent.hub.as_ref().and_then(|hub| hub.stream_view(&stream()));
            let Some(view) = view else { continue };
            if view.received.is_some_and(|received| received > world.durable) {
                return Err(format!("{host}: received {:?} is past what is durable, {}", view.received, world.durable));
            }
            if view.applied.is_some_and(|applied| applied > world.durable) {
                return Err(format!("{host}: applied {:?} is past what is durable, {}", view.applied, world.durable));
            }
        }
        Ok(())
    }

    fn work(&mut self) {
        let world = &mut *lock(&self.world);
        let per_step = f64::from(world.settings.rate) * TICK.as_secs_f64();
        if self.dice.random_bool(per_step.min(1.0)) && world.now >= world.source.down_until {
            workload::step(&mut self.dice, &mut world.source, world.now, world.settings.ids);
        }
    }

    fn log(&self, text: String) {
        lock(&self.world).log(text);
    }

    fn later(&mut self, least: u64, most: u64, what: Later) {
        let wait = Duration::from_millis(self.dice.random_range(least..most));
        self.sequence += 1;
        self.later.insert((self.sim.elapsed() + wait, self.sequence), what);
    }

    fn link(&mut self) -> (&'static str, &'static str) {
        let pairs = [("north", "south"), ("north", "south-b"), ("north-b", "south"), ("north-b", "south-b")];
        *pairs.choose(&mut self.dice).expect("some")
    }

    fn faults(&mut self) {
        if !self.dice.random_bool(0.005) {
            return;
        }
        match self.dice.random_range(0..15) {
            0 | 1 => {
                let host = *HOSTS.choose(&mut self.dice).expect("some");
                let silent = self.dice.random_bool(0.5);
                self.crash(host, silent);
                self.later(200, 5000, Later::Bounce(host));
            }
            2 | 3 => self.partition(),
            4 => {
                let (a, b) = self.link();
                let (from, to) = if self.dice.random_bool(0.5) { (a, b) } else { (b, a) };
                self.log(format!("nothing goes from {from} to {to}"));
                self.sim.partition_oneway(from, to);
                lock(&self.world).counts.partitions += 1;
                self.later(200, 20_000, Later::RepairOneway(from, to));
            }
            5 => {
                let (a, b) = self.link();
                self.log(format!("hold {a} {b}"));
                self.sim.hold(a, b);
                self.later(100, 8000, Later::Release(a, b));
            }
            6 | 7 => self.fail_over(),
            8 => {
                let site = *["north", "south"].choose(&mut self.dice).expect("some");
                let blind = Duration::from_millis(self.dice.random_range(3000..12_000));
                let world = &mut *lock(&self.world);
                if let Some(host) = world.leader(site) {
                    world.agents.get_mut(host).expect("known").blind_until = world.now + blind;
                    world.counts.takeovers += 1;
                    world.log(format!("{host} loses touch with its lease for {} ms", blind.as_millis()));
                }
            }
            9 => {
                let away = Duration::from_millis(self.dice.random_range(100..4000));
                let world = &mut *lock(&self.world);
                world.source.down_until = world.now + away;
                world.log("the source's primary steps down");
            }
            10 => {
                let slow = Duration::from_millis(self.dice.random_range(30..400));
                self.log(format!("latency up to {} ms", slow.as_millis()));
                self.sim.set_max_message_latency(slow);
                self.later(500, 5000, Later::Latency);
            }
            11 => self.corrupt(),
            12 | 13 => self.truncate(),
            _ => {
                let (a, b) = self.link();
                self.log(format!("loss between {a} and {b}"));
                self.sim.set_link_fail_rate(a, b, 0.02);
                self.later(500, 5000, Later::Loss(a, b));
            }
        }
    }

    /// The oplog loses what nobody may need: the stored floor is where a target that lost everything else goes on.
    fn truncate(&mut self) {
        let world = &mut *lock(&self.world);
        let floor = world.target.stream.as_ref().map(|stream| stream.record.floor);
        if let Some(floor) = floor.filter(|_| world.settings.short_oplog)
            && world.source.truncate(floor)
        {
            world.counts.truncations += 1;
            world.log(format!("the oplog begins right before {floor}"));
        }
    }

    /// A bit flips in the newest record on a disk.
    fn corrupt(&mut self) {
        let host = *HOSTS.choose(&mut self.dice).expect("some");
        let log = if host.starts_with("north") { LogId::Outbox } else { LogId::Inbox(site("north")) };
        let world = &mut *lock(&self.world);
        let store = &world.agents[host].store;
        let end = store.state(&log).ok().flatten().map(|state| state.end);
        if let Some(end) = end.filter(|end| store.corrupt(&log, *end)) {
            world.counts.corruptions += 1;
            world.log(format!("a record of {host} is damaged, the one that ends at {end}"));
        }
    }

    fn partition(&mut self) {
        let (a, b) = self.link();
        self.log(format!("partition {a} {b}"));
        self.sim.partition(a, b);
        lock(&self.world).counts.partitions += 1;
        self.later(200, 20_000, Later::Release(a, b));
    }

    fn fail_over(&mut self) {
        let away = Duration::from_millis(self.dice.random_range(50..3000));
        let world = &mut *lock(&self.world);
        let keep = self.dice.random_range(0..world.target.unconfirmed() + 1);
        let lost = world.target.unconfirmed() - keep;
        world.target.fail_over(keep, world.now + away);
        world.counts.failovers += 1;
        world.log(format!("the target fails over and loses {lost} commits"));
    }

    fn crash(&mut self, host: &'static str, silent: bool) {
        if self.down.contains(&host) {
            return;
        }
        self.log(format!("crash {host}{}", if silent { " without a word" } else { "" }));
        let others: Vec<&'static str> = HOSTS.into_iter().filter(|other| *other != host).collect();
        lock(&self.world).agents.get_mut(host).expect("known").hub = None;
        if silent {
            for other in &others {
                self.sim.partition_oneway(host, *other);
            }
        }
        self.sim.crash(host);
        if silent {
            for other in &others {
                self.sim.repair_oneway(host, *other);
            }
        }
        lock(&self.world).counts.crashes += 1;
        self.down.push(host);
    }

    fn bounce(&mut self, host: &'static str) {
        if let Some(at) = self.down.iter().position(|down| *down == host) {
            self.down.remove(at);
            if host.starts_with("north") {
                self.truncate();
            }
            self.sim.bounce(host);
        }
    }

    /// Kubernetes starts a process that ended again.
    fn restart_exited(&mut self) {
        let exited: Vec<&'static str> = {
            let world = &mut *lock(&self.world);
            let exited = world.agents.iter_mut().filter_map(|(host, agent)| agent.exit.take().map(|_| *host));
            exited.collect()
        };
        for host in exited {
            self.crash(host, false);
            {
                let counts = &mut lock(&self.world).counts;
                counts.crashes -= 1;
                counts.exits += 1;
            }
            self.later(300, 2000, Later::Bounce(host));
        }
    }

    fn undo(&mut self, later: Later) {
        match later {
            Later::Bounce(host) => self.bounce(host),
            Later::Release(a, b) => {
                self.log(format!("heal {a} {b}"));
                self.sim.release(a, b);
            }
            Later::RepairOneway(from, to) => {
                self.log(format!("heal from {from} to {to}"));
                self.sim.repair_oneway(from, to);
            }
            Later::Latency => self.sim.set_max_message_latency(Duration::from_millis(20)),
            Later::Loss(a, b) => self.sim.set_link_fail_rate(a, b, 0.0),
        }
    }

    /// Everything heals, everybody is up, nothing fails any more.
    fn calm(&mut self) {
        self.log("calm".into());
        lock(&self.world).calm = true;
        let pending = std::mem::take(&mut self.later);
        for (_, later) in pending {
            self.undo(later);
        }
        for a in ["north", "north-b"] {
            for b in ["south", "south-b"] {
                self.sim.set_link_fail_rate(a, b, 0.0);
                self.sim.release(a, b);
            }
        }
        for host in self.down.clone() {
            self.bounce(host);
        }
    }
}
