//! Counters: increments that show when one was applied twice, or an acknowledged one was lost.
//!
//! Each increment adds 1 to `n` and its own identity to `seen`. On any faithful copy `n` equals the
//! number of identities, all different; and `n` lies between the increments acknowledged and those
//! acknowledged or of unknown outcome.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use bson::{Document, doc};
use futures::TryStreamExt;
use mongodb::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::op::Step;
use super::retry::{self, PAUSE, Reply};
use super::run::{Stop, Until};

/// Where counters live.
pub(super) const COLLECTION: &str = "counters";

/// What the client knows about its increments.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    /// Counter -> (acknowledged, unknown).
    counters: BTreeMap<i32, (i64, i64)>,
}

impl Ledger {
    pub(super) fn acknowledged(&mut self, counter: i32) {
        self.counters.entry(counter).or_default().0 += 1;
    }

    pub(super) fn unknown(&mut self, counter: i32) {
        self.counters.entry(counter).or_default().1 += 1;
    }

    pub(super) async fn check(&self, client: &Client, database: &str) -> Result<()> {
        let found: Vec<Document> =
            client.database(database).collection::<Document>(COLLECTION).find(doc! {}).await?.try_collect().await?;
        let mut values = BTreeMap::new();
        for document in &found {
            let (counter, n) = verify(document)?;
            values.insert(counter, n);
        }
        for (counter, (acknowledged, unknown)) in &self.counters {
            let n = values.remove(counter).unwrap_or(0);
            ensure!(
                (*acknowledged..=acknowledged + unknown).contains(&n),
                "counter {counter} is {n}, with {acknowledged} increments acknowledged and \
                 {unknown} unknown"
            );
        }
        Ok(())
    }
}

/// Checks one counter document by itself: nothing in it was applied twice.
fn verify(document: &Document) -> Result<(i32, i64)> {
    let counter = document.get_i32("_id")?;
    let n = document.get_i64("n")?;
    let seen = document.get_array("seen")?;
    let distinct: BTreeSet<i64> = seen.iter().filter_map(|id| id.as_i64()).collect();
    ensure!(
        n == seen.len() as i64 && distinct.len() == seen.len(),
        "counter {counter} is {n}, with {} increments seen, {} of them different",
        seen.len(),
        distinct.len()
    );
    Ok((counter, n))
}

/// A workload of nothing but counters.
pub struct Counters {
    database: String,
    rng: StdRng,
    next: i64,
    ledger: Ledger,
}

impl Counters {
    /// Counters in this database; one `Counters` per database.
    pub fn new(seed: u64, database: &str) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        Self { database: database.to_owned(), rng, next: 0, ledger: Ledger::default() }
    }

    /// Increments until the condition is met; returns how many were acknowledged.
    pub async fn run(&mut self, client: &Client, until: Until) -> Result<u64> {
        let stop = Stop::new(until);
        let db = client.database(&self.database);
        let mut acknowledged = 0;
        while stop.take() {
            self.next += 1;
            let counter = (self.next / 1000 * 16) as i32 + self.rng.random_range(0..16);
            let ns = (self.database.clone(), COLLECTION.to_owned());
            let update = doc! { "$inc": { "n": 1_i64 }, "$push": { "seen": self.next } };
            let step = Step::upsert(&ns, doc! { "_id": counter }, update);
            let mut command = step.command;
            command.append(bson::raw::cstr!("writeConcern"), bson::rawdoc! { "w": "majority" });
            match retry::send(&db, command, None, &[], false).await? {
                Reply::Again(_) => {
                    self.ledger.unknown(counter);
                    tokio::time::sleep(PAUSE).await;
                }
                _ => {
                    self.ledger.acknowledged(counter);
                    acknowledged += 1;
                }
            }
        }
        Ok(acknowledged)
    }

    /// Fails when an increment was applied twice, or an acknowledged one is missing.
    pub async fn check(&self, client: &Client) -> Result<()> {
        self.ledger.check(client, &self.database).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_double_apply_shows_in_one_document() {
        let good = doc! { "_id": 1, "n": 2_i64, "seen": [5_i64, 7_i64] };
        assert_eq!(verify(&good).expect("a good counter"), (1, 2));
        for bad in [
            doc! { "_id": 1, "n": 3_i64, "seen": [5_i64, 7_i64] },
            doc! { "_id": 1, "n": 2_i64, "seen": [5_i64, 5_i64] },
            doc! { "_id": 1, "n": 1_i64, "seen": [5_i64, 7_i64] },
        ] {
            assert!(verify(&bad).is_err(), "{bad}");
        }
    }
}
