//! Users of a replica set and the drivers connected as them.
//!
//! A driver belongs to the runtime it was made in, and every test has its own: drivers are cached with the handle a
//! test holds, never with the servers, which warm sets hand from test to test.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use mongodb::Client;
use mongodb::options::{ClientOptions, Credential, ServerAddress, Tls, TlsOptions};

use crate::pki::ServerFiles;

/// Who to connect as; without `auth` everybody is everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum User {
    /// All rights; bypasses the write block.
    Root,
    /// An application.
    App,
    /// The agent.
    Farshore,
}

impl User {
    /// Name in the database `admin`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::App => "app",
            Self::Farshore => "farshore",
        }
    }
}

/// How to reach the members and what to show them.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) replica_set: String,
    pub(super) hosts: Vec<ServerAddress>,
    /// Suffix of all passwords of the set; none without `auth`.
    pub(super) secret: Option<String>,
    pub(super) tls: Option<ServerFiles>,
}

impl Access {
    /// Not guessable and found nowhere by chance, so that a test can look for it where it must not be.
    pub(super) fn password(&self, user: User) -> Option<String> {
        self.secret.as_ref().map(|secret| format!("{}-{secret}", user.name()))
    }

    /// A driver; `member` alone when given, as `user` when given.
    pub(super) fn connect(&self, user: Option<User>, member: Option<usize>) -> Result<Client> {
        let credential = user.and_then(|user| {
            let password = self.password(user)?;
            let credential = Credential::builder().username(user.name().to_owned()).password(password);
            Some(credential.source("admin".to_owned()).build())
        });
        let mut options = ClientOptions::builder()
            .hosts(member.map_or_else(|| self.hosts.clone(), |member| vec![self.hosts[member].clone()]))
            .direct_connection(member.is_some())
            .credential(credential)
            .app_name("farshore-testkit".to_owned())
            // The least the driver takes: tests wait for elections.
            .heartbeat_freq(Duration::from_millis(500))
            .server_selection_timeout(Duration::from_secs(15))
            .connect_timeout(Duration::from_secs(5))
            .build();
        if member.is_none() {
            options.repl_set_name = Some(self.replica_set.clone());
        }
        options.tls =
            self.tls.as_ref().map(|tls| Tls::Enabled(TlsOptions::builder().ca_file_path(tls.ca_file.clone()).build()));
        Client::with_options(options).context("make a MongoDB client")
    }
}

/// Drivers by user and member.
#[derive(Default)]
pub(super) struct Clients(Mutex<HashMap<(User, Option<usize>), Client>>);

impl Clients {
    pub(super) fn get(&self, access: &Access, user: User, member: Option<usize>) -> Result<Client> {
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&(user, member)) {
            return Ok(client.clone());
        }
        let client = access.connect(Some(user), member)?;
        clients.insert((user, member), client.clone());
        Ok(client)
    }
}
