//! Follows the files that the login to MongoDB is made from.
//!
//! A client of the driver keeps the password and the certificates it was made with. When a file changes, the new contents
//! are tried first, beside the client in use; only when MongoDB takes them is it worth starting again. So it does not
//! matter whether the user or the file is changed first, and a mistake in a file interrupts nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use bson::doc;

use super::clients;
use crate::admin::telemetry::Flapping;
use crate::config::MongoDb;
use crate::config::secret::Secret;
use crate::mongo::Failure;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Wait after new contents did not work.
const RETRY: Duration = Duration::from_secs(3);

/// The files' contents, in the order of the configuration.
type Contents = Secret<Vec<Vec<u8>>>;

/// The login in use.
pub(super) struct Credentials {
    config: MongoDb,
    in_use: Contents,
}

impl Credentials {
    /// Reads the files; to be called before a client is made from them.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub(super) fn read(config: &MongoDb) -> Result<Self, String> {
        Ok(Self { in_use: contents(config)?, config: config.clone() })
    }

    /// Returns when the files hold a login that is new and works.
    pub(super) async fn renewed(&self) {
        let mut flapping = Flapping::default();
        loop {
            tokio::time::sleep(LOOK).await;
            match self.look().await {
                Ok(false) => flapping.recovered(Instant::now(), "the new MongoDB login"),
                Ok(true) => return,
                Err(error) => {
                    flapping.warn(Instant::now(), "the new MongoDB login", &error);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn look(&self) -> Result<bool, String> {
        let config = self.config.clone();
        let reading = tokio::task::spawn_blocking(move || contents(&config)).await;
        let contents = reading.map_err(|error| error.to_string())??;
        if contents == self.in_use {
            return Ok(false);
        }
        let client = clients::connect(&self.config, 1).await?;
        let asked = client.database("admin").run_command(doc! {"ping": 1}).await;
        asked.map_err(|error| Failure::of("log in")(error).to_string())?;
        Ok(true)
    }
}

fn contents(config: &MongoDb) -> Result<Contents, String> {
    let password = config.login.as_ref().map(|login| &login.password_file);
    let files = [password, config.tls_ca_file.as_ref(), config.tls_certificate_key_file.as_ref()];
    let read = |path: &Path| std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()));
    let contents = files.into_iter().flatten().map(|path| read(path));
    Ok(Secret::new(contents.collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Login;

    #[test]
    fn a_changed_file_is_seen_and_its_contents_never_shown() {
        let dir = tempfile::tempdir().expect("dir");
        let password_file = dir.path().join("password");
        std::fs::write(&password_file, "hunter2").expect("write");
        let login = Login { username: "u".into(), password_file: password_file.clone(), auth_source: "admin".into() };
        let config = MongoDb {
            uri: "mongodb://127.0.0.1/?replicaSet=r".into(),
            login: Some(login),
            tls_ca_file: None,
            tls_certificate_key_file: None,
        };
        let before = contents(&config).expect("readable");
        assert_eq!(before, contents(&config).expect("readable"));
        std::fs::write(&password_file, "hunter3").expect("write");
        assert_ne!(before, contents(&config).expect("readable"));
        assert!(!format!("{before:?}").contains("hunter"));
        std::fs::remove_file(&password_file).expect("remove");
        assert!(contents(&config).expect_err("gone").contains("cannot read"));
    }
}
