//! What the hosts of one simulation share: both databases, the leases, the disks, the dice, and the record of it all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use farshore::apply::engine::Options;
use farshore::apply::status::ApplyStatus;
use farshore::apply::target::{CommitError, TargetError, Transaction};
use farshore::link::{Hub, Leadership};
use farshore::model::{Position, Term};
use farshore::outbox::{MemStore, Quota, Store as _};
use farshore::source::tail::TailError;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};

use crate::agents::{HOSTS, site_of};
use crate::source::SourceDb;
use crate::target::TargetDb;

/// All hosts run on one thread, so nobody ever waits for this.
pub(crate) type Shared = Arc<Mutex<World>>;

pub(crate) fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().expect("no holder panics")
}

/// A lease without renewal is free after this.
const TTL: Duration = Duration::from_secs(3);

/// How this seed's agents are configured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) quota: Quota,
    pub(crate) ring: usize,
    pub(crate) credit: u64,
    pub(crate) options: Options,
    pub(crate) single_change_units: bool,
    pub(crate) both_dial: bool,
    /// The source's oplog loses what the target has stored as applied.
    pub(crate) short_oplog: bool,
    /// Writes per second of simulated time.
    pub(crate) rate: u32,
    /// Documents per collection: few meet often, many use all lanes.
    pub(crate) ids: i32,
    /// Changes the target's cache takes in one transaction.
    pub(crate) cache: usize,
}

/// What a run did.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Counts {
    pub(crate) crashes: u64,
    pub(crate) exits: u64,
    pub(crate) partitions: u64,
    pub(crate) failovers: u64,
    pub(crate) takeovers: u64,
    pub(crate) fetches: u64,
    pub(crate) corruptions: u64,
    pub(crate) truncations: u64,
    /// Outboxes that began again because what follows them was gone.
    pub(crate) begun_again: u64,
    /// Transactions that the target's cache did not take.
    pub(crate) too_large: u64,
    /// Catalog entries of dropped collections that were removed.
    pub(crate) forgotten: u64,
}

/// One host.
pub(crate) struct Agent {
    pub(crate) store: MemStore,
    process: u64,
    pub(crate) hub: Option<Hub>,
    pub(crate) exit: Option<String>,
    pub(crate) blind_until: Duration,
    pub(crate) status: ApplyStatus,
}

#[derive(Default)]
struct Lease {
    applied: Option<Position>,
    term: u64,
    holder: Option<(&'static str, u64)>,
    expires: Duration,
}

/// See the module text.
pub(crate) struct World {
    pub(crate) dice: StdRng,
    pub(crate) now: Duration,
    pub(crate) settings: Settings,
    pub(crate) source: SourceDb,
    pub(crate) target: TargetDb,
    pub(crate) beginning: Position,
    /// How far any inbox ever was on disk.
    pub(crate) durable: Position,
    pub(crate) agents: BTreeMap<&'static str, Agent>,
    leases: BTreeMap<&'static str, Lease>,
    pub(crate) counts: Counts,
    pub(crate) trace: Vec<String>,
    pub(crate) violation: Option<String>,
    /// Nothing fails any more.
    pub(crate) calm: bool,
}

fn settings(dice: &mut StdRng) -> Settings {
    let small = dice.random_bool(0.25);
    let quota = Quota {
        limit_bytes: if small { 160 << 10 } else { 1 << 30 },
        retention_bytes: if dice.random_bool(0.5) { 0 } else { 1 << 30 },
        retention_time: Duration::from_secs(if dice.random_bool(0.5) { 0 } else { 3600 }),
    };
    Settings {
        quota,
        ring: if dice.random_bool(0.5) { 4 << 10 } else { 1 << 20 },
        credit: if dice.random_bool(0.3) { 16 << 10 } else { 4 << 20 },
        options: Options {
            workers: dice.random_range(1..9),
            memory: if dice.random_bool(0.3) { 8 << 10 } else { 16 << 20 },
            adopted: false,
            // The double's events carry no wall time.
            clock: || 0,
        },
        single_change_units: dice.random_bool(0.7),
        both_dial: dice.random_bool(0.5),
        short_oplog: dice.random_bool(0.4),
        rate: dice.random_range(10..90),
        ids: *[8, 24, 24, 400].choose(dice).expect("some"),
        cache: *[2, 5, usize::MAX, usize::MAX, usize::MAX, usize::MAX, usize::MAX, usize::MAX]
            .choose(dice)
            .expect("some"),
    }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        let settings = settings(&mut dice);
        let mut source = SourceDb::default();
        source.noop(Duration::ZERO);
        let beginning = Position::through(source.clock);
        let agent = |(number, host): (usize, &&'static str)| {
            let store = MemStore::new();
            store.put_meta("agent_id", Bytes::from(vec![number as u8 + 1; 16])).expect("a fresh store");
            let (blind_until, status) = (Duration::ZERO, ApplyStatus::default());
            (*host, Agent { store, process: 0, hub: None, exit: None, blind_until, status })
        };
        Self {
            agents: HOSTS.iter().enumerate().map(agent).collect(),
            leases: ["north", "south"].map(|site| (site, Lease::default())).into(),
            dice,
            now: Duration::ZERO,
            settings,
            source,
            target: TargetDb::default(),
            beginning,
            durable: beginning,
            counts: Counts::default(),
            trace: Vec::new(),
            violation: None,
            calm: false,
        }
    }

    pub(crate) fn log(&mut self, text: impl AsRef<str>) {
        self.trace.push(format!("{:>6} {}", self.now.as_millis(), text.as_ref()));
    }

    /// Something that must never happen did.
    pub(crate) fn broken(&mut self, text: String) {
        self.log(format!("BROKEN: {text}"));
        self.violation.get_or_insert(text);
    }

    pub(crate) fn latency(&mut self) -> Duration {
        let slow = self.dice.random_bool(0.01) && !self.calm;
        Duration::from_millis(self.dice.random_range(0..if slow { 400 } else { 5 }))
    }

    /// How long an index build takes.
    pub(crate) fn building(&mut self) -> Duration {
        let long = self.dice.random_bool(0.3) && !self.calm;
        Duration::from_millis(self.dice.random_range(0..if long { 3000 } else { 20 }))
    }

    pub(crate) fn batch_size(&mut self) -> usize {
        self.dice.random_range(1..40)
    }

    fn fails(&mut self, probability: f64) -> bool {
        !self.calm && self.dice.random_bool(probability)
    }

    pub(crate) fn source_up(&mut self) -> Result<(), TailError> {
        match self.now < self.source.down_until || self.fails(0.002) {
            true => Err(TailError::Interrupted("the primary stepped down".into())),
            false => Ok(()),
        }
    }

    pub(crate) fn target_is_up(&self) -> bool {
        self.now >= self.target.electing_until
    }

    pub(crate) fn target_up(&mut self) -> Result<(), TargetError> {
        match !self.target_is_up() || self.fails(0.002) {
            true => Err(TargetError::Transient("not primary".into())),
            false => Ok(()),
        }
    }

    /// Something was done, and whoever asked never hears of it.
    pub(crate) fn answer_lost(&mut self) -> bool {
        self.fails(0.003)
    }

    pub(crate) fn write_conflict(&mut self) -> bool {
        self.fails(0.02)
    }

    /// The process on a host begins, with what its disk holds.
    pub(crate) fn boot(&mut self, host: &'static str) -> (MemStore, u64) {
        let agent = self.agents.get_mut(host).expect("known");
        agent.process += 1;
        agent.store = agent.store.crash();
        agent.status = ApplyStatus::default();
        let booted = (agent.store.clone(), agent.process);
        self.log(format!("{host} boots"));
        booted
    }

    /// The process on a host has a reason to end.
    pub(crate) fn exit(&mut self, host: &'static str, reason: String) {
        self.log(format!("{host} exits: {reason}"));
        self.agents.get_mut(host).expect("known").exit = Some(reason);
    }

    /// Asks for the lease: nothing when the database cannot be asked, else the term, if it is this process's.
    pub(crate) fn renew(&mut self, host: &'static str, process: u64, held: Leadership) -> Option<Option<Term>> {
        if self.now < self.agents[host].blind_until {
            return None;
        }
        let now = self.now;
        let lease = self.leases.get_mut(site_of(host)).expect("known");
        let mine = lease.holder == Some((host, process));
        let free = lease.holder.is_none_or(|(holder, _)| holder == host) || lease.expires < now;
        if !mine && free {
            lease.term += 1;
            lease.holder = Some((host, process));
            let term = lease.term;
            lease.expires = now + TTL;
            self.log(format!("{host} leads in term {term} (had {})", held.term));
            return Some(Some(Term(term)));
        }
        if mine {
            lease.expires = now + TTL;
        }
        Some(mine.then_some(Term(lease.term)))
    }

    /// The holder of a site's lease tells how far everything is applied; the others are told.
    pub(crate) fn tell(&mut self, host: &'static str, process: u64, applied: Option<Position>) -> Option<Position> {
        let lease = self.leases.get_mut(site_of(host)).expect("known");
        if lease.holder == Some((host, process)) {
            lease.applied = applied;
        }
        lease.applied
    }

    /// Who holds the lease of a site.
    pub(crate) fn leader(&self, site: &str) -> Option<&'static str> {
        self.leases[site].holder.map(|(host, _)| host)
    }

    /// The engine's status moved.
    pub(crate) fn seen(&mut self, host: &'static str, status: ApplyStatus) {
        let before = &self.agents[host].status;
        if before.applied > status.applied {
            let text = format!("{host}: applied goes back from {:?} to {:?}", before.applied, status.applied);
            self.broken(text);
        }
        if let Some((cause, _)) = status.diverged.iter().next() {
            self.broken(format!("{host}: documents diverged: {}", cause.as_str()));
        }
        if self.agents[host].status.phase != status.phase {
            self.log(format!("{host} apply is {:?}", status.phase));
        }
        self.agents.get_mut(host).expect("known").status = status;
    }

    /// A transaction came to the target.
    pub(crate) fn committed(
        &mut self,
        host: &str,
        transaction: &Transaction<'_>,
        result: &Result<(), Result<CommitError, String>>,
    ) {
        let items = transaction.items;
        let (first, last) = (items.first().map(|i| i.position), items.last().map(|i| i.position));
        let outcome = match result {
            Ok(()) => "committed".to_owned(),
            Err(Ok(error)) => error.to_string(),
            Err(Err(broken)) => {
                self.broken(format!("{host}: {broken}"));
                "BROKEN".to_owned()
            }
        };
        let (lanes, count) = (transaction.lanes.len(), items.len());
        self.log(format!("{host} {count} changes {first:?}..{last:?} on {lanes} lanes: {outcome}"));
    }
}
