//! What is written: collections of documents of about 500 bytes, and backlogs of one kind of change each.
//!
//! Every change is one oplog entry. Writers have disjoint parts of the documents, so counts are exact.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use bson::{Document, Timestamp, doc};
use clap::ValueEnum;
use mongodb::Client;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;

/// Database of all collections.
pub(crate) const DB: &str = "bench";
/// Concurrent writers.
const WRITERS: u64 = 4;
/// Statements in a command.
const STATEMENTS: usize = 1_000;
/// Documents of [`Kind::Hot`].
const HOT: u64 = 1_000;

/// Kinds of backlog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// New documents, ids ascending.
    Inserts,
    /// `$set` of three fields of random documents.
    Set,
    /// All documents, in random order.
    Deletes,
    /// Two fifths inserts, two fifths `$set`, one fifth deletes, in short commands.
    Mixed,
    /// `$set` on a thousand documents.
    Hot,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Inserts => "inserts",
            Self::Set => "set",
            Self::Deletes => "deletes",
            Self::Mixed => "mixed",
            Self::Hot => "hot",
        }
    }
}

/// A collection and its backlog.
pub(crate) struct Load {
    pub(crate) kind: Kind,
    pub(crate) collection: String,
    pub(crate) changes: u64,
}

impl Load {
    pub(crate) fn new(kind: Kind, collection: &str, changes: u64) -> Self {
        let changes = changes / (WRITERS * 100) * (WRITERS * 100);
        Self { kind, collection: collection.to_owned(), changes }
    }

    /// Documents before the backlog.
    fn documents(&self) -> u64 {
        match self.kind {
            Kind::Inserts => 0,
            Kind::Hot => HOT,
            Kind::Set | Kind::Deletes | Kind::Mixed => self.changes,
        }
    }

    /// Makes the collection and what the backlog changes.
    pub(crate) async fn prepare(&self, client: &Client) -> Result<()> {
        run(client, doc! {"create": &self.collection}).await?;
        let documents = self.documents();
        self.parallel(client, documents, |_, from, to| insert_commands(from, to, STATEMENTS)).await?;
        Ok(())
    }

    /// Writes the backlog; returns the cluster time of its last change.
    pub(crate) async fn write(&self, client: &Client) -> Result<Timestamp> {
        let (kind, documents) = (self.kind, self.documents());
        self.parallel(client, self.changes, move |seed, from, to| match kind {
            Kind::Inserts => insert_commands(from, to, STATEMENTS),
            Kind::Deletes => delete_commands(shuffled(seed, from, to), STATEMENTS),
            Kind::Set | Kind::Hot => {
                let mut rng = StdRng::seed_from_u64(seed);
                let ids = (from..to).map(|_| rng.random_range(0..documents)).collect();
                set_commands(seed, ids, STATEMENTS)
            }
            Kind::Mixed => mixed_commands(seed, documents, from, to),
        })
        .await
    }

    /// Removes the collection again.
    pub(crate) async fn finish(&self, client: &Client) -> Result<()> {
        run(client, doc! {"drop": &self.collection}).await?;
        Ok(())
    }

    async fn parallel(
        &self,
        client: &Client,
        count: u64,
        commands: impl Fn(u64, u64, u64) -> Vec<Command>,
    ) -> Result<Timestamp> {
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let commands = commands(writer, count * writer / WRITERS, count * (writer + 1) / WRITERS);
            let (client, collection) = (client.clone(), self.collection.clone());
            writers.spawn(async move {
                let mut last = Timestamp { time: 0, increment: 0 };
                for command in commands {
                    let expected = command.statements.len();
                    let reply = run(&client, command.document(&collection)).await?;
                    let done = reply.get_i32("n").unwrap_or(0);
                    ensure!(done as usize == expected, "{done} of {expected} statements took effect");
                    last = reply.get_timestamp("operationTime").context("a reply without a time")?;
                }
                Ok(last)
            });
        }
        let mut last = Timestamp { time: 0, increment: 0 };
        while let Some(done) = writers.join_next().await {
            last = last.max(done??);
        }
        Ok(last)
    }
}

/// One write command to be.
struct Command {
    name: &'static str,
    list: &'static str,
    statements: Vec<Document>,
}

impl Command {
    fn document(self, collection: &str) -> Document {
        let mut command = doc! {self.name: collection, "ordered": false, "writeConcern": {"w": 1}};
        command.insert(self.list, self.statements);
        command
    }
}

fn insert_commands(from: u64, to: u64, size: usize) -> Vec<Command> {
    let ids: Vec<u64> = (from..to).collect();
    let command = |ids: &[u64]| Command {
        name: "insert",
        list: "documents",
        statements: ids.iter().map(|id| document(*id)).collect(),
    };
    ids.chunks(size).map(command).collect()
}

fn set_commands(seed: u64, ids: Vec<u64>, size: usize) -> Vec<Command> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5e7);
    let mut statement = |id: &u64| {
        let set = doc! {"stock": rng.random::<i32>(), "price": rng.random::<f64>(), "note": noise(&mut rng, 1)};
        doc! {"q": {"_id": *id as i64}, "u": {"$set": set}}
    };
    let chunks = ids.chunks(size);
    chunks
        .map(|ids| Command { name: "update", list: "updates", statements: ids.iter().map(&mut statement).collect() })
        .collect()
}

fn delete_commands(ids: Vec<u64>, size: usize) -> Vec<Command> {
    let statement = |id: &u64| doc! {"q": {"_id": *id as i64}, "limit": 1};
    let chunks = ids.chunks(size);
    chunks
        .map(|ids| Command { name: "delete", list: "deletes", statements: ids.iter().map(statement).collect() })
        .collect()
}

/// Rounds of 40 inserts, 40 `$set` and 20 deletes; `$set` touches the lower half of a writer's documents, deletes the
/// upper one.
fn mixed_commands(seed: u64, documents: u64, from: u64, to: u64) -> Vec<Command> {
    let mut rng = StdRng::seed_from_u64(seed);
    let middle = from + (to - from) / 2;
    let mut deletes = shuffled(seed, middle, to);
    let mut commands = Vec::new();
    for round in 0..(to - from) / 100 {
        let new = documents + from + round * 40;
        commands.extend(insert_commands(new, new + 40, 40));
        commands.extend(set_commands(round, (0..40).map(|_| rng.random_range(from..middle)).collect(), 40));
        commands.extend(delete_commands(deletes.split_off(deletes.len() - 20), 20));
    }
    commands
}

fn shuffled(seed: u64, from: u64, to: u64) -> Vec<u64> {
    let mut ids: Vec<u64> = (from..to).collect();
    ids.shuffle(&mut StdRng::seed_from_u64(seed));
    ids
}

/// About 500 bytes, half of them hard to compress.
fn document(id: u64) -> Document {
    let mut rng = StdRng::seed_from_u64(id);
    doc! {
        "_id": id as i64, "noise": noise(&mut rng, 16), "name": format!("item {id} of the shop"), "stock": rng.random_range(0..1000),
        "price": rng.random::<f64>(), "tags": ["new", "cheap", "blue"], "address": {"street": "Main Street", "town": "Springfield"},
        "description": "an item that is sold in the shop, with a description of a hundred characters or a little more",
    }
}

/// So many words of 16 random hexadecimal digits.
pub(crate) fn noise(rng: &mut StdRng, words: usize) -> String {
    let mut text = String::with_capacity(words * 16);
    for _ in 0..words {
        write!(text, "{:016x}", rng.random::<u64>()).expect("writing to a string");
    }
    text
}

/// Runs a command on [`DB`]; write errors are errors.
pub(crate) async fn run(client: &Client, command: Document) -> Result<Document> {
    let name = command.keys().next().cloned().unwrap_or_default();
    let reply = client.database(DB).run_command(command).await.with_context(|| format!("run {name}"))?;
    ensure!(!reply.contains_key("writeErrors"), "{name}: {reply}");
    Ok(reply)
}
