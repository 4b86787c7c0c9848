//! Who gets past an mTLS handshake with the test PKI, and who does not.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use anyhow::{Result, ensure};
use farshore_testkit::pki::{Identity, Pki, Role};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// One byte each way over an mTLS connection in memory; returns the client's certificate as the server saw it.
async fn connect(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<Vec<u8>> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("127.0.0.1")?;
    let dial = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.write_all(b"x").await?;
        stream.read_u8().await
    };
    let serve = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.read_u8().await?;
        stream.write_all(b"y").await?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        Ok(chain.first().map(|certificate| certificate.to_vec()).unwrap_or_default())
    };
    let (_, certificate) = tokio::try_join!(dial, serve)?;
    Ok(certificate)
}

async fn meets(client: &Identity, server: &Identity) -> Result<Vec<u8>> {
    connect(client.client_config()?, server.server_config()?).await
}

#[tokio::test]
async fn identities_of_one_fleet_meet_and_show_their_names() -> Result<()> {
    let pki = Pki::new("farshore")?;
    let north = pki.identity(Role::Site, "north")?;
    for (role, uri) in [
        (Role::Site, "spiffe://farshore/site/south"),
        (Role::Operator, "spiffe://farshore/operator/south"),
        (Role::Viewer, "spiffe://farshore/viewer/south"),
        (Role::Router, "spiffe://farshore/router/south"),
    ] {
        let south = pki.identity(role, "south")?;
        ensure!(south.uri() == Some(uri));
        let certificate = meets(&south, &north).await?;
        ensure!(certificate.windows(uri.len()).any(|window| window == uri.as_bytes()), "no {uri} in the certificate");
        meets(&north, &south).await?;
    }
    Ok(())
}

#[tokio::test]
async fn strangers_expired_and_bare_clients_are_refused() -> Result<()> {
    let pki = Pki::new("farshore")?;
    let north = pki.identity(Role::Site, "north")?;
    let strangers = pki.stranger()?;
    let stranger = strangers.identity(Role::Site, "south")?;
    ensure!(meets(&stranger, &north).await.is_err(), "a stranger got in");
    // Also one who trusts this fleet.
    Pki::trust(&stranger, &[&pki])?;
    ensure!(meets(&stranger, &north).await.is_err(), "a stranger got in");
    let expired = pki.expired(Role::Site, "south")?;
    ensure!(meets(&expired, &north).await.is_err(), "an expired certificate got in");
    ensure!(meets(&north, &expired).await.is_err(), "an expired certificate was trusted");
    let bare = connect(north.client_config_without_certificate()?, north.server_config()?).await;
    ensure!(bare.is_err(), "a client without a certificate got in");
    Ok(())
}

#[tokio::test]
async fn a_renewal_keeps_files_and_name_and_changes_the_key() -> Result<()> {
    let pki = Pki::new("farshore")?;
    let north = pki.identity(Role::Site, "north")?;
    let south = pki.identity(Role::Site, "south")?;
    let before = meets(&south, &north).await?;
    let key = std::fs::read(&south.key_file)?;
    pki.renew(&south)?;
    ensure!(std::fs::read(&south.key_file)? != key);
    ensure!(meets(&south, &north).await? != before);
    let mode = std::fs::metadata(&south.key_file)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    Ok(())
}

#[tokio::test]
async fn a_bundle_of_two_authorities_accepts_both() -> Result<()> {
    let (old, new) = (Pki::new("farshore")?, Pki::new("farshore")?);
    let north = old.identity(Role::Site, "north")?;
    let south = new.identity(Role::Site, "south")?;
    ensure!(meets(&south, &north).await.is_err());
    for identity in [&north, &south] {
        Pki::trust(identity, &[&old, &new])?;
    }
    meets(&south, &north).await?;
    meets(&north, &south).await?;
    Ok(())
}
