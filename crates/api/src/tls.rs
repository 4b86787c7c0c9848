//! Mutual TLS from files that may change while the process runs.
//!
//! Certificates rotate: the files are looked at again when [`Reloading::refresh`] is called (about once a second), new
//! handshakes use what was read last, and a bad new file keeps the old one. TLS 1.3 and 1.2, aws-lc-rs as the provider, given
//! explicitly. No session is ever resumed: each connection proves the certificate again, so an expired one cannot linger.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;

use crate::identity::{Identity, IdentityError, expiry};
use crate::verify::{ClientVerifier, ServerVerifier};

pub use crate::verify::{Expected, WrongPeer};

/// Where the certificate material lies; all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Own certificate, followed by its intermediates.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Bundle of the CAs of the fleet.
    pub ca: PathBuf,
}

/// Why certificate material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A file is not what it should be.
    #[error("{} does not hold {what}", path.display())]
    Contents { path: PathBuf, what: &'static str },
    /// Certificate, key and bundle do not work together.
    #[error("certificate {} and key {} cannot be used: {source}", certificate.display(), key.display())]
    Unusable { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    /// The bundle of CAs cannot be used.
    #[error("CA bundle {} cannot be used: {message}", path.display())]
    Bundle { path: PathBuf, message: String },
    /// Our own certificate names nobody.
    #[error("{}: {source}", path.display())]
    Identity { path: PathBuf, source: IdentityError },
}

/// What a look at the files found.
#[derive(Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// Nothing new.
    Unchanged,
    /// New material is in use.
    Renewed,
    /// The new files are bad, the old material stays in use. Said once per change of the files.
    Kept { problem: String },
}

struct Material {
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
    identity: Identity,
    expires: i64,
    generation: u64,
}

/// Certificate material that follows its files.
pub struct Reloading {
    files: TlsFiles,
    domain: String,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Material>,
    seen: RwLock<Contents>,
    problem: ArcSwapOption<String>,
}

impl std::fmt::Debug for Reloading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloading")
            .field("files", &self.files)
            .field("identity", &self.identity())
            .finish_non_exhaustive()
    }
}

impl Reloading {
    /// Reads the files; they must be good at the start.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn load(files: TlsFiles, domain: impl Into<String>) -> Result<Self, Error> {
        let domain = domain.into();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let contents = Contents::read(&files)?;
        let material = contents.material(&files, &domain, &provider)?;
        let current = ArcSwap::from_pointee(material);
        Ok(Self { files, domain, provider, current, seen: RwLock::new(contents), problem: ArcSwapOption::empty() })
    }

    /// Looks at the files again. Blocks for as long as reading three small files takes.
    pub fn refresh(&self) -> Refreshed {
        let outcome = match Contents::read(&self.files) {
            Ok(contents) if contents == *self.seen.read().unwrap_or_else(PoisonError::into_inner) => {
                return Refreshed::Unchanged;
            }
            Ok(contents) => {
                let made = contents.material(&self.files, &self.domain, &self.provider);
                *self.seen.write().unwrap_or_else(PoisonError::into_inner) = contents;
                made
            }
            Err(error) => Err(error),
        };
        let problem = match outcome {
            Ok(material) => {
                let generation = self.generation() + 1;
                self.current.store(Arc::new(Material { generation, ..material }));
                self.problem.store(None);
                return Refreshed::Renewed;
            }
            Err(error) => error.to_string(),
        };
        if self.problem().as_ref() == Some(&problem) {
            return Refreshed::Unchanged;
        }
        self.problem.store(Some(Arc::new(problem.clone())));
        Refreshed::Kept { problem }
    }

    /// Why the newest files are not in use, if they are not.
    pub fn problem(&self) -> Option<String> {
        self.problem.load().as_ref().map(|problem| problem.as_ref().clone())
    }

    /// Who we are.
    pub fn identity(&self) -> Identity {
        self.current.load().identity.clone()
    }

    /// The fleet's trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// When our own certificate expires, seconds since the Unix epoch.
    pub fn expires(&self) -> i64 {
        self.current.load().expires
    }

    /// How often new material came into use.
    pub fn generation(&self) -> u64 {
        self.current.load().generation
    }

    /// For the next connection we accept: a client certificate of the fleet is mandatory.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.current.load().server.clone()
    }

    /// For the next connection we open.
    pub fn client_config(&self, expected: Expected) -> Arc<ClientConfig> {
        let material = self.current.load();
        let verifier = ServerVerifier {
            roots: material.roots.clone(),
            provider: self.provider.clone(),
            domain: self.domain.clone(),
            expected,
        };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13, &TLS12])
            .expect("the provider has suites for both versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(material.key.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }
}

#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

impl Contents {
    fn read(files: &TlsFiles) -> Result<Self, Error> {
        let read = |path: &Path| std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source });
        Ok(Self { certificate: read(&files.certificate)?, key: read(&files.key)?, ca: read(&files.ca)? })
    }

    fn material(&self, files: &TlsFiles, domain: &str, provider: &Arc<CryptoProvider>) -> Result<Material, Error> {
        let chain = certificates(&self.certificate, &files.certificate)?;
        let identity_error = |source| Error::Identity { path: files.certificate.clone(), source };
        let identity = Identity::from_certificate(&chain[0], domain).map_err(identity_error)?;
        let expires = expiry(&chain[0]).map_err(identity_error)?;
        let contents = |_| Error::Contents { path: files.key.clone(), what: "a PEM private key" };
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(contents)?;
        let unusable =
            |source| Error::Unusable { certificate: files.certificate.clone(), key: files.key.clone(), source };
        let key = Arc::new(CertifiedKey::from_der(chain, key, provider).map_err(unusable)?);
        let bundle = |message: String| Error::Bundle { path: files.ca.clone(), message };
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.ca, &files.ca)? {
            roots.add(root).map_err(|e| bundle(e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| bundle(e.to_string()))?;
        let verifier = ClientVerifier { chain, domain: domain.to_owned() };
        let server = Arc::new(server_config(provider, verifier, key.clone()));
        Ok(Material { key, roots, server, identity, expires, generation: 0 })
    }
}

fn server_config(provider: &Arc<CryptoProvider>, verifier: ClientVerifier, key: Arc<CertifiedKey>) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("the provider has suites for both versions")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let contents = || Error::Contents { path: path.to_owned(), what: "a PEM certificate" };
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(contents)
}

/// The certificate at the other end of an established connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Whom it names.
    pub identity: Identity,
    /// When it expires, seconds since the Unix epoch.
    pub expires: i64,
}

impl PeerCertificate {
    /// From the chain of a finished handshake.
    ///
    /// # Errors
    /// There is none, or it names nobody.
    pub fn of(chain: Option<&[CertificateDer<'_>]>, domain: &str) -> Result<Self, IdentityError> {
        let first = chain.and_then(<[_]>::first).ok_or_else(|| IdentityError::None { domain: domain.to_owned() })?;
        Ok(Self { identity: Identity::from_certificate(first, domain)?, expires: expiry(first)? })
    }
}

/// Connects to `address` (host:port) and proves both ends.
///
/// # Errors
/// No connection, or a failed handshake; [`explain`] says more.
pub async fn dial(
    address: &str,
    tls: &Reloading,
    expected: Expected,
) -> io::Result<(tokio_rustls::client::TlsStream<TcpStream>, PeerCertificate)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let connector = tokio_rustls::TlsConnector::from(tls.client_config(expected));
    let name = ServerName::try_from("farshore").expect("a constant name");
    let stream = connector.connect(name, stream).await?;
    let peer = PeerCertificate::of(stream.get_ref().1.peer_certificates(), tls.domain()).map_err(io::Error::other)?;
    Ok((stream, peer))
}

/// A failed handshake or connection in words, with our own reasons in place of the TLS library's wrapping.
pub fn explain(error: &io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => other.0.to_string(),
        // A CA of another fleet may well have the same name.
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "the peer's certificate is not signed by a CA of this fleet".into()
        }
        Some(rustls::Error::AlertReceived(alert)) => {
            format!("the peer refused our certificate or the handshake ({alert:?})")
        }
        Some(other) => other.to_string(),
        None => error.to_string(),
    }
}
