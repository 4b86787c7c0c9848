//! What the generator believes exists: databases, collections, documents, views.
//!
//! The belief is advanced when an operation is generated, never by what the server answered: the same
//! seed must give the same operations. A wrong belief only makes an operation match nothing.

use std::collections::{BTreeMap, BTreeSet};

use bson::Bson;
use rand::Rng;
use rand::rngs::StdRng;

use super::values;

/// Documents remembered per collection; beyond it inserts turn into deletes.
const MAX_SLOTS: usize = 150;

/// How a collection was created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    Plain,
    Unique,
    Validator,
    Collation,
    Clustered,
}

/// What kind of document a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Standard,
    Odd,
    Wide,
    Duplicate,
    Large,
}

#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) id: Bson,
    pub(super) unique: i64,
    pub(super) group: i32,
    pub(super) shape: Shape,
}

#[derive(Clone, Debug)]
pub(super) struct Coll {
    pub(super) flavour: Flavour,
    pub(super) slots: Vec<Slot>,
    pub(super) indexes: BTreeSet<&'static str>,
}

impl Coll {
    pub(super) fn new(flavour: Flavour) -> Self {
        Self { flavour, slots: Vec::new(), indexes: BTreeSet::new() }
    }

    pub(super) fn is_full(&self) -> bool {
        self.slots.len() >= MAX_SLOTS
    }

    pub(super) fn holds(&self, id: &Bson) -> bool {
        self.slots.iter().any(|slot| values::same_id(&slot.id, id))
    }

    /// Positions of slots with a shape.
    pub(super) fn of_shape(&self, shape: Shape) -> Vec<usize> {
        (0..self.slots.len()).filter(|n| self.slots[*n].shape == shape).collect()
    }
}

/// A collection or view, by database and name.
pub(super) type Ns = (String, String);

#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) databases: Vec<String>,
    pub(super) colls: BTreeMap<Ns, Coll>,
    /// Views by name, with what each stands on.
    pub(super) views: BTreeMap<Ns, String>,
}

impl Model {
    pub(super) fn new(prefix: &str) -> Self {
        let databases = ["a", "b", "x"].map(|name| format!("{prefix}_{name}")).to_vec();
        Self { databases, colls: BTreeMap::new(), views: BTreeMap::new() }
    }

    /// A random collection that fits.
    pub(super) fn pick(&self, rng: &mut StdRng, fits: impl Fn(&Ns, &Coll) -> bool) -> Option<Ns> {
        let fitting: Vec<_> = self.colls.iter().filter(|(ns, coll)| fits(ns, coll)).map(|(ns, _)| ns).collect();
        Some((*fitting.get(pick_index(rng, fitting.len())?)?).clone())
    }

    pub(super) fn pick_view(&self, rng: &mut StdRng) -> Option<Ns> {
        let n = pick_index(rng, self.views.len())?;
        self.views.keys().nth(n).cloned()
    }

    /// A random name of the pool `prefix0..size` which nothing in this database uses.
    pub(super) fn free_name(&self, rng: &mut StdRng, database: &str, prefix: &str, size: usize) -> Option<String> {
        let free: Vec<_> = (0..size)
            .map(|n| format!("{prefix}{n}"))
            .filter(|name| {
                let ns = (database.to_owned(), name.clone());
                !self.colls.contains_key(&ns) && !self.views.contains_key(&ns)
            })
            .collect();
        free.get(pick_index(rng, free.len())?).cloned()
    }

    pub(super) fn coll(&mut self, ns: &Ns) -> &mut Coll {
        self.colls.entry(ns.clone()).or_insert_with(|| Coll::new(Flavour::Plain))
    }
}

pub(super) fn pick_index(rng: &mut StdRng, len: usize) -> Option<usize> {
    (len > 0).then(|| rng.random_range(0..len))
}
