//! Every metric of the agent, typed, in one place.
//!
//! Counters and histograms are moved by the code that does the work; gauges are read off the same [`StatusResponse`]
//! that `farshore status` shows, at scrape time, so that lags keep growing while a peer is silent (see
//! [`super::observed`]). Labels come from closed sets: sites, stages, kinds, codes; never collections or documents.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use farshore_api::control::v1::StatusResponse;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::observed::Observed;
use crate::model::Op;

/// A step of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Change stream to batch.
    Capture,
    /// Batch to disk at the source.
    Outbox,
    /// Batch to the link.
    Ship,
    /// Batch to disk at the target.
    Receive,
    /// Change to MongoDB at the target.
    Apply,
}

/// What a change does, as the `op` label tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpLabel {
    Insert,
    Update,
    Replace,
    Delete,
    Ddl,
}

/// How a document differed from what its change needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Divergence {
    /// An update or delete matched nothing.
    Missing,
    /// An insert found its `_id` taken.
    Exists,
    /// A unique value is held by another document.
    Unique,
    /// Anything else.
    Other,
}

macro_rules! label {
    ($type:ident { $($variant:ident => $text:literal),+ $(,)? }) => {
        impl $type {
            /// The label's text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl EncodeLabelValue for $type {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                self.as_str().encode(encoder)
            }
        }
    };
}

label!(Stage { Capture => "capture", Outbox => "outbox", Ship => "ship", Receive => "receive", Apply => "apply" });
label!(OpLabel { Insert => "insert", Update => "update", Replace => "replace", Delete => "delete", Ddl => "ddl" });
label!(Divergence { Missing => "missing", Exists => "exists", Unique => "unique", Other => "other" });

impl From<Op> for OpLabel {
    fn from(op: Op) -> Self {
        match op {
            Op::Insert => Self::Insert,
            Op::Update => Self::Update,
            Op::Replace => Self::Replace,
            Op::Delete => Self::Delete,
            _ => Self::Ddl,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StreamLabels {
    stream: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlowLabels {
    stream: String,
    stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    stream: String,
    stage: Stage,
    op: OpLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DivergenceLabels {
    stream: String,
    kind: Divergence,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectLabels {
    stream: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    stage: Stage,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabels {
    stream: String,
    code: i32,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics; cheap to share behind an `Arc`. A `stream` is `source/target`, or the source alone before the outbox.
pub struct Metrics {
    registry: Registry,
    observed: Arc<Observed>,
    changes: Family<ChangeLabels, Counter>,
    bytes: Family<FlowLabels, Counter>,
    wire_bytes: Family<StreamLabels, Counter>,
    transactions: Family<StreamLabels, Counter>,
    divergences: Family<DivergenceLabels, Counter>,
    healed: Family<StreamLabels, Counter>,
    corrupt_records: Family<StreamLabels, Counter>,
    rejects: Family<RejectLabels, Counter>,
    retries: Family<RetryLabels, Counter>,
    apply_errors: Family<CodeLabels, Counter>,
    fsync: Histogram,
    commit_to_apply: Histograms<StreamLabels>,
}

/// 0.1 ms to 3.3 s: from a disk with a battery to one that is failing.
fn fsync_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.0001, 2.0, 16))
}

/// 5 ms to 300 s, the range an RPO is set in.
fn latency_histogram() -> Histogram {
    Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0])
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            observed: Arc::default(),
            changes: Family::default(),
            bytes: Family::default(),
            wire_bytes: Family::default(),
            transactions: Family::default(),
            divergences: Family::default(),
            healed: Family::default(),
            corrupt_records: Family::default(),
            rejects: Family::default(),
            retries: Family::default(),
            apply_errors: Family::default(),
            fsync: fsync_histogram(),
            commit_to_apply: Family::new_with_constructor(latency_histogram),
        };
        metrics.register();
        metrics
    }

    /// Names leave out `_total` and `_info`, which the encoder appends.
    fn register(&mut self) {
        let registry = &mut self.registry;
        let build = Info::new([
            ("version", env!("CARGO_PKG_VERSION")),
            ("commit", option_env!("FARSHORE_COMMIT").unwrap_or("unknown")),
        ]);
        registry.register("farshore_build", "The build that runs", build);
        registry.register("farshore_changes", "Changes that passed a stage", self.changes.clone());
        registry.register(
            "farshore_bytes",
            "Bytes of changes that passed a stage, before compression",
            self.bytes.clone(),
        );
        registry.register("farshore_wire_bytes", "Bytes of batches as shipped", self.wire_bytes.clone());
        registry.register("farshore_transactions", "Source transactions applied as one", self.transactions.clone());
        registry.register(
            "farshore_divergences",
            "Documents that were not as their change needs them",
            self.divergences.clone(),
        );
        registry.register("farshore_healed", "Diverged documents fetched again and made equal", self.healed.clone());
        registry.register(
            "farshore_corrupt_records",
            "Records that failed their checksum or chain",
            self.corrupt_records.clone(),
        );
        registry.register("farshore_rejects", "Batches or sessions refused", self.rejects.clone());
        registry.register("farshore_retries", "Attempts repeated after a passing failure", self.retries.clone());
        registry.register(
            "farshore_apply_errors",
            "Errors of MongoDB while applying, by its code",
            self.apply_errors.clone(),
        );
        registry.register("farshore_outbox_fsync_duration_seconds", "Time of one synced write", self.fsync.clone());
        registry.register(
            "farshore_commit_to_apply_seconds",
            "Commit at the source to commit at the target",
            self.commit_to_apply.clone(),
        );
        registry.register_collector(Box::new(Arc::clone(&self.observed)));
    }

    /// Where gauges come from; only the first call counts. The closure must not block and is called on the admin thread.
    pub fn observe(&self, status: impl Fn() -> StatusResponse + Send + Sync + 'static) {
        self.observed.set_source(Box::new(status));
    }

    /// When this agent's own certificate ends, in milliseconds since the Unix epoch.
    pub fn own_certificate_expires(&self, at_ms: i64) {
        self.observed.set_own_expiry(at_ms);
    }

    /// Changes passed a stage.
    pub fn changes(&self, stream: impl Display, stage: Stage, op: impl Into<OpLabel>, count: u64) {
        self.changes.get_or_create(&ChangeLabels { stream: stream.to_string(), stage, op: op.into() }).inc_by(count);
    }

    /// Bytes passed a stage.
    pub fn bytes(&self, stream: impl Display, stage: Stage, count: u64) {
        self.bytes.get_or_create(&FlowLabels { stream: stream.to_string(), stage }).inc_by(count);
    }

    /// Bytes of batches went over the link.
    pub fn wire_bytes(&self, stream: impl Display, count: u64) {
        self.wire_bytes.get_or_create(&labels(stream)).inc_by(count);
    }

    /// Source transactions were applied.
    pub fn transactions(&self, stream: impl Display, count: u64) {
        self.transactions.get_or_create(&labels(stream)).inc_by(count);
    }

    /// A document diverged.
    pub fn divergence(&self, stream: impl Display, kind: Divergence) {
        self.divergences.get_or_create(&DivergenceLabels { stream: stream.to_string(), kind }).inc();
    }

    /// A diverged document is equal again.
    pub fn healed(&self, stream: impl Display) {
        self.healed.get_or_create(&labels(stream)).inc();
    }

    /// A record failed its checksum.
    pub fn corrupt_record(&self, stream: impl Display) {
        self.corrupt_records.get_or_create(&labels(stream)).inc();
    }

    /// A batch or session was refused.
    pub fn reject(&self, stream: impl Display, reason: &'static str) {
        self.rejects.get_or_create(&RejectLabels { stream: stream.to_string(), reason }).inc();
    }

    /// Something was tried again.
    pub fn retry(&self, stage: Stage, reason: &'static str) {
        self.retries.get_or_create(&RetryLabels { stage, reason }).inc();
    }

    /// MongoDB refused something that was applied.
    pub fn apply_error(&self, stream: impl Display, code: i32) {
        self.apply_errors.get_or_create(&CodeLabels { stream: stream.to_string(), code }).inc();
    }

    /// One synced write of the outbox took so long.
    pub fn fsync(&self, took: Duration) {
        self.fsync.observe(took.as_secs_f64());
    }

    /// One change took so long from commit to commit.
    pub fn commit_to_apply(&self, stream: impl Display, took: Duration) {
        self.commit_to_apply.get_or_create(&labels(stream)).observe(took.as_secs_f64());
    }

    /// The text that Prometheus reads.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn labels(stream: impl Display) -> StreamLabels {
    StreamLabels { stream: stream.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_and_histogram_can_be_moved() {
        let metrics = Metrics::new();
        let stream = "north/south";
        metrics.changes(stream, Stage::Apply, Op::Insert, 3);
        metrics.changes(stream, Stage::Apply, Op::CreateIndexes, 1);
        metrics.bytes(stream, Stage::Capture, 100);
        metrics.wire_bytes(stream, 50);
        metrics.transactions(stream, 2);
        metrics.divergence(stream, Divergence::Missing);
        metrics.healed(stream);
        metrics.corrupt_record(stream);
        metrics.reject(stream, "epoch");
        metrics.retry(Stage::Ship, "unreachable");
        metrics.apply_error(stream, 11000);
        metrics.fsync(Duration::from_millis(3));
        metrics.commit_to_apply(stream, Duration::from_millis(30));
        let text = metrics.encode();
        for line in [
            "farshore_build_info{version=\"",
            "farshore_changes_total{stream=\"north/south\",stage=\"apply\",op=\"insert\"} 3",
            "farshore_changes_total{stream=\"north/south\",stage=\"apply\",op=\"ddl\"} 1",
            "farshore_bytes_total{stream=\"north/south\",stage=\"capture\"} 100",
            "farshore_wire_bytes_total{stream=\"north/south\"} 50",
            "farshore_transactions_total{stream=\"north/south\"} 2",
            "farshore_divergences_total{stream=\"north/south\",kind=\"missing\"} 1",
            "farshore_healed_total{stream=\"north/south\"} 1",
            "farshore_corrupt_records_total{stream=\"north/south\"} 1",
            "farshore_rejects_total{stream=\"north/south\",reason=\"epoch\"} 1",
            "farshore_retries_total{stage=\"ship\",reason=\"unreachable\"} 1",
            "farshore_apply_errors_total{stream=\"north/south\",code=\"11000\"} 1",
            "farshore_outbox_fsync_duration_seconds_count 1",
            "farshore_commit_to_apply_seconds_bucket{le=\"0.05\",stream=\"north/south\"} 1",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line}\n{text}");
        }
    }
}
