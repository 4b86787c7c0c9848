//! Puts the inbox in order before streams flow: it must continue what is applied.

use super::target::{Target, TargetError};
use crate::model::Epoch;
use crate::outbox::{self, Log};

/// Makes the inbox continue what is applied: a lost or outdated inbox begins again where the stored floor is, and the
/// source ships from there.
///
/// # Errors
/// The target or the inbox cannot be reached.
pub async fn reconcile<T: Target>(target: &T, inbox: &Log, epoch: Epoch) -> Result<(), ReconcileError> {
    let Some(record) = target.record().await? else { return Ok(()) };
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
