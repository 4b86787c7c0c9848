//! One `mongod`: its folder, port, arguments and process.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::options::Options;
use crate::pki::ServerFiles;
use crate::ports::Port;
use crate::process::Process;

/// A member of a replica set; the process may be down.
pub(super) struct Member {
    pub(super) port: Port,
    pub(super) process: Process,
    arguments: Vec<String>,
    data: PathBuf,
    log: PathBuf,
}

impl Member {
    /// Starts a `mongod` with its files in `folder`.
    pub(super) fn start(
        folder: &Path,
        options: &Options,
        key_file: Option<&Path>,
        tls: Option<&ServerFiles>,
    ) -> Result<Self> {
        let port = Port::take()?;
        let data = folder.join("db");
        std::fs::create_dir_all(&data).with_context(|| format!("make {}", data.display()))?;
        let mut arguments = arguments(options, port.number(), &data);
        if let Some(file) = key_file {
            arguments.extend(["--keyFile".to_owned(), file.display().to_string()]);
        }
        if let Some(tls) = tls {
            arguments.extend([
                "--tlsMode=requireTLS".to_owned(),
                format!("--tlsCertificateKeyFile={}", tls.certificate_key_file.display()),
                format!("--tlsCAFile={}", tls.ca_file.display()),
                "--tlsAllowConnectionsWithoutCertificates".to_owned(),
            ]);
        }
        let log = folder.join("mongod.log");
        let process = spawn(&port, &arguments, &log)?;
        Ok(Self { port, process, arguments, data, log })
    }

    /// Copies the data of a member that is down, as a snapshot of its volume would.
    pub(super) fn save_data(&mut self, to: &Path) -> Result<()> {
        self.copy(&self.data.clone(), to)
    }

    /// Puts a copy in the place of the data of a member that is down.
    pub(super) fn restore_data(&mut self, from: &Path) -> Result<()> {
        std::fs::remove_dir_all(&self.data).with_context(|| format!("remove {}", self.data.display()))?;
        self.copy(from, &self.data.clone())
    }

    fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        if self.process.is_running() {
            bail!("the mongod on {} still runs", self.port);
        }
        let done = Command::new("cp").arg("-a").args([from, to]).status().context("run cp")?;
        if !done.success() {
            bail!("cp -a {} {} ended with {done}", from.display(), to.display());
        }
        Ok(())
    }

    /// Starts it again with the same files and port.
    pub(super) fn restart(&mut self) -> Result<()> {
        if self.process.is_running() {
            bail!("the mongod on {} still runs", self.port);
        }
        self.process = spawn(&self.port, &self.arguments, &self.log)?;
        Ok(())
    }
}

fn arguments(options: &Options, port: u16, data: &Path) -> Vec<String> {
    let mut arguments = vec![
        "--bind_ip=127.0.0.1".to_owned(),
        format!("--port={port}"),
        format!("--dbpath={}", data.display()),
        "--nounixsocket".to_owned(),
        format!("--wiredTigerCacheSizeGB={}", options.cache_gb),
        format!("--oplogSize={}", options.oplog_mb),
    ];
    if !options.name.is_empty() {
        arguments.push(format!("--replSet={}", options.name));
    }
    if options.oplog_mb < Options::SMALL_OPLOG_MB {
        arguments.push("--syncdelay=1".to_owned());
    }
    // Ends at once on SIGTERM; writes no diagnostic files; spends less on each log-in (tests make many clients).
    let fixed = [
        ("shutdownTimeoutMillisForSignaledShutdown", "0"),
        ("diagnosticDataCollectionEnabled", "false"),
        ("scramSHA256IterationCount", "5000"),
    ];
    let given = options.set_parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in fixed.into_iter().chain(given) {
        arguments.push(format!("--setParameter={name}={value}"));
    }
    arguments
}

fn spawn(port: &Port, arguments: &[String], log: &Path) -> Result<Process> {
    let mut command = Command::new(binary()?);
    command.args(arguments);
    if let Some(libraries) = std::env::var_os("FARSHORE_MONGOD_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    Process::spawn(&format!("mongod on {port}"), &mut command, log)
}

/// `FARSHORE_MONGOD`, or what `dev/setup` has put into the cache.
fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FARSHORE_MONGOD") {
        return Ok(path.into());
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cache = match (std::env::var_os("FARSHORE_CACHE"), std::env::var_os("XDG_CACHE_HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(caches)) => PathBuf::from(caches).join("farshore"),
        (None, None) => home.join(".cache/farshore"),
    };
    let path = cache.join("mongod-6.0.5/mongod");
    if !path.exists() {
        bail!("there is no mongod: run dev/setup, then `. dev/env.sh`, or set FARSHORE_MONGOD");
    }
    Ok(path)
}
