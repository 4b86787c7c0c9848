//! What an error of a write means for a workload: try again, expected refusal, or a reason to stop.

use std::time::Duration;

use anyhow::{Result, bail};
use bson::raw::RawDocumentBuf;
use bson::{Document, RawDocument};
use mongodb::error::{Error, ErrorKind, UNKNOWN_TRANSACTION_COMMIT_RESULT};
use mongodb::{ClientSession, Database};

/// Pause before a command is sent again.
pub(super) const PAUSE: Duration = Duration::from_millis(25);

/// Elections, networks, lock conflicts, index builds in the way, a write block (371), a scan that another writer's rename or
/// drop ended (175).
const AGAIN: &[i32] = &[
    6, 7, 24, 64, 89, 91, 112, 117, 134, 175, 189, 202, 215, 246, 251, 262, 276, 371, 9001, 10107, 11600, 11602, 12587,
    13435, 13436,
];

/// MongoDB 6.0.5 fails deletes of some documents whose `_id` is NaN ("KeyString format error"); they stay.
const BUG: i32 = 50_819;

/// What follows from a belief that a disturbance made wrong: things that exist, or do not.
const AFTER_DISTURBANCE: &[i32] = &[20, 26, 27, 48, 68, 72, 85, 86, 121, 166, 201, 11000];

/// One attempt's result.
#[derive(Debug)]
pub(super) enum Reply {
    /// Acknowledged; true when something changed.
    Done(bool),
    /// Refused with a code that is expected here.
    Refused(i32),
    /// The outcome may be unknown; trying again makes sense.
    Again(String),
}

/// Sends one command. An unexpected error is an error.
pub(super) async fn send(
    db: &Database,
    command: RawDocumentBuf,
    session: Option<&mut ClientSession>,
    expect: &[i32],
    disturbed: bool,
) -> Result<Reply> {
    let run = db.run_raw_command(command);
    let reply = match session {
        Some(session) => run.session(session).await,
        None => run.await,
    };
    match reply {
        Ok(reply) => read_reply(&reply, expect, disturbed),
        Err(error) => match judge(&error) {
            Some(_) if is_again(&error) => Ok(Reply::Again(error.to_string())),
            Some(code) if is_expected(code, expect, disturbed) => Ok(Reply::Refused(code)),
            None if is_again(&error) => Ok(Reply::Again(error.to_string())),
            _ => bail!(error),
        },
    }
}

fn is_expected(code: i32, expect: &[i32], disturbed: bool) -> bool {
    code == BUG || expect.contains(&code) || (disturbed && AFTER_DISTURBANCE.contains(&code))
}

fn judge(error: &Error) -> Option<i32> {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => Some(command.code),
        _ => None,
    }
}

/// True for errors of network, election or conflict.
pub(super) fn is_again(error: &Error) -> bool {
    let by_kind = match error.kind.as_ref() {
        ErrorKind::Command(command) => AGAIN.contains(&command.code),
        ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. } | ErrorKind::ServerSelection { .. } => true,
        _ => false,
    };
    by_kind
        || error.contains_label(mongodb::error::TRANSIENT_TRANSACTION_ERROR)
        || error.contains_label(mongodb::error::RETRYABLE_WRITE_ERROR)
        || error.contains_label(UNKNOWN_TRANSACTION_COMMIT_RESULT)
}

fn read_reply(reply: &Document, expect: &[i32], disturbed: bool) -> Result<Reply> {
    if let Ok(errors) = reply.get_array("writeErrors") {
        let codes: Vec<i32> = errors.iter().filter_map(|error| error.as_document()?.get_i32("code").ok()).collect();
        if codes.iter().any(|code| AGAIN.contains(code)) {
            return Ok(Reply::Again(format!("{errors:?}")));
        }
        match codes.iter().find(|code| !is_expected(**code, expect, disturbed)) {
            Some(_) => bail!("unexpected write errors: {errors:?}"),
            None if !changed(reply) => {
                return Ok(Reply::Refused(codes.first().copied().unwrap_or(0)));
            }
            None => return Ok(Reply::Done(true)),
        }
    }
    if let Ok(error) = reply.get_document("writeConcernError") {
        return Ok(Reply::Again(format!("{error:?}")));
    }
    Ok(Reply::Done(changed(reply)))
}

/// True when a reply says that something changed. Schema changes answer no counts: they did.
fn changed(reply: &Document) -> bool {
    let number = |document: &Document, name: &str| {
        document.get(name).and_then(|n| n.as_i64().or_else(|| n.as_i32().map(i64::from)))
    };
    if let Ok(last) = reply.get_document("lastErrorObject") {
        return number(last, "n") != Some(0);
    }
    if let (Some(before), Some(after)) = (number(reply, "numIndexesBefore"), number(reply, "numIndexesAfter")) {
        return after > before;
    }
    match number(reply, "nModified") {
        Some(modified) => modified > 0 || reply.contains_key("upserted"),
        None => number(reply, "n") != Some(0),
    }
}

/// The first field's name of a command, for messages.
pub(super) fn command_name(command: &RawDocument) -> String {
    command.iter().flatten().next().map(|(key, _)| key.as_str().to_owned()).unwrap_or_default()
}
