//! The link's transport over turmoil's network: no TLS, but both ends still say and check who they are.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use farshore::link::{Connection, Listener, Peer, Transport};
use farshore::model::SiteName;
use farshore_api::Identity;
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use turmoil::net::{TcpListener, TcpStream};

/// Where every agent listens.
pub(crate) const PORT: u16 = 7000;
/// A peer that does not say who it is in this time is given up.
const GREETING: Duration = Duration::from_secs(5);

/// See the module text.
pub(crate) struct SimTransport {
    site: SiteName,
    tasks: TaskTracker,
}

impl SimTransport {
    pub(crate) fn new(site: SiteName, tasks: TaskTracker) -> Self {
        Self { site, tasks }
    }
}

async fn greet(stream: &mut TcpStream, own: &SiteName) -> io::Result<SiteName> {
    let exchange = async {
        stream.write_u8(own.as_str().len() as u8).await?;
        stream.write_all(own.as_str().as_bytes()).await?;
        let mut name = vec![0; usize::from(stream.read_u8().await?)];
        stream.read_exact(&mut name).await?;
        let name = String::from_utf8(name).map_err(io::Error::other)?;
        SiteName::try_from(name).map_err(io::Error::other)
    };
    tokio::time::timeout(GREETING, exchange).await?
}

fn peer(site: &SiteName, address: String) -> Peer {
    Peer { identity: Identity::site(site.as_str()), address, certificate_expires: None, shown: 0, read: Arc::default() }
}

impl Transport for SimTransport {
    fn connect<'a>(&'a self, address: &'a str, site: &'a SiteName) -> BoxFuture<'a, Result<Connection, String>> {
        Box::pin(async move {
            let mut stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
            let theirs = greet(&mut stream, &self.site).await.map_err(|e| e.to_string())?;
            if theirs != *site {
                return Err(format!("{theirs} answers at {address}, not {site}"));
            }
            Ok(Connection::new(stream, peer(&theirs, address.to_owned())))
        })
    }

    fn listen<'a>(&'a self, _: &'a str, cancel: CancellationToken) -> BoxFuture<'a, io::Result<Listener>> {
        Box::pin(async move {
            let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
            let address: SocketAddr = listener.local_addr()?;
            let (accepted, incoming) = mpsc::channel(16);
            let (own, tasks) = (self.site.clone(), self.tasks.clone());
            self.tasks.spawn(async move {
                while let Some(Ok((mut stream, from))) = cancel.run_until_cancelled(listener.accept()).await {
                    let (own, accepted) = (own.clone(), accepted.clone());
                    tasks.spawn(async move {
                        if let Ok(theirs) = greet(&mut stream, &own).await {
                            let connection = Connection::new(stream, peer(&theirs, from.to_string()));
                            drop(accepted.send(connection).await);
                        }
                    });
                }
            });
            Ok(Listener { address, incoming })
        })
    }
}
