//! What the agent tells about itself: status, lag, the contents of its logs.

use std::sync::Arc;
use std::time::Duration;

use farshore_api::control::v1 as pb;
use futures::stream::{BoxStream, StreamExt as _};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Clock;
use crate::admin::control::{Console, Peek, PeekError, PeekLog};
use crate::apply::status::{ApplyStatus, Phase as ApplyPhase};
use crate::config::{Config, format_duration};
use crate::link::{Hub, Leadership, LinkState, SourceProgress};
use crate::model::{Position, SiteName, StreamId};
use crate::outbox::{self, Level, Log, LogId, LogState, Logs};
use crate::source::capture::{CaptureStatus, Phase as CapturePhase};
use crate::source::heartbeat::Head;

/// What is known of the site's MongoDB.
#[derive(Clone, Debug, Default)]
pub(super) struct MongoView {
    pub(super) reachable: bool,
    pub(super) replica_set: String,
    pub(super) version: String,
    pub(super) error: String,
}

/// See the module text. Reads watches only, so it never blocks.
pub(super) struct AgentConsole {
    pub(super) config: Arc<Config>,
    pub(super) logs: Arc<Logs>,
    pub(super) hub: Arc<Hub>,
    pub(super) clock: Clock,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) mongo: watch::Receiver<MongoView>,
    pub(super) head: watch::Receiver<Head>,
    pub(super) progress: watch::Receiver<SourceProgress>,
    pub(super) capture: watch::Receiver<CaptureStatus>,
    /// The stream this site receives, if it does.
    pub(super) apply: Option<(SiteName, watch::Receiver<ApplyStatus>)>,
}

/// A peer that was silent for longer is not believed to be where it said.
const SILENT: Duration = Duration::from_secs(3);

fn at(position: Option<Position>) -> Option<pb::Position> {
    position.map(Into::into)
}

impl AgentConsole {
    pub(super) fn site(&self) -> &SiteName {
        &self.config.site.name
    }

    pub(super) fn originates(&self) -> bool {
        self.config.group.primary == *self.site()
    }

    fn log(&self, id: &LogId) -> (Log, Option<LogState>) {
        let log = self.logs.log(id);
        let state = log.state();
        (log, state)
    }

    fn log_status(&self, id: &LogId) -> Option<pb::LogStatus> {
        let state = self.log(id).1?;
        let usage = self.logs.usage();
        let full = usage.level == Level::Full && *id == LogId::Outbox;
        let stopped = self.logs.failed().or(full.then(|| "data.outbox_limit is reached".to_owned()));
        Some(pb::LogStatus {
            bytes: state.bytes,
            limit_bytes: usage.limit_bytes,
            batches: state.batches,
            first: at(Some(state.first)),
            last: at(Some(state.end)),
            encrypted: self.config.data.encryption_key_file.is_some(),
            stopped: stopped.unwrap_or_default(),
        })
    }

    /// State and reason of a stream whose session did not come about or ended.
    fn no_session(&self, peer: &SiteName, otherwise: &str) -> (&'static str, String) {
        let link = self.hub.peers().into_iter().find(|link| link.site == *peer && link.state == LinkState::Refused);
        match link {
            Some(link) if link.hint.is_empty() => ("refused", link.error),
            Some(link) => ("refused", format!("{} ({})", link.error, link.hint)),
            None => ("waiting", otherwise.to_owned()),
        }
    }

    /// How far back the oplog of this site reaches, in seconds; 0: not known.
    fn oplog_window(&self) -> u64 {
        let head = self.head.borrow();
        if head.oldest.0 == 0 { 0 } else { u64::from(head.time.seconds().saturating_sub(head.oldest.seconds())) }
    }

    /// Streams this site originates, as the source sees them.
    fn outgoing(&self, peer: &SiteName) -> pb::StreamStatus {
        let stream = StreamId { source: self.site().clone(), target: peer.clone() };
        let view = self.hub.stream_view(&stream).unwrap_or_default();
        let (capturing, progress) = (self.capture.borrow().clone(), *self.progress.borrow());
        let state = self.log(&LogId::Outbox).1;
        let (mut name, mut reason) = match &capturing.phase {
            CapturePhase::Waiting => ("waiting", "no target has asked for the stream yet".to_owned()),
            CapturePhase::Streaming if view.open => ("streaming", String::new()),
            CapturePhase::Streaming => self.no_session(peer, "there is no session with the target"),
            CapturePhase::Retrying(reason) => ("waiting", reason.clone()),
            CapturePhase::Lost(lost) => ("failed", format!("{} ({})", lost.reason, lost.hint())),
            CapturePhase::Full(reason) => {
                let window = self.oplog_window();
                let left = (window > 0)
                    .then(|| format!(", which reaches back {}", format_duration(Duration::from_secs(window))));
                ("failed", format!("{reason}; what follows waits in the oplog{}", left.unwrap_or_default()))
            }
            CapturePhase::Failed(reason) => ("failed", reason.clone()),
        };
        if let Some((rejection, _)) = view.last_reject.as_ref().filter(|(r, _)| !view.open && !r.is_transient()) {
            (name, reason) = ("refused", rejection.message.clone());
        }
        let received = view.received;
        let exposure = lag_ms(progress.head.millis(), received.map(|p| p.time.millis()));
        pb::StreamStatus {
            source: stream.source.to_string(),
            target: stream.target.to_string(),
            state: name.into(),
            reason,
            incarnation: state.as_ref().map(|s| s.incarnation.to_string()).unwrap_or_default(),
            head: at(Some(Position::before(progress.head))),
            captured: at(progress.captured),
            sent: at(view.sent),
            received: at(received),
            applied: at(view.applied),
            verified: None,
            data_loss_exposure_ms: exposure,
            apply_lag_ms: view
                .applied
                .zip(received)
                .map_or(-1, |(a, r)| lag_ms(r.time.millis(), Some(a.time.millis()))),
            datum_age_ms: view.heard.map_or(-1, age_ms),
            changes: capturing.flow.changes(),
            bytes: capturing.flow.bytes,
            ddl: capturing.flow.ddl,
            corrupt_records: view.counters.corrupt_records,
            hash: state.map(|s| s.hash.to_string()).unwrap_or_default(),
            ..Default::default()
        }
    }

    /// The stream this site receives.
    fn incoming(&self, source: &SiteName, apply: &ApplyStatus) -> pb::StreamStatus {
        let stream = StreamId { source: source.clone(), target: self.site().clone() };
        let view = self.hub.stream_view(&stream).unwrap_or_default();
        let state = self.log(&LogId::Inbox(source.clone())).1;
        let received = state.as_ref().map(|s| s.end);
        let word = view.progress;
        let age = word.map(|(_, when)| Instant::now().saturating_duration_since(when));
        let head = word.map(|(word, _)| word.head);
        let refused = view.last_reject.as_ref().filter(|(r, _)| !view.open && !r.is_transient());
        let (name, reason) = match (&apply.phase, refused) {
            // Trying again does not make it better: it is shown until it is out of the way.
            _ if let Some((message, hint)) = &apply.failure => ("failed", format!("{message} ({hint})")),
            (ApplyPhase::Failed { message, hint }, _) => ("failed", format!("{message} ({hint})")),
            (_, Some((rejection, _))) => ("refused", format!("{} ({})", rejection.message, rejection.hint)),
            (ApplyPhase::Retrying(reason), _) => ("waiting", reason.clone()),
            _ if !view.open => self.no_session(source, "there is no session with the source"),
            (ApplyPhase::Waiting, _) => ("waiting", "nothing was received yet".to_owned()),
            (ApplyPhase::Running, _) => {
                let behind = apply
                    .applied
                    .zip(received)
                    .is_some_and(|(a, r)| lag_ms(r.time.millis(), Some(a.time.millis())) > 5_000);
                (if behind { "catching_up" } else { "streaming" }, String::new())
            }
        };
        // While the source is silent, time passes and with it what may be lost.
        let silent = age.filter(|age| *age > SILENT || !view.open);
        let known = head.map_or(-1, |head| lag_ms(head.millis(), received.map(|p| p.time.millis())));
        let exposure = match (silent, received) {
            (Some(_), Some(received)) => ((self.clock)() - received.time.millis()).max(known),
            _ => known,
        };
        let applied = apply.applied;
        let diverged = apply.diverged.values().sum();
        let diverged_kinds = apply.diverged.iter().map(|(kind, count)| (kind.as_str().to_owned(), *count));
        let refused = apply.refused.iter().map(|(namespace, reason)| pb::RefusedCollection {
            namespace: namespace.clone(),
            reason: reason.clone(),
            hint: "its changes are left out; everything else goes on".into(),
        });
        pb::StreamStatus {
            source: stream.source.to_string(),
            target: stream.target.to_string(),
            state: name.into(),
            reason,
            incarnation: state.as_ref().map(|s| s.incarnation.to_string()).unwrap_or_default(),
            head: head.and_then(|head| at(Some(Position::before(head)))),
            captured: at(word.and_then(|(word, _)| word.captured)),
            sent: None,
            received: at(received),
            applied: at(applied),
            verified: None,
            data_loss_exposure_ms: exposure,
            apply_lag_ms: applied.zip(received).map_or(-1, |(a, r)| lag_ms(r.time.millis(), Some(a.time.millis()))),
            datum_age_ms: word.map_or(-1, |(_, when)| age_ms(when)),
            changes: apply.flow.changes(),
            bytes: apply.flow.bytes,
            transactions: apply.source_transactions,
            target_transactions: apply.transactions,
            ddl: apply.flow.ddl,
            diverged,
            healed: apply.healed,
            corrupt_records: view.counters.corrupt_records + apply.corrupt,
            at_cut: apply.at_cut,
            consistent_from: apply.consistent_from.and_then(|time| at(Some(Position::through(time)))),
            refused: refused.collect(),
            hash: apply.hash.to_string(),
            diverged_kinds: diverged_kinds.collect(),
        }
    }

    fn links(&self) -> Vec<pb::LinkStatus> {
        let now = Instant::now();
        let link = |peer: crate::link::PeerStatus| pb::LinkStatus {
            peer: peer.site.to_string(),
            state: match peer.state {
                LinkState::Connected => "connected",
                LinkState::Connecting => "connecting",
                LinkState::Refused => "refused",
            }
            .into(),
            address: peer.address,
            error: if peer.hint.is_empty() { peer.error } else { format!("{} ({})", peer.error, peer.hint) },
            rtt_us: peer.rtt.map_or(0, |rtt| i64::try_from(rtt.as_micros()).unwrap_or(i64::MAX)),
            since_ms: (self.clock)()
                - i64::try_from(now.saturating_duration_since(peer.since).as_millis()).unwrap_or(0),
            certificate_expires_ms: peer.certificate_expiry.map_or(0, |seconds| seconds.saturating_mul(1000)),
        };
        self.hub.peers().into_iter().map(link).collect()
    }

    fn problems(&self, streams: &[pb::StreamStatus]) -> Vec<pb::Problem> {
        let problem = |severity: &str, subject: String, message: String, hint: &str| pb::Problem {
            severity: severity.into(),
            subject,
            message,
            hint: hint.into(),
        };
        let mut found = Vec::new();
        let mongo = self.mongo.borrow().clone();
        if !mongo.reachable {
            let error = if mongo.error.is_empty() { "it was not reached yet".to_owned() } else { mongo.error };
            found.push(problem(
                "error",
                "mongodb".into(),
                error,
                "look at the replica set of this site; check uri, username and password_file under [mongodb]",
            ));
        }
        if let Some(reason) = self.logs.failed() {
            found.push(problem("error", "data".into(), reason, "free or repair the disk, then restart the agent"));
        }
        if self.logs.usage().level != Level::Ok {
            let message = "outbox and inbox fill data.outbox_limit".to_owned();
            found.push(problem("warning", "data".into(), message, "bring the peer back, or raise the limit"));
        }
        for stream in streams {
            let subject = format!("stream {}/{}", stream.source, stream.target);
            if matches!(stream.state.as_str(), "failed" | "refused") {
                found.push(problem("error", subject.clone(), stream.reason.clone(), ""));
            }
            for refused in &stream.refused {
                let message = format!("{} is not replicated: {}", refused.namespace, refused.reason);
                found.push(problem("error", subject.clone(), message, &refused.hint));
            }
        }
        if let Some((source, apply)) = &self.apply
            && let healing @ 1.. = apply.borrow().healing
        {
            let subject = format!("stream {source}/{}", self.site());
            let message = format!("{healing} documents differ from the source");
            found.push(problem("warning", subject, message, "they are fetched again by themselves"));
        }
        found
    }
}

fn age_ms(since: Instant) -> i64 {
    i64::try_from(Instant::now().saturating_duration_since(since).as_millis()).unwrap_or(i64::MAX)
}

/// How far `behind` is below `ahead`, in source time; -1 when unknown.
fn lag_ms(ahead: i64, behind: Option<i64>) -> i64 {
    match behind {
        Some(behind) if ahead > 0 => (ahead - behind).max(0),
        _ => -1,
    }
}

impl Console for AgentConsole {
    fn status(&self) -> pb::StatusResponse {
        let leadership = *self.leadership.borrow();
        let mongo = self.mongo.borrow().clone();
        let mut streams: Vec<pb::StreamStatus> = match self.originates() {
            true => self.config.peers.iter().map(|peer| self.outgoing(&peer.site)).collect(),
            false => Vec::new(),
        };
        if let Some((source, apply)) = &self.apply {
            streams.push(self.incoming(source, &apply.borrow().clone()));
        }
        pb::StatusResponse {
            site: self.site().to_string(),
            group: self.config.group.name.clone(),
            agent: self.logs.agent_id().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            role: if self.originates() { "primary" } else { "standby" }.into(),
            epoch: super::EPOCH.0,
            term: leadership.term.0,
            leader: leadership.leader,
            now_ms: (self.clock)(),
            mongodb: Some(pb::MongoStatus {
                reachable: mongo.reachable,
                replica_set: mongo.replica_set,
                version: mongo.version,
                error: mongo.error,
                oplog_window_seconds: self.oplog_window(),
            }),
            problems: self.problems(&streams),
            streams,
            links: self.links(),
            outbox: self.log_status(&LogId::Outbox),
            inbox: self.apply.as_ref().and_then(|(source, _)| self.log_status(&LogId::Inbox(source.clone()))),
            memory_bytes: resident_bytes(),
            memory_limit_bytes: self.config.memory.limit.0,
        }
    }

    fn outbox_stats(&self) -> pb::OutboxStatsResponse {
        let own = self.site().clone();
        let member = |peer: &crate::config::Peer| {
            let stream = StreamId { source: own.clone(), target: peer.site.clone() };
            let view = self.hub.stream_view(&stream)?;
            Some(pb::MemberPosition {
                site: peer.site.to_string(),
                received: at(view.received),
                applied: at(view.applied),
            })
        };
        let members =
            if self.originates() { self.config.peers.iter().filter_map(member).collect() } else { Vec::new() };
        let inbox = self.apply.as_ref().and_then(|(source, _)| self.log_status(&LogId::Inbox(source.clone())));
        pb::OutboxStatsResponse { outbox: self.log_status(&LogId::Outbox), inbox, members }
    }

    async fn peek(&self, peek: Peek) -> Result<BoxStream<'static, Result<pb::PeekedChange, PeekError>>, PeekError> {
        let (id, names) = match (peek.log, &self.apply) {
            (PeekLog::Outbox, _) => (LogId::Outbox, ("outbox", "captured")),
            (PeekLog::Inbox, Some((source, _))) => (LogId::Inbox(source.clone()), ("inbox", "received")),
            (PeekLog::Inbox, None) => return Err(PeekError::NoLog("inbox", "received")),
        };
        let (log, state) = self.log(&id);
        let state = state.ok_or(PeekError::NoLog(names.0, names.1))?;
        let after = peek.after.unwrap_or(state.first);
        if after < state.first {
            return Err(PeekError::Trimmed { first: state.first });
        }
        Ok(peeked(log, after, state.end).take(peek.limit).boxed())
    }
}

/// The changes of a log in (`after`, `end`].
fn peeked(
    log: Log,
    after: Position,
    end: Position,
) -> impl futures::Stream<Item = Result<pb::PeekedChange, PeekError>> {
    let batches = futures::stream::unfold((log.reader(after), after), move |(mut reader, mut last)| async move {
        if last >= end {
            return None;
        }
        let changes = match reader.next().await {
            Ok(stored) => {
                last = stored.batch.header().end;
                render(&stored, after)
            }
            Err(outbox::Error::Trimmed { first, .. }) => vec![Err(PeekError::Trimmed { first })],
            Err(error) => vec![Err(PeekError::Failed(error.to_string()))],
        };
        if changes.iter().any(Result::is_err) {
            last = end;
        }
        Some((futures::stream::iter(changes), (reader, last)))
    });
    batches.flatten()
}

fn render(stored: &outbox::Stored, after: Position) -> Vec<Result<pb::PeekedChange, PeekError>> {
    let changes = match stored.batch.changes() {
        Ok(changes) => changes,
        Err(error) => return vec![Err(PeekError::Failed(error.to_string()))],
    };
    let skip = after.max(stored.skip_through);
    let wanted = changes.shared().filter(|(position, _)| *position > skip);
    let one = |(position, bytes): (Position, bytes::Bytes)| {
        let raw = bson::RawDocument::from_bytes(&bytes).map_err(|error| PeekError::Failed(error.to_string()))?;
        let document = bson::Document::try_from(raw).map_err(|error| PeekError::Failed(error.to_string()))?;
        let json = bson::Bson::Document(document).into_canonical_extjson().to_string();
        Ok(pb::PeekedChange { position: at(Some(position)), json })
    };
    wanted.map(one).collect()
}

/// Resident memory of this process, from /proc; 0 where there is none.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}
