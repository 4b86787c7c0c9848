//! Connects to the site's MongoDB as the configuration says.

use std::time::Duration;

use mongodb::Client;
use mongodb::options::{ClientOptions, Credential, ServerApi, Tls, TlsOptions};

use crate::config::MongoDb;
use crate::config::secret;

/// How long an operation waits for a primary before it fails and its owner decides.
const SERVER_SELECTION: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(5);

/// Makes a client with room for `connections` operations at once; nothing is contacted yet.
///
/// # Errors
/// The URI or a file it needs is bad; the text names it.
pub(super) async fn connect(config: &MongoDb, connections: u32) -> Result<Client, String> {
    let mut options = ClientOptions::parse(&config.uri).await.map_err(|error| format!("mongodb.uri: {error}"))?;
    options.app_name = Some("farshore".into());
    options.server_selection_timeout = Some(SERVER_SELECTION);
    options.connect_timeout = Some(CONNECT);
    options.max_pool_size = Some(connections);
    options.retry_writes = Some(false);
    options.server_api = None::<ServerApi>;
    if let Some(login) = &config.login {
        let password = secret::read_password(&login.password_file).map_err(|error| error.to_string())?;
        options.credential = Some(
            Credential::builder()
                .username(login.username.clone())
                .password(password.expose().clone())
                .source(login.auth_source.clone())
                .build(),
        );
    }
    if let Some(ca) = &config.tls_ca_file {
        let mut tls = TlsOptions::builder().ca_file_path(ca.clone()).build();
        tls.cert_key_file_path.clone_from(&config.tls_certificate_key_file);
        options.tls = Some(Tls::Enabled(tls));
    }
    Client::with_options(options).map_err(|error| format!("mongodb: {error}"))
}
