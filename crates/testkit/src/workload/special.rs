//! Large documents, and what lies beyond the first spine: capped, time series, `$out`, `$merge`.

use bson::{Bson, doc};
use rand::Rng;

use super::generate::Generator;
use super::kind::Kind;
use super::model::Shape;
use super::op::{Op, Step};
use super::values;

/// The largest document the server stores.
const DOCUMENT_LIMIT: usize = 16 * 1024 * 1024;

impl Generator {
    pub(super) fn make_special(&mut self, kind: Kind) -> Option<Op> {
        match kind {
            Kind::InsertLarge => {
                let size = self.large_size();
                self.insert_large(kind, size, None)
            }
            Kind::EventOverLimit => {
                // The oplog entry holds `_id` twice and just fits. The event holds it twice more, as
                // hexadecimal in the resume token, and does not.
                let id = format!("{}{}", self.serial(), "k".repeat(300_000));
                self.insert_large(kind, DOCUMENT_LIMIT - 650_000, Some(Bson::String(id)))
            }
            Kind::UpdateLarge | Kind::ReplaceLarge => self.change_large(kind),
            _ => self.make_beyond(kind),
        }
    }

    /// Mostly around a few hundred KB, sometimes up to 15.9 MB.
    fn large_size(&mut self) -> usize {
        match self.rng.random_range(0..10) {
            0 => 15_900_000,
            1 => self.rng.random_range(1_000_000..15_900_000),
            _ => self.rng.random_range(100_000..600_000),
        }
    }

    fn spend(&mut self, bytes: usize) -> Option<()> {
        self.budget = self.budget.checked_sub(bytes as u64)?;
        Some(())
    }

    fn insert_large(&mut self, kind: Kind, size: usize, id: Option<Bson>) -> Option<Op> {
        let ns = self.pick_where(|coll| coll.flavour == super::model::Flavour::Plain && !coll.is_full())?;
        self.spend(size + id.as_ref().map_or(0, text_len))?;
        let group = self.serial() as i32;
        let slot = self.new_slot(&ns, group, Shape::Large);
        if let Some(id) = &id {
            self.model.coll(&ns).slots.last_mut()?.id = id.clone();
        }
        let document = self.large(id.unwrap_or(slot.id), group, size);
        Some(Op::crud(kind, vec![Step::insert(&ns, vec![document])]))
    }

    fn large(&mut self, id: Bson, group: i32, size: usize) -> bson::Document {
        let letter = char::from(b'a' + self.rng.random_range(0..26));
        let text = letter.to_string().repeat(size.saturating_sub(2_000));
        doc! { "_id": id, "g": group, "n": 1, "arr": (0..100).collect::<Vec<i32>>(), "big": text }
    }

    fn change_large(&mut self, kind: Kind) -> Option<Op> {
        let (ns, position) = self.pick_slot(Shape::Large)?;
        let slot = self.slot(&ns, position);
        let filter = doc! { "_id": slot.id.clone() };
        if kind == Kind::UpdateLarge {
            let n = self.rng.random_range(0..1000);
            let update = doc! { "$set": { "n": n, "arr.3": n, "new": n }, "$inc": { "times": 1 } };
            return Some(Self::update(kind, &ns, filter, update));
        }
        let size = self.large_size();
        self.spend(size + 2 * text_len(&slot.id))?;
        let document = self.large(slot.id, slot.group, size.min(DOCUMENT_LIMIT - 400_000));
        Some(Self::update(kind, &ns, filter, document))
    }

    fn make_beyond(&mut self, kind: Kind) -> Option<Op> {
        let database = self.model.databases[1].clone();
        let serial = self.serial();
        let capped = format!("capped{}", serial % 2);
        let series = format!("series{}", serial % 2);
        let date = values::date(&mut self.rng);
        let (command, expect): (_, &[i32]) = match kind {
            Kind::CappedCreate => (doc! { "create": capped, "capped": true, "size": 10_000, "max": 20 }, &[48]),
            Kind::CappedInsert => {
                let document = doc! { "_id": serial, "t": date };
                (doc! { "insert": capped, "documents": [document] }, &[])
            }
            Kind::TimeseriesCreate => {
                let options = doc! { "timeField": "t", "metaField": "m", "granularity": "hours" };
                (doc! { "create": series, "timeseries": options }, &[48])
            }
            Kind::TimeseriesInsert => {
                let document = doc! { "_id": serial, "t": date, "m": serial % 5, "x": serial };
                (doc! { "insert": series, "documents": [document] }, &[])
            }
            _ => return self.aggregate_into(kind),
        };
        Some(Op::ddl(kind, vec![Step::new(&database, command)], expect))
    }

    fn aggregate_into(&mut self, kind: Kind) -> Option<Op> {
        let ns = self.pick_where(|coll| !coll.slots.is_empty())?;
        // `$merge` takes neither a null `_id` nor names that begin with `$`.
        let matching = doc! { "$match": { "n": { "$type": "number" }, "_id": { "$ne": null } } };
        let fields = doc! { "$project": { "n": 1, "s": 1, "arr": 1, "grid": 1 } };
        let last = match kind {
            Kind::Out => doc! { "$out": "out" },
            _ => doc! { "$merge": { "into": "merged", "whenMatched": "replace" } },
        };
        let command = doc! { "aggregate": &ns.1, "pipeline": [matching, fields, last], "cursor": {} };
        Some(Op::ddl(kind, vec![Step::new(&ns.0, command)], &[]))
    }
}

fn text_len(id: &Bson) -> usize {
    id.as_str().map_or(0, str::len)
}
