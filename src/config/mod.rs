//! The agent's configuration: one TOML file in, an immutable [`Config`] or all its problems at once out.
//!
//! `parse` is pure: it reads text and decides. `load` adds the file system: the file itself and the files it names.
//! Secrets stay in their files; the configuration holds paths only (see [`secret`]).

mod files;
mod problem;
mod reader;
pub mod secret;
mod sections;
#[cfg(test)]
mod tests;
mod units;
mod uri;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

pub use problem::{Problem, Problems, Severity};
use reader::{FileRef, Report, Section};
pub use secret::Secret;
pub use units::{ByteSize, InvalidDuration, InvalidSize, format_duration, parse_duration};

use crate::model::{ClusterTime, SiteName};

/// All that an agent is told. Paths are absolute or relative to the process, no longer to the file.
#[derive(Clone, Debug)]
pub struct Config {
    /// This site.
    pub site: Site,
    /// The group it belongs to.
    pub group: Group,
    /// Its MongoDB.
    pub mongodb: MongoDb,
    /// The agent's own disk.
    pub data: Data,
    /// Its certificate.
    pub tls: Tls,
    /// Replication and control services.
    pub link: Link,
    /// The other sites.
    pub peers: Vec<Peer>,
    /// Applying changes.
    pub apply: Apply,
    /// Health and metrics.
    pub admin: Admin,
    /// Memory.
    pub memory: Memory,
    /// Logging.
    pub log: Log,
    /// Agents in pairs.
    pub lease: Lease,
    /// What somebody should look at; the agent logs each once.
    pub warnings: Vec<Problem>,
}

/// `[site]`
#[derive(Clone, Debug)]
pub struct Site {
    /// Its name.
    pub name: SiteName,
    /// Trust domain of the certificates.
    pub domain: String,
}

/// `[group]`
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// The site that originates writes.
    pub primary: SiteName,
}

/// `[mongodb]`
#[derive(Clone, Debug)]
pub struct MongoDb {
    /// Without user and password.
    pub uri: String,
    /// How to log in.
    pub login: Option<Login>,
    /// Turns TLS on.
    pub tls_ca_file: Option<PathBuf>,
    /// The client's certificate and key.
    pub tls_certificate_key_file: Option<PathBuf>,
}

/// A MongoDB user.
#[derive(Clone, Debug)]
pub struct Login {
    /// Its name.
    pub username: String,
    /// Its password is the first line; see [`secret::read_password`].
    pub password_file: PathBuf,
    /// The database that holds the user.
    pub auth_source: String,
}

/// `[data]`
#[derive(Clone, Debug)]
pub struct Data {
    /// Outbox, inboxes and meta.
    pub directory: PathBuf,
    /// Outbox and inboxes together.
    pub outbox_limit: ByteSize,
    /// Kept below the lowest applied position.
    pub retention: ByteSize,
    /// Kept for at most so long.
    pub retention_time: Duration,
    /// Encryption at rest; see [`secret::read_encryption_key`].
    pub encryption_key_file: Option<PathBuf>,
}

/// `[tls]`
#[derive(Clone, Debug)]
pub struct Tls {
    /// PEM chain.
    pub certificate_file: PathBuf,
    /// PEM key.
    pub key_file: PathBuf,
    /// PEM bundle of the CAs of the fleet.
    pub ca_file: PathBuf,
}

/// `[link]`
#[derive(Clone, Debug)]
pub struct Link {
    /// Replication and control services.
    pub listen: SocketAddr,
    /// Bytes in flight.
    pub credit: ByteSize,
    /// Interval of heartbeat marks.
    pub heartbeat: Duration,
}

/// `[[peers]]`
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name.
    pub site: SiteName,
    /// `host:port` of every agent there; empty: it dials us.
    pub addresses: Vec<String>,
    /// Whether to dial it.
    pub dial: bool,
}

/// `[apply]`
#[derive(Clone, Debug)]
pub struct Apply {
    /// Workers that serve the lanes.
    pub workers: usize,
    /// The target equals the source at this cluster time.
    pub start_at: Option<ClusterTime>,
}

/// `[admin]`
#[derive(Clone, Debug)]
pub struct Admin {
    /// Plain HTTP.
    pub listen: SocketAddr,
}

/// `[memory]`
#[derive(Clone, Debug)]
pub struct Memory {
    /// For the whole process.
    pub limit: ByteSize,
}

/// `[log]`
#[derive(Clone, Debug)]
pub struct Log {
    /// Lines of JSON or of text.
    pub format: LogFormat,
    /// `info`, or directives as `info,farshore::link=debug`.
    pub level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

/// `[lease]`
#[derive(Clone, Debug)]
pub struct Lease {
    /// Another agent of the site takes over after this much silence.
    pub ttl: Duration,
}

impl Config {
    /// Reads a file, and looks at the files it names.
    ///
    /// # Errors
    /// Every problem there is.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        let problem = |what: String, mend: &str| {
            let problem =
                Problem { severity: Severity::Error, key: String::new(), line: None, what, mend: mend.to_owned() };
            Problems::new(path, vec![problem])
        };
        let bytes = std::fs::read(path)
            .map_err(|e| problem(format!("cannot read the file: {e}"), "correct the path given with --config"))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| problem("the file is not UTF-8 text".to_owned(), "save it as UTF-8"))?;
        let base = path.parent().unwrap_or(Path::new(""));
        let draft = draft(&text, base);
        let mut problems = draft.problems;
        problems.extend(files::check(&draft.files));
        let readable = !problems.iter().any(|problem| problem.key.starts_with("tls."));
        if let Some(config) = draft.config.as_ref().filter(|_| readable) {
            problems.extend(files::check_tls(config, &draft.files));
        }
        finish(path, draft.config, problems)
    }

    /// Reads text without touching the file system; relative paths are taken from `base`.
    ///
    /// # Errors
    /// Every problem of the text.
    pub fn parse(text: &str, base: &Path) -> Result<Self, Problems> {
        let draft = draft(text, base);
        finish(&base.join("farshore.toml"), draft.config, draft.problems)
    }

    /// The peer of that name.
    pub fn peer(&self, site: &SiteName) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.site == *site)
    }
}

/// What parsing made of a text: a configuration where everything it needs was readable, and all problems so far.
struct Draft {
    config: Option<Config>,
    problems: Vec<Problem>,
    files: Vec<FileRef>,
}

fn draft(text: &str, base: &Path) -> Draft {
    let (document, faults) = DeTable::parse_recoverable(text);
    let report = Report::new(text, base);
    for fault in &faults {
        let line = fault.span().map(|span| report.line(span.start));
        report.note(Severity::Error, String::new(), line, format!("not TOML: {}", fault.message()), String::new());
    }
    // What a damaged text leaves is not worth judging: half of the findings would be false.
    let config = if faults.is_empty() { sections::read(Section::root(&report, document.get_ref())) } else { None };
    let (problems, files) = report.into_parts();
    Draft { config, problems, files }
}

fn finish(path: &Path, config: Option<Config>, problems: Vec<Problem>) -> Result<Config, Problems> {
    let refused = problems.iter().any(|problem| problem.severity == Severity::Error);
    match config {
        Some(config) if !refused => Ok(Config { warnings: problems, ..config }),
        _ => Err(Problems::new(path, problems)),
    }
}
