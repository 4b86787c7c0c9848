//! Counters and histograms: what the modules have counted since the process started.
//!
//! | metric (`farshore_…`) | moves when |
//! |---|---|
//! | `changes_total`, `bytes_total` | a change is durable in the outbox (`capture`), committed at the target (`apply`) |
//! | `batches_total`, `wire_bytes_total` | a record went to the link (`ship`), became durable in the inbox (`receive`) |
//! | `transactions_total` | a unit of several source changes became visible as one |
//! | `target_transactions_total` | a transaction was committed at the target |
//! | `left_out_changes_total` | a change of a collection that is not replicated was passed over |
//! | `divergences_total`, `healed_total` | a document was not as its change needs it; such a one was fetched and committed |
//! | `apply_errors_total` | the target's MongoDB answered apply with an error |
//! | `corrupt_records_total` | a record failed its crc or chain, stored or received |
//! | `rejects_total`, `link_failures_total` | a session was refused, told or received; broke or could not be opened |
//! | `retries_total` | the change stream was opened again, a transaction or a session of apply begun again |
//! | `outbox_fsync_duration_seconds` | a synced write of the logs (outbox and inbox) returned |
//! | `commit_to_apply_seconds` | a batch was confirmed by a majority of the target: time since its newest change was written |
//!
//! Values with a label from a closed set are exported from zero on, so that a rate is known from the first movement.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use crate::model::{Durations, Flow};

/// See the module text. A stream is named `source/target`.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// At a source: the site, and what its outbox has taken.
    pub captured: Option<(String, Flow)>,
    /// Things tried again, by stage.
    pub retries: Vec<(&'static str, u64)>,
    /// One for each stream that begins or ends here.
    pub streams: Vec<StreamCounts>,
    /// One for each link.
    pub links: Vec<LinkCounts>,
    /// Synced writes of the logs.
    pub fsyncs: Durations,
}

/// One stream.
#[derive(Clone, Debug, Default)]
pub struct StreamCounts {
    /// Its name.
    pub stream: String,
    /// `ship` at the source, `receive` at the target.
    pub stage: &'static str,
    /// Records that went over the link.
    pub batches: u64,
    /// Their bytes.
    pub wire_bytes: u64,
    /// Damaged ones.
    pub corrupt_records: u64,
    /// At the target.
    pub applied: Option<AppliedCounts>,
}

/// What was applied of a stream.
#[derive(Clone, Debug, Default)]
pub struct AppliedCounts {
    /// Changes committed.
    pub flow: Flow,
    /// Changes of collections that are not replicated.
    pub left_out: u64,
    /// Units of several changes.
    pub source_transactions: u64,
    /// Transactions at the target.
    pub transactions: u64,
    /// Documents that differed, by cause.
    pub diverged: Vec<(&'static str, u64)>,
    /// Those made equal.
    pub healed: u64,
    /// Errors of MongoDB, by code.
    pub errors: Vec<(String, u64)>,
    /// Written at the source to confirmed here.
    pub commit_to_apply: Durations,
}

/// One link.
#[derive(Clone, Debug, Default)]
pub struct LinkCounts {
    /// The peer.
    pub peer: String,
    /// Sessions that broke or could not be opened.
    pub failures: u64,
    /// Refusals, by reason.
    pub rejects: Vec<(&'static str, u64)>,
}

/// Writes all of them.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, counts: &Counts) -> Result<(), fmt::Error> {
    let mut counters = Counters { encoder };
    flows(&mut counters, counts)?;
    wire(&mut counters, &counts.streams)?;
    apply(&mut counters, &counts.streams)?;
    links(&mut counters, &counts.links)?;
    let retries: Vec<_> = counts.retries.iter().map(|(stage, count)| ([("stage", *stage)], *count)).collect();
    counters.family("farshore_retries", "Attempts repeated after a passing failure", &retries)?;
    let text = "Time of one synced write of outbox and inbox";
    let kind = MetricType::Histogram;
    let fsyncs = encoder.encode_descriptor("farshore_outbox_fsync_duration_seconds", text, None, kind)?;
    histogram(fsyncs, &counts.fsyncs)
}

struct Counters<'e, 'a> {
    encoder: &'e mut DescriptorEncoder<'a>,
}

impl Counters<'_, '_> {
    /// The encoder appends `_total`.
    fn family<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: &[([(&str, &str); N], u64)],
    ) -> Result<(), fmt::Error> {
        if values.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in values {
            metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)?;
        }
        Ok(())
    }
}

fn histogram(mut metric: MetricEncoder<'_>, durations: &Durations) -> Result<(), fmt::Error> {
    let buckets: Vec<_> = durations.buckets().collect();
    metric.encode_histogram::<NoLabelSet>(durations.seconds(), durations.count(), &buckets, None)
}

/// What was applied, by the name of its stream.
fn applied(streams: &[StreamCounts]) -> impl Iterator<Item = (&str, &AppliedCounts)> {
    streams.iter().filter_map(|one| Some((one.stream.as_str(), one.applied.as_ref()?)))
}

fn flows(counters: &mut Counters<'_, '_>, counts: &Counts) -> Result<(), fmt::Error> {
    let captured = counts.captured.iter().map(|(site, flow)| (site.as_str(), "capture", flow));
    let flows: Vec<_> =
        captured.chain(applied(&counts.streams).map(|(stream, one)| (stream, "apply", &one.flow))).collect();
    let by_op = |(stream, stage, flow): &(_, _, &Flow)| {
        let (stream, stage) = (*stream, *stage);
        flow.by_op().map(|(op, count)| ([("stream", stream), ("stage", stage), ("op", op)], count))
    };
    let changes: Vec<_> = flows.iter().flat_map(by_op).collect();
    counters.family("farshore_changes", "Changes that passed a stage, marks of Farshore left out", &changes)?;
    let bytes: Vec<_> =
        flows.iter().map(|(stream, stage, flow)| ([("stream", *stream), ("stage", *stage)], flow.bytes)).collect();
    counters.family("farshore_bytes", "Bytes of changes that passed a stage, before compression", &bytes)
}

fn wire(counters: &mut Counters<'_, '_>, streams: &[StreamCounts]) -> Result<(), fmt::Error> {
    let each = |value: fn(&StreamCounts) -> u64| -> Vec<_> {
        streams.iter().map(|one| ([("stream", one.stream.as_str()), ("stage", one.stage)], value(one))).collect()
    };
    counters.family("farshore_batches", "Records that passed a stage", &each(|one| one.batches))?;
    counters.family("farshore_wire_bytes", "Bytes of those records", &each(|one| one.wire_bytes))?;
    let corrupt: Vec<_> = streams.iter().map(|one| ([("stream", one.stream.as_str())], one.corrupt_records)).collect();
    counters.family("farshore_corrupt_records", "Records that failed their checksum or chain", &corrupt)
}

fn apply(counters: &mut Counters<'_, '_>, streams: &[StreamCounts]) -> Result<(), fmt::Error> {
    let each = |value: fn(&AppliedCounts) -> u64| -> Vec<_> {
        applied(streams).map(|(stream, one)| ([("stream", stream)], value(one))).collect()
    };
    let units = each(|one| one.source_transactions);
    counters.family("farshore_transactions", "Source transactions of several changes, applied as one", &units)?;
    let committed = each(|one| one.transactions);
    counters.family("farshore_target_transactions", "Transactions committed at the target", &committed)?;
    let left_out = each(|one| one.left_out);
    counters.family("farshore_left_out_changes", "Changes of collections that are not replicated", &left_out)?;
    let kinds = |(stream, one): (_, &AppliedCounts)| {
        let labels = move |(kind, count): &(&'static str, u64)| ([("stream", stream), ("kind", *kind)], *count);
        one.diverged.iter().map(labels).collect::<Vec<_>>()
    };
    let diverged: Vec<_> = applied(streams).flat_map(kinds).collect();
    counters.family("farshore_divergences", "Documents that were not as their change needs them", &diverged)?;
    let healed = each(|one| one.healed);
    counters.family("farshore_healed", "Diverged documents fetched again and made equal", &healed)?;
    let errors: Vec<_> = applied(streams)
        .flat_map(|(stream, one)| {
            one.errors.iter().map(move |(code, count)| ([("stream", stream), ("code", code.as_str())], *count))
        })
        .collect();
    counters.family("farshore_apply_errors", "Errors of MongoDB while applying, by its code", &errors)?;
    let text = "Newest change of a batch written at the source to the batch confirmed at the target";
    let kind = MetricType::Histogram;
    if applied(streams).next().is_none() {
        return Ok(());
    }
    let mut metric = counters.encoder.encode_descriptor("farshore_commit_to_apply_seconds", text, None, kind)?;
    for (stream, one) in applied(streams) {
        histogram(metric.encode_family(&[("stream", stream)])?, &one.commit_to_apply)?;
    }
    Ok(())
}

fn links(counters: &mut Counters<'_, '_>, links: &[LinkCounts]) -> Result<(), fmt::Error> {
    let failures: Vec<_> = links.iter().map(|one| ([("peer", one.peer.as_str())], one.failures)).collect();
    counters.family("farshore_link_failures", "Sessions with a peer that broke or could not be opened", &failures)?;
    let rejects: Vec<_> = links
        .iter()
        .flat_map(|LinkCounts { peer, rejects, .. }| {
            rejects.iter().map(move |(reason, count)| ([("peer", peer.as_str()), ("reason", *reason)], *count))
        })
        .collect();
    counters.family("farshore_rejects", "Sessions refused, by either side", &rejects)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::admin::metrics::{Metrics, Observation};

    use super::*;

    fn counts() -> Counts {
        let flow = Flow { inserts: 3, updates: 4, ddl: 1, bytes: 100, ..Flow::default() };
        let mut durations = Durations::default();
        durations.record(Duration::from_millis(30));
        let applied = AppliedCounts {
            flow,
            left_out: 5,
            source_transactions: 2,
            transactions: 6,
            diverged: vec![("missing", 1), ("exists", 0)],
            healed: 1,
            errors: vec![("11000".into(), 9)],
            commit_to_apply: durations,
        };
        let link = LinkCounts { peer: "north".into(), failures: 8, rejects: vec![("epoch", 1), ("gap", 0)] };
        Counts {
            captured: Some(("north".into(), flow)),
            retries: vec![("capture", 1), ("apply", 2)],
            streams: vec![StreamCounts {
                stream: "north/south".into(),
                stage: "receive",
                batches: 11,
                wire_bytes: 50,
                corrupt_records: 7,
                applied: Some(applied),
            }],
            links: vec![link],
            fsyncs: durations,
        }
    }

    fn scrape(counts: Counts) -> String {
        let metrics = Metrics::new();
        metrics.observe(move || Observation { counts: counts.clone(), ..Observation::default() });
        metrics.encode()
    }

    #[test]
    fn each_counter_and_histogram_follows_what_was_counted() {
        let text = scrape(counts());
        for line in [
            "farshore_changes_total{stream=\"north\",stage=\"capture\",op=\"insert\"} 3",
            "farshore_changes_total{stream=\"north/south\",stage=\"apply\",op=\"ddl\"} 1",
            "farshore_changes_total{stream=\"north/south\",stage=\"apply\",op=\"delete\"} 0",
            "farshore_bytes_total{stream=\"north\",stage=\"capture\"} 100",
            "farshore_batches_total{stream=\"north/south\",stage=\"receive\"} 11",
            "farshore_wire_bytes_total{stream=\"north/south\",stage=\"receive\"} 50",
            "farshore_transactions_total{stream=\"north/south\"} 2",
            "farshore_target_transactions_total{stream=\"north/south\"} 6",
            "farshore_left_out_changes_total{stream=\"north/south\"} 5",
            "farshore_divergences_total{stream=\"north/south\",kind=\"missing\"} 1",
            "farshore_healed_total{stream=\"north/south\"} 1",
            "farshore_corrupt_records_total{stream=\"north/south\"} 7",
            "farshore_rejects_total{peer=\"north\",reason=\"epoch\"} 1",
            "farshore_link_failures_total{peer=\"north\"} 8",
            "farshore_retries_total{stage=\"apply\"} 2",
            "farshore_apply_errors_total{stream=\"north/south\",code=\"11000\"} 9",
            "farshore_outbox_fsync_duration_seconds_count 1",
            "farshore_outbox_fsync_duration_seconds_bucket{le=\"0.05\"} 1",
            "farshore_commit_to_apply_seconds_bucket{le=\"0.025\",stream=\"north/south\"} 0",
            "farshore_commit_to_apply_seconds_bucket{le=\"0.05\",stream=\"north/south\"} 1",
            "farshore_commit_to_apply_seconds_bucket{le=\"+Inf\",stream=\"north/south\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn what_a_site_does_not_do_is_left_out() {
        let text = scrape(Counts { captured: None, streams: Vec::new(), ..counts() });
        for name in ["farshore_changes", "farshore_batches", "farshore_healed", "farshore_commit_to_apply"] {
            assert!(!text.contains(name), "{name}\n{text}");
        }
    }
}
