//! Multi-document transactions over several collections and databases.

use bson::doc;
use rand::Rng;

use super::generate::Generator;
use super::kind::Kind;
use super::model::{Coll, Flavour, Ns};
use super::op::{Op, Step};

/// Names a database's collections draw from. More than `MAX_COLLECTIONS`, so that a rename finds one.
pub(super) const COLLECTION_POOL: usize = 14;
const MAX_COLLECTIONS: usize = 9;

impl Generator {
    pub(super) fn make_transaction(&mut self, kind: Kind) -> Option<Op> {
        let before = (kind == Kind::TxnAbort).then(|| self.model.clone());
        let mut steps = self.transaction_writes(kind);
        if kind == Kind::TxnCreate {
            let create = self.transaction_create()?;
            let at = self.rng.random_range(0..=steps.len());
            steps.splice(at..at, create);
        }
        if let Some(before) = before {
            self.model = before;
        }
        (!steps.is_empty()).then(|| Op::transaction(kind, steps, kind != Kind::TxnAbort))
    }

    fn transaction_writes(&mut self, kind: Kind) -> Vec<Step> {
        let long = kind == Kind::TxnCommit && self.rng.random_ratio(1, 20);
        let count = if long { 150 } else { self.rng.random_range(2..9) };
        (0..count).filter_map(|_| self.transaction_write()).collect()
    }

    fn transaction_write(&mut self) -> Option<Step> {
        // A refused statement would abort the whole: only collections without hazards.
        let safe = |coll: &Coll| matches!(coll.flavour, Flavour::Plain | Flavour::Clustered);
        let ns = self.pick_where(|coll| safe(coll) && !coll.is_full())?;
        let group = self.serial() as i32;
        let positions = self.model.coll(&ns).of_shape(super::model::Shape::Standard);
        match (self.rng.random_range(0..4), positions.first()) {
            (0, Some(_)) => {
                let position = positions[self.rng.random_range(0..positions.len())];
                let slot = self.model.coll(&ns).slots.remove(position);
                Some(Step::delete(&ns, doc! { "_id": slot.id }, 1))
            }
            (1 | 2, Some(_)) => {
                let position = positions[self.rng.random_range(0..positions.len())];
                let id = self.slot(&ns, position).id;
                let update = doc! { "$inc": { "n": 1 }, "$set": { "txn": group } };
                Some(Step::update(&ns, doc! { "_id": id }, update))
            }
            _ => {
                let count = self.rng.random_range(1..4);
                let documents = (0..count).map(|_| self.new_document(&ns, group)).collect();
                Some(Step::insert(&ns, documents))
            }
        }
    }

    /// Creates a collection, by name or by its first insert, and fills it.
    fn transaction_create(&mut self) -> Option<Vec<Step>> {
        let ns = self.free_collection()?;
        self.model.colls.insert(ns.clone(), Coll::new(Flavour::Plain));
        let group = self.serial() as i32;
        let mut steps = Vec::new();
        if self.rng.random::<bool>() {
            steps.push(Step::new(&ns.0, doc! { "create": &ns.1 }));
            if self.rng.random::<bool>() {
                let index = doc! { "key": { "n": 1, "g": 1 }, "name": "compound" };
                self.model.coll(&ns).indexes.insert("compound");
                steps.push(Step::new(&ns.0, doc! { "createIndexes": &ns.1, "indexes": [index] }));
            }
        }
        let documents = (0..3).map(|_| self.new_document(&ns, group)).collect();
        steps.push(Step::insert(&ns, documents));
        Some(steps)
    }

    /// A name that no collection uses, in any database.
    pub(super) fn free_collection(&mut self) -> Option<Ns> {
        let n = self.rng.random_range(0..self.model.databases.len());
        let database = self.model.databases[n].clone();
        let existing = self.model.colls.keys().filter(|ns| ns.0 == database).count();
        (existing < MAX_COLLECTIONS).then_some(())?;
        let name = self.model.free_name(&mut self.rng, &database, "c", COLLECTION_POOL)?;
        Some((database, name))
    }
}
