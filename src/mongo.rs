//! The one door to the MongoDB driver's errors and options.
//!
//! Driver errors become [`Failure`] here and nowhere else, so retry decisions are made on what a failure means and never
//! on its text.

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{Document, doc};
use mongodb::error::{Error as DriverError, ErrorKind};
use mongodb::{Client, ClientSession};

use crate::model::{ClusterTime, Position};

/// Server error codes decisions depend on; names and numbers as in MongoDB's `error_codes.yml`.
pub mod code {
    pub const NAMESPACE_NOT_FOUND: i32 = 26;
    pub const INDEX_NOT_FOUND: i32 = 27;
    pub const NAMESPACE_EXISTS: i32 = 48;
    pub const WRITE_CONFLICT: i32 = 112;
    pub const HISTORY_LOST: i32 = 286;
    pub const FATAL_CHANGE_STREAM: i32 = 280;
    pub const INVALID_RESUME_TOKEN: i32 = 260;
    pub const UUID_MISMATCH: i32 = 361;
    pub const EVENT_TOO_LARGE: i32 = 10334;
    pub const TOO_LARGE_FOR_CACHE: i32 = 388;
    pub const DUPLICATE_KEY: i32 = 11000;
    pub const USER_WRITES_BLOCKED: i32 = 371;
    pub const SNAPSHOT_TOO_OLD: i32 = 239;
    pub const SNAPSHOT_UNAVAILABLE: i32 = 246;
    pub const UNAUTHORIZED: i32 = 13;
    pub const AUTHENTICATION_FAILED: i32 = 18;
}

/// What a failed operation means for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The same operation may succeed later: network, election, write conflict.
    Transient,
    /// The server refused with this code.
    Command(i32),
    /// Anything else; trying again will not help.
    Other,
}

/// A failed MongoDB operation.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {detail}")]
pub struct Failure {
    /// What was being done, in the present tense.
    pub doing: &'static str,
    /// What the failure means.
    pub kind: Kind,
    /// The transaction was certainly not committed and may be run again as a whole.
    pub transaction_aborted: bool,
    /// The server's error code, if there is one, whatever it means.
    pub server_code: Option<i32>,
    /// What the driver or the server said.
    pub detail: String,
}

impl Failure {
    /// Names the operation that failed.
    pub fn of(doing: &'static str) -> impl FnOnce(DriverError) -> Self {
        move |error| Self {
            doing,
            kind: classify(&error),
            transaction_aborted: error.contains_label("TransientTransactionError"),
            server_code: code_of(&error),
            detail: describe(&error),
        }
    }

    /// Whether trying again can help.
    pub fn is_transient(&self) -> bool {
        self.kind == Kind::Transient
    }

    /// The server's error code, if it refused.
    pub fn code(&self) -> Option<i32> {
        match self.kind {
            Kind::Command(code) => Some(code),
            _ => None,
        }
    }
}

/// What went wrong, without the raw reply the driver's own text carries.
fn describe(error: &DriverError) -> String {
    match &*error.kind {
        ErrorKind::Command(command) => format!("{} ({}): {}", command.code_name, command.code, command.message),
        kind => kind.to_string(),
    }
}

fn code_of(error: &DriverError) -> Option<i32> {
    match &*error.kind {
        ErrorKind::Command(command) => Some(command.code),
        ErrorKind::Write(mongodb::error::WriteFailure::WriteConcernError(error)) => Some(error.code),
        ErrorKind::Write(mongodb::error::WriteFailure::WriteError(error)) => Some(error.code),
        _ => None,
    }
}

/// Codes after which the same command is worth sending again: elections, shutdowns, interrupted operations, timeouts of
/// locks and of majority waits (driver specification "retryable reads", MongoDB `error_codes.yml` category RetriableError).
const TRANSIENT: [i32; 24] = [
    6, 7, 24, 50, 63, 64, 89, 91, 112, 133, 134, 150, 189, 234, 237, 251, 262, 317, 358, 9001, 10058, 10107, 11600,
    11602,
];
const TRANSIENT_MORE: [i32; 6] = [13388, 13435, 13436, 43, 202, 12587];

/// Decides what a driver error means.
pub fn classify(error: &DriverError) -> Kind {
    if error.contains_label("TransientTransactionError") || error.contains_label("RetryableWriteError") {
        return Kind::Transient;
    }
    if let Some(code) = code_of(error) {
        return kind_of(code);
    }
    match &*error.kind {
        // A login refused while a connection is made: the password may be about to change here or there.
        ErrorKind::Authentication { .. }
        | ErrorKind::Io(_)
        | ErrorKind::ConnectionPoolCleared { .. }
        | ErrorKind::ServerSelection { .. }
        | ErrorKind::DnsResolve { .. } => Kind::Transient,
        _ => Kind::Other,
    }
}

fn kind_of(code: i32) -> Kind {
    match TRANSIENT.contains(&code) || TRANSIENT_MORE.contains(&code) {
        true => Kind::Transient,
        false => Kind::Command(code),
    }
}

/// Majority, journaled: for everything outside lane transactions.
pub fn majority() -> Document {
    doc! {"w": "majority", "j": true, "wtimeout": 30_000}
}

/// The cluster time of a BSON timestamp.
pub fn cluster_time(timestamp: bson::Timestamp) -> ClusterTime {
    ClusterTime::new(timestamp.time, timestamp.increment)
}

/// The BSON timestamp of a cluster time.
pub fn timestamp(time: ClusterTime) -> bson::Timestamp {
    bson::Timestamp { time: time.seconds(), increment: time.increment() }
}

/// A position as documents hold it.
pub fn position(position: Position) -> Document {
    doc! {"time": timestamp(position.time), "ordinal": i64::from(position.ordinal)}
}

/// The position a document holds.
pub fn read_position(document: &Document) -> Option<Position> {
    let time = cluster_time(document.get_timestamp("time").ok()?);
    Some(Position::new(time, u32::try_from(document.get_i64("ordinal").ok()?).ok()?))
}

/// Runs a command built as raw bytes, in a session where one is given.
///
/// # Errors
/// The server refused or could not be reached.
pub async fn run(
    client: &Client,
    db: &str,
    command: RawDocumentBuf,
    session: Option<&mut ClientSession>,
    doing: &'static str,
) -> Result<Document, Failure> {
    let database = client.database(db);
    let command = database.run_raw_command(command);
    let reply = match session {
        Some(session) => command.session(session).await,
        None => command.await,
    };
    reply.map_err(Failure::of(doing))
}

/// Runs a command document with majority write concern.
///
/// # Errors
/// The server refused or could not be reached; `writeErrors` of the reply are not errors here.
pub async fn run_majority(
    client: &Client,
    db: &str,
    mut command: Document,
    doing: &'static str,
) -> Result<Document, Failure> {
    command.insert("writeConcern", majority());
    let reply = client.database(db).run_command(command).await.map_err(Failure::of(doing))?;
    // A generic command's reply is not searched by the driver: the write may stand on the primary alone.
    match reply.get_document("writeConcernError") {
        Ok(error) => {
            let detail = format!("not written by a majority: {error}");
            let server_code = error.get_i32("code").ok();
            Err(Failure { doing, kind: Kind::Transient, transaction_aborted: false, server_code, detail })
        }
        Err(_) => Ok(reply),
    }
}

/// As [`run_majority`], and a statement that was not written is a failure.
///
/// # Errors
/// The server refused or could not be reached.
pub async fn write_majority(
    client: &Client,
    db: &str,
    command: Document,
    doing: &'static str,
) -> Result<Document, Failure> {
    let reply = run_majority(client, db, command, doing).await?;
    match unwritten(&reply, doing) {
        None => Ok(reply),
        Some(failure) => Err(failure),
    }
}

/// The first of a reply's write errors.
pub fn first_write_error(reply: &Document) -> Option<&Document> {
    reply.get_array("writeErrors").ok()?.first()?.as_document()
}

fn unwritten(reply: &Document, doing: &'static str) -> Option<Failure> {
    let error = first_write_error(reply)?;
    let code = error.get_i32("code").unwrap_or(0);
    let detail = format!("{} ({code})", error.get_str("errmsg").unwrap_or("not written"));
    Some(Failure { doing, kind: kind_of(code), transaction_aborted: false, server_code: Some(code), detail })
}

/// What the server says about itself and its replica set.
#[derive(Clone, Debug)]
pub struct ServerInfo {
    /// `buildInfo.version`.
    pub version: String,
    /// `hello.maxWireVersion`; 17 is 6.0.
    pub wire_version: i32,
    /// Name of the replica set.
    pub replica_set: String,
    /// Newest majority-committed cluster time.
    pub majority_time: ClusterTime,
    /// Identity of the current primary's election.
    pub election: Option<bson::oid::ObjectId>,
}

/// Asks the primary who it is.
///
/// # Errors
/// Unreachable, or not a replica set (a mongos or a standalone server is refused with the reason).
pub async fn server_info(client: &Client) -> Result<Result<ServerInfo, &'static str>, Failure> {
    let admin = client.database("admin");
    let hello = admin.run_command(doc! {"hello": 1}).await.map_err(Failure::of("ask the server who it is"))?;
    if hello.get_str("msg").is_ok_and(|msg| msg == "isdbgrid") {
        return Ok(Err("mongod replica sets only: this is a mongos, where two transactions may share a cluster time"));
    }
    let Ok(replica_set) = hello.get_str("setName") else {
        return Ok(Err("the server is not a member of a replica set; change streams need one"));
    };
    let build = admin.run_command(doc! {"buildInfo": 1}).await.map_err(Failure::of("ask the server's version"))?;
    let majority = hello.get_document("lastWrite").ok().and_then(|w| w.get_document("majorityOpTime").ok());
    Ok(Ok(ServerInfo {
        version: build.get_str("version").unwrap_or("unknown").to_owned(),
        wire_version: hello.get_i32("maxWireVersion").unwrap_or(0),
        replica_set: replica_set.to_owned(),
        majority_time: majority.and_then(|m| m.get_timestamp("ts").ok()).map(cluster_time).unwrap_or_default(),
        election: hello.get_object_id("electionId").ok(),
    }))
}

/// Keeps users, and the server's own TTL deletes, from writing: what is not in the stream would be a difference. Nobody is
/// blocked where there is no login, for then the agent would be, too.
///
/// # Errors
/// Unreachable, not authorised, or another transaction is in the way for too long.
pub async fn block_users(client: &Client) -> Result<(), Failure> {
    const BLOCKED: i32 = 2;
    let admin = client.database("admin");
    let status = admin.run_command(doc! {"serverStatus": 1}).await;
    let status = status.map_err(Failure::of("ask whether users may write"))?;
    if status.get_document("repl").is_ok_and(|repl| repl.get_i32("userWriteBlockMode").ok() == Some(BLOCKED)) {
        return Ok(());
    }
    let login = admin.run_command(doc! {"connectionStatus": 1}).await.map_err(Failure::of("ask who the agent is"))?;
    let users = login.get_document("authInfo").and_then(|info| info.get_array("authenticatedUsers"));
    if users.is_ok_and(|users| users.is_empty()) {
        tracing::warn!("MongoDB has no logins here: its users and TTL indexes can write to the target");
        return Ok(());
    }
    // Readers wait behind it while it waits for transactions.
    let block = doc! {"setUserWriteBlockMode": 1, "global": true, "maxTimeMS": 500};
    admin.run_command(block).await.map_err(Failure::of("keep users from writing"))?;
    tracing::info!("users are kept from writing to the target (setUserWriteBlockMode)");
    Ok(())
}

/// The oldest cluster time the primary's oplog holds.
///
/// # Errors
/// Unreachable, or the role lacks `find` on `local.oplog.rs`.
pub async fn oldest_oplog_time(client: &Client) -> Result<Option<ClusterTime>, Failure> {
    let oplog = client.database("local").collection::<RawDocumentBuf>("oplog.rs");
    let entry = oplog
        .find_one(doc! {})
        .sort(doc! {"$natural": 1})
        .projection(doc! {"ts": 1})
        .await
        .map_err(Failure::of("read the oldest oplog entry"))?;
    Ok(entry.and_then(|e| e.get_timestamp("ts").ok()).map(cluster_time))
}

/// Databases that are never replicated.
pub fn is_internal_database(name: &str) -> bool {
    matches!(name, "admin" | "config" | "local" | "farshore")
}

/// User collections and views as (database, `listCollections` entry), in name order.
///
/// # Errors
/// Unreachable or not authorised.
pub async fn user_collections(client: &Client) -> Result<Vec<(String, RawDocumentBuf)>, Failure> {
    let mut found = Vec::new();
    let mut databases = client.list_database_names().await.map_err(Failure::of("list databases"))?;
    databases.sort();
    for database in databases.into_iter().filter(|name| !is_internal_database(name)) {
        for entry in list_collections(client, &database, doc! {}).await? {
            if entry.get_str("name").is_ok_and(|name| !name.starts_with("system.")) {
                found.push((database.clone(), entry));
            }
        }
    }
    Ok(found)
}

/// `listCollections` entries of one database.
///
/// # Errors
/// Unreachable or not authorised.
pub async fn list_collections(
    client: &Client,
    database: &str,
    filter: Document,
) -> Result<Vec<RawDocumentBuf>, Failure> {
    use futures::TryStreamExt as _;
    let command = doc! {"listCollections": 1, "filter": filter, "cursor": {}};
    let cursor = client.database(database).run_cursor_command(command).batch().await;
    let mut cursor = cursor.map_err(Failure::of("list collections"))?;
    let mut found = Vec::new();
    while let Some(batch) = cursor.try_next().await.map_err(Failure::of("list collections"))? {
        let entries = batch.doc_slices().map_err(Failure::of("list collections"))?;
        found.extend(entries.into_iter().filter_map(|e| Some(e.ok()?.as_document()?.to_owned())));
    }
    Ok(found)
}

/// The UUID in a `listCollections` entry.
pub fn uuid_of(entry: &RawDocument) -> Option<crate::model::CollectionUuid> {
    let binary = entry.get_document("info").ok()?.get_binary("uuid").ok()?;
    crate::model::CollectionUuid::from_slice(binary.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_that_was_not_written_is_a_failure() {
        let refused =
            doc! {"ok": 1, "n": 0, "writeErrors": [{"index": 0, "code": 371, "errmsg": "user writes blocked"}]};
        let failure = unwritten(&refused, "write a mark").expect("a failure");
        assert_eq!((failure.code(), failure.is_transient()), (Some(code::USER_WRITES_BLOCKED), false));
        assert!(failure.to_string().contains("user writes blocked"), "{failure}");
        let stepped_down = doc! {"ok": 1, "writeErrors": [{"index": 0, "code": 10107, "errmsg": "not primary"}]};
        assert!(unwritten(&stepped_down, "write a mark").expect("a failure").is_transient());
        assert!(unwritten(&doc! {"ok": 1, "n": 1}, "write a mark").is_none());
    }

    #[test]
    fn cluster_times_convert_both_ways() {
        let time = ClusterTime::new(1_763_669_100, 7);
        assert_eq!(cluster_time(timestamp(time)), time);
    }
}
