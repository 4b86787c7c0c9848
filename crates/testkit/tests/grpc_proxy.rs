//! The gRPC proxy between a client with one site's certificate and a server with the other's.
#![allow(clippy::disallowed_methods, reason = "a test with peers of its own")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use farshore_api::replication::v1::frame::Body;
use farshore_api::replication::v1::replication_client::ReplicationClient;
use farshore_api::replication::v1::replication_server::{Replication, ReplicationServer};
use farshore_api::replication::v1::{Ack, Batch, Frame, Hello};
use farshore_testkit::pki::{Identity, Pki, Role};
use farshore_testkit::proxy::faults::Faults;
use farshore_testkit::proxy::grpc::GrpcProxy;
use farshore_testkit::proxy::tcp::Direction;
use farshore_testkit::proxy::tls;
use futures::StreamExt;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

const SOON: Duration = Duration::from_secs(10);

/// Sends an ack with the batch's length for each batch, and every other frame back.
#[derive(Clone, Default)]
struct Peer {
    records: Arc<Mutex<Vec<Bytes>>>,
}

#[tonic::async_trait]
impl Replication for Peer {
    type SessionStream = futures::stream::BoxStream<'static, Result<Frame, Status>>;

    async fn session(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::SessionStream>, Status> {
        let records = Arc::clone(&self.records);
        let answers = request.into_inner().map(move |frame| {
            let frame = frame?;
            let Some(Body::Batch(batch)) = frame.body else {
                return Ok(frame);
            };
            let credit = batch.record.len() as u64;
            records.lock().expect("nobody panics").push(batch.record);
            Ok(Frame::of(Body::Ack(Ack { credit, ..Ack::default() })))
        });
        Ok(Response::new(answers.boxed()))
    }
}

async fn serve(identity: &Identity, peer: Peer) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let incoming = tls::incoming(listener, identity.server_config()?);
    let service = ReplicationServer::new(peer).max_decoding_message_size(usize::MAX);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    Ok(address)
}

struct Session {
    send: mpsc::Sender<Frame>,
    receive: Streaming<Frame>,
}

impl Session {
    async fn open(address: SocketAddr, identity: &Identity) -> Result<Self> {
        let channel = tls::channel(address, &identity.client_config()?).await?;
        let (send, frames) = mpsc::channel(8);
        let mut client = ReplicationClient::new(channel).max_encoding_message_size(usize::MAX);
        let receive = client.session(ReceiverStream::new(frames)).await?.into_inner();
        Ok(Self { send, receive })
    }

    async fn send(&self, body: Body) -> Result<()> {
        Ok(self.send.send(Frame::of(body)).await?)
    }

    async fn next(&mut self) -> Result<Frame> {
        let next = tokio::time::timeout(SOON, self.receive.message()).await.context("nothing came")??;
        next.context("the session ended")
    }
}

fn hello(site: &str) -> Body {
    Body::Hello(Hello { site: site.to_owned(), ..Hello::default() })
}

fn batch(record: Vec<u8>) -> Body {
    Body::Batch(Batch { record: record.into(), ..Batch::default() })
}

#[tokio::test]
async fn frames_pass_both_ways_with_the_certificates_of_both_sites() -> Result<()> {
    let pki = Pki::new("farshore")?;
    let (north, south) = (pki.identity(Role::Site, "north")?, pki.identity(Role::Site, "south")?);
    let peer = Peer::default();
    let proxy = GrpcProxy::start(serve(&south, peer.clone()).await?, &north, &south, 1).await?;
    let mut session = Session::open(proxy.address(), &north).await?;
    session.send(hello("north")).await?;
    ensure!(session.next().await?.body == Some(hello("north")));
    session.send(batch(vec![1; 20 << 20])).await?;
    ensure!(session.next().await?.body == Some(Body::Ack(Ack { credit: 20 << 20, ..Ack::default() })));
    ensure!(proxy.counts(Direction::Forward).frames == 2 && proxy.counts(Direction::Back).acks == 1);

    proxy.cut();
    ensure!(session.next().await.is_err(), "a cut session goes on");
    let mut session = Session::open(proxy.address(), &north).await?;
    session.send(hello("again")).await?;
    session.next().await?;
    ensure!(proxy.sessions() == 2);

    let strangers = pki.stranger()?;
    let stranger = strangers.identity(Role::Site, "north")?;
    Pki::trust(&stranger, &[&pki])?;
    ensure!(Session::open(proxy.address(), &stranger).await.is_err(), "a stranger got in");
    Ok(())
}

#[tokio::test]
async fn faults_strike_only_the_direction_they_are_set_for() -> Result<()> {
    let pki = Pki::new("farshore")?;
    let (north, south) = (pki.identity(Role::Site, "north")?, pki.identity(Role::Site, "south")?);
    let peer = Peer::default();
    let proxy = GrpcProxy::start(serve(&south, peer.clone()).await?, &north, &south, 7).await?;
    let mut session = Session::open(proxy.address(), &north).await?;

    proxy.set_faults(Direction::Forward, Faults { batch_corrupt: 1.0, ..Faults::default() });
    session.send(batch(vec![5; 100])).await?;
    session.next().await?;
    let changed = peer.records.lock().expect("nobody panics")[0].iter().filter(|byte| **byte != 5).count();
    ensure!(changed == 1, "{changed} bytes were changed");

    proxy.set_faults(Direction::Forward, Faults { batch_drop: 1.0, ..Faults::default() });
    proxy.set_faults(Direction::Back, Faults { ack_repeat: 1.0, ..Faults::default() });
    session.send(batch(vec![6])).await?;
    proxy.set_faults(Direction::Back, Faults { ack_repeat: 1.0, ..Faults::default() });
    session.send(hello("after the lost batch")).await?;
    ensure!(session.next().await?.body == Some(hello("after the lost batch")));
    proxy.set_faults(Direction::Forward, Faults::default());
    session.send(batch(vec![7; 7])).await?;
    let ack = Body::Ack(Ack { credit: 7, ..Ack::default() });
    ensure!(session.next().await?.body == Some(ack.clone()));
    ensure!(session.next().await?.body == Some(ack), "the ack came once");
    let (forward, back) = (proxy.counts(Direction::Forward), proxy.counts(Direction::Back));
    ensure!((forward.batch_corruptions, forward.batch_drops, back.ack_repeats) == (1, 1, 1), "{forward:?} {back:?}");
    Ok(())
}
