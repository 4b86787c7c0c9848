//! The data of the sample application: sites whose pages show items, and ratings of those items.
//!
//! `load` writes the catalogue and some history; `run` adds ratings at a steady rate, as visitors would.

use anyhow::{Result, ensure};
use bson::oid::ObjectId;
use bson::{DateTime, Document, doc};
use mongodb::options::WriteConcern;
use mongodb::{Client, Collection, Database};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::{Duration, Instant, MissedTickBehavior};

use super::retry::{self, PAUSE};
use super::run::{Stop, Until};
use super::values;

/// The sample application's items: name and `uid`.
const ITEMS: &[(&str, i32)] = &[("Banana", 1), ("Coconut", 2), ("Oranges", 3), ("Pineapple", 4)];
/// Pages of its one site.
const PAGES: &[(&str, &str)] = &[("Home", "Welcome"), ("Rating", "Rate our smoothies"), ("Leaderboard", "Leaderboard")];
/// How long one write keeps trying through an election.
const PATIENCE: Duration = Duration::from_secs(60);

/// Items, ratings and sites in one database.
pub struct Ratings {
    database: String,
    rng: StdRng,
    items: Vec<ObjectId>,
}

impl Ratings {
    /// The same seed gives the same items and sites.
    pub fn new(seed: u64, database: &str) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let items = ITEMS.iter().map(|_| values::oid(&mut rng)).collect();
        Self { database: database.to_owned(), rng, items }
    }

    /// Drops the database's three collections and writes them anew with `history` ratings.
    pub async fn load(&mut self, client: &Client, history: u32) -> Result<()> {
        let db = client.database(&self.database);
        for name in ["items", "ratings", "sites"] {
            db.collection::<Document>(name).drop().await?;
        }
        let item = |(id, (name, uid)): (&ObjectId, &(&str, i32))| {
            let img = format!("/images/{}.jpg", name.to_lowercase());
            doc! { "_id": id, "uid": uid, "name": name, "img": img, "__v": 0 }
        };
        let items: Vec<Document> = self.items.iter().zip(ITEMS).map(item).collect();
        db.collection("items").insert_many(items).await?;
        db.collection("sites").insert_one(self.site()).await?;
        let mut left = history;
        while left > 0 {
            let count = left.min(1_000);
            let batch: Vec<_> = (0..count).map(|_| self.rating()).collect();
            ratings(&db).insert_many(batch).await?;
            left -= count;
        }
        Ok(())
    }

    fn site(&mut self) -> Document {
        let page = |(name, title): &(&str, &str)| {
            let image = format!("/images/{}.png", name.to_lowercase());
            ((*name).to_owned(), doc! { "title": title, "headerImage": image, "subtitle": "Fruit Smoothies" }.into())
        };
        let pages: Document = PAGES.iter().map(page).collect();
        let id = values::oid(&mut self.rng);
        doc! { "_id": id, "name": "Fruit Smoothies", "shortCode": "FR", "pages": pages }
    }

    fn rating(&mut self) -> Document {
        let count = self.rng.random_range(1..4);
        let rated: Vec<ObjectId> = (0..count).map(|_| self.items[self.rng.random_range(0..self.items.len())]).collect();
        let ip = format!("10.{}.{}.7", self.rng.random::<u8>(), self.rng.random::<u8>());
        doc! {
            "_id": values::oid(&mut self.rng),
            "rating": self.rng.random_range(0..=5),
            "timestamp": DateTime::now(),
            "raterIp": ip,
            "itemRated": rated,
            "__v": 0,
        }
    }

    /// Adds `per_second` ratings, at most `limit`, until the condition is met. Returns how many.
    ///
    /// Each has its own `_id`: trying again after a lost answer can not write one twice.
    pub async fn run(&mut self, client: &Client, per_second: u32, limit: u64, until: Until) -> Result<u64> {
        let stop = Stop::new(until);
        let collection = ratings(&client.database(&self.database));
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second.max(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut written = 0;
        while written < limit && stop.take() {
            ticks.tick().await;
            let rating = self.rating();
            let patience = Instant::now() + PATIENCE;
            while let Err(error) = collection.insert_one(&rating).await {
                if is_duplicate(&error) {
                    break;
                }
                ensure!(retry::is_again(&error) && Instant::now() < patience, error);
                if stop.is_over() {
                    return Ok(written);
                }
                tokio::time::sleep(PAUSE).await;
            }
            written += 1;
        }
        Ok(written)
    }
}

fn is_duplicate(error: &mongodb::error::Error) -> bool {
    use mongodb::error::{ErrorKind, WriteFailure};
    matches!(
        error.kind.as_ref(),
        ErrorKind::Write(WriteFailure::WriteError(write)) if write.code == 11000
    )
}

fn ratings(db: &Database) -> Collection<Document> {
    let options = mongodb::options::CollectionOptions::builder().write_concern(WriteConcern::majority());
    db.collection_with_options("ratings", options.build())
}
