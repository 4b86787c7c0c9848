//! Connects to the site's MongoDB as the configuration says.

use std::time::Duration;

use bson::doc;
use mongodb::Client;
use mongodb::options::{AuthMechanism, ClientOptions, Credential, ServerApi, Tls, TlsOptions};

use crate::config::MongoDb;
use crate::config::secret;

/// How long an operation waits for a primary before it fails and its owner decides.
const SERVER_SELECTION: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(5);
/// How long one server is asked who it is.
const DIRECT: Duration = Duration::from_secs(2);

/// Makes a client with room for `connections` operations at once; nothing is contacted yet.
///
/// # Errors
/// The URI or a file it needs is bad; the text names it.
pub(super) async fn connect(config: &MongoDb, connections: u32) -> Result<Client, String> {
    let mut options = options(config).await?;
    options.max_pool_size = Some(connections);
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
    if config.login.is_none() && config.tls_certificate_key_file.is_some() {
        // The server knows the user by the certificate's subject.
        options.credential = Some(Credential::builder().mechanism(AuthMechanism::MongoDbX509).build());
    }
    Client::with_options(options).map_err(|error| format!("mongodb: {error}"))
}

async fn options(config: &MongoDb) -> Result<ClientOptions, String> {
    let mut options = ClientOptions::parse(&config.uri).await.map_err(|error| format!("mongodb.uri: {error}"))?;
    options.app_name = Some("farshore".into());
    options.server_selection_timeout = Some(SERVER_SELECTION);
    options.connect_timeout = Some(CONNECT);
    options.retry_writes = Some(false);
    options.server_api = None::<ServerApi>;
    if let Some(ca) = &config.tls_ca_file {
        let mut tls = TlsOptions::builder().ca_file_path(ca.clone()).build();
        tls.cert_key_file_path.clone_from(&config.tls_certificate_key_file);
        options.tls = Some(Tls::Enabled(tls));
    }
    Ok(options)
}

/// Why servers that answer are not of the replica set of `mongodb.uri`; the driver leaves them out without a word. Asked
/// directly and without logging in.
pub(super) async fn diagnose(config: &MongoDb) -> Option<String> {
    let found = options(config).await.ok()?;
    let wanted = found.repl_set_name.clone()?;
    for host in found.hosts.clone() {
        let mut options = found.clone();
        (options.hosts, options.repl_set_name, options.direct_connection) = (vec![host.clone()], None, Some(true));
        options.server_selection_timeout = Some(DIRECT);
        let Ok(client) = Client::with_options(options) else { continue };
        let Ok(hello) = client.database("admin").run_command(doc! {"hello": 1}).await else { continue };
        match hello.get_str("setName") {
            Err(_) => {
                return Some(format!(
                    "{host} is not a member of a replica set (mongodb.uri names {wanted}); change streams need one"
                ));
            }
            Ok(other) if other != wanted => {
                return Some(format!("{host} is a member of replica set {other}, not of {wanted} as in mongodb.uri"));
            }
            Ok(_) => {}
        }
    }
    None
}
