//! What the tests of the link share.

use bson::rawdoc;

use crate::model::batch::BatchBuilder;
use crate::model::{Batch, ClusterTime, Epoch, Incarnation, Position, SiteName, StreamHash};

pub(super) fn site(name: &str) -> SiteName {
    SiteName::try_from(name).expect("a valid name")
}

pub(super) fn incarnation(n: u8) -> Incarnation {
    Incarnation([n; 16])
}

/// The stream hash of the test history at ordinal 0 of `time`.
pub(super) fn hash_before(time: u64) -> StreamHash {
    (1..time).fold(StreamHash(0), roll)
}

fn roll(hash: StreamHash, time: u64) -> StreamHash {
    hash.roll(Position::new(ClusterTime(time), 1), change(time).as_bytes())
}

fn change(time: u64) -> bson::RawDocumentBuf {
    rawdoc! {"n": time as i64, "pad": "x".repeat((time % 50) as usize)}
}

/// A batch of the test history: one change at each cluster time in `from..to`, complete up to before `to`.
pub(super) fn batch(of: u8, from: u64, to: u64) -> Batch {
    batch_after(of, from, to, hash_before(from))
}

/// The same when the hash at `from` is known.
pub(super) fn batch_after(of: u8, from: u64, to: u64, hash: StreamHash) -> Batch {
    let mut builder = BatchBuilder::new(incarnation(of), Epoch(1), Position::before(ClusterTime(from)), hash);
    for time in from..to {
        builder.push(Position::new(ClusterTime(time), 1), &[change(time).as_bytes()]);
    }
    builder.finish(Position::before(ClusterTime(to)))
}
