//! What `/readyz` waits for once the agent has started.
//!
//! MongoDB counts until it was reached for the first time (a login that never worked is a mistake of the configuration) and
//! not later: an agent must stay reachable for its operators while MongoDB is away. A history that is lost counts until the
//! stream begins anew.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::console::MongoView;
use crate::admin::health::{Latch, Readiness};
use crate::source::capture::{CaptureStatus, Phase};

/// See the module text.
pub(super) struct Ready {
    readiness: Readiness,
    unreached: Option<Latch>,
    lost: Option<Latch>,
    mongo: watch::Receiver<MongoView>,
    capture: watch::Receiver<CaptureStatus>,
}

impl Ready {
    /// Not ready from now on.
    pub(super) fn new(
        readiness: Readiness,
        mongo: watch::Receiver<MongoView>,
        capture: watch::Receiver<CaptureStatus>,
    ) -> Self {
        let unreached = Some(readiness.latch("MongoDB"));
        Self { readiness, unreached, lost: None, mongo, capture }
    }

    /// Follows until `stop`.
    pub(super) async fn follow(mut self, stop: CancellationToken) -> Result<(), String> {
        loop {
            if self.mongo.borrow_and_update().reachable {
                self.unreached = None;
            }
            let lost = matches!(self.capture.borrow_and_update().phase, Phase::Lost(_));
            if lost != self.lost.is_some() {
                self.lost = lost.then(|| self.readiness.latch("a resync, as history is lost"));
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                Ok(()) = self.mongo.changed() => {}
                Ok(()) = self.capture.changed() => {}
                else => return Ok(()),
            }
        }
    }
}
