//! The fleet's certificates for tests: a CA, identities by role, and certificates that must be refused.
//!
//! Every identity carries the URI SAN `spiffe://<domain>/<role>/<name>` besides `localhost` and 127.0.0.1, serves as
//! client and server certificate, and lies in a folder of its own as `certificate.pem`, `key.pem` (0600) and `ca.pem`.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::scratch::Scratch;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What a certificate entitles to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Site,
    Operator,
    Viewer,
    Router,
}

impl Role {
    /// As it stands in the URI SAN.
    pub fn name(self) -> &'static str {
        match self {
            Self::Site => "site",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
            Self::Router => "router",
        }
    }
}

/// A certificate authority and what it issued; the files go when it is dropped, so keep it as long as their users.
pub struct Pki {
    domain: String,
    ca: CertifiedIssuer<'static, KeyPair>,
    issued: AtomicU64,
    folder: Scratch,
}

/// A certificate, its key and the CA bundle, as files.
#[derive(Debug, Clone)]
pub struct Identity {
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
    pub ca_file: PathBuf,
    uri: Option<String>,
}

/// What a `mongod` with TLS and its clients need, as files.
#[derive(Debug, Clone)]
pub struct ServerFiles {
    /// Certificate and key in one file.
    pub certificate_key_file: PathBuf,
    pub ca_file: PathBuf,
}

impl Pki {
    /// A new CA for the trust domain; two calls give two CAs that do not trust each other.
    pub fn new(domain: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("{domain} test CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let now = SystemTime::now();
        params.not_before = (now - DAY).into();
        params.not_after = (now + 3650 * DAY).into();
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?).context("make a CA")?;
        Ok(Self { domain: domain.to_owned(), ca, issued: AtomicU64::new(0), folder: Scratch::new("pki")? })
    }

    /// Another CA that says the same names: nobody of this fleet may trust it.
    pub fn stranger(&self) -> Result<Self> {
        Self::new(&self.domain)
    }

    /// The trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The CA's certificate as PEM.
    pub fn ca_pem(&self) -> String {
        self.ca.pem()
    }

    /// A valid certificate `spiffe://<domain>/<role>/<name>`.
    pub fn identity(&self, role: Role, name: &str) -> Result<Identity> {
        self.identity_with_uri(&self.uri(role, name))
    }

    /// A valid certificate with any URI SAN, also one that makes no sense.
    pub fn identity_with_uri(&self, uri: &str) -> Result<Identity> {
        let identity = self.place(Some(uri))?;
        self.issue(&identity, SystemTime::now() + 365 * DAY)?;
        Ok(identity)
    }

    /// A valid certificate without a URI SAN.
    pub fn anonymous(&self) -> Result<Identity> {
        let identity = self.place(None)?;
        self.issue(&identity, SystemTime::now() + 365 * DAY)?;
        Ok(identity)
    }

    /// A certificate that expired an hour ago.
    pub fn expired(&self, role: Role, name: &str) -> Result<Identity> {
        let identity = self.place(Some(&self.uri(role, name)))?;
        self.issue(&identity, SystemTime::now() - DAY / 24)?;
        Ok(identity)
    }

    /// Replaces certificate and key (a new one) in their files, each atomically, the key first.
    pub fn renew(&self, identity: &Identity) -> Result<()> {
        self.issue(identity, SystemTime::now() + 365 * DAY)
    }

    /// The same, valid for so long from now.
    pub fn renew_for(&self, identity: &Identity, valid: Duration) -> Result<()> {
        self.issue(identity, SystemTime::now() + valid)
    }

    /// Makes `identity` trust these CAs and no others.
    pub fn trust(identity: &Identity, authorities: &[&Self]) -> Result<()> {
        let bundle: String = authorities.iter().map(|pki| pki.ca_pem()).collect();
        write(&identity.ca_file, bundle.as_bytes(), 0o644)
    }

    /// A server certificate for the `mongod` of a replica set.
    pub fn mongod(&self) -> Result<ServerFiles> {
        let identity = self.anonymous()?;
        let mut both = fs::read(&identity.certificate_file).context("read the certificate")?;
        both.extend(fs::read(&identity.key_file).context("read the key")?);
        let certificate_key_file = identity.key_file.with_file_name("certificate-and-key.pem");
        write(&certificate_key_file, &both, 0o600)?;
        Ok(ServerFiles { certificate_key_file, ca_file: identity.ca_file })
    }

    fn uri(&self, role: Role, name: &str) -> String {
        format!("spiffe://{}/{}/{name}", self.domain, role.name())
    }

    fn place(&self, uri: Option<&str>) -> Result<Identity> {
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let folder = self.folder.path().join(number.to_string());
        fs::create_dir(&folder).context("make the identity's folder")?;
        let identity = Identity {
            certificate_file: folder.join("certificate.pem"),
            key_file: folder.join("key.pem"),
            ca_file: folder.join("ca.pem"),
            uri: uri.map(str::to_owned),
        };
        Self::trust(&identity, &[self])?;
        Ok(identity)
    }

    fn issue(&self, identity: &Identity, not_after: SystemTime) -> Result<()> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        if let Some(uri) = &identity.uri {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
        }
        params.distinguished_name.push(DnType::CommonName, "farshore test");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (not_after.min(SystemTime::now()) - DAY).into();
        params.not_after = not_after.into();
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca).context("issue a certificate")?;
        write(&identity.key_file, key.serialize_pem().as_bytes(), 0o600)?;
        write(&identity.certificate_file, certificate.pem().as_bytes(), 0o644)
    }
}

impl Identity {
    /// The URI SAN.
    pub fn uri(&self) -> Option<&str> {
        self.uri.as_deref()
    }

    /// Settings of an HTTP/2 server that demands a client certificate of the CAs in the bundle.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(self.roots()?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain()?, self.key()?)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Settings of an HTTP/2 client that shows its certificate.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>> {
        let mut config = self.client_builder()?.with_client_auth_cert(self.chain()?, self.key()?)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Settings of an HTTP/2 client that trusts the CAs in the bundle but shows no certificate.
    pub fn client_config_without_certificate(&self) -> Result<Arc<ClientConfig>> {
        let mut config = self.client_builder()?.with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    fn client_builder(&self) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(builder.with_root_certificates(self.roots()?))
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>> {
        certificates(&self.certificate_file)
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::from_pem_file(&self.key_file).with_context(|| format!("read {}", self.key_file.display()))
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca_file)? {
            roots.add(certificate).context("add a CA")?;
        }
        Ok(roots)
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let context = || format!("read {}", file.display());
    let found: Vec<_> =
        CertificateDer::pem_file_iter(file).with_context(context)?.collect::<Result<_, _>>().with_context(context)?;
    if found.is_empty() {
        bail!("{} holds no certificate", file.display());
    }
    Ok(found)
}

/// Writes beside and renames, so that a reader sees the old file or the new one.
pub(crate) fn write(file: &Path, text: &[u8], mode: u32) -> Result<()> {
    let context = || format!("write {}", file.display());
    let temp = file.with_extension("new");
    let _ = fs::remove_file(&temp);
    let mut open = OpenOptions::new().create_new(true).write(true).mode(mode).open(&temp).with_context(context)?;
    open.write_all(text).with_context(context)?;
    fs::rename(&temp, file).with_context(context)
}
