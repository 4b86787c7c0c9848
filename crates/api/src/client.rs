//! Connections to an agent: how the CLI, the router and the agents themselves reach its services.

use std::io;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::tls::{self, Expected, Reloading};

/// No connection to an agent.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {address}: {message}")]
pub struct Error {
    /// Where we tried.
    pub address: String,
    /// Why it failed.
    pub message: String,
}

/// Opens a channel to the agent at `address` (host:port) over mutual TLS. The channel connects again by itself, each time with
/// the newest certificates.
///
/// # Errors
/// Nobody answers there, or the handshake fails at either end.
pub async fn connect(address: &str, tls: Arc<Reloading>, expected: Expected) -> Result<Channel, Error> {
    let failed = |message: String| Error { address: address.to_owned(), message };
    let target = address.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (address, tls, expected) = (target.clone(), tls.clone(), expected.clone());
        async move {
            let (stream, _) =
                tls::dial(&address, &tls, expected).await.map_err(|e| io::Error::new(e.kind(), tls::explain(&e)))?;
            io::Result::Ok(TokioIo::new(stream))
        }
    });
    endpoint().connect_with_connector(connector).await.map_err(|error| failed(root_cause(&error)))
}

/// The endpoint every client of an agent starts from: keepalive so that a half-open connection is noticed.
pub fn endpoint() -> Endpoint {
    // The name is never resolved: connections come from a connector of ours.
    Endpoint::from_static("http://farshore")
        .http2_keep_alive_interval(std::time::Duration::from_secs(10))
        .keep_alive_timeout(std::time::Duration::from_secs(5))
        .keep_alive_while_idle(true)
}

/// The innermost cause of an error, which is the one that says something.
pub fn root_cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
