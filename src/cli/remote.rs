//! Reaching an agent's control service over mutual TLS.
//!
//! The one place where the CLI connects. What cannot be reached is told apart from what refuses: the first exits with 1,
//! the second with 9.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use farshore_api::client;
use farshore_api::control::v1::control_client::ControlClient;
use farshore_api::tls::{self, Expected, Reloading, TlsFiles};
use tokio::io::AsyncReadExt;
use tonic::Code;
use tonic::transport::Channel;

use super::exit::{Exit, Failure};
use crate::config::parse_duration;

/// A peeked change may be a document of 16 MB, several times that as extended JSON.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// How long to wait for the reason of a refusal.
const DIAGNOSIS: Duration = Duration::from_secs(2);

/// Which agent to ask, and as whom.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub struct RemoteArgs {
    /// Agent to ask, as host:port (its link.listen)
    #[arg(long, env = "FARSHORE_ADDRESS", value_name = "HOST:PORT")]
    pub address: String,
    /// Own certificate (PEM), with a role in its URI SAN
    #[arg(long, env = "FARSHORE_CERT", value_name = "FILE")]
    pub cert: PathBuf,
    /// Private key of the certificate (PEM)
    #[arg(long, env = "FARSHORE_KEY", value_name = "FILE")]
    pub key: PathBuf,
    /// CAs of the fleet (PEM)
    #[arg(long, env = "FARSHORE_CA", value_name = "FILE")]
    pub ca: PathBuf,
    /// Trust domain of the certificates
    #[arg(long, env = "FARSHORE_DOMAIN", value_name = "NAME", default_value = "farshore")]
    pub domain: String,
    /// How long to wait for an answer
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// An agent that can be asked.
pub struct Remote {
    args: RemoteArgs,
    tls: Arc<Reloading>,
    /// The client.
    pub control: ControlClient<Channel>,
}

impl Remote {
    /// Connects.
    ///
    /// # Errors
    /// The files cannot be used, nobody answers, or one side refuses the other's certificate.
    pub async fn connect(args: &RemoteArgs) -> Result<Self, Failure> {
        let files = TlsFiles { certificate: args.cert.clone(), key: args.key.clone(), ca: args.ca.clone() };
        let tls = Reloading::load(files, args.domain.clone())
            .map_err(|error| Failure::new(error.to_string(), "correct --cert, --key, --ca or --domain"))?;
        let tls = Arc::new(tls);
        let connecting = client::connect(&args.address, Arc::clone(&tls), Expected::AnySite);
        let channel = match tokio::time::timeout(args.timeout, connecting).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(refusal(args, &tls).await.unwrap_or_else(|| unreachable(error.to_string()))),
            Err(_) => return Err(unreachable(format!("no answer from {} within {:?}", args.address, args.timeout))),
        };
        let control = ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { args: args.clone(), tls, control })
    }

    /// Waits for an answer, no longer than the caller allows.
    ///
    /// # Errors
    /// The agent refuses, fails or is silent.
    pub async fn ask<T>(&self, call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.args.timeout, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(self.explain(status).await),
            Err(_) => Err(tonic::Status::deadline_exceeded("").into()),
        }
    }

    /// What a failed call means. With TLS 1.3 a server refuses a client's certificate only after the client believes to be
    /// connected, so a broken connection is looked at again.
    pub async fn explain(&self, status: tonic::Status) -> Failure {
        let broken = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled);
        let refused = if broken { refusal(&self.args, &self.tls).await } else { None };
        refused.unwrap_or_else(|| status.into())
    }
}

fn unreachable(message: String) -> Failure {
    Failure::new(message, "is the agent running, and is --address its link.listen?")
}

/// Whether it was TLS that refused, found out by a handshake of its own and a look at the first byte after it.
async fn refusal(args: &RemoteArgs, tls: &Reloading) -> Option<Failure> {
    let attempt = async {
        let (mut stream, _peer) = tls::dial(&args.address, tls, Expected::AnySite).await?;
        stream.read_u8().await
    };
    let error = tokio::time::timeout(DIAGNOSIS, attempt).await.ok()?.err()?;
    is_refusal(&error).then(|| {
        let hint = "check --cert, --key and --ca against the agent's [tls] section, and --domain";
        Failure::new(format!("{}: {}", args.address, tls::explain(&error)), hint).with(Exit::Unauthenticated)
    })
}

/// Failures of certificates are wrapped in I/O errors by the TLS library.
fn is_refusal(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        inner,
        Some(
            rustls::Error::InvalidCertificate(_)
                | rustls::Error::AlertReceived(_)
                | rustls::Error::NoCertificatesPresented
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_failures_are_told_apart_from_others() {
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired);
        assert!(is_refusal(&io::Error::new(io::ErrorKind::InvalidData, alert)));
        assert!(!is_refusal(&io::Error::from(io::ErrorKind::ConnectionRefused)));
        assert!(!is_refusal(&io::Error::new(io::ErrorKind::InvalidData, rustls::Error::DecryptError)));
    }
}
