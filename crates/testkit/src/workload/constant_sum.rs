//! Accounts in two collections whose balances always add up: shows half transactions.
//!
//! Transfers move money between accounts in multi-document transactions. A reader who sees another sum,
//! on the source or on any copy, has seen half a transaction.

use anyhow::{Result, bail, ensure};
use bson::{Document, doc};
use futures::TryStreamExt;
use mongodb::error::Error;
use mongodb::options::WriteConcern;
use mongodb::{Client, ClientSession};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::{Duration, Instant};

use super::retry::{self, PAUSE};
use super::run::{Stop, Until};

const COLLECTIONS: [&str; 2] = ["checking", "savings"];
const BALANCE: i64 = 1_000;
/// How long a check or transfer keeps trying through an election.
const PATIENCE: Duration = Duration::from_secs(60);

/// `accounts` accounts in each of two collections of one database.
pub struct ConstantSum {
    database: String,
    accounts: i32,
    rng: StdRng,
}

impl ConstantSum {
    pub fn new(seed: u64, database: &str, accounts: i32) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        Self { database: database.to_owned(), accounts: accounts.max(2), rng }
    }

    /// The sum that every reader must see.
    pub fn expected(&self) -> i64 {
        2 * i64::from(self.accounts) * BALANCE
    }

    /// Writes the accounts, all in one transaction, so that a reader sees none or all.
    pub async fn load(&self, client: &Client) -> Result<()> {
        let patience = Instant::now() + PATIENCE;
        while let Err(error) = self.load_once(client).await {
            ensure!(retry::is_again(&error) && Instant::now() < patience, error);
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn load_once(&self, client: &Client) -> mongodb::error::Result<()> {
        let mut session = begin(client).await?;
        for name in COLLECTIONS {
            let accounts = (0..self.accounts).map(|n| doc! { "_id": n, "balance": BALANCE });
            let collection = client.database(&self.database).collection::<Document>(name);
            collection.delete_many(doc! {}).session(&mut session).await?;
            collection.insert_many(accounts).session(&mut session).await?;
        }
        session.commit_transaction().await
    }

    /// Transfers until the condition is met; returns how many were acknowledged.
    pub async fn run(&mut self, client: &Client, until: Until) -> Result<u64> {
        let stop = Stop::new(until);
        let mut done = 0;
        let mut last = Instant::now();
        while stop.take() {
            // A failed transfer is let go: committed or not, the sum is the same.
            match self.transfer(client).await {
                Ok(()) => {
                    done += 1;
                    last = Instant::now();
                }
                Err(error) if retry::is_again(&error) && last.elapsed() < PATIENCE => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => bail!(error),
            }
        }
        Ok(done)
    }

    async fn transfer(&mut self, client: &Client) -> mongodb::error::Result<()> {
        let amount = self.rng.random_range(1..50_i64);
        let from = (self.rng.random_range(0..2), self.rng.random_range(0..self.accounts));
        let mut to = (self.rng.random_range(0..2), self.rng.random_range(0..self.accounts));
        if to == from {
            to.0 = 1 - to.0;
        }
        let mut session = begin(client).await?;
        for ((side, account), change) in [(from, -amount), (to, amount)] {
            client
                .database(&self.database)
                .collection::<Document>(COLLECTIONS[side])
                .update_one(doc! { "_id": account }, doc! { "$inc": { "balance": change } })
                .session(&mut session)
                .await?;
        }
        session.commit_transaction().await
    }

    /// Reads all accounts in one snapshot and fails when the sum is another. Nothing loaded yet is `None`.
    pub async fn check(&self, client: &Client) -> Result<Option<i64>> {
        let patience = Instant::now() + PATIENCE;
        let (accounts, sum) = loop {
            match self.read(client).await {
                Ok(read) => break read,
                Err(error) if retry::is_again(&error) && Instant::now() < patience => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => bail!(error),
            }
        };
        if accounts == 0 {
            return Ok(None);
        }
        ensure!(
            accounts == 2 * i64::from(self.accounts) && sum == self.expected(),
            "half a transaction is visible: {accounts} accounts hold {sum}, not {}",
            self.expected()
        );
        Ok(Some(sum))
    }

    async fn read(&self, client: &Client) -> std::result::Result<(i64, i64), Error> {
        let mut session = client.start_session().snapshot(true).await?;
        let (mut accounts, mut sum) = (0, 0);
        for name in COLLECTIONS {
            let collection = client.database(&self.database).collection::<Document>(name);
            let mut cursor = collection.find(doc! {}).session(&mut session).await?;
            let found: Vec<Document> = cursor.stream(&mut session).try_collect().await?;
            accounts += found.len() as i64;
            sum += found.iter().filter_map(|account| account.get_i64("balance").ok()).sum::<i64>();
        }
        Ok((accounts, sum))
    }
}

async fn begin(client: &Client) -> mongodb::error::Result<ClientSession> {
    let mut session = client.start_session().await?;
    session.start_transaction().write_concern(WriteConcern::majority()).await?;
    Ok(session)
}
