//! The accepting side: the replication service, and whatever other services are served beside it.
//!
//! Every connection has proven its identity before it comes here. Only the role `site`, and of it only configured peers,
//! may open a session.

use std::sync::Arc;
use std::time::Duration;

use farshore_api::Role;
use farshore_api::replication::v1::Frame;
use farshore_api::replication::v1::replication_server::{Replication, ReplicationServer};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use farshore_api::client::root_cause;

use super::hub::{Hub, Shared};
use super::session::{self, Ended, Wire};
use super::transport::{Listener, Peer};
use crate::model::SiteName;

/// HTTP/2 windows, of a stream and of a connection: a 100 ms link at 2.5 Gbit/s; our own credit is what limits.
pub(super) const WINDOW: u32 = 32 << 20;
/// HTTP/2 frame size.
pub(super) const FRAME_SIZE: u32 = 1 << 20;
/// Largest message: a record of the largest batch, or an answer to a fetch.
pub(super) const MESSAGE: usize = 64 << 20;
/// Frames handed to the transport and not yet written.
pub(super) const IN_TRANSPORT: usize = 2;
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves sessions and `others` on accepted connections until `cancel`.
///
/// # Errors
/// The server failed.
pub async fn serve(hub: &Hub, others: Routes, listener: Listener, cancel: CancellationToken) -> Result<(), String> {
    let service = ReplicationServer::new(Service { shared: hub.shared.clone() })
        .max_decoding_message_size(MESSAGE)
        .max_encoding_message_size(MESSAGE);
    let connections = ReceiverStream::new(listener.incoming).map(std::io::Result::Ok);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME_SIZE)
        .add_routes(others)
        .add_service(service)
        .serve_with_incoming_shutdown(connections, cancel.cancelled_owned())
        .await
        .map_err(|error| root_cause(&error))
}

struct Service {
    shared: Arc<Shared>,
}

impl Service {
    /// The peer's site, if its certificate may open a session here.
    fn site(&self, peer: &Peer) -> Result<SiteName, Status> {
        let denied = |message: String| Err(Status::permission_denied(message));
        if peer.identity.role != Role::Site {
            return denied(format!("{} may not open a session, only sites may", peer.identity));
        }
        match SiteName::try_from(peer.identity.name.as_str()) {
            Ok(site) if self.shared.peers.contains_key(&site) => Ok(site),
            Ok(site) => denied(format!("{site} is not a peer of {}; add it under [[peers]]", self.shared.config.site)),
            Err(error) => denied(error.to_string()),
        }
    }
}

#[tonic::async_trait]
impl Replication for Service {
    type SessionStream = BoxStream<'static, Result<Frame, Status>>;

    async fn session(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::SessionStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("the connection has no identity"))?;
        let site = self.site(&peer)?;
        let (out, frames) = mpsc::channel(IN_TRANSPORT);
        let incoming = request.into_inner().map(|frame| frame.map_err(|status| root_cause(&status))).boxed();
        let shared = self.shared.clone();
        self.shared.tasks.spawn(async move {
            let wire = Wire { out, incoming, peer, site: site.clone(), dialled: false };
            let address = wire.peer.address.clone();
            let summary = session::run(&shared, wire).await;
            let entry = shared.peers.get(&site).expect("checked before");
            // Refusals must show at both ends; a connection that breaks before Hello is the dialler's affair.
            if !summary.established
                && !entry.slot.is_taken()
                && matches!(summary.ended, Ended::Refused(ref r) | Ended::Rejected(ref r) if !r.is_transient())
            {
                shared.link_failed(entry, Some(&address), &summary.ended);
            }
        });
        Ok(Response::new(ReceiverStream::new(frames).map(Ok).boxed()))
    }
}
