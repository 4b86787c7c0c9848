//! `/startupz`, `/livez`, `/readyz` and `/metrics` on the plain admin port.
//!
//! - ready: every [`Latch`] was dropped. A part that must be up before the control service can answer holds one.
//! - started: the latch of the start was dropped; it stays true, and MongoDB or a peer that is away changes nothing.
//! - alive: the main runtime moved the [`Heartbeat`] within 30 s. Nothing else: a site without MongoDB or without its
//!   peer must not be restarted for it.
//!
//! The port is bound before [`serve`] returns, so that a port in use is an error at start. The server has a thread and a
//! current-thread runtime of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;

/// Silence of the main runtime after which it counts as stuck.
pub const STALE_AFTER: Duration = Duration::from_secs(30);
/// The latch of the start.
const STARTUP: &str = "startup";

/// Why the admin port cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is in use or not ours.
    #[error("cannot listen on {address} for health and metrics: {source}; choose another admin.listen")]
    Bind { address: SocketAddr, source: std::io::Error },
    /// No thread or runtime.
    #[error("cannot start the admin thread: {0}")]
    Thread(std::io::Error),
}

#[derive(Default)]
struct Latches {
    held: BTreeMap<&'static str, usize>,
    started: bool,
}

/// Whether the agent can serve.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Mutex<Latches>>);

/// Holds readiness back until it is dropped.
#[must_use = "dropping a latch says that the part is ready"]
pub struct Latch {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Not ready until the latch that comes with it was dropped: take all others before that.
    pub fn new() -> (Self, Latch) {
        let readiness = Self::default();
        let latch = readiness.latch(STARTUP);
        (readiness, latch)
    }

    /// Holds readiness back on behalf of a part. May be taken at any time, also to become unready before a shutdown.
    pub fn latch(&self, name: &'static str) -> Latch {
        *self.lock().held.entry(name).or_default() += 1;
        Latch { name, readiness: self.clone() }
    }

    /// The parts that are not ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.lock().held.keys().copied().collect()
    }

    fn has_started(&self) -> bool {
        self.lock().started
    }

    fn lock(&self) -> MutexGuard<'_, Latches> {
        self.0.lock().expect("no code panics while it holds the latches")
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        let mut latches = self.readiness.lock();
        let count = latches.held.get_mut(self.name).expect("a latch is counted until it drops");
        *count -= 1;
        if *count == 0 {
            latches.held.remove(self.name);
        }
        latches.started |= self.name == STARTUP;
    }
}

/// A sign of life of the main runtime.
pub struct Heartbeat {
    origin: Instant,
    last_ms: AtomicU64,
}

impl Heartbeat {
    /// Counts as just moved at `now`.
    pub fn new(now: Instant) -> Self {
        Self { origin: now, last_ms: AtomicU64::new(0) }
    }

    /// Called each second by a task on the main runtime.
    pub fn beat(&self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.origin).as_millis();
        self.last_ms.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long it has been still.
    pub fn age(&self, now: Instant) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(self.origin).saturating_sub(last)
    }
}

/// What the port answers from.
#[derive(Clone)]
pub struct Health {
    /// For `/readyz` and `/startupz`.
    pub readiness: Readiness,
    /// For `/livez`.
    pub heartbeat: Arc<Heartbeat>,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Silence allowed; [`STALE_AFTER`] outside of tests.
    pub stale_after: Duration,
}

/// The running server; stops when dropped.
pub struct HealthServer {
    address: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl HealthServer {
    /// Where it listens (of interest when the port was 0).
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HealthServer {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the admin thread panicked");
        }
    }
}

/// Binds the port and answers on it from a thread of its own.
///
/// # Errors
/// The port cannot be bound, or no thread can be made.
pub fn serve(listen: SocketAddr, health: Health) -> Result<HealthServer, Error> {
    let bind = |source| Error::Bind { address: listen, source };
    let listener = std::net::TcpListener::bind(listen).map_err(bind)?;
    listener.set_nonblocking(true).map_err(bind)?;
    let address = listener.local_addr().map_err(bind)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
    let listener = {
        let _context = runtime.enter();
        tokio::net::TcpListener::from_std(listener).map_err(bind)?
    };
    let stop = CancellationToken::new();
    let stopped = stop.clone().cancelled_owned();
    let work = move || {
        runtime.block_on(async {
            // Connections are cut, not drained: answers are short and a probe that lingers must not hold up a shutdown.
            tokio::select! {
                biased;
                () = stopped => {}
                result = axum::serve(listener, router(health)).into_future() => {
                    if let Err(error) = result {
                        tracing::error!(%error, "the admin port stopped answering");
                    }
                }
            }
        });
    };
    let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(work).map_err(Error::Thread)?;
    Ok(HealthServer { address, stop, thread: Some(thread) })
}

fn router(health: Health) -> Router {
    Router::new()
        .route("/startupz", get(startupz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(health)
}

async fn startupz(State(health): State<Health>) -> (StatusCode, String) {
    verdict(health.readiness.has_started(), || waiting(&health.readiness))
}

async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    verdict(health.readiness.waiting_for().is_empty(), || waiting(&health.readiness))
}

async fn livez(State(health): State<Health>) -> (StatusCode, String) {
    let age = health.heartbeat.age(Instant::now());
    verdict(age <= health.stale_after, || format!("the main runtime has not moved for {} s\n", age.as_secs()))
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let headers = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (headers, health.metrics.encode())
}

fn verdict(good: bool, why: impl FnOnce() -> String) -> (StatusCode, String) {
    if good { (StatusCode::OK, "ok\n".to_owned()) } else { (StatusCode::SERVICE_UNAVAILABLE, why()) }
}

fn waiting(readiness: &Readiness) -> String {
    format!("waiting for: {}\n", readiness.waiting_for().join(", "))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn start(stale_after: Duration) -> (HealthServer, Readiness, Latch, Arc<Heartbeat>) {
        let (readiness, latch) = Readiness::new();
        let heartbeat = Arc::new(Heartbeat::new(Instant::now()));
        let health = Health {
            readiness: readiness.clone(),
            heartbeat: Arc::clone(&heartbeat),
            metrics: Arc::new(Metrics::new()),
            stale_after,
        };
        let server = serve(SocketAddr::from(([127, 0, 0, 1], 0)), health).expect("serve");
        (server, readiness, latch, heartbeat)
    }

    fn get(server: &HealthServer, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(server.address()).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read");
        answer
    }

    #[test]
    fn ready_means_that_every_latch_was_dropped() {
        let (server, readiness, startup, _) = start(STALE_AFTER);
        let store = readiness.latch("outbox");
        assert!(get(&server, "/startupz").starts_with("HTTP/1.1 503"));
        drop(startup);
        let answer = get(&server, "/readyz");
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("waiting for: outbox\n"), "{answer}");
        assert!(
            get(&server, "/startupz").starts_with("HTTP/1.1 200"),
            "a part that is not ready is no reason to restart"
        );
        drop(store);
        assert!(get(&server, "/readyz").starts_with("HTTP/1.1 200"));
        let _stopping = readiness.latch("shutdown");
        assert!(get(&server, "/readyz").starts_with("HTTP/1.1 503"));
        assert!(get(&server, "/startupz").starts_with("HTTP/1.1 200"), "started stays true");
    }

    #[test]
    fn alive_means_that_the_main_runtime_moved() {
        let (server, _, _latch, heartbeat) = start(Duration::from_secs(30));
        assert!(get(&server, "/livez").starts_with("HTTP/1.1 200"));
        drop(server);
        let now = Instant::now();
        assert!(heartbeat.age(now + Duration::from_secs(31)) > Duration::from_secs(30));
        heartbeat.beat(now + Duration::from_secs(29));
        assert!(heartbeat.age(now + Duration::from_secs(31)) < Duration::from_secs(3));

        // A zero allowance stands for 30 s gone by.
        let (server, _, _latch, _) = start(Duration::ZERO);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !get(&server, "/livez").contains("503") {
            assert!(Instant::now() < deadline, "a runtime that never moves stays alive");
        }
    }

    #[test]
    fn metrics_are_served_and_other_paths_are_not() {
        let (server, _, _latch, _) = start(STALE_AFTER);
        let answer = get(&server, "/metrics");
        assert!(
            answer.contains("application/openmetrics-text") && answer.contains("farshore_build_info{version="),
            "{answer}"
        );
        assert!(answer.ends_with("# EOF\n"));
        assert!(get(&server, "/").starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn a_port_in_use_is_an_error_at_start() {
        let (server, readiness, _latch, heartbeat) = start(STALE_AFTER);
        let health = Health { readiness, heartbeat, metrics: Arc::new(Metrics::new()), stale_after: STALE_AFTER };
        let error = serve(server.address(), health).err().expect("in use").to_string();
        assert!(error.contains("admin.listen"), "{error}");
    }
}
