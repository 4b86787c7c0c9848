//! The control service: what operators, the router and the status page ask this agent.
//!
//! A thin shell over [`Console`]: checks what a request asks for, keeps streams bounded, and knows nothing about where
//! the answers come from. Roles are checked before a call gets here (see [`super::roles`]).

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use farshore_api::control::v1::control_server::{Control, ControlServer};
use farshore_api::control::v1::{
    LagSample, OutboxPeekRequest, OutboxStatsRequest, OutboxStatsResponse, PeekedChange, StatusRequest, StatusResponse,
    WatchLagRequest,
};
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::roles::Authorized;
use crate::model::Position;

/// Interval of lag samples unless the caller names one.
const DEFAULT_INTERVAL_MS: u32 = 1_000;
/// A shorter one would cost more than it shows.
const MIN_INTERVAL_MS: u32 = 100;
const DEFAULT_PEEK: u32 = 20;
const MAX_PEEK: u32 = 10_000;
/// Streams served at once; each costs a task and some memory for as long as the caller stays.
const MAX_STREAMS: usize = 32;

/// A log to peek into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeekLog {
    /// Changes of this site.
    Outbox,
    /// Changes of the other site.
    Inbox,
}

/// A checked request to peek.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Which log.
    pub log: PeekLog,
    /// Start behind this position; `None`: from the oldest.
    pub after: Option<Position>,
    /// At most so many changes, 1 to 10,000. The service enforces it too.
    pub limit: usize,
}

/// Why a log cannot be peeked into.
#[derive(Debug, thiserror::Error)]
pub enum PeekError {
    /// This agent has no such log yet.
    #[error("there is no {0} here: this site has not {1} anything yet")]
    NoLog(&'static str, &'static str),
    /// The position was trimmed.
    #[error("the log begins behind that position; the oldest one kept is {first}, start there with --after {first}")]
    Trimmed { first: Position },
    /// Anything else; shown as it is, so it names no contents.
    #[error("cannot read the log: {0}")]
    Failed(String),
}

impl From<PeekError> for Status {
    fn from(error: PeekError) -> Self {
        let message = error.to_string();
        match error {
            PeekError::NoLog(..) => Self::failed_precondition(message),
            PeekError::Trimmed { .. } => Self::out_of_range(message),
            PeekError::Failed(_) => Self::internal(message),
        }
    }
}

/// What the agent can tell about itself.
pub trait Console: Send + Sync + 'static {
    /// The state right now. Called from the control service and, for metrics, from the admin thread: it must not block
    /// and must work outside of the main runtime.
    fn status(&self) -> StatusResponse;

    /// Outbox and inbox in detail. Must not block.
    fn outbox_stats(&self) -> OutboxStatsResponse;

    /// Changes of a log in order. The stream ends at the end of the log; it does not wait for more.
    fn peek(
        &self,
        peek: Peek,
    ) -> impl Future<Output = Result<BoxStream<'static, Result<PeekedChange, PeekError>>, PeekError>> + Send;
}

/// The service, over any console.
pub struct ControlService<C> {
    console: Arc<C>,
    stop: CancellationToken,
    streams: Arc<Semaphore>,
}

impl<C: Console> ControlService<C> {
    /// Streams end when `stop` is cancelled, so that they do not hold up a shutdown.
    pub fn new(console: Arc<C>, stop: CancellationToken) -> Self {
        Self { console, stop, streams: Arc::new(Semaphore::new(MAX_STREAMS)) }
    }

    /// The service with the role table in front, ready for a tonic server that puts an `Identity` into the extensions of
    /// each request.
    pub fn into_server(self) -> Authorized<ControlServer<Self>> {
        Authorized::new(ControlServer::new(self))
    }

    fn stream_permit(&self) -> Result<OwnedSemaphorePermit, Status> {
        let refused = |_| Status::resource_exhausted("too many streams are open at this agent; close one (at most 32)");
        Arc::clone(&self.streams).try_acquire_owned().map_err(refused)
    }
}

#[tonic::async_trait]
impl<C: Console> Control for ControlService<C> {
    type WatchLagStream = BoxStream<'static, Result<LagSample, Status>>;
    type OutboxPeekStream = BoxStream<'static, Result<PeekedChange, Status>>;

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.console.status()))
    }

    async fn watch_lag(&self, request: Request<WatchLagRequest>) -> Result<Response<Self::WatchLagStream>, Status> {
        let watch = Watch::check(request.get_ref())?;
        let permit = self.stream_permit()?;
        let console = Arc::clone(&self.console);
        let samples = futures::stream::unfold(watch.interval(), |mut interval| async move {
            interval.tick().await;
            Some(((), interval))
        });
        let samples = samples.map(move |()| {
            let _held = &permit;
            let status = console.status();
            Ok(LagSample { now_ms: status.now_ms, streams: status.streams })
        });
        let samples = samples.take(watch.count.unwrap_or(usize::MAX)).take_until(self.stop.clone().cancelled_owned());
        Ok(Response::new(samples.boxed()))
    }

    async fn outbox_stats(
        &self,
        _request: Request<OutboxStatsRequest>,
    ) -> Result<Response<OutboxStatsResponse>, Status> {
        Ok(Response::new(self.console.outbox_stats()))
    }

    async fn outbox_peek(
        &self,
        request: Request<OutboxPeekRequest>,
    ) -> Result<Response<Self::OutboxPeekStream>, Status> {
        let peek = Peek::check(request.get_ref())?;
        let permit = self.stream_permit()?;
        let changes = self.console.peek(peek).await?;
        let changes = changes.take(peek.limit).map(move |change| {
            let _held = &permit;
            change.map_err(Status::from)
        });
        Ok(Response::new(changes.take_until(self.stop.clone().cancelled_owned()).boxed()))
    }
}

/// A checked request to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watch {
    every: Duration,
    count: Option<usize>,
}

impl Watch {
    fn check(request: &WatchLagRequest) -> Result<Self, Status> {
        let every = match request.interval_ms {
            0 => DEFAULT_INTERVAL_MS,
            short if short < MIN_INTERVAL_MS => {
                return Err(Status::invalid_argument(format!(
                    "an interval of {short} ms is too short; ask for at least {MIN_INTERVAL_MS} ms"
                )));
            }
            ms => ms,
        };
        let count = usize::try_from(request.count).ok().filter(|count| *count > 0);
        Ok(Self { every: Duration::from_millis(u64::from(every)), count })
    }

    fn interval(self) -> Interval {
        let mut interval = tokio::time::interval(self.every);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval
    }
}

impl Peek {
    fn check(request: &OutboxPeekRequest) -> Result<Self, Status> {
        let log = match request.log.as_str() {
            "" | "outbox" => PeekLog::Outbox,
            "inbox" => PeekLog::Inbox,
            _ => return Err(Status::invalid_argument("there is no such log; ask for outbox or inbox")),
        };
        let limit = match request.limit {
            0 => DEFAULT_PEEK,
            many if many > MAX_PEEK => {
                return Err(Status::invalid_argument(format!(
                    "a limit of {many} is too large; ask for at most {MAX_PEEK} and go on with --after"
                )));
            }
            limit => limit,
        };
        Ok(Self {
            log,
            after: request.after.map(Position::from),
            limit: usize::try_from(limit).expect("at most 10,000"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_checked() {
        let watch = |interval_ms, count| Watch::check(&WatchLagRequest { interval_ms, count });
        assert_eq!(watch(0, 0).expect("defaults"), Watch { every: Duration::from_secs(1), count: None });
        assert_eq!(watch(100, 3).expect("bound"), Watch { every: Duration::from_millis(100), count: Some(3) });
        assert!(watch(99, 0).expect_err("too short").message().contains("at least 100 ms"));

        let peek = |log: &str, limit| Peek::check(&OutboxPeekRequest { log: log.to_owned(), after: None, limit });
        assert_eq!(peek("", 0).expect("defaults"), Peek { log: PeekLog::Outbox, after: None, limit: 20 });
        assert_eq!(peek("inbox", 10_000).expect("bound").limit, 10_000);
        assert!(peek("inbox", 10_001).is_err());
        assert!(peek("journal", 1).is_err());
    }
}
