//! Judges which documents are not as the changes of a job need them (pure): what is at the target is an argument.

use std::collections::{BTreeMap, BTreeSet};

use bson::raw::{RawDocument, RawDocumentBuf};

use super::lanes::Item;
use super::target::{Cause, Suspect};
use crate::model::{Change, CollectionUuid, Op};

fn change(item: &Item) -> Option<Change<'_>> {
    Change::parse(item.position, RawDocument::from_bytes(&item.bytes).ok()?).ok()
}

/// The key of a change's document.
pub fn key_of(item: &Item) -> Option<RawDocumentBuf> {
    change(item)?.document_key.map(RawDocument::to_owned)
}

/// The document with this identity, if one of the changes is about it.
pub fn named(items: &[Item], collection: CollectionUuid, identity: u128, cause: Cause) -> Option<Suspect> {
    let item = items.iter().find(|item| item.collection == collection && item.key == identity)?;
    Some(Suspect { collection, identity, key: key_of(item)?, cause })
}

/// Updates, replacements and deletes whose document is not `there`, inserts whose `_id` is, and changes that came without
/// their document; each document once.
pub fn unmatched(items: &[Item], mut there: BTreeSet<(CollectionUuid, u128)>) -> Vec<Suspect> {
    let mut suspects = BTreeMap::new();
    for item in items {
        let Some(change) = change(item) else { continue };
        let id = (item.collection, item.key);
        let exists = there.contains(&id);
        let cause = match change.op {
            Op::Insert if exists => Some(Cause::Exists),
            Op::Update | Op::Replace if !exists => Some(Cause::Missing),
            Op::Delete if !exists => Some(Cause::Missing),
            _ => None,
        };
        if change.op == Op::Delete {
            there.remove(&id)
        } else {
            there.insert(id)
        };
        let cause = if change.trimmed { Some(Cause::Large) } else { cause };
        if let (Some(cause), Some(key)) = (cause, change.document_key) {
            let suspect = Suspect { collection: item.collection, identity: item.key, key: key.to_owned(), cause };
            suspects.entry(id).or_insert(suspect);
        }
    }
    suspects.into_values().collect()
}
