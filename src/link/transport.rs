//! How bytes get from one agent to another, and who is at the other end.
//!
//! The shells above know streams with an identity and nothing of TLS or sockets, so that simulations run the same shells
//! over their own network. The only transport of the product is [`super::tls::TlsTransport`].

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use farshore_api::Identity;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::model::SiteName;

/// Both directions of a connection.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// Who is at the other end, proven by the transport. Services find it in the extensions of a request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Whom its certificate names.
    pub identity: Identity,
    /// Where it is: for people.
    pub address: String,
    /// When its certificate expires, seconds since the Unix epoch.
    pub certificate_expires: Option<i64>,
    /// Which of our own certificates it was shown, counted from 0.
    pub shown: u64,
    /// Bytes read from it.
    pub read: Arc<AtomicU64>,
}

/// An established connection.
pub struct Connection {
    io: Box<dyn Io>,
    peer: Peer,
}

impl Connection {
    /// A connection whose other end is proven to be `peer`.
    pub fn new(io: impl Io, peer: Peer) -> Self {
        Self { io: Box::new(io), peer }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let ready = Pin::new(&mut *self.io).poll_read(cx, buf);
        let bytes = buf.filled().len() - before;
        self.peer.read.fetch_add(bytes as u64, Ordering::Relaxed);
        ready
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_shutdown(cx)
    }
}

/// Accepted connections.
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddr,
    /// Connections whose other end is proven.
    pub incoming: mpsc::Receiver<Connection>,
}

/// A way to reach other agents and to be reached.
pub trait Transport: Send + Sync + 'static {
    /// Opens a connection to `address`, where an agent of `site` must answer. The error is for people.
    fn connect<'a>(&'a self, address: &'a str, site: &'a SiteName) -> BoxFuture<'a, Result<Connection, String>>;

    /// Accepts connections on `address` until `cancel`.
    fn listen<'a>(&'a self, address: &'a str, cancel: CancellationToken) -> BoxFuture<'a, io::Result<Listener>>;
}
