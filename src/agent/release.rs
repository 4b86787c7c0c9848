//! Gives back what every target has applied.
//!
//! Targets tell it to the agent that leads, in their sessions with it; that one tells the site's other agents through the
//! lease, so that their outboxes do not fill with what nobody needs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Peer};
use crate::lease::Applied;
use crate::link::Hub;
use crate::model::{Position, StreamId};
use crate::outbox::Log;

const EVERY: Duration = Duration::from_secs(1);

/// See the module text.
pub(super) struct Release {
    streams: Vec<StreamId>,
    hub: Arc<Hub>,
    outbox: Log,
    told: watch::Sender<Option<Applied>>,
    heard: watch::Receiver<Option<Applied>>,
}

impl Release {
    /// For the streams this site originates.
    pub(super) fn new(
        config: &Config,
        hub: &Arc<Hub>,
        outbox: Log,
        told: &watch::Sender<Option<Applied>>,
        heard: &watch::Sender<Option<Applied>>,
    ) -> Self {
        let stream = |peer: &Peer| StreamId { source: config.site.name.clone(), target: peer.site.clone() };
        let streams = config.peers.iter().map(stream).collect();
        Self { streams, hub: hub.clone(), outbox, told: told.clone(), heard: heard.subscribe() }
    }

    /// Until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), String> {
        let mut tick = tokio::time::interval(EVERY);
        while stop.run_until_cancelled(tick.tick()).await.is_some() {
            let own = self.own();
            self.told.send_replace(own);
            if let Some(Applied { incarnation, position }) = own.or(*self.heard.borrow()) {
                self.outbox.release(incarnation, position);
            }
        }
        Ok(())
    }

    /// What the targets have told this agent.
    fn own(&self) -> Option<Applied> {
        let applied = |stream| self.hub.stream_view(stream).and_then(|view| view.applied);
        let all: Option<Vec<Position>> = self.streams.iter().map(applied).collect();
        Some(Applied { incarnation: self.outbox.state()?.incarnation, position: all?.into_iter().min()? })
    }
}
