//! Schema changes: collections, indexes, collMod, views.

use bson::{Document, doc};
use rand::Rng;

use super::generate::Generator;
use super::kind::Kind;
use super::model::{Coll, Flavour, Ns};
use super::op::{Op, Step};

/// Seconds until a TTL index would act: longer than any document here is old.
const NEVER: i32 = 1_000_000_000;
const VIEW_POOL: usize = 6;

impl Generator {
    pub(super) fn make_ddl(&mut self, kind: Kind) -> Option<Op> {
        match kind {
            Kind::CreatePlain => self.create_free(Flavour::Plain),
            Kind::CreateValidator => self.create_free(Flavour::Validator),
            Kind::CreateCollation => self.create_free(Flavour::Collation),
            Kind::CreateClustered => self.create_free(Flavour::Clustered),
            Kind::Drop | Kind::DropRecreate => self.drop_collection(kind),
            Kind::DropDatabase => Some(self.drop_database()),
            Kind::RenameCollection | Kind::RenameChain => self.rename(kind),
            Kind::RenameDropTarget => self.rename_drop_target(),
            Kind::IndexDrop | Kind::IndexDropAll => self.drop_index(kind),
            Kind::CollModHidden | Kind::CollModExpire => self.mod_index(kind),
            Kind::CollModValidator | Kind::CollModLevel => self.mod_validation(kind),
            Kind::ViewCreate | Kind::ViewMod | Kind::ViewDrop | Kind::ViewChain => self.view(kind),
            _ => self.create_index(kind),
        }
    }

    /// Creates a collection of this flavour; a unique one gets its index at once.
    pub(super) fn create(&mut self, ns: &Ns, flavour: Flavour) -> Op {
        let mut coll = Coll::new(flavour);
        let mut command = doc! { "create": &ns.1 };
        let mut kind = Kind::CreatePlain;
        match flavour {
            Flavour::Plain | Flavour::Unique => {}
            Flavour::Validator => {
                kind = Kind::CreateValidator;
                command.insert("validator", validator(0));
            }
            Flavour::Collation => {
                kind = Kind::CreateCollation;
                command.insert("collation", doc! { "locale": "en", "strength": 2 });
            }
            Flavour::Clustered => {
                kind = Kind::CreateClustered;
                command.insert("clusteredIndex", doc! { "key": { "_id": 1 }, "unique": true });
            }
        }
        let mut steps = vec![Step::new(&ns.0, command)];
        if flavour == Flavour::Unique {
            coll.indexes.insert("unique");
            let index = doc! { "key": { "u": 1 }, "name": "unique", "unique": true, "sparse": true };
            steps.push(Step::new(&ns.0, doc! { "createIndexes": &ns.1, "indexes": [index] }));
        }
        self.model.colls.insert(ns.clone(), coll);
        Op::ddl(kind, steps, &[48])
    }

    fn create_free(&mut self, flavour: Flavour) -> Option<Op> {
        let ns = self.free_collection()?;
        Some(self.create(&ns, flavour))
    }

    /// Collections that may go: enough must stay for all other kinds.
    fn expendable(&mut self) -> Option<Ns> {
        (self.model.colls.len() > 12).then_some(())?;
        self.pick_where(|coll| coll.flavour != Flavour::Unique)
    }

    fn drop_collection(&mut self, kind: Kind) -> Option<Op> {
        let ns = self.expendable()?;
        let old = self.model.colls.remove(&ns)?;
        let mut steps = vec![Step::new(&ns.0, doc! { "drop": &ns.1 })];
        if kind == Kind::DropRecreate {
            let flavour = if self.rng.random() { old.flavour } else { Flavour::Plain };
            steps.extend(self.create(&ns, flavour).steps);
            let group = self.serial() as i32;
            let documents = (0..5).map(|_| self.new_document(&ns, group)).collect();
            steps.push(Step::insert(&ns, documents));
        }
        Some(Op::ddl(kind, steps, &[11000]))
    }

    /// Drops the last database, so that the others keep their collections, and begins it anew.
    fn drop_database(&mut self) -> Op {
        let database = self.model.databases[2].clone();
        self.model.colls.retain(|ns, _| ns.0 != database);
        self.model.views.retain(|ns, _| ns.0 != database);
        let mut steps = vec![Step::new(&database, doc! { "dropDatabase": 1 })];
        for (n, flavour) in [Flavour::Plain, Flavour::Unique, Flavour::Validator].iter().enumerate() {
            let ns = (database.clone(), format!("c{n}"));
            steps.extend(self.create(&ns, *flavour).steps);
            let group = self.serial() as i32;
            let documents = (0..4).map(|_| self.new_document(&ns, group)).collect();
            steps.push(Step::insert(&ns, documents));
        }
        Op::ddl(Kind::DropDatabase, steps, &[11000])
    }

    fn rename(&mut self, kind: Kind) -> Option<Op> {
        let mut from = self.pick_where(|_| true)?;
        let hops = if kind == Kind::RenameChain { 2 } else { 1 };
        let mut steps = Vec::new();
        for _ in 0..hops {
            let database = from.0.clone();
            let pool = super::txn::COLLECTION_POOL;
            let to = (database.clone(), self.model.free_name(&mut self.rng, &database, "c", pool)?);
            let coll = self.model.colls.remove(&from)?;
            self.model.colls.insert(to.clone(), coll);
            steps.push(rename_step(&from, &to, false));
            from = to;
        }
        Some(Op::ddl(kind, steps, &[]))
    }

    fn rename_drop_target(&mut self) -> Option<Op> {
        let to = self.expendable()?;
        let from = self.model.pick(&mut self.rng, |ns, _| ns.0 == to.0 && *ns != to)?;
        let coll = self.model.colls.remove(&from)?;
        self.model.colls.insert(to.clone(), coll);
        Some(Op::ddl(Kind::RenameDropTarget, vec![rename_step(&from, &to, true)], &[]))
    }

    fn create_index(&mut self, kind: Kind) -> Option<Op> {
        let (name, mut index) = index(kind)?;
        let ns = self.pick_where(|coll| !coll.indexes.contains(name))?;
        let coll = self.model.coll(&ns);
        // A text index knows no other; and a symbol, which these may meet, is not indexed under one.
        let simple = [Kind::IndexText, Kind::IndexWildcard, Kind::IndexCompound].contains(&kind);
        if simple && coll.flavour == Flavour::Collation {
            index.insert("collation", doc! { "locale": "simple" });
        }
        coll.indexes.insert(name);
        index.insert("name", name);
        let step = Step::new(&ns.0, doc! { "createIndexes": &ns.1, "indexes": [index] });
        Some(Op::ddl(kind, vec![step], &[11000]))
    }

    fn drop_index(&mut self, kind: Kind) -> Option<Op> {
        // Collections whose role is their unique index keep it.
        let ns = self.pick_where(|coll| coll.flavour != Flavour::Unique && !coll.indexes.is_empty())?;
        let coll = self.model.coll(&ns);
        let target = if kind == Kind::IndexDropAll {
            coll.indexes.clear();
            "*"
        } else {
            let names: Vec<_> = coll.indexes.iter().copied().collect();
            let name = names[self.rng.random_range(0..names.len())];
            self.model.coll(&ns).indexes.remove(name);
            name
        };
        let step = Step::new(&ns.0, doc! { "dropIndexes": &ns.1, "index": target });
        Some(Op::ddl(kind, vec![step], &[27]))
    }

    fn mod_index(&mut self, kind: Kind) -> Option<Op> {
        let wanted: &[&str] = match kind {
            Kind::CollModHidden => &["hidden", "compound", "sparse", "partial"],
            _ => &["ttl"],
        };
        let fits = |coll: &Coll| wanted.iter().any(|name| coll.indexes.contains(name));
        let ns = self.pick_where(fits)?;
        let coll = self.model.coll(&ns);
        let name = *wanted.iter().find(|name| coll.indexes.contains(*name))?;
        let mut index = doc! { "name": name };
        match kind {
            Kind::CollModHidden => index.insert("hidden", self.rng.random::<bool>()),
            _ => index.insert("expireAfterSeconds", NEVER - self.rng.random_range(0..1000)),
        };
        let step = Step::new(&ns.0, doc! { "collMod": &ns.1, "index": index });
        Some(Op::ddl(kind, vec![step], &[27]))
    }

    fn mod_validation(&mut self, kind: Kind) -> Option<Op> {
        let ns = self.pick_where(|coll| coll.flavour == Flavour::Validator)?;
        let mut command = doc! { "collMod": &ns.1 };
        if kind == Kind::CollModValidator {
            command.insert("validator", validator(self.rng.random_range(0..100)));
        } else {
            let level = ["strict", "moderate"][self.rng.random_range(0..2)];
            command.insert("validationLevel", level);
            let action = ["error", "warn"][self.rng.random_range(0..2)];
            command.insert("validationAction", action);
        }
        Some(Op::ddl(kind, vec![Step::new(&ns.0, command)], &[]))
    }

    fn view(&mut self, kind: Kind) -> Option<Op> {
        let n = self.rng.random_range(0..1000);
        let pipeline = vec![doc! { "$match": { "n": { "$gte": n } } }, doc! { "$set": { "x": n } }];
        let (ns, command) = match kind {
            Kind::ViewCreate => {
                let on = self.pick_where(|_| true)?;
                let ns = self.free_view(&on.0)?;
                self.model.views.insert(ns.clone(), on.1.clone());
                (ns.clone(), doc! { "create": ns.1, "viewOn": on.1, "pipeline": pipeline })
            }
            Kind::ViewChain => {
                let on = self.model.pick_view(&mut self.rng)?;
                // A chain of more than a few hops would in the end meet the server's limit of 20.
                self.model.views.get(&on).filter(|below| !below.starts_with('v'))?;
                let ns = self.free_view(&on.0)?;
                self.model.views.insert(ns.clone(), on.1.clone());
                (ns.clone(), doc! { "create": ns.1, "viewOn": on.1, "pipeline": pipeline })
            }
            Kind::ViewMod => {
                let ns = self.model.pick_view(&mut self.rng)?;
                let on = self.model.pick(&mut self.rng, |other, _| other.0 == ns.0)?;
                self.model.views.insert(ns.clone(), on.1.clone());
                (ns.clone(), doc! { "collMod": ns.1, "viewOn": on.1, "pipeline": pipeline })
            }
            _ => {
                let ns = self.model.pick_view(&mut self.rng)?;
                self.model.views.remove(&ns);
                (ns.clone(), doc! { "drop": ns.1 })
            }
        };
        Some(Op::ddl(kind, vec![Step::new(&ns.0, command)], &[]))
    }

    fn free_view(&mut self, database: &str) -> Option<Ns> {
        let name = self.model.free_name(&mut self.rng, database, "v", VIEW_POOL)?;
        Some((database.to_owned(), name))
    }
}

fn rename_step(from: &Ns, to: &Ns, drop_target: bool) -> Step {
    let full = |ns: &Ns| format!("{}.{}", ns.0, ns.1);
    let command = doc! { "renameCollection": full(from), "to": full(to), "dropTarget": drop_target };
    Step::new("admin", command)
}

/// Forbids strings in `strict`; the number only makes one definition differ from another.
fn validator(number: i32) -> Document {
    doc! { "strict": { "$not": { "$type": "string" } }, "never": { "$ne": number } }
}

/// Name and specification of the index a kind stands for.
fn index(kind: Kind) -> Option<(&'static str, Document)> {
    Some(match kind {
        Kind::IndexUnique => ("unique", doc! { "key": { "u": 1 }, "unique": true, "sparse": true }),
        Kind::IndexSparse => ("sparse", doc! { "key": { "opt": -1 }, "sparse": true }),
        Kind::IndexPartial => {
            let partial = doc! { "n": { "$gt": 100 } };
            ("partial", doc! { "key": { "n": 1 }, "partialFilterExpression": partial })
        }
        Kind::IndexTtl => ("ttl", doc! { "key": { "at": 1 }, "expireAfterSeconds": NEVER }),
        Kind::IndexHidden => ("hidden", doc! { "key": { "n": -1 }, "hidden": true }),
        Kind::IndexCompound => ("compound", doc! { "key": { "n": 1, "s": -1, "nest.k": 1, "arr": 1 } }),
        Kind::IndexText => ("text", doc! { "key": { "s": "text" }, "default_language": "none", "weights": { "s": 3 } }),
        Kind::IndexGeo => ("geo", doc! { "key": { "loc": "2dsphere" } }),
        Kind::IndexWildcard => ("wildcard", doc! { "key": { "nest.$**": 1 } }),
        Kind::IndexHashed => ("hashed", doc! { "key": { "h": "hashed" } }),
        Kind::IndexCollation => {
            ("collation", doc! { "key": { "s": 1 }, "collation": { "locale": "fr", "strength": 1 } })
        }
        _ => return None,
    })
}
