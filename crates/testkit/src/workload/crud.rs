//! Inserts, replaces, upserts, deletes and operations of several commands.

use bson::raw::{RawArrayBuf, RawDocumentBuf};
use bson::{Bson, Document, doc, rawdoc};
use rand::Rng;
use rand::seq::SliceRandom;

use super::generate::Generator;
use super::kind::Kind;
use super::model::{Flavour, Ns, Shape, Slot};
use super::op::{Mode, Op, Step};
use super::values;

/// Increments to one counter document before the next is begun: its list of increments stays small.
const INCREMENTS_PER_COUNTER: i64 = 200;

impl Generator {
    pub(super) fn make_crud(&mut self, kind: Kind) -> Option<Op> {
        match kind {
            Kind::InsertOne => self.insert(kind, 1),
            Kind::InsertMany => {
                let count = self.rng.random_range(2..40);
                self.insert(kind, count)
            }
            Kind::InsertBypass => self.insert_bypass(),
            Kind::InsertDuplicateKeys => self.insert_duplicate_keys(),
            Kind::InsertOdd | Kind::InsertWide => self.insert_shaped(kind),
            Kind::ReplaceHalf => self.replace_half(),
            Kind::ReplaceReordered => self.replace_reordered(),
            Kind::Upsert | Kind::UpsertReplace => self.upsert(kind),
            Kind::FindAndModify => {
                let (ns, slot) = self.standard()?;
                let command = doc! {
                    "findAndModify": &ns.1, "query": { "_id": slot.id },
                    "update": { "$inc": { "n": 1 }, "$set": { "h": values::scalar(&mut self.rng) } },
                    "new": self.rng.random::<bool>(),
                };
                Some(Op::crud(kind, vec![Step::new(&ns.0, command)]))
            }
            Kind::FindAndRemove => {
                let (ns, slot) = self.take_standard()?;
                let command = doc! { "findAndModify": &ns.1, "query": { "_id": slot.id }, "remove": true };
                Some(Op::crud(kind, vec![Step::new(&ns.0, command)]))
            }
            Kind::DeleteOne => {
                let (ns, slot) = self.take_standard()?;
                Some(Op::crud(kind, vec![Step::delete(&ns, doc! { "_id": slot.id }, 1)]))
            }
            Kind::DeleteMany => self.delete_many(),
            Kind::IdTypeSwap => self.id_type_swap(),
            Kind::UniqueSwap => self.unique_swap(),
            Kind::UniqueReuse => self.unique_reuse(),
            Kind::CounterInc => Some(self.counter_inc()),
            _ => None,
        }
    }

    /// A standard document somewhere.
    pub(super) fn standard(&mut self) -> Option<(Ns, Slot)> {
        let (ns, position) = self.pick_slot(Shape::Standard)?;
        let slot = self.slot(&ns, position);
        Some((ns, slot))
    }

    fn take_standard(&mut self) -> Option<(Ns, Slot)> {
        let (ns, position) = self.pick_slot(Shape::Standard)?;
        let slot = self.model.coll(&ns).slots.remove(position);
        Some((ns, slot))
    }

    /// A new standard document, remembered.
    pub(super) fn new_document(&mut self, ns: &Ns, group: i32) -> Document {
        let slot = self.new_slot(ns, group, Shape::Standard);
        values::standard(&mut self.rng, slot.id, group, slot.unique)
    }

    fn insert(&mut self, kind: Kind, count: usize) -> Option<Op> {
        let ns = self.pick_coll()?;
        let group = self.serial() as i32;
        let documents = (0..count).map(|_| self.new_document(&ns, group)).collect();
        Some(Op::crud(kind, vec![Step::insert(&ns, documents)]))
    }

    fn insert_bypass(&mut self) -> Option<Op> {
        let ns = self.pick_where(|coll| coll.flavour == Flavour::Validator && !coll.is_full())?;
        let group = self.serial() as i32;
        let mut document = self.new_document(&ns, group);
        document.insert("strict", "a string, which the validator forbids");
        let command = doc! {
            "insert": &ns.1, "documents": [document], "bypassDocumentValidation": true,
        };
        Some(Op::crud(Kind::InsertBypass, vec![Step::new(&ns.0, command)]))
    }

    fn insert_duplicate_keys(&mut self) -> Option<Op> {
        let ns = self.pick_coll()?;
        let group = self.serial() as i32;
        let slot = self.new_slot(&ns, group, Shape::Duplicate);
        let mut documents = RawArrayBuf::new();
        documents.push(values::duplicate_keys(&mut self.rng, slot.id, group));
        let mut command: RawDocumentBuf = rawdoc! { "insert": ns.1.as_str() };
        command.append(bson::raw::cstr!("documents"), documents);
        let step = Step { database: ns.0, command };
        Some(Op::crud(Kind::InsertDuplicateKeys, vec![step]))
    }

    fn insert_shaped(&mut self, kind: Kind) -> Option<Op> {
        let ns = self.pick_coll()?;
        let group = self.serial() as i32;
        let document = if kind == Kind::InsertOdd {
            let slot = self.new_slot(&ns, group, Shape::Odd);
            values::odd(&mut self.rng, slot.id, group)
        } else {
            let slot = self.new_slot(&ns, group, Shape::Wide);
            values::wide(slot.id, group)
        };
        Some(Op::crud(kind, vec![Step::insert(&ns, vec![document])]))
    }

    fn replace_half(&mut self) -> Option<Op> {
        let (ns, slot) = self.standard()?;
        let fresh = values::standard(&mut self.rng, slot.id.clone(), slot.group, slot.unique);
        let document: Document = fresh
            .into_iter()
            .filter(|(name, _)| ["_id", "g", "u"].contains(&name.as_str()) || self.rng.random_bool(0.5))
            .collect();
        Some(Self::update(Kind::ReplaceHalf, &ns, doc! { "_id": slot.id }, document))
    }

    fn replace_reordered(&mut self) -> Option<Op> {
        let (ns, slot) = self.standard()?;
        let fresh = values::standard(&mut self.rng, slot.id.clone(), slot.group, slot.unique);
        let mut fields: Vec<_> = fresh.into_iter().collect();
        fields.shuffle(&mut self.rng);
        let document: Document = fields.into_iter().collect();
        Some(Self::update(Kind::ReplaceReordered, &ns, doc! { "_id": slot.id }, document))
    }

    fn upsert(&mut self, kind: Kind) -> Option<Op> {
        let ns = self.pick_coll()?;
        let group = self.serial() as i32;
        let document = self.new_document(&ns, group);
        let filter = doc! { "_id": document.get("_id").cloned() };
        let update = if kind == Kind::UpsertReplace {
            document
        } else {
            let (set, on_insert): (Document, Document) =
                document.into_iter().filter(|(name, _)| name != "_id").partition(|(name, _)| name.as_str() < "h");
            doc! { "$set": set, "$setOnInsert": on_insert }
        };
        Some(Op::crud(kind, vec![Step::upsert(&ns, filter, update)]))
    }

    fn delete_many(&mut self) -> Option<Op> {
        let (ns, slot) = self.standard()?;
        self.model.coll(&ns).slots.retain(|other| other.group != slot.group);
        let step = Step::delete(&ns, doc! { "g": slot.group }, 0);
        Some(Op::crud(Kind::DeleteMany, vec![step]))
    }

    /// Deletes a number and inserts the same number as another type.
    fn id_type_swap(&mut self) -> Option<Op> {
        let numeric = |slot: &Slot| {
            let number = matches!(slot.id, Bson::Int32(_) | Bson::Int64(_) | Bson::Double(_));
            slot.shape == Shape::Standard && (number || matches!(slot.id, Bson::Decimal128(_)))
        };
        let ns = self.pick_where(|coll| coll.slots.iter().any(numeric))?;
        let slots = &self.model.coll(&ns).slots;
        let found: Vec<_> = (0..slots.len()).filter(|n| numeric(&slots[*n])).collect();
        let position = found[self.rng.random_range(0..found.len())];
        let slot = self.slot(&ns, position);
        let other = values::other_numeric(&mut self.rng, &slot.id)?;
        self.model.coll(&ns).slots[position].id = other.clone();
        let document = values::standard(&mut self.rng, other, slot.group, slot.unique);
        let delete = Step::delete(&ns, doc! { "_id": slot.id }, 1);
        Some(Op::crud(Kind::IdTypeSwap, vec![delete, Step::insert(&ns, vec![document])]))
    }

    fn unique_coll(&mut self) -> Option<Ns> {
        self.pick_where(|coll| coll.flavour == Flavour::Unique && coll.of_shape(Shape::Standard).len() >= 2)
    }

    /// Two documents swap a unique value through a temporary.
    fn unique_swap(&mut self) -> Option<Op> {
        let ns = self.unique_coll()?;
        let found = self.model.coll(&ns).of_shape(Shape::Standard);
        let first = self.rng.random_range(0..found.len());
        let second = (first + self.rng.random_range(1..found.len())) % found.len();
        let (first, second) = (found[first], found[second]);
        let (a, b) = (self.slot(&ns, first), self.slot(&ns, second));
        let slots = &mut self.model.coll(&ns).slots;
        slots[first].unique = b.unique;
        slots[second].unique = a.unique;
        let set = |slot: &Slot, unique: i64| {
            Step::update(&ns, doc! { "_id": slot.id.clone() }, doc! { "$set": { "u": unique } })
        };
        let steps = vec![set(&a, -a.unique), set(&b, a.unique), set(&a, b.unique)];
        Some(Op::crud(Kind::UniqueSwap, steps))
    }

    /// A new `_id` takes over the unique value of a deleted one.
    fn unique_reuse(&mut self) -> Option<Op> {
        let ns = self.unique_coll()?;
        let found = self.model.coll(&ns).of_shape(Shape::Standard);
        let position = found[self.rng.random_range(0..found.len())];
        let old = self.model.coll(&ns).slots.remove(position);
        let id = self.fresh_id(&ns);
        let slot = Slot { id: id.clone(), ..old };
        self.model.coll(&ns).slots.push(slot);
        let document = values::standard(&mut self.rng, id, old.group, old.unique);
        let delete = Step::delete(&ns, doc! { "_id": old.id }, 1);
        Some(Op::crud(Kind::UniqueReuse, vec![delete, Step::insert(&ns, vec![document])]))
    }

    /// One increment with an identity of its own, so that one applied twice shows.
    fn counter_inc(&mut self) -> Op {
        let increment = self.serial();
        let lane = self.rng.random_range(0..8);
        let counter = (increment / INCREMENTS_PER_COUNTER * 8 + lane) as i32;
        let ns = (self.model.databases[0].clone(), super::counters::COLLECTION.to_owned());
        let update = doc! { "$inc": { "n": 1_i64 }, "$push": { "seen": increment } };
        let step = Step::upsert(&ns, doc! { "_id": counter }, update);
        Op { mode: Mode::Counter(counter), majority: true, ..Op::crud(Kind::CounterInc, vec![step]) }
    }
}
