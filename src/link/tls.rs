//! The transport of the product: TCP with mutual TLS.
//!
//! The accept loop is ours, not tonic's, so that each new handshake uses the certificates on disk now, a slow or hostile
//! client holds nothing but one of a bounded number of places for a bounded time, and the identity is known before a byte
//! of HTTP is read. Failed handshakes are counted, and logged at most once a minute per address.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use farshore_api::tls::{Expected, PeerCertificate, Refreshed, Reloading, dial, explain};
use futures::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::transport::{Connection, Listener, Peer, Transport};
use crate::model::SiteName;

/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes going on at once; further connections wait in the kernel.
const PENDING_HANDSHAKES: usize = 64;
/// Connections accepted and not yet served.
const ACCEPTED: usize = 16;
/// At most one line per address in this time.
const QUIET: Duration = Duration::from_secs(60);
/// Addresses remembered for that.
const ADDRESSES: usize = 1024;
/// How often the certificate files are looked at.
const REFRESH: Duration = Duration::from_secs(1);

/// TCP with mutual TLS.
pub struct TlsTransport {
    tls: Arc<Reloading>,
    tasks: TaskTracker,
    failed: Arc<AtomicU64>,
}

impl TlsTransport {
    /// Accept loops run on `tasks`.
    pub fn new(tls: Arc<Reloading>, tasks: TaskTracker) -> Self {
        Self { tls, tasks, failed: Arc::default() }
    }

    /// Handshakes of others that failed since the start.
    pub fn failed_handshakes(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}

impl Transport for TlsTransport {
    fn connect<'a>(&'a self, address: &'a str, site: &'a SiteName) -> BoxFuture<'a, Result<Connection, String>> {
        Box::pin(async move {
            let expected = Expected::Site(site.to_string());
            let shown = self.tls.generation();
            let (stream, certificate) = dial(address, &self.tls, expected).await.map_err(|error| explain(&error))?;
            Ok(Connection::new(stream, peer(certificate, address.to_owned(), shown)))
        })
    }

    fn listen<'a>(&'a self, address: &'a str, cancel: CancellationToken) -> BoxFuture<'a, io::Result<Listener>> {
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            let (accepted, incoming) = mpsc::channel(ACCEPTED);
            let acceptor = Acceptor { tls: self.tls.clone(), failed: self.failed.clone(), accepted };
            self.tasks.spawn(acceptor.run(listener, self.tasks.clone(), cancel));
            Ok(Listener { address, incoming })
        })
    }
}

fn peer(certificate: PeerCertificate, address: String, shown: u64) -> Peer {
    Peer {
        identity: certificate.identity,
        address,
        certificate_expires: Some(certificate.expires),
        shown,
        read: Arc::default(),
    }
}

/// Looks at the certificate files about once a second until `cancel`; calls `renewed` after new ones came into use.
pub async fn follow_files(tls: Arc<Reloading>, renewed: impl Fn(), cancel: CancellationToken) {
    let mut tick = tokio::time::interval(REFRESH);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while cancel.run_until_cancelled(tick.tick()).await.is_some() {
        let looking = tls.clone();
        let found = tokio::task::spawn_blocking(move || looking.refresh()).await;
        match found {
            Ok(Refreshed::Unchanged) => {}
            Ok(Refreshed::Renewed) => {
                tracing::info!(expires = tls.expires(), "certificates were renewed");
                renewed();
            }
            Ok(Refreshed::Kept { problem }) => {
                tracing::error!(problem, "new certificates cannot be used, the old ones stay in use; mend the files");
            }
            Err(error) => tracing::error!(%error, "looking at the certificate files failed"),
        }
    }
}

struct Acceptor {
    tls: Arc<Reloading>,
    failed: Arc<AtomicU64>,
    accepted: mpsc::Sender<Connection>,
}

impl Acceptor {
    async fn run(self, listener: TcpListener, tasks: TaskTracker, cancel: CancellationToken) {
        let places = Arc::new(Semaphore::new(PENDING_HANDSHAKES));
        let (failures, mut failed) = mpsc::channel::<(IpAddr, String)>(PENDING_HANDSHAKES);
        let mut quiet = Quiet::default();
        let this = Arc::new(self);
        loop {
            let step = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Some(failure) = failed.recv() => Err(failure),
                accepted = accept(&listener, &places) => Ok(accepted),
            };
            match step {
                Err((address, error)) => {
                    if quiet.speaks(address, Instant::now()) {
                        tracing::warn!(%address, error, "handshake failed (further ones from there: at most one line a minute)");
                    }
                }
                Ok(Err(error)) => {
                    // Out of file descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "cannot accept connections");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Ok(Ok((stream, from, place))) => {
                    let (this, failures) = (this.clone(), failures.clone());
                    tasks.spawn(cancel.clone().run_until_cancelled_owned(async move {
                        let outcome = timeout(HANDSHAKE, this.handshake(stream, from.to_string())).await;
                        drop(place);
                        match outcome.unwrap_or_else(|_| Err("the handshake took too long".into())) {
                            Ok(connection) => drop(this.accepted.send(connection).await),
                            Err(error) => {
                                this.failed.fetch_add(1, Ordering::Relaxed);
                                drop(failures.try_send((from.ip(), error)));
                            }
                        }
                    }));
                }
            }
        }
    }

    async fn handshake(&self, stream: TcpStream, from: String) -> Result<Connection, String> {
        let in_words = |error: io::Error| explain(&error);
        stream.set_nodelay(true).map_err(in_words)?;
        let shown = self.tls.generation();
        let acceptor = tokio_rustls::TlsAcceptor::from(self.tls.server_config());
        let stream = acceptor.accept(stream).await.map_err(in_words)?;
        let chain = stream.get_ref().1.peer_certificates();
        let certificate = PeerCertificate::of(chain, self.tls.domain()).map_err(|error| error.to_string())?;
        Ok(Connection::new(stream, peer(certificate, from, shown)))
    }
}

type Accepted = (TcpStream, std::net::SocketAddr, tokio::sync::OwnedSemaphorePermit);

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> io::Result<Accepted> {
    let place = places.clone().acquire_owned().await.expect("never closed");
    let (stream, from) = listener.accept().await?;
    Ok((stream, from, place))
}

/// Which addresses were spoken of lately.
#[derive(Default)]
struct Quiet(BTreeMap<IpAddr, Instant>);

impl Quiet {
    fn speaks(&mut self, address: IpAddr, now: Instant) -> bool {
        if self.0.get(&address).is_some_and(|last| now.duration_since(*last) < QUIET) {
            return false;
        }
        if self.0.len() >= ADDRESSES {
            self.0.retain(|_, last| now.duration_since(*last) < QUIET);
            if self.0.len() >= ADDRESSES {
                return false;
            }
        }
        self.0.insert(address, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_spoken_of_once_a_minute_and_memory_is_bounded() {
        let (mut quiet, start) = (Quiet::default(), Instant::now());
        let ip = |n: u32| IpAddr::from(n.to_be_bytes());
        assert!(quiet.speaks(ip(1), start));
        assert!(!quiet.speaks(ip(1), start + Duration::from_secs(59)));
        assert!(quiet.speaks(ip(2), start));
        assert!(quiet.speaks(ip(1), start + QUIET));
        for n in 0..3000 {
            quiet.speaks(ip(n), start + QUIET);
        }
        assert!(quiet.0.len() <= ADDRESSES);
    }
}
