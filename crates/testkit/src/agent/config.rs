//! The agent's configuration file, built piece by piece.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::mongo::{ReplicaSet, User};
use crate::pki::{self, Identity, Pki, Role};
use crate::ports::Port;

/// Everything an agent is started with; ports and certificate are its own.
pub struct AgentConfig {
    site: String,
    /// Section, then key, then the value as TOML.
    sections: BTreeMap<String, BTreeMap<String, String>>,
    peers: Vec<(String, Vec<SocketAddr>)>,
    extra: String,
    password: Option<String>,
    identity: Identity,
    link: Port,
    admin: Port,
}

impl AgentConfig {
    /// An agent of `site` in group `bank`, whose primary site is `primary`, on that replica set.
    pub fn new(site: &str, primary: &str, mongo: &ReplicaSet, pki: &Pki) -> Result<Self> {
        let identity = pki.identity(Role::Site, site)?;
        let password = mongo.password(User::Farshore);
        let mut config = Self {
            site: site.to_owned(),
            sections: BTreeMap::new(),
            peers: Vec::new(),
            extra: String::new(),
            password,
            link: Port::take()?,
            admin: Port::take()?,
            identity,
        };
        config.set_text("site", "name", site);
        config.set_text("site", "domain", pki.domain());
        config.set_text("group", "name", "bank");
        config.set_text("group", "primary", primary);
        config.set_text("mongodb", "uri", &mongo.uri());
        if config.password.is_some() {
            config.set_text("mongodb", "username", User::Farshore.name());
            config.set_text("mongodb", "password_file", "secrets/mongodb-password");
        }
        if let Some(tls) = mongo.tls() {
            config.set_text("mongodb", "tls_ca_file", &tls.ca_file.display().to_string());
        }
        config.set_text("data", "directory", "data");
        config.set_identity(config.identity.clone());
        config.set_text("link", "listen", &config.link.to_string());
        config.set_text("admin", "listen", &config.admin.to_string());
        Ok(config)
    }

    /// Adds a peer; without addresses the peer dials us.
    pub fn peer(mut self, site: &str, addresses: &[SocketAddr]) -> Self {
        self.peers.push((site.to_owned(), addresses.to_vec()));
        self
    }

    /// Forgets all peers.
    pub fn clear_peers(&mut self) {
        self.peers.clear();
    }

    /// Sets a key to a value in TOML, such as `"8"` or `"\"10s\""`.
    pub fn set(&mut self, section: &str, key: &str, toml: &str) {
        self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), toml.to_owned());
    }

    /// Sets a key to a string.
    pub fn set_text(&mut self, section: &str, key: &str, text: &str) {
        self.set(section, key, &quoted(text));
    }

    /// Removes a key.
    pub fn unset(&mut self, section: &str, key: &str) {
        if let Some(keys) = self.sections.get_mut(section) {
            keys.remove(key);
        }
    }

    /// Shows this certificate on the link instead.
    pub fn set_identity(&mut self, identity: Identity) {
        self.set_text("tls", "certificate_file", &identity.certificate_file.display().to_string());
        self.set_text("tls", "key_file", &identity.key_file.display().to_string());
        self.set_text("tls", "ca_file", &identity.ca_file.display().to_string());
        self.identity = identity;
    }

    /// Another password of the MongoDB user, in the file that has it.
    pub fn set_password(&mut self, password: &str) {
        self.password = Some(password.to_owned());
    }

    /// Appends text to the file, for what has no method; its sections must be new ones.
    pub fn append(&mut self, toml: &str) {
        self.extra.push_str(toml);
        self.extra.push('\n');
    }

    /// The certificate it shows on the link.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its site.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Where it will listen for peers.
    pub fn link_address(&self) -> SocketAddr {
        self.link.address()
    }

    /// Where it will listen for health and metrics.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.address()
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (section, keys) in &self.sections {
            let _ = writeln!(text, "[{section}]");
            for (key, value) in keys {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        for (site, addresses) in &self.peers {
            let addresses: Vec<String> = addresses.iter().map(|address| quoted(&address.to_string())).collect();
            let _ = writeln!(text, "[[peers]]\nsite = {}\naddresses = [{}]", quoted(site), addresses.join(", "));
        }
        text + &self.extra
    }

    /// Writes the file and the password beside it.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let secrets = folder.join("secrets");
        std::fs::create_dir_all(&secrets).context("make the folder of secrets")?;
        if let Some(password) = &self.password {
            pki::write(&secrets.join("mongodb-password"), format!("{password}\n").as_bytes(), 0o600)?;
        }
        pki::write(&file(folder), self.text().as_bytes(), 0o644)
    }
}

pub(super) fn file(folder: &Path) -> PathBuf {
    folder.join("farshore.toml")
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
