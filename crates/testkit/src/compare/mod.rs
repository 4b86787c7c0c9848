//! Whole-cluster comparison: are two MongoDB clusters equal, byte for byte, and if not, where?
//!
//! Both clusters must be at rest. Documents are compared as raw bytes, so numeric types, field order,
//! duplicate keys and NaN payloads all count. Each collection is streamed from both sides in `_id`
//! index order and joined on the bytes of `_id`: a document waits in memory only until its partner
//! arrives, so memory grows with the differences and not with the data. Joining (instead of merging by
//! a comparator) keeps this right under any collation, where only the server knows the order.
//!
//! `admin`, `config`, `local` and `farshore` are never compared.

mod bytes;
mod catalog;
mod difference;
mod documents;

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result};
use mongodb::Client;
use xxhash_rust::xxh3::Xxh3;

pub use difference::{Difference, Kind};

use catalog::{Catalog, Collection};
use difference::Report;

/// What to leave out and how much to report.
#[derive(Clone, Debug)]
pub struct Options {
    /// Namespaces (`db.collection`) or whole databases (`db`) left out on both sides.
    pub skip: Vec<String>,
    /// Compare only databases whose name starts so.
    pub database_prefix: Option<String>,
    /// Differences kept in full; the rest is counted.
    pub max_differences: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { skip: Vec::new(), database_prefix: None, max_differences: 50 }
    }
}

impl Options {
    /// Compares only databases whose name starts with `prefix`.
    pub fn for_databases(prefix: impl Into<String>) -> Self {
        Self { database_prefix: Some(prefix.into()), ..Self::default() }
    }

    fn wants_database(&self, database: &str) -> bool {
        !["admin", "config", "local", "farshore"].contains(&database)
            && self.database_prefix.as_deref().is_none_or(|prefix| database.starts_with(prefix))
            && !self.skip.iter().any(|skip| skip == database)
    }

    fn wants_namespace(&self, namespace: &str) -> bool {
        !self.skip.iter().any(|skip| skip == namespace)
    }
}

/// The result of a comparison. Counts are those of the first cluster.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    pub documents: u64,
    pub collections: u64,
    pub indexes: u64,
    /// The first differences found, at most `Options::max_differences`.
    pub differences: Vec<Difference>,
    /// Differences found beyond those kept.
    pub more: u64,
}

impl Comparison {
    /// True when nothing differs.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty() && self.more == 0
    }

    /// An error that names the differences, unless there are none.
    pub fn ensure_equal(&self) -> Result<()> {
        anyhow::ensure!(self.is_equal(), "{self}");
        Ok(())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_equal() { "equal" } else { "DIFFERENT" };
        write!(
            f,
            "{verdict}: {} documents, {} collections and views, {} indexes, {} differences",
            self.documents,
            self.collections,
            self.indexes,
            self.differences.len() as u64 + self.more
        )?;
        for difference in &self.differences {
            write!(f, "\n  {difference}")?;
        }
        if self.more > 0 {
            write!(f, "\n  ... and {} more", self.more)?;
        }
        Ok(())
    }
}

/// Compares everything of two clusters at rest. `a` is the reference: "missing" is missing in `b`.
pub async fn compare(a: &Client, b: &Client, options: &Options) -> Result<Comparison> {
    let (left, right) = futures::try_join!(
        async { Catalog::read(a, options).await.context("read the catalog of the first cluster") },
        async { Catalog::read(b, options).await.context("read the catalog of the second cluster") },
    )?;
    let mut report = Report::new(options.max_differences);
    let mut result =
        Comparison { collections: left.collections.len() as u64, indexes: left.indexes(), ..Comparison::default() };
    let names: BTreeSet<_> = left.collections.keys().chain(right.collections.keys()).collect();
    for key in names {
        match (left.collections.get(key), right.collections.get(key)) {
            (Some(l), Some(r)) => {
                compare_metadata(l, r, &mut report);
                if l.has_documents() && r.has_documents() {
                    result.documents += documents::compare(a, b, l, r, &mut report)
                        .await
                        .with_context(|| format!("compare the documents of {}", l.namespace()))?;
                }
            }
            (Some(l), None) => report.push(l.namespace(), Kind::CollectionMissing(l.kind.clone())),
            (None, Some(r)) => report.push(r.namespace(), Kind::CollectionExtra(r.kind.clone())),
            (None, None) => {}
        }
    }
    (result.differences, result.more) = report.finish();
    Ok(result)
}

fn compare_metadata(l: &Collection, r: &Collection, report: &mut Report) {
    if l.is_temporary() {
        report.push(l.namespace(), Kind::Temporary);
    }
    if l.metadata != r.metadata {
        report.push(
            l.namespace(),
            Kind::Options { a: bytes::shorten(&l.metadata, 400), b: bytes::shorten(&r.metadata, 400) },
        );
    }
    let names: BTreeSet<_> = l.indexes.keys().chain(r.indexes.keys()).collect();
    for name in names {
        let spec = |c: &Collection| c.indexes.get(name).map(|spec| bytes::shorten(spec, 400));
        let kind = match (l.indexes.get(name), r.indexes.get(name)) {
            (x, y) if x == y => continue,
            (_, None) => Kind::IndexMissing(spec(l).unwrap_or_default()),
            (None, _) => Kind::IndexExtra(spec(r).unwrap_or_default()),
            _ => Kind::IndexDifferent {
                name: name.clone(),
                a: spec(l).unwrap_or_default(),
                b: spec(r).unwrap_or_default(),
            },
        };
        report.push(l.namespace(), kind);
    }
}

/// A short fingerprint of a whole cluster, for cheap repeated checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    pub hash: u64,
    pub documents: u64,
    pub collections: u64,
    pub indexes: u64,
    pub bytes: u64,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:016x}: {} documents ({} bytes), {} collections and views, {} indexes",
            self.hash, self.documents, self.bytes, self.collections, self.indexes
        )
    }
}

/// Hashes all that `compare` would look at. Equal clusters have equal digests.
pub async fn digest(client: &Client, options: &Options) -> Result<Digest> {
    let catalog = Catalog::read(client, options).await?;
    let mut hasher = Xxh3::new();
    let mut digest = Digest {
        hash: 0,
        documents: 0,
        collections: catalog.collections.len() as u64,
        indexes: catalog.indexes(),
        bytes: 0,
    };
    for collection in catalog.collections.values() {
        hasher.update(collection.namespace().as_bytes());
        hasher.update(collection.metadata.as_bytes());
        for spec in collection.indexes.values() {
            hasher.update(spec.as_bytes());
        }
        if collection.has_documents() {
            let sum = documents::digest(client, collection).await?;
            hasher.update(&sum.hash.to_be_bytes());
            hasher.update(&sum.documents.to_be_bytes());
            digest.documents += sum.documents;
            digest.bytes += sum.bytes;
        }
    }
    digest.hash = hasher.digest();
    Ok(digest)
}
