//! What the link shows of itself: one cell per peer and one per stream, each with one writer and any number of readers.

use std::time::Duration;

use farshore_api::replication::v1 as pb;
use tokio::sync::watch;
use tokio::time::Instant;

use super::hub::{PeerEntry, Shared};
use super::session::Ended;
use super::transport::Peer;
use super::wire::{REASONS, Reason, Rejection};
use crate::model::{ClusterTime, Position, SiteName};

/// State of the link to one peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// A session is open.
    Connected,
    /// None is; it is tried again by itself.
    Connecting,
    /// One side refuses; a person may have to act. Tried again every few seconds.
    Refused,
}

/// The link to one peer.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// The peer.
    pub site: SiteName,
    /// Since `since`.
    pub state: LinkState,
    /// Where the peer is or was tried last.
    pub address: String,
    /// Why there is no session; empty when there is one.
    pub error: String,
    /// What to do about it; may be empty.
    pub hint: String,
    /// Round trip, when known.
    pub rtt: Option<Duration>,
    /// When the state was entered.
    pub since: Instant,
    /// When the peer's certificate expires, seconds since the Unix epoch.
    pub certificate_expiry: Option<i64>,
    /// Sessions that broke, and attempts that came to none, since the start.
    pub failures: u64,
    /// Rejections told or received since the start, in the order of [`REASONS`].
    pub rejects: [u64; REASONS.len()],
    /// What the log says of the link until something else is true.
    said: Option<String>,
}

impl PeerStatus {
    pub(super) fn new(site: SiteName, now: Instant) -> Self {
        Self {
            site,
            state: LinkState::Connecting,
            address: String::new(),
            error: String::new(),
            hint: String::new(),
            rtt: None,
            since: now,
            certificate_expiry: None,
            failures: 0,
            rejects: [0; REASONS.len()],
            said: None,
        }
    }

    pub(super) fn enter(&mut self, state: LinkState, error: String, hint: String, now: Instant) {
        if self.state != state {
            self.since = now;
        }
        (self.state, self.error, self.hint) = (state, error, hint);
        if state != LinkState::Connected {
            self.rtt = None;
        }
    }

    /// Counts how a session, or an attempt at one, ended.
    fn count(&mut self, ended: &Ended) {
        match ended {
            Ended::Rejected(rejection) | Ended::Refused(rejection) => {
                let at = REASONS.iter().position(|(reason, _)| *reason == rejection.reason);
                if let Some(count) = at.map(|at| &mut self.rejects[at]) {
                    *count += 1;
                }
            }
            Ended::Closed | Ended::Lost(_) | Ended::Failed(_) => self.failures += 1,
            Ended::Cancelled | Ended::Duplicate => {}
        }
    }
}

/// Counters of one stream at this agent since its start.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Records shipped, or stored durably.
    pub batches: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records that failed their crc or could not be decoded.
    pub corrupt_records: u64,
}

/// One stream as this agent sees it.
#[derive(Clone, Default, Debug)]
pub struct StreamView {
    /// Source side: end of what was sent in the current session.
    pub sent: Option<Position>,
    /// The target's durable position: as acknowledged (source side), or our own (target side).
    pub received: Option<Position>,
    /// The target's applied position, likewise.
    pub applied: Option<Position>,
    /// Target side: the newest word of the source, and when it came.
    pub progress: Option<(SourceWord, Instant)>,
    /// Source side: when the target was heard last.
    pub heard: Option<Instant>,
    /// What was counted.
    pub counters: Counters,
    /// The newest rejection, told or received, and when.
    pub last_reject: Option<(Rejection, Instant)>,
    /// Whether the last session that carried the stream is still open.
    pub open: bool,
}

/// What a source says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceWord {
    /// Newest majority-committed cluster time.
    pub head: ClusterTime,
    /// End of what it captured.
    pub captured: Option<Position>,
    /// Changes captured since its start.
    pub captured_changes: u64,
    /// Their bytes.
    pub captured_bytes: u64,
    /// Its wall clock, milliseconds since the Unix epoch.
    pub now_ms: i64,
}

impl From<&pb::Progress> for SourceWord {
    fn from(progress: &pb::Progress) -> Self {
        Self {
            head: ClusterTime(progress.head),
            captured: progress.captured.map(Into::into),
            captured_changes: progress.captured_changes,
            captured_bytes: progress.captured_bytes,
            now_ms: progress.now_ms,
        }
    }
}

pub(super) type ViewCell = watch::Sender<StreamView>;

pub(super) fn note_reject(view: &ViewCell, rejection: &Rejection, now: Instant) {
    view.send_modify(|view| view.last_reject = Some((rejection.clone(), now)));
}

impl Shared {
    /// A session, or an attempt at one, has ended.
    pub(super) fn count_end(&self, entry: &PeerEntry, ended: &Ended) {
        entry.status.send_modify(|status| status.count(ended));
    }

    /// A ping came back.
    pub(super) fn link_measured(&self, entry: &PeerEntry, rtt: Duration) {
        entry.status.send_modify(|status| status.rtt = Some(rtt));
    }

    /// A session is open. One that was refused before may be refused again at once: that it is up is only said when
    /// something went over it ([`Self::link_carries`]).
    pub(super) fn link_up(&self, entry: &PeerEntry, peer: &Peer) {
        let now = Instant::now();
        entry.status.send_modify(|status| {
            if status.said.is_none() {
                tracing::info!(peer = %status.site, address = peer.address, "link is up");
            }
            status.enter(LinkState::Connected, String::new(), String::new(), now);
            status.address.clone_from(&peer.address);
            status.certificate_expiry = peer.certificate_expires;
        });
    }

    /// A batch or an acknowledgement went over the session.
    pub(super) fn link_carries(&self, entry: &PeerEntry) {
        entry.status.send_if_modified(|status| {
            let recovered = status.said.take().is_some();
            if recovered {
                tracing::info!(peer = %status.site, address = status.address, "link is up again");
            }
            recovered
        });
    }

    /// A session that was open has ended.
    pub(super) fn link_down(&self, entry: &PeerEntry, ended: &Ended) {
        match ended {
            Ended::Cancelled | Ended::Duplicate => {
                entry.status.send_modify(|status| {
                    status.enter(LinkState::Connecting, String::new(), String::new(), Instant::now());
                });
            }
            ended => self.link_failed(entry, None, ended),
        }
    }

    /// There is no session, for this reason; said once until there is one again.
    pub(super) fn link_failed(&self, entry: &PeerEntry, address: Option<&str>, ended: &Ended) {
        let (state, error, hint) = match ended {
            Ended::Rejected(rejection) | Ended::Refused(rejection) => {
                self.note_deposed(ended, rejection);
                let state = if rejection.is_transient() { LinkState::Connecting } else { LinkState::Refused };
                let side = if matches!(ended, Ended::Rejected(_)) { "the peer refuses" } else { "refused here" };
                (state, format!("{side}: {}", rejection.message), rejection.hint.clone())
            }
            Ended::Lost(error) | Ended::Failed(error) => (LinkState::Connecting, error.clone(), String::new()),
            Ended::Closed => (LinkState::Connecting, "the peer closed the session".into(), String::new()),
            Ended::Cancelled | Ended::Duplicate => return,
        };
        entry.status.send_modify(|status| {
            // Ways of not being reached take turns; they are one thing to say, a refusal is another.
            let what = if state == LinkState::Refused { error.clone() } else { "unreachable".to_owned() };
            if status.said.as_ref() != Some(&what) {
                tracing::warn!(peer = %status.site, error, hint, "link is down (said once until it is up again)");
                status.said = Some(what);
            }
            status.enter(state, error, hint, Instant::now());
            if let Some(address) = address {
                address.clone_into(&mut status.address);
            }
        });
    }

    fn note_deposed(&self, ended: &Ended, rejection: &Rejection) {
        if matches!(ended, Ended::Rejected(_)) && rejection.reason == Reason::Term {
            let own = self.leadership().term;
            if rejection.term > own {
                tracing::error!(%own, newer = %rejection.term, "another agent of this site has taken over; this process must exit");
                self.deposed.send_replace(Some(rejection.term));
            }
        }
    }
}
