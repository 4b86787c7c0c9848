//! Certificates, and who gets past the handshake with them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use farshore_api::Identity;
use farshore_api::tls::{Expected, Refreshed, Reloading, TlsFiles, dial, explain};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::link::testing::site;
use crate::link::{TlsTransport, Transport};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate authority of a fleet.
pub(super) struct Pki {
    ca: CertifiedIssuer<'static, KeyPair>,
    pub(super) folder: TempDir,
}

impl Pki {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("ca");
        Self { ca, folder: TempDir::new().expect("folder") }
    }

    /// Files with a certificate for `uri` that expires so many days from now.
    pub(super) fn issue(&self, folder: &str, uri: &str, days: i64) -> TlsFiles {
        let folder = self.folder.path().join(folder);
        std::fs::create_dir_all(&folder).expect("folder");
        let files =
            TlsFiles { certificate: folder.join("c.pem"), key: folder.join("k.pem"), ca: folder.join("ca.pem") };
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("params");
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("ascii")));
        let now = SystemTime::now();
        params.not_before = (now - 30 * DAY).into();
        let span = DAY * u32::try_from(days.unsigned_abs()).expect("small");
        params.not_after = if days < 0 { now - span } else { now + span }.into();
        let certificate = params.signed_by(&key, &self.ca).expect("signed");
        std::fs::write(&files.certificate, certificate.pem()).expect("write");
        std::fs::write(&files.key, key.serialize_pem()).expect("write");
        std::fs::write(&files.ca, self.ca.pem()).expect("write");
        files
    }

    pub(super) fn site(&self, name: &str) -> Arc<Reloading> {
        let files = self.issue(name, &format!("spiffe://farshore/site/{name}"), 90);
        Arc::new(Reloading::load(files, "farshore").expect("loads"))
    }
}

/// A client that checks little, as a stranger would.
fn stranger(ca: &Path, own: Option<&TlsFiles>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("ca")).expect("root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    Arc::new(match own {
        None => builder.with_no_client_auth(),
        Some(files) => {
            let chain = vec![CertificateDer::from_pem_file(&files.certificate).expect("certificate")];
            let key = PrivateKeyDer::from_pem_file(&files.key).expect("key");
            builder.with_client_auth_cert(chain, key).expect("pair")
        }
    })
}

#[tokio::test]
async fn only_members_of_the_fleet_get_past_the_handshake() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
    let transport = TlsTransport::new(pki.site("south"), tasks.clone());
    let mut listener = transport.listen("127.0.0.1:0", cancel.clone()).await.expect("listens");
    let ca = pki.folder.path().join("south/ca.pem");
    let strangers = [
        ("no certificate", None),
        ("another CA", Some(other.issue("x", "spiffe://farshore/site/north", 90))),
        ("another domain", Some(pki.issue("domain", "spiffe://elsewhere/site/north", 90))),
        ("no role", Some(pki.issue("role", "spiffe://farshore/north", 90))),
        ("expired", Some(pki.issue("expired", "spiffe://farshore/site/north", -1))),
    ];
    for (failed, (name, files)) in strangers.iter().enumerate() {
        let connector = tokio_rustls::TlsConnector::from(stranger(&ca, files.as_ref()));
        let tcp = TcpStream::connect(listener.address).await.expect("tcp");
        let refused = match connector.connect("localhost".try_into().expect("name"), tcp).await {
            // With TLS 1.3 the client is done first and hears of the refusal when it reads.
            Ok(mut stream) => stream.read_u8().await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "{name}");
        while transport.failed_handshakes() <= failed as u64 {
            tokio::task::yield_now().await;
        }
        assert!(listener.incoming.try_recv().is_err(), "{name} got through");
    }
    let north = TlsTransport::new(pki.site("north"), tasks.clone());
    let address = listener.address.to_string();
    let connection = north.connect(&address, &site("south")).await.expect("connects");
    assert_eq!(connection.peer().identity, Identity::site("south"));
    let accepted = listener.incoming.recv().await.expect("accepted");
    assert_eq!(accepted.peer().identity, Identity::site("north"));
    assert!(accepted.peer().certificate_expires.is_some());
    cancel.cancel();
}

#[tokio::test]
async fn a_client_insists_on_the_site_it_expects() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
    let transport = TlsTransport::new(pki.site("south"), tasks.clone());
    let listener = transport.listen("127.0.0.1:0", cancel.clone()).await.expect("listens");
    let address = listener.address.to_string();
    let error = async |tls: &Reloading, expected| {
        explain(&dial(&address, tls, expected).await.map(|_| ()).expect_err("refused"))
    };
    let north = pki.site("north");
    let wrong = error(&north, Expected::Site("east".into())).await;
    assert_eq!(wrong, "the peer is site/south, expected site/east; check the address");
    let unknown = error(&other.site("north"), Expected::AnySite).await;
    assert!(unknown.contains("not signed by a CA of this fleet"), "{unknown}");
    let operator = pki.issue("op", "spiffe://farshore/operator/jo", 9);
    let operator = Arc::new(Reloading::load(operator, "farshore").expect("loads"));
    let shop = TlsTransport::new(operator, tasks);
    let listener = shop.listen("127.0.0.1:0", cancel.clone()).await.expect("listens");
    let message = explain(
        &dial(&listener.address.to_string(), &north, Expected::AnySite).await.map(|_| ()).expect_err("no site"),
    );
    assert_eq!(message, "the peer is operator/jo, expected a site");
    cancel.cancel();
}

#[tokio::test]
async fn renewed_certificates_are_used_and_bad_ones_are_not() {
    let pki = Pki::new();
    let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
    let south = pki.site("south");
    let transport = TlsTransport::new(south.clone(), tasks.clone());
    let listener = transport.listen("127.0.0.1:0", cancel.clone()).await.expect("listens");
    let address = listener.address.to_string();
    let north = pki.site("north");
    let seen = async || dial(&address, &north, Expected::AnySite).await.expect("connects").1.expires;
    let before = seen().await;
    assert_eq!((before, south.refresh()), (south.expires(), Refreshed::Unchanged));

    let files = pki.issue("south", "spiffe://farshore/site/south", 200);
    assert_eq!(south.refresh(), Refreshed::Renewed);
    let after = seen().await;
    assert!(after > before + 100 * 24 * 3600, "{before} {after}");

    let good = std::fs::read(&files.certificate).expect("read");
    pki.issue("south", "spiffe://farshore/site/south", 300);
    std::fs::write(&files.certificate, &good).expect("write");
    let kept = south.refresh();
    assert!(matches!(&kept, Refreshed::Kept { problem } if problem.contains("cannot be used")), "{kept:?}");
    assert_eq!(south.refresh(), Refreshed::Unchanged, "said once");
    assert_eq!((seen().await, south.problem().is_some()), (after, true));
    std::fs::remove_file(&files.key).expect("remove");
    assert!(matches!(south.refresh(), Refreshed::Kept { problem } if problem.contains("cannot read")));
    assert_eq!(south.refresh(), Refreshed::Unchanged, "said once");

    pki.issue("south", "spiffe://farshore/site/south", 300);
    assert_eq!((south.refresh(), south.problem()), (Refreshed::Renewed, None));
    assert!(seen().await > after);
    cancel.cancel();
}
