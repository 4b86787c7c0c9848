//! One named difference between two clusters, and the bounded list that collects them.

use std::fmt;

/// One difference: where, and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub namespace: String,
    pub kind: Kind,
}

/// What differs. Documents and specifications are shortened extended JSON; `a` is the first cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only in the first cluster; holds its type (collection, view, timeseries).
    CollectionMissing(String),
    /// Only in the second cluster; holds its type.
    CollectionExtra(String),
    /// A leftover of an aggregation (`tmp.agg_out.*`), which must not exist at rest.
    Temporary,
    /// Type, options or `_id` index differ.
    Options {
        a: String,
        b: String,
    },
    IndexMissing(String),
    IndexExtra(String),
    IndexDifferent {
        name: String,
        a: String,
        b: String,
    },
    DocumentMissing {
        id: String,
        a: String,
    },
    DocumentExtra {
        id: String,
        b: String,
    },
    /// `at` is the path of the first field that differs, with both values.
    DocumentDifferent {
        id: String,
        a: String,
        b: String,
        at: String,
        only_field_order: bool,
    },
    /// Natural order of a capped collection differs, first at this document (counted from 0).
    NaturalOrder {
        position: u64,
        a: String,
        b: String,
    },
    /// So many documents had no partner that this collection was given up.
    TooFarApart {
        unmatched: u64,
    },
}

impl Kind {
    /// A short stable name of the kind.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::CollectionMissing(_) => "collection missing",
            Kind::CollectionExtra(_) => "collection extra",
            Kind::Temporary => "temporary collection",
            Kind::Options { .. } => "options",
            Kind::IndexMissing(_) => "index missing",
            Kind::IndexExtra(_) => "index extra",
            Kind::IndexDifferent { .. } => "index different",
            Kind::DocumentMissing { .. } => "document missing",
            Kind::DocumentExtra { .. } => "document extra",
            Kind::DocumentDifferent { only_field_order: true, .. } => "document field order",
            Kind::DocumentDifferent { .. } => "document different",
            Kind::NaturalOrder { .. } => "natural order",
            Kind::TooFarApart { .. } => "too far apart",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.namespace, self.kind.name())?;
        match &self.kind {
            Kind::CollectionMissing(what) | Kind::CollectionExtra(what) => write!(f, " ({what})"),
            Kind::Temporary => Ok(()),
            Kind::Options { a, b } => write!(f, "\n    a: {a}\n    b: {b}"),
            Kind::IndexMissing(spec) | Kind::IndexExtra(spec) => write!(f, " {spec}"),
            Kind::IndexDifferent { name, a, b } => write!(f, " {name}\n    a: {a}\n    b: {b}"),
            Kind::DocumentMissing { id, a } => write!(f, " _id {id}\n    a: {a}"),
            Kind::DocumentExtra { id, b } => write!(f, " _id {id}\n    b: {b}"),
            Kind::DocumentDifferent { id, a, b, at, .. } => {
                write!(f, " _id {id} at {at}\n    a: {a}\n    b: {b}")
            }
            Kind::NaturalOrder { position, a, b } => {
                write!(f, " at {position}\n    a: {a}\n    b: {b}")
            }
            Kind::TooFarApart { unmatched } => write!(f, " ({unmatched} without a partner)"),
        }
    }
}

/// Collects differences up to a limit and counts the rest.
pub(super) struct Report {
    limit: usize,
    kept: Vec<Difference>,
    more: u64,
}

impl Report {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, kept: Vec::new(), more: 0 }
    }

    /// Adds one difference, or counts it when the list is full.
    pub(super) fn push(&mut self, namespace: String, kind: Kind) {
        if self.kept.len() < self.limit {
            self.kept.push(Difference { namespace, kind });
        } else {
            self.more += 1;
        }
    }

    pub(super) fn finish(self) -> (Vec<Difference>, u64) {
        (self.kept, self.more)
    }
}
