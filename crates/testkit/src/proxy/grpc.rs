//! A man in the middle of the link who holds the certificates of both sites.
//!
//! The dialling agent is given the proxy's address instead of its peer's. The proxy shows it the certificate of the
//! listening site, dials the listening agent with the certificate of the dialling site, and passes decoded frames on
//! through one [`Injector`] per direction. Either end of a session ends the other.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use farshore_api::replication::v1::Frame;
use farshore_api::replication::v1::replication_client::ReplicationClient;
use farshore_api::replication::v1::replication_server::{Replication, ReplicationServer};
use rustls::ClientConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

use super::faults::{Counts, Faults, Injector};
use super::tcp::Direction;
use super::tls;
use crate::pki::Identity;
use crate::ports::Port;

/// Frames between the two ends of the proxy, each direction; a frame may have many megabytes.
const IN_FLIGHT: usize = 4;
/// A running proxy; ends with its sessions when dropped.
pub struct GrpcProxy {
    port: Port,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    target: SocketAddr,
    client: Arc<ClientConfig>,
    injectors: [Mutex<Injector>; 2],
    sessions: AtomicU64,
    /// Counts the cuts; a session ends when it changes.
    cuts: watch::Sender<u64>,
}

impl GrpcProxy {
    /// Stands between an agent with `dialling`'s certificate and the agent at `target`, which has `listening`'s.
    pub async fn start(target: SocketAddr, dialling: &Identity, listening: &Identity, seed: u64) -> Result<Self> {
        let port = Port::take()?;
        let shared = Arc::new(Shared {
            target,
            client: dialling.client_config()?,
            injectors: [Mutex::new(Injector::new(seed)), Mutex::new(Injector::new(!seed))],
            sessions: AtomicU64::new(0),
            cuts: watch::channel(0).0,
        });
        let listener = TcpListener::bind(port.address()).await.context("listen")?;
        let service = ReplicationServer::new(Service(Arc::clone(&shared)))
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX);
        let incoming = tls::incoming(listener, listening.server_config()?);
        let task = tokio::spawn(async move {
            let server = Server::builder()
                .initial_stream_window_size(tls::WINDOW)
                .initial_connection_window_size(tls::WINDOW)
                .add_service(service);
            if let Err(error) = server.serve_with_incoming(incoming).await {
                eprintln!("gRPC proxy: {error}");
            }
        });
        Ok(Self { port, shared, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Faults of one direction from the next frame on.
    pub fn set_faults(&self, direction: Direction, faults: Faults) {
        self.shared.injector(direction, |injector| injector.set(faults));
    }

    /// What has happened in one direction.
    pub fn counts(&self, direction: Direction) -> Counts {
        self.shared.injector(direction, |injector| injector.counts())
    }

    /// Sessions opened so far.
    pub fn sessions(&self) -> u64 {
        self.shared.sessions.load(Ordering::Relaxed)
    }

    /// Ends all sessions; new ones may be opened at once.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }
}

impl Drop for GrpcProxy {
    fn drop(&mut self) {
        self.cut();
        self.task.abort();
    }
}

impl Shared {
    fn injector<T>(&self, direction: Direction, call: impl FnOnce(&mut Injector) -> T) -> T {
        call(&mut self.injectors[direction as usize].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Passes frames of one direction on through its injector until either end closes.
    async fn pass(&self, direction: Direction, mut from: Streaming<Frame>, to: &mpsc::Sender<Result<Frame, Status>>) {
        loop {
            let frame = tokio::select! {
                () = to.closed() => return,
                frame = from.message() => frame,
            };
            let arriving = match frame {
                Ok(Some(frame)) => self.injector(direction, |injector| injector.on(frame)),
                Ok(None) => return,
                Err(status) => {
                    let _ = to.send(Err(status)).await;
                    return;
                }
            };
            for frame in arriving {
                if to.send(Ok(frame)).await.is_err() {
                    return;
                }
            }
        }
    }

    /// One session from its opening to its end.
    async fn relay(
        self: Arc<Self>,
        channel: Channel,
        from_dialler: Streaming<Frame>,
        to_dialler: mpsc::Sender<Result<Frame, Status>>,
    ) {
        let mut cuts = self.cuts.subscribe();
        let (to_listener, outgoing) = mpsc::channel(IN_FLIGHT);
        // The request must flow before the listening side answers: it may want to see the hello first.
        let forward = self.pass(Direction::Forward, from_dialler, &to_listener);
        let back = async {
            let mut client = ReplicationClient::new(channel)
                .max_decoding_message_size(usize::MAX)
                .max_encoding_message_size(usize::MAX);
            let request = ReceiverStream::new(outgoing).map_while(Result::ok);
            match client.session(request).await {
                Ok(response) => self.pass(Direction::Back, response.into_inner(), &to_dialler).await,
                Err(status) => drop(to_dialler.send(Err(status)).await),
            }
        };
        tokio::select! {
            () = forward => {}
            () = back => {}
            _ = cuts.changed() => drop(to_dialler.try_send(Err(Status::unavailable("cut by the proxy")))),
        }
    }
}

/// The service that the dialling agent talks to.
struct Service(Arc<Shared>);

#[tonic::async_trait]
impl Replication for Service {
    type SessionStream = ReceiverStream<Result<Frame, Status>>;

    async fn session(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::SessionStream>, Status> {
        let channel = tls::channel(self.0.target, &self.0.client).await;
        let channel = channel.map_err(|error| Status::unavailable(format!("the proxy cannot dial: {error:#}")))?;
        self.0.sessions.fetch_add(1, Ordering::Relaxed);
        for direction in [Direction::Forward, Direction::Back] {
            self.0.injector(direction, Injector::reset);
        }
        let (to_dialler, incoming) = mpsc::channel(IN_FLIGHT);
        tokio::spawn(Arc::clone(&self.0).relay(channel, request.into_inner(), to_dialler));
        Ok(Response::new(ReceiverStream::new(incoming)))
    }
}
