//! The verbs against a real control service over mutual TLS: answers and exit codes.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use farshore_api::control::v1::{OutboxStatsResponse, PeekedChange, StatusResponse};
use farshore_api::tls::{Reloading, TlsFiles};
use futures::stream::{BoxStream, StreamExt};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;

use super::exit::Exit;
use super::{Cli, samples};
use crate::admin::control::{Console, ControlService, Peek, PeekError};
use crate::link::{TlsTransport, Transport};

struct Fleet {
    folder: tempfile::TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Fleet {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("ca");
        Self { folder: tempfile::tempdir().expect("folder"), ca }
    }

    fn issue(&self, path: &str) -> TlsFiles {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(format!("spiffe://farshore/{path}").try_into().expect("uri")));
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.ca).expect("certificate");
        let write = |kind: &str, text: String| -> PathBuf {
            let path = self.folder.path().join(format!("{}.{kind}", path.replace('/', "-")));
            std::fs::write(&path, text).expect("write");
            path
        };
        TlsFiles {
            certificate: write("pem", certificate.pem()),
            key: write("key", key.serialize_pem()),
            ca: write("ca", self.ca.pem()),
        }
    }
}

struct Double(StatusResponse);

impl Console for Double {
    fn status(&self) -> StatusResponse {
        self.0.clone()
    }

    fn outbox_stats(&self) -> OutboxStatsResponse {
        OutboxStatsResponse { outbox: self.0.outbox.clone(), ..Default::default() }
    }

    async fn peek(&self, _peek: Peek) -> Result<BoxStream<'static, Result<PeekedChange, PeekError>>, PeekError> {
        // Larger than what gRPC clients accept by default.
        let json = format!("{{\"blob\":\"{}\"}}", "x".repeat(5 << 20));
        Ok(futures::stream::iter([Ok(PeekedChange { position: samples::at(0, 1), json })]).boxed())
    }
}

struct Agent {
    address: String,
    _runtime: Runtime,
}

impl Agent {
    fn start(files: TlsFiles, status: StatusResponse) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
        let tls = Arc::new(Reloading::load(files, "farshore").expect("tls"));
        let transport = TlsTransport::new(tls, TaskTracker::new());
        let listener = runtime.block_on(transport.listen("127.0.0.1:0", CancellationToken::new())).expect("listen");
        let address = listener.address.to_string();
        let service = ControlService::new(Arc::new(Double(status)), CancellationToken::new()).into_server();
        let incoming = ReceiverStream::new(listener.incoming).map(io::Result::Ok);
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, _runtime: runtime }
    }

    /// Runs the command line as the holder of `files`.
    fn farshore(&self, words: &[&str], files: &TlsFiles) -> ExitCode {
        farshore(words, &self.address, files)
    }
}

fn farshore(words: &[&str], address: &str, files: &TlsFiles) -> ExitCode {
    let path = |path: &Path| path.display().to_string();
    let mut line = vec!["farshore".to_owned()];
    line.extend(words.iter().map(ToString::to_string));
    line.extend(["--address".to_owned(), address.to_owned(), "--cert".to_owned(), path(&files.certificate)]);
    line.extend(["--key".to_owned(), path(&files.key), "--ca".to_owned(), path(&files.ca)]);
    super::run(Cli::try_parse_from(line).expect("a command line"), |_| ExitCode::FAILURE)
}

#[track_caller]
fn assert_exit(code: ExitCode, expected: Exit) {
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(expected)), "{expected:?}");
}

#[test]
fn verbs_answer_and_roles_decide() {
    let fleet = Fleet::new();
    let agent = Agent::start(fleet.issue("site/north"), samples::healthy());
    let operator = fleet.issue("operator/jo");
    let viewer = fleet.issue("viewer/jo");
    for words in [
        vec!["status"],
        vec!["status", "-o", "json", "--fail-on-warn"],
        vec!["lag", "north/south"],
        vec!["lag", "--count", "2", "--interval", "100ms", "-o", "json"],
        vec!["outbox", "stats"],
        vec!["outbox", "peek", "--limit", "1"],
    ] {
        assert_exit(agent.farshore(&words, &operator), Exit::Ok);
    }
    assert_exit(agent.farshore(&["status"], &viewer), Exit::Ok);
    assert_exit(agent.farshore(&["outbox", "peek"], &viewer), Exit::Unauthenticated);
    assert_exit(agent.farshore(&["lag", "north/nowhere"], &viewer), Exit::Failed);
}

#[test]
fn a_troubled_site_exits_with_4() {
    let fleet = Fleet::new();
    let agent = Agent::start(fleet.issue("site/north"), samples::troubled());
    assert_exit(agent.farshore(&["status"], &fleet.issue("viewer/jo")), Exit::NotReady);
}

#[test]
fn a_refused_certificate_exits_with_9_and_silence_with_1() {
    let fleet = Fleet::new();
    let agent = Agent::start(fleet.issue("site/north"), samples::healthy());
    // Trusts the agent's CA, so that it is the agent that refuses.
    let mut stranger = Fleet::new().into_files("operator/jo", &fleet);
    assert_exit(agent.farshore(&["status"], &stranger.1), Exit::Unauthenticated);
    // Trusts its own CA only, so that it is the caller that refuses.
    stranger.1.ca = stranger.0.issue("operator/other").ca;
    assert_exit(agent.farshore(&["status"], &stranger.1), Exit::Unauthenticated);

    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = closed.local_addr().expect("address").to_string();
    drop(closed);
    assert_exit(farshore(&["status"], &address, &fleet.issue("viewer/jo")), Exit::Failed);
}

impl Fleet {
    /// A certificate of this fleet whose holder trusts `other`.
    fn into_files(self, path: &str, other: &Self) -> (Self, TlsFiles) {
        let mut files = self.issue(path);
        files.ca = other.issue("viewer/ca").ca;
        (self, files)
    }
}
