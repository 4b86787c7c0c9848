//! The control service over a real tonic server: every method with every role, streams and limits.
#![allow(clippy::disallowed_methods, reason = "tests on real sockets and real time")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_api::control::v1::control_client::ControlClient;
use farshore_api::control::v1::{
    OutboxPeekRequest, OutboxStatsRequest, OutboxStatsResponse, PeekedChange, StatusRequest, StatusResponse,
    WatchLagRequest,
};
use farshore_api::identity::{Identity, Role};
use futures::stream::{BoxStream, StreamExt};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status};
use tower::util::MapRequestLayer;

use super::control::{Console, ControlService, Peek, PeekError, PeekLog};
use crate::model::{ClusterTime, Position};

/// An agent whose outbox never ends and that has no inbox.
struct Double;

impl Console for Double {
    fn status(&self) -> StatusResponse {
        StatusResponse { site: "north".into(), now_ms: 7, ..Default::default() }
    }

    fn outbox_stats(&self) -> OutboxStatsResponse {
        OutboxStatsResponse::default()
    }

    async fn peek(&self, peek: Peek) -> Result<BoxStream<'static, Result<PeekedChange, PeekError>>, PeekError> {
        if peek.log == PeekLog::Inbox {
            return Err(PeekError::NoLog("inbox", "received"));
        }
        if let Some(after) = peek.after {
            return Err(PeekError::Trimmed { first: after });
        }
        let change = PeekedChange { position: None, json: "{}".into() };
        Ok(futures::stream::repeat_with(move || Ok(change.clone())).boxed())
    }
}

struct Agent {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Agent {
    /// An agent that takes every caller for `identity`.
    async fn start(identity: Option<Identity>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let stop = CancellationToken::new();
        let service = ControlService::new(Arc::new(Double), stop.clone()).into_server();
        let identify = MapRequestLayer::new(move |mut request: http::Request<Body>| {
            if let Some(identity) = &identity {
                request.extensions_mut().insert(identity.clone());
            }
            request
        });
        let stopped = stop.clone().cancelled_owned();
        let server = Server::builder().layer(identify).add_service(service);
        tokio::spawn(server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped));
        Self { address, stop }
    }

    async fn client(&self) -> ControlClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("endpoint");
        ControlClient::new(endpoint.connect().await.expect("connect"))
    }
}

fn holder(role: Role) -> Identity {
    Identity { role, name: "x".to_owned() }
}

/// Calls every method and gives the codes of those that failed.
async fn call_all(mut client: ControlClient<Channel>) -> Vec<(&'static str, Result<(), Status>)> {
    let once = WatchLagRequest { interval_ms: 100, count: 1 };
    vec![
        ("Status", client.status(StatusRequest {}).await.map(drop)),
        ("WatchLag", client.watch_lag(once).await.map(drop)),
        ("OutboxStats", client.outbox_stats(OutboxStatsRequest {}).await.map(drop)),
        ("OutboxPeek", client.outbox_peek(OutboxPeekRequest::default()).await.map(drop)),
    ]
}

#[tokio::test]
async fn every_method_with_every_role() {
    let expected = [
        (Role::Site, vec!["Status"]),
        (Role::Operator, vec!["OutboxPeek", "OutboxStats", "Status", "WatchLag"]),
        (Role::Viewer, vec!["OutboxStats", "Status", "WatchLag"]),
        (Role::Router, vec!["Status", "WatchLag"]),
    ];
    for (role, allowed) in expected {
        let agent = Agent::start(Some(holder(role))).await;
        let mut open = BTreeSet::new();
        for (method, result) in call_all(agent.client().await).await {
            match result {
                Ok(()) => {
                    open.insert(method);
                }
                Err(status) => {
                    assert_eq!(status.code(), Code::PermissionDenied, "{role} {method}");
                    assert!(status.message().contains("needs the role"), "{}", status.message());
                }
            }
        }
        assert_eq!(open.into_iter().collect::<Vec<_>>(), allowed, "{role}");
    }
}

#[tokio::test]
async fn nobody_gets_nothing() {
    let agent = Agent::start(None).await;
    for (method, result) in call_all(agent.client().await).await {
        assert_eq!(result.expect_err(method).code(), Code::Unauthenticated, "{method}");
    }
}

#[tokio::test]
async fn a_watch_samples_at_once_and_as_often_as_asked() {
    let agent = Agent::start(Some(holder(Role::Viewer))).await;
    let mut client = agent.client().await;
    let begun = Instant::now();
    let mut samples =
        client.watch_lag(WatchLagRequest { interval_ms: 100, count: 3 }).await.expect("watch").into_inner();
    let mut seen = 0;
    while let Some(sample) = samples.message().await.expect("sample") {
        assert_eq!(sample.now_ms, 7);
        seen += 1;
    }
    assert_eq!(seen, 3);
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    let error = client.watch_lag(WatchLagRequest { interval_ms: 99, count: 1 }).await.expect_err("too often");
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn an_endless_watch_ends_with_the_agent() {
    let agent = Agent::start(Some(holder(Role::Viewer))).await;
    let mut samples = agent
        .client()
        .await
        .watch_lag(WatchLagRequest { interval_ms: 60_000, count: 0 })
        .await
        .expect("watch")
        .into_inner();
    assert!(samples.message().await.expect("sample").is_some());
    agent.stop.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(10), samples.message()).await.expect("in time");
    assert!(matches!(ended, Ok(None) | Err(_)));
}

#[tokio::test]
async fn a_peek_is_cut_at_its_limit_and_its_failures_say_what_to_do() {
    let agent = Agent::start(Some(holder(Role::Operator))).await;
    let mut client = agent.client().await;
    for (limit, shown) in [(0, 20), (3, 3)] {
        let request = OutboxPeekRequest { limit, ..Default::default() };
        let changes = client.outbox_peek(request).await.expect("peek").into_inner();
        assert_eq!(changes.count().await, shown);
    }
    let after = Some(Position::new(ClusterTime::new(5, 1), 1).into());
    for (request, code, hint) in [
        (OutboxPeekRequest { limit: 10_001, ..Default::default() }, Code::InvalidArgument, "at most 10000"),
        (OutboxPeekRequest { log: "journal".into(), ..Default::default() }, Code::InvalidArgument, "outbox or inbox"),
        (OutboxPeekRequest { log: "inbox".into(), ..Default::default() }, Code::FailedPrecondition, "no inbox"),
        (OutboxPeekRequest { after, ..Default::default() }, Code::OutOfRange, "--after 5:1/1"),
    ] {
        let status = client.outbox_peek(request).await.expect_err("refused");
        assert_eq!(status.code(), code);
        assert!(status.message().contains(hint), "{}", status.message());
    }
}

#[tokio::test]
async fn streams_are_bounded_and_a_closed_one_makes_room() {
    let agent = Agent::start(Some(holder(Role::Viewer))).await;
    let mut client = agent.client().await;
    let request = || WatchLagRequest { interval_ms: 60_000, count: 0 };
    let mut open = Vec::new();
    for _ in 0..32 {
        open.push(client.watch_lag(request()).await.expect("watch").into_inner());
    }
    assert_eq!(client.watch_lag(request()).await.expect_err("full").code(), Code::ResourceExhausted);
    open.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    while client.watch_lag(request()).await.is_err() {
        assert!(Instant::now() < deadline, "a closed stream made no room");
        tokio::task::yield_now().await;
    }
}
