//! What the agent's modules have counted, gathered for metrics.

use super::console::AgentConsole;
use crate::admin::counted::{AppliedCounts, Counts, LinkCounts, StreamCounts};
use crate::admin::metrics::Observation;
use crate::apply::status::ApplyStatus;
use crate::apply::target::Cause;
use crate::link::{PeerStatus, REASONS, StreamView};
use crate::model::{SiteName, StreamId};

impl AgentConsole {
    /// Status and counts of this moment.
    pub(super) fn observation(&self) -> Observation {
        use crate::admin::control::Console as _;
        Observation { status: self.status(), counts: self.counts() }
    }

    fn counts(&self) -> Counts {
        let capture = self.capture.borrow().clone();
        let apply = self.apply.as_ref().map(|(source, apply)| (source, apply.borrow().clone()));
        let mut retries = Vec::new();
        let mut streams = Vec::new();
        if self.originates() {
            retries.push(("capture", capture.retries));
            streams.extend(self.config.peers.iter().map(|peer| self.shipped(&peer.site)));
        }
        if let Some((source, status)) = &apply {
            retries.push(("apply", status.retries));
            streams.push(self.received(source, status));
        }
        Counts {
            captured: self.originates().then(|| (self.site().to_string(), capture.flow)),
            retries,
            streams,
            links: self.hub.peers().iter().map(link).collect(),
            fsyncs: self.logs.commits(),
        }
    }

    fn shipped(&self, peer: &SiteName) -> StreamCounts {
        let stream = StreamId { source: self.site().clone(), target: peer.clone() };
        let view = self.hub.stream_view(&stream).unwrap_or_default();
        wire(&stream, "ship", &view)
    }

    fn received(&self, source: &SiteName, status: &ApplyStatus) -> StreamCounts {
        let stream = StreamId { source: source.clone(), target: self.site().clone() };
        let view = self.hub.stream_view(&stream).unwrap_or_default();
        let counts = wire(&stream, "receive", &view);
        let corrupt_records = counts.corrupt_records + status.corrupt;
        StreamCounts { corrupt_records, applied: Some(applied(status)), ..counts }
    }
}

fn wire(stream: &StreamId, stage: &'static str, view: &StreamView) -> StreamCounts {
    StreamCounts {
        stream: stream.to_string(),
        stage,
        batches: view.counters.batches,
        wire_bytes: view.counters.bytes,
        corrupt_records: view.counters.corrupt_records,
        applied: None,
    }
}

fn applied(status: &ApplyStatus) -> AppliedCounts {
    let diverged = |cause: Cause| (cause.as_str(), status.diverged.get(&cause).copied().unwrap_or_default());
    AppliedCounts {
        flow: status.flow,
        left_out: status.left_out,
        source_transactions: status.source_transactions,
        transactions: status.transactions,
        diverged: Cause::DIVERGENCES.map(diverged).to_vec(),
        healed: status.healed,
        errors: status.errors.iter().map(|(code, count)| (code.to_string(), *count)).collect(),
        commit_to_apply: status.commit_to_apply,
    }
}

fn link(peer: &PeerStatus) -> LinkCounts {
    let reasons = REASONS.iter().map(|(_, name)| *name);
    LinkCounts { peer: peer.site.to_string(), failures: peer.failures, rejects: reasons.zip(peer.rejects).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_of_a_divergence_has_its_count() {
        let mut status = ApplyStatus::default();
        status.diverged.insert(Cause::Exists, 2);
        assert_eq!(applied(&status).diverged, [("missing", 0), ("exists", 2), ("unique", 0), ("shape", 0)]);
    }
}
