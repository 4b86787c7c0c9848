//! Puts the inbox in order before streams flow: it must continue what is applied.

use super::target::{StreamRecord, Target, TargetError};
use crate::model::Epoch;
use crate::outbox::{self, Log};

/// Makes the inbox continue what is applied: a lost or outdated inbox begins again where the stored floor is, and the
/// source ships from there.
///
/// # Errors
/// The target or the inbox cannot be reached.
pub async fn reconcile<T: Target>(target: &T, inbox: &Log, epoch: Epoch) -> Result<(), ReconcileError> {
    if let Some(record) = target.record().await? {
        continue_from(&record, inbox, epoch).await?;
    }
    Ok(())
}

/// [`reconcile`] with a record that was read already.
pub(super) async fn continue_from(record: &StreamRecord, inbox: &Log, epoch: Epoch) -> Result<(), outbox::Error> {
    let continues = inbox.state().is_some_and(|state| {
        state.incarnation == record.incarnation && state.first <= record.floor && state.end >= record.floor
    });
    if !continues {
        tracing::warn!(floor = %record.floor, "the inbox does not continue what is applied and begins again there");
        inbox.begin(record.incarnation, epoch, record.floor, record.hash, None).await?;
    }
    Ok(())
}

/// Why the inbox could not be reconciled.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The inbox.
    #[error(transparent)]
    Inbox(#[from] outbox::Error),
}
