//! The metrics of the agent, read off what its modules keep when somebody asks.
//!
//! Nothing is counted here: gauges are the [`StatusResponse`] that `farshore status` shows ([`super::observed`]), counters
//! and histograms are the numbers of the modules that do the work ([`super::counted`]). So the three cannot disagree,
//! lags keep growing while a peer is silent, and nothing is exported that no code moves. Labels come from closed sets:
//! sites, stages, causes, codes; never collections or documents.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};

use farshore_api::control::v1::StatusResponse;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::counted::{self, Counts};
use super::observed;

/// What the agent knows of itself at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// Its status.
    pub status: StatusResponse,
    /// What its modules have counted since the process started.
    pub counts: Counts,
}

type Source = Box<dyn Fn() -> Observation + Send + Sync>;

/// All metrics; cheap to share behind an `Arc`.
pub struct Metrics {
    registry: Registry,
    scrape: Arc<Scrape>,
}

/// The collector; nothing but the build is exported before it has a source.
#[derive(Default)]
struct Scrape {
    source: OnceLock<Source>,
    own_expiry_ms: AtomicI64,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(source) = self.source.get() else { return Ok(()) };
        let Observation { status, counts } = source();
        counted::encode(&mut encoder, &counts)?;
        observed::encode(encoder, &status, self.own_expiry_ms.load(Ordering::Relaxed))
    }
}

impl Metrics {
    /// Without a source yet.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let build = Info::new([
            ("version", env!("CARGO_PKG_VERSION")),
            ("commit", option_env!("FARSHORE_COMMIT").unwrap_or("unknown")),
        ]);
        // The encoder appends `_info`.
        registry.register("farshore_build", "The build that runs", build);
        let scrape = Arc::new(Scrape::default());
        registry.register_collector(Box::new(Arc::clone(&scrape)));
        Self { registry, scrape }
    }

    /// Where all of it comes from; only the first call counts. The closure must not block and is called on the admin thread.
    pub fn observe(&self, source: impl Fn() -> Observation + Send + Sync + 'static) {
        if self.scrape.source.set(Box::new(source)).is_err() {
            tracing::debug!("metrics already have a source");
        }
    }

    /// When this agent's own certificate ends, in milliseconds since the Unix epoch.
    pub fn own_certificate_expires(&self, at_ms: i64) {
        self.scrape.own_expiry_ms.store(at_ms, Ordering::Relaxed);
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
