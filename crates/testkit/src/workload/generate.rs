//! Turns a seed into operations: which kind next, on what, with which values. Pure.

use bson::Bson;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::Profile;
use super::kind::{Class, Kind};
use super::model::{Coll, Flavour, Model, Ns, Shape, Slot};
use super::op::{Mode, Op, Step};
use super::values;

/// Gives the operations of one seed, one by one, for ever.
pub struct Generator {
    pub(super) rng: StdRng,
    pub(super) profile: Profile,
    pub(super) model: Model,
    /// Source of fresh `_id`s, groups and unique values.
    pub(super) serial: i64,
    /// Bytes of large documents still allowed.
    pub(super) budget: u64,
}

impl Generator {
    /// A generator for databases that start with `prefix`.
    pub fn new(seed: u64, profile: Profile, prefix: &str) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            budget: profile.large_budget,
            profile,
            model: Model::new(prefix),
            serial: 100,
        }
    }

    /// The operations that make the first collections, to run before all others.
    pub fn setup(&mut self) -> Vec<Op> {
        let flavours = [
            Flavour::Plain,
            Flavour::Plain,
            Flavour::Unique,
            Flavour::Validator,
            Flavour::Collation,
            Flavour::Clustered,
        ];
        let mut ops = Vec::new();
        for database in self.model.databases.clone() {
            for (n, flavour) in flavours.iter().enumerate() {
                ops.push(self.create(&(database.clone(), format!("c{n}")), *flavour));
            }
        }
        if self.profile.beyond_spine {
            // Both of each, so that no insert makes a plain collection of that name first.
            for kind in [Kind::CappedCreate, Kind::TimeseriesCreate] {
                ops.extend((0..2).filter_map(|_| self.make(kind)));
            }
        }
        ops
    }

    /// The next operation.
    pub fn next_op(&mut self) -> Op {
        for _ in 0..200 {
            let kind = self.next_kind();
            if let Some(mut op) = self.make(kind) {
                self.finish(&mut op);
                return op;
            }
        }
        unreachable!("inserts are always possible");
    }

    /// An operation of this kind, if the present state allows one.
    pub fn next_of(&mut self, kind: Kind) -> Option<Op> {
        let mut op = self.make(kind)?;
        self.finish(&mut op);
        Some(op)
    }

    fn finish(&mut self, op: &mut Op) {
        op.majority = op.majority || self.rng.random_ratio(1, 16);
        if op.mode == Mode::Plain && self.rng.random_bool(0.4) && op.may_be_retryable() {
            op.mode = Mode::Retryable;
        }
    }

    fn next_kind(&mut self) -> Kind {
        let share = |kind: &Kind| u64::from(self.profile.share(kind.class()));
        let class_weight = |class: Class| -> u64 {
            Kind::ALL.iter().filter(|kind| kind.class() == class).map(|kind| u64::from(kind.weight())).sum()
        };
        // Weights inside a class are relative; scale so that a class gets exactly its share.
        let scaled: Vec<u64> = Kind::ALL
            .iter()
            .map(|kind| share(kind) * u64::from(kind.weight()) * 1_000 / class_weight(kind.class()))
            .collect();
        let mut point = self.rng.random_range(0..scaled.iter().sum());
        for (kind, weight) in Kind::ALL.iter().zip(scaled) {
            if point < weight {
                return *kind;
            }
            point -= weight;
        }
        Kind::InsertOne
    }

    fn make(&mut self, kind: Kind) -> Option<Op> {
        match kind.class() {
            Class::Crud => self.make_crud(kind).or_else(|| self.make_update(kind)),
            Class::Transaction => self.make_transaction(kind),
            Class::Ddl => self.make_ddl(kind),
            Class::Large | Class::Beyond => self.make_special(kind),
        }
    }

    pub(super) fn serial(&mut self) -> i64 {
        self.serial += 1;
        self.serial
    }

    /// An `_id` that this collection does not hold.
    pub(super) fn fresh_id(&mut self, ns: &Ns) -> Bson {
        loop {
            let serial = self.serial();
            let id = values::id(&mut self.rng, serial);
            let coll = self.model.coll(ns);
            // The server cannot index a symbol under a collation.
            let symbol = matches!(id, Bson::Symbol(_)) && coll.flavour == Flavour::Collation;
            if !symbol && !coll.holds(&id) {
                return id;
            }
        }
    }

    /// A fresh slot, remembered in the model.
    pub(super) fn new_slot(&mut self, ns: &Ns, group: i32, shape: Shape) -> Slot {
        let id = self.fresh_id(ns);
        let slot = Slot { id, unique: self.serial(), group, shape };
        self.model.coll(ns).slots.push(slot.clone());
        slot
    }

    /// A collection that takes another document.
    pub(super) fn pick_coll(&mut self) -> Option<Ns> {
        self.pick_where(|coll| !coll.is_full())
    }

    pub(super) fn pick_where(&mut self, fits: impl Fn(&Coll) -> bool) -> Option<Ns> {
        self.model.pick(&mut self.rng, |_, coll| fits(coll))
    }

    /// A document of this shape, the first ones of a collection more often than others.
    pub(super) fn pick_slot(&mut self, shape: Shape) -> Option<(Ns, usize)> {
        let ns = self.pick_where(|coll| coll.slots.iter().any(|slot| slot.shape == shape))?;
        let found = self.model.coll(&ns).of_shape(shape);
        let hot = self.rng.random_bool(0.2);
        let reach = if hot { found.len().min(3) } else { found.len() };
        Some((ns, found[self.rng.random_range(0..reach)]))
    }

    pub(super) fn slot(&mut self, ns: &Ns, position: usize) -> Slot {
        self.model.coll(ns).slots[position].clone()
    }

    /// One update statement on one document.
    pub(super) fn update(kind: Kind, ns: &Ns, filter: bson::Document, u: impl Into<Bson>) -> Op {
        Op::crud(kind, vec![Step::update(ns, filter, u)])
    }
}
