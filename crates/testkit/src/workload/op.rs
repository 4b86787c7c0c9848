//! One operation as plain data: raw commands in order, and how to send them.

use bson::raw::RawDocumentBuf;
use bson::{Bson, Document, doc};

use super::kind::Kind;
use super::model::Ns;

/// One command against one database.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub database: String,
    pub command: RawDocumentBuf,
}

/// How the commands of an operation belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One after the other, sent again when the outcome is unknown.
    Plain,
    /// As plain, with a transaction number: sent again, applied once.
    Retryable,
    /// One transaction, committed or aborted at the end.
    Transaction { commit: bool },
    /// An increment of this counter, never sent again: its outcome is counted.
    Counter(i32),
}

/// One operation of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    pub kind: Kind,
    pub mode: Mode,
    pub steps: Vec<Step>,
    /// Error codes that belong to this operation.
    pub expect: &'static [i32],
    /// Wait for the majority.
    pub majority: bool,
}

/// Duplicate key, document validation.
const CRUD_ERRORS: &[i32] = &[11000, 121];

impl Op {
    /// An operation of document writes.
    pub(super) fn crud(kind: Kind, steps: Vec<Step>) -> Self {
        Self { kind, mode: Mode::Plain, steps, expect: CRUD_ERRORS, majority: false }
    }

    /// An operation of schema changes, with the errors that may answer it.
    pub(super) fn ddl(kind: Kind, steps: Vec<Step>, expect: &'static [i32]) -> Self {
        Self { kind, mode: Mode::Plain, steps, expect, majority: false }
    }

    pub(super) fn transaction(kind: Kind, steps: Vec<Step>, commit: bool) -> Self {
        let mode = Mode::Transaction { commit };
        Self { kind, mode, steps, expect: CRUD_ERRORS, majority: false }
    }

    /// True when the server takes a transaction number for it: one statement on one document.
    pub(super) fn may_be_retryable(&self) -> bool {
        let [step] = self.steps.as_slice() else {
            return false;
        };
        let multi = |list: &str, limit: &str, many: bool| {
            step.command.get_array(list).is_ok_and(|statements| {
                statements.into_iter().flatten().any(|statement| {
                    let Some(statement) = statement.as_document() else {
                        return true;
                    };
                    match many {
                        true => statement.get_bool(limit).unwrap_or(false),
                        false => statement.get_i32(limit).unwrap_or(0) != 1,
                    }
                })
            })
        };
        let first = step.command.iter().flatten().next().map(|(key, _)| key.as_str().to_owned());
        match first.as_deref() {
            Some("insert" | "findAndModify") => true,
            Some("update") => !multi("updates", "multi", true),
            Some("delete") => !multi("deletes", "limit", false),
            _ => false,
        }
    }
}

impl Step {
    /// A command from a document without duplicate keys.
    pub(super) fn new(database: &str, command: Document) -> Self {
        let command = RawDocumentBuf::try_from(&command).expect("no zero byte in a field name");
        Self { database: database.to_owned(), command }
    }

    pub(super) fn insert(ns: &Ns, documents: Vec<Document>) -> Self {
        Self::new(&ns.0, doc! { "insert": &ns.1, "documents": documents })
    }

    pub(super) fn update(ns: &Ns, filter: Document, update: impl Into<Bson>) -> Self {
        let statement = doc! { "q": filter, "u": update.into() };
        Self::new(&ns.0, doc! { "update": &ns.1, "updates": [statement] })
    }

    pub(super) fn upsert(ns: &Ns, filter: Document, update: impl Into<Bson>) -> Self {
        let statement = doc! { "q": filter, "u": update.into(), "upsert": true };
        Self::new(&ns.0, doc! { "update": &ns.1, "updates": [statement] })
    }

    pub(super) fn delete(ns: &Ns, filter: Document, limit: i32) -> Self {
        let statement = doc! { "q": filter, "limit": limit };
        Self::new(&ns.0, doc! { "delete": &ns.1, "deletes": [statement] })
    }
}
