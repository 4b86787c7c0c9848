//! Every form of update: operators, numeric path parts, pipelines, odd names, thousands of paths.

use bson::{Bson, Document, bson, doc};
use rand::Rng;

use super::generate::Generator;
use super::kind::Kind;
use super::model::Shape;
use super::op::{Op, Step};
use super::values::{self, ODD_NAMES};

impl Generator {
    pub(super) fn make_update(&mut self, kind: Kind) -> Option<Op> {
        match kind {
            Kind::SetDotted | Kind::UnsetDotted | Kind::SetBesideDotted => self.update_odd(kind),
            Kind::UpdateDuplicateKeys => {
                let (ns, position) = self.pick_slot(Shape::Duplicate)?;
                let id = self.slot(&ns, position).id;
                let update = doc! { "$inc": { "n": 1 }, "$set": { "once": self.number() } };
                Some(Self::update(kind, &ns, doc! { "_id": id }, update))
            }
            Kind::ThousandPaths => self.thousand_paths(),
            Kind::UpdateMany => self.update_many(),
            Kind::BulkUpdate => self.bulk_update(),
            Kind::HotDocument => self.hot_document(),
            _ => self.update_standard(kind),
        }
    }

    fn number(&mut self) -> i32 {
        self.rng.random_range(0..1_000_000)
    }

    fn update_standard(&mut self, kind: Kind) -> Option<Op> {
        let (mut guard, update) = self.operators(kind).or_else(|| self.pipeline(kind))?;
        let (ns, slot) = self.standard()?;
        guard.insert("_id", slot.id);
        let mut statement = doc! { "q": guard, "u": update };
        if kind == Kind::SetArrayFilter {
            statement.insert("arrayFilters", vec![doc! { "e": { "$gte": 20 } }]);
        }
        let step = Step::new(&ns.0, doc! { "update": &ns.1, "updates": [statement] });
        Some(Op::crud(kind, vec![step]))
    }

    /// Guard and update of one operator kind. The guard keeps a path from meeting another type.
    fn operators(&mut self, kind: Kind) -> Option<(Document, Bson)> {
        let n = self.number();
        let array = doc! { "arr": { "$type": "array" } };
        let index = self.rng.random_range(0..3);
        let free = doc! {};
        Some(match kind {
            Kind::SetTop => (free, self.set_top()),
            Kind::SetNested => {
                let value = values::value(&mut self.rng, 1);
                (free, bson!({ "$set": { "nest.deep.x": n, "nest.v": value } }))
            }
            Kind::SetNewNested => {
                let fields: Document = ["z", "b", "aa"]
                    .iter()
                    .map(|name| (format!("nest.{name}{}", n % 8), Bson::Int32(n)))
                    .chain([(format!("nest.new{}.y.x", n % 4), Bson::Int32(n))])
                    .collect();
                (free, bson!({ "$set": fields }))
            }
            Kind::SetMany => {
                let fields: Document = (0..20).rev().map(|f| (format!("many{f}"), Bson::Int32(n + f))).collect();
                (free, bson!({ "$set": fields }))
            }
            Kind::SetArrayIndex => (array, bson!({ "$set": { format!("arr.{index}"): n, "grid.1.0": n } })),
            Kind::SetPadded => (array, bson!({ "$set": { format!("arr.{}", 10 + index): n } })),
            Kind::SetInArrayDocument => {
                let guard = doc! { format!("objs.{index}.k"): { "$exists": true } };
                let path = format!("objs.{index}");
                let update = bson!({
                    "$set": { format!("{path}.v"): n, format!("{path}.w.0"): "zero" },
                    "$inc": { format!("{path}.k"): 1 },
                });
                (guard, update)
            }
            Kind::SetNumericName => (
                doc! { "num": { "$type": "object" }, "num.1": { "$type": "object" } },
                bson!({ "$set": { "num.0": n, "num.1.0": n, format!("num.{}", n % 20 + 2): n } }),
            ),
            Kind::SetLeadingZero => (
                doc! { "num": { "$type": "object" } },
                bson!({ "$set": { "num.00": n, format!("num.0{}", n % 7 + 1): n } }),
            ),
            Kind::SetArrayFilter => (array, bson!({ "$set": { "arr.$[e]": n } })),
            Kind::Unset => {
                let names = ["s", "h", "opt", "v", "num", "objs", "z1", "b1", "aa1", "grid"];
                let one = names[self.rng.random_range(0..names.len())];
                (free, bson!({ "$unset": { one: "", format!("many{}", n % 20): "" } }))
            }
            Kind::Inc => (free, bson!({ "$inc": { "n": n % 10 - 5, "nest.count": 1_i64 } })),
            Kind::MinMax => (free, bson!({ "$min": { "low": n }, "$max": { "high": n }, "$mul": { "n": 1.5 } })),
            Kind::Push => {
                let (a, b) = (values::value(&mut self.rng, 1), n % 100);
                (array, bson!({ "$push": { "arr": { "$each": [a, b], "$slice": -30 } } }))
            }
            Kind::PushSlice => {
                let keep = self.rng.random_range(1..5);
                (array, bson!({ "$push": { "arr": { "$each": [n], "$slice": keep } } }))
            }
            Kind::PushSliceZero => (array, bson!({ "$push": { "arr": { "$each": [n], "$slice": 0 } } })),
            Kind::Pop => {
                let end = if n % 2 == 0 { 1 } else { -1 };
                (array, bson!({ "$pop": { "arr": end } }))
            }
            Kind::Pull => (array, bson!({ "$pull": { "arr": { "$lt": n % 60 } } })),
            Kind::Rename => {
                let pairs = [("s", "s2"), ("s2", "s"), ("opt", "nest.opt"), ("high", "h3")];
                let (from, to) = pairs[self.rng.random_range(0..pairs.len())];
                (free, bson!({ "$rename": { from: to } }))
            }
            _ => return None,
        })
    }

    fn set_top(&mut self) -> Bson {
        let value = values::value(&mut self.rng, 2);
        match self.rng.random_range(0..4) {
            0 => bson!({ "$set": { "grid": values::grid(&mut self.rng) } }),
            1 => bson!({ "$set": { "arr": [1, 2, 3, 40, 50], "s": "far shore", "v": value } }),
            2 => bson!({ "$set": { "num": { "0": 0, "00": 0, "1": { "0": 1 } } } }),
            _ => bson!({ "$set": { "v": value, "at": values::date(&mut self.rng) } }),
        }
    }

    fn pipeline(&mut self, kind: Kind) -> Option<(Document, Bson)> {
        let n = self.number();
        Some(match kind {
            Kind::PipelineShrink => {
                // Shrinks the outer array, cuts a row inside it and changes another, all at once.
                let row = |n: i32| bson!({ "$arrayElemAt": ["$grid", n] });
                let rows = bson!([
                    { "$slice": [row(0), 1] },
                    row(1),
                    { "$concatArrays": [row(2), [n]] },
                ]);
                let guard = doc! {
                    "grid.0": { "$type": "array" }, "grid.1": { "$type": "array" },
                    "grid.2": { "$type": "array" }, "grid.0.0": { "$exists": true },
                };
                (guard, bson!([{ "$set": { "grid": rows, "n": n % 1000 } }]))
            }
            Kind::PipelineNewFields => {
                let k = n % 10;
                let stages = bson!([
                    { "$set": { format!("z{k}"): n } },
                    { "$set": { format!("b{k}"): { "z": 1, "a": 2 } } },
                    { "$set": { format!("aa{k}"): [n, n] } },
                    { "$set": { format!("nest.z{k}"): n } },
                    { "$set": { format!("nest.b{k}"): n } },
                ]);
                (doc! {}, stages)
            }
            Kind::PipelineReplace => {
                let value = values::value(&mut self.rng, 1);
                let merged = bson!({ "$mergeObjects": [
                    "$$ROOT", { "v": { "$literal": value }, format!("q{}", n % 5): n },
                ] });
                (doc! {}, bson!([{ "$replaceWith": merged }]))
            }
            Kind::PipelineReorder if n % 2 == 0 => {
                let reversed = bson!({ "$arrayToObject": { "$reverseArray": { "$objectToArray": "$nest" } } });
                (doc! { "nest": { "$type": "object" } }, bson!([{ "$set": { "nest": reversed } }]))
            }
            Kind::PipelineReorder => {
                let field = ["s", "v", "nest", "arr"][self.rng.random_range(0..4)];
                let last = bson!({ "$mergeObjects": ["$$ROOT", { field: format!("$old.{field}") }] });
                let stages = bson!([
                    { "$set": { "old": "$$ROOT" } }, { "$unset": field }, { "$replaceWith": last }, { "$unset": "old" },
                ]);
                (doc! { field: { "$exists": true } }, stages)
            }
            _ => return None,
        })
    }

    fn update_odd(&mut self, kind: Kind) -> Option<Op> {
        let (ns, position) = self.pick_slot(Shape::Odd)?;
        let id = self.slot(&ns, position).id;
        let name = ODD_NAMES[self.rng.random_range(0..ODD_NAMES.len())];
        let n = self.number();
        let field = doc! { "$literal": name };
        let (filter, update) = match kind {
            Kind::SetDotted if n % 3 == 0 => {
                let inner = doc! { "$setField": { "field": field, "input": "$a", "value": n } };
                (doc! { "a": { "$type": "object" } }, bson!([{ "$set": { "a": inner } }]))
            }
            Kind::SetDotted => {
                let whole = doc! { "$setField": { "field": field, "input": "$$ROOT", "value": n } };
                (doc! {}, bson!([{ "$replaceWith": whole }]))
            }
            Kind::UnsetDotted => {
                let whole = doc! { "$unsetField": { "field": field, "input": "$$ROOT" } };
                (doc! {}, bson!([{ "$replaceWith": whole }]))
            }
            _ => (doc! { "a": { "$type": "object" } }, bson!({ "$set": { "a.b": n } })),
        };
        let mut filter = filter;
        filter.insert("_id", id);
        Some(Self::update(kind, &ns, filter, update))
    }

    fn thousand_paths(&mut self) -> Option<Op> {
        let (ns, position) = self.pick_slot(Shape::Wide)?;
        let id = self.slot(&ns, position).id;
        let n = self.number();
        let fields: Document = match n % 2 {
            0 => (0..1000).map(|f| (format!("wide.f{f:04}"), Bson::Int32(n + f))).collect(),
            _ => (0..1000).map(|f| (format!("many.{f}"), Bson::Int32(n + f))).collect(),
        };
        Some(Self::update(Kind::ThousandPaths, &ns, doc! { "_id": id }, doc! { "$set": fields }))
    }

    fn update_many(&mut self) -> Option<Op> {
        let (ns, slot) = self.standard()?;
        let n = self.number();
        let filter = match n % 2 {
            0 => doc! { "g": slot.group },
            _ => doc! { "n": { "$gte": n % 900, "$lt": n % 900 + 100 } },
        };
        let update = doc! { "$inc": { "n": 1 }, "$set": { "mark": n } };
        let statement = doc! { "q": filter, "u": update, "multi": true };
        let step = Step::new(&ns.0, doc! { "update": &ns.1, "updates": [statement] });
        Some(Op::crud(Kind::UpdateMany, vec![step]))
    }

    fn bulk_update(&mut self) -> Option<Op> {
        let (ns, _) = self.pick_slot(Shape::Standard)?;
        let found = self.model.coll(&ns).of_shape(Shape::Standard);
        let statements: Vec<_> = (0..self.rng.random_range(2..20))
            .map(|n: i32| {
                let position = found[self.rng.random_range(0..found.len())];
                let id = self.model.coll(&ns).slots[position].id.clone();
                doc! { "q": { "_id": id }, "u": { "$set": { "bulk": n }, "$inc": { "n": 1 } } }
            })
            .collect();
        let step = Step::new(&ns.0, doc! { "update": &ns.1, "updates": statements });
        Some(Op::crud(Kind::BulkUpdate, vec![step]))
    }

    /// A burst on one document.
    fn hot_document(&mut self) -> Option<Op> {
        let ns = self.pick_where(|coll| !coll.of_shape(Shape::Standard).is_empty())?;
        let first = self.model.coll(&ns).of_shape(Shape::Standard)[0];
        let id = self.slot(&ns, first).id;
        let statements: Vec<_> = (0..self.rng.random_range(5..20))
            .map(|n: i32| {
                let update = match n % 3 {
                    0 => doc! { "$inc": { "hot": 1 } },
                    1 => doc! { "$set": { "last": n } },
                    _ => doc! { "$unset": { "last": "" } },
                };
                doc! { "q": { "_id": id.clone() }, "u": update }
            })
            .collect();
        let step = Step::new(&ns.0, doc! { "update": &ns.1, "updates": statements });
        Some(Op::crud(Kind::HotDocument, vec![step]))
    }
}
