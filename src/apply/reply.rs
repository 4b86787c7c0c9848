//! What errors in replies of the target's MongoDB mean for apply (pure).

use bson::Document;
use bson::raw::RawDocumentBuf;

use super::plan::PlanError;
use super::target::{CommitError, Divergence, TargetError};
use crate::model::CollectionUuid;
use crate::mongo::code;

/// The first of a reply's write errors.
pub(super) struct WriteError {
    pub(super) code: i32,
    pub(super) message: String,
    key_pattern: Option<Document>,
    key_value: Option<Document>,
}

pub(super) fn first_write_error(reply: &Document) -> Option<WriteError> {
    let error = crate::mongo::first_write_error(reply)?;
    Some(WriteError {
        code: error.get_i32("code").unwrap_or(0),
        message: error.get_str("errmsg").unwrap_or("no message").to_owned(),
        key_pattern: error.get_document("keyPattern").ok().cloned(),
        key_value: error.get_document("keyValue").ok().cloned(),
    })
}

pub(super) fn hint_of(code: i32) -> &'static str {
    match code {
        code::USER_WRITES_BLOCKED => {
            "the agent's user needs the privilege bypassWriteBlockingMode; see the role in the README"
        }
        code::UNAUTHORIZED => "grant the agent's user the role in the README",
        _ => "see the message of MongoDB",
    }
}

impl WriteError {
    /// As the reason of something that was not done.
    pub(super) fn into_target(self, doing: &str) -> TargetError {
        match self.code {
            code::WRITE_CONFLICT => TargetError::Conflict(self.message),
            251 | 24 => TargetError::Transient(self.message),
            code::TOO_LARGE_FOR_CACHE => TargetError::TooLarge(self.message),
            code::UUID_MISMATCH | code::NAMESPACE_NOT_FOUND => TargetError::Fatal {
                message: format!("{doing}: {}", self.message),
                hint: "a replicated collection was dropped or replaced at the target; it must be copied again",
            },
            other => TargetError::Fatal { message: format!("{doing}: {}", self.message), hint: hint_of(other) },
        }
    }

    /// As the reason of a transaction that was not committed.
    pub(super) fn into_commit(self, collection: CollectionUuid) -> CommitError {
        if self.code != code::DUPLICATE_KEY {
            return self.into_target("apply changes").into();
        }
        let on_id = self.key_pattern.as_ref().is_none_or(|pattern| pattern.contains_key("_id"));
        let fields = self.key_value.filter(|_| !on_id).and_then(|fields| RawDocumentBuf::try_from(&fields).ok());
        CommitError::Diverged(match fields {
            Some(fields) => Divergence::Unique { collection, fields },
            None => Divergence::Somewhere,
        })
    }
}

/// Why a plan could not be made, as the reason of a transaction that was not committed.
pub(super) fn plan_error(error: PlanError) -> CommitError {
    match error {
        PlanError::NeedsFetch(_) => CommitError::Diverged(Divergence::Somewhere),
        PlanError::Ahead { collection, .. } => CommitError::Diverged(Divergence::Ahead { collection }),
        other => TargetError::Fatal {
            message: other.to_string(),
            hint: "the change is kept in the inbox; upgrade or report it",
        }
        .into(),
    }
}
