//! The `farshore` agent as a process of its own.
//!
//! An [`AgentConfig`] holds the ports and certificates, so that agents can be told of each other before any is started.
//! An [`AgentProcess`] has a folder with its configuration, secrets, data and log; the folder outlives restarts.

mod config;
mod http;
mod metrics;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

pub use self::config::AgentConfig;
pub use self::http::{Reply, get};
pub use self::metrics::Metrics;
use crate::process::{Process, Usage};
use crate::scratch::Scratch;
use crate::wait;

/// A staged shutdown stays well below this.
const SHUTDOWN: Duration = Duration::from_secs(30);

/// An agent; killed when dropped.
pub struct AgentProcess {
    binary: PathBuf,
    config: AgentConfig,
    process: Process,
    // Last: the folder goes after the process in it.
    folder: Scratch,
}

impl AgentProcess {
    /// Writes the configuration and starts the agent; does not wait until it is ready.
    pub fn start(config: AgentConfig) -> Result<Self> {
        Self::start_binary(binary()?, config)
    }

    /// The same with another binary, such as one of an earlier version.
    pub fn start_binary(binary: PathBuf, config: AgentConfig) -> Result<Self> {
        let folder = Scratch::new(&format!("agent-{}", config.site()))?;
        config.write(folder.path())?;
        let process = spawn(&binary, &config, folder.path())?;
        Ok(Self { binary, config, process, folder })
    }

    /// Its configuration; changes take effect with [`Self::restart`].
    pub fn config_mut(&mut self) -> &mut AgentConfig {
        &mut self.config
    }

    /// Its configuration.
    pub fn config(&self) -> &AgentConfig {
        &self.config
    }

    /// The configuration file.
    pub fn config_file(&self) -> PathBuf {
        config::file(self.folder.path())
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Its folder: configuration, secrets, data, log.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where peers, operators and routers connect.
    pub fn link_address(&self) -> SocketAddr {
        self.config.link_address()
    }

    /// Where health and metrics are.
    pub fn admin_address(&self) -> SocketAddr {
        self.config.admin_address()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// CPU time and memory.
    pub fn usage(&self) -> Result<Usage> {
        self.process.usage()
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// SIGKILL.
    pub fn kill9(&mut self) -> Result<()> {
        self.process.kill9()
    }

    /// SIGSTOP.
    pub fn stop(&self) -> Result<()> {
        self.process.stop()
    }

    /// SIGCONT.
    pub fn cont(&self) -> Result<()> {
        self.process.cont()
    }

    /// SIGTERM, and waits for its end.
    pub async fn term(&mut self) -> Result<ExitStatus> {
        self.process.terminate()?;
        self.process.wait(SHUTDOWN).await
    }

    /// Waits for an end of its own.
    pub async fn wait_end(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.process.wait(deadline).await
    }

    /// Starts it again with its folder, after killing it when it runs.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill9()?;
        self.config.write(self.folder.path())?;
        self.process = spawn(&self.binary, &self.config, self.folder.path())?;
        Ok(())
    }

    /// Writes its configuration and password anew, whether it runs or not.
    pub fn write_files(&self) -> Result<()> {
        self.config.write(self.folder.path())
    }

    /// Loses its disk: the agent must be down.
    pub fn wipe_data(&mut self) -> Result<()> {
        ensure!(!self.is_running(), "the agent still runs");
        std::fs::remove_dir_all(self.data()).context("remove the data directory")
    }

    /// Waits until `/readyz` says yes; fails at once when the agent ends.
    pub async fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let what = format!("agent {} to be ready", self.config.site());
        let admin = self.admin_address();
        let process = &mut self.process;
        let ended = wait::until(&what, deadline, || {
            let status = process.try_wait();
            async move {
                if let Some(status) = status? {
                    return Ok(Some(status));
                }
                let reply = get(admin, "/readyz").await?;
                ensure!(reply.status == 200, "/readyz says {} {}", reply.status, reply.body.trim());
                anyhow::Ok(None)
            }
        })
        .await?;
        match ended {
            None => Ok(()),
            Some(status) => bail!("agent {} ended with {status}: {}", self.config.site(), self.log_tail()),
        }
    }

    /// A GET on the admin port.
    pub async fn get(&self, path: &str) -> Result<Reply> {
        get(self.admin_address(), path).await
    }

    /// What `/metrics` says now.
    pub async fn metrics(&self) -> Result<Metrics> {
        let reply = self.get("/metrics").await?;
        ensure!(reply.status == 200, "/metrics says {}", reply.status);
        Metrics::parse(&reply.body)
    }

    /// All it has logged, over all restarts.
    pub fn log(&self) -> Result<String> {
        let bytes = std::fs::read(self.process.log()).context("read the agent's log")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// An error naming the first line of level ERROR, or of a panic, that holds none of the `expected` texts.
    pub fn check_log(&self, expected: &[&str]) -> Result<()> {
        let log = self.log()?;
        let unexpected = log.lines().find(|line| is_error(line) && !expected.iter().any(|text| line.contains(text)));
        match unexpected {
            Some(line) => bail!("agent {} logged: {line}", self.config.site()),
            None => Ok(()),
        }
    }

    fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

/// JSON and text logs both name the level; a panic has none.
fn is_error(line: &str) -> bool {
    if let Ok(serde_json::Value::Object(fields)) = serde_json::from_str(line) {
        return fields
            .get("level")
            .and_then(|level| level.as_str())
            .is_some_and(|level| level.eq_ignore_ascii_case("error"));
    }
    line.split_ascii_whitespace().take(3).any(|word| word == "ERROR") || line.contains("panicked at")
}

fn spawn(binary: &Path, config: &AgentConfig, folder: &Path) -> Result<Process> {
    let mut command = Command::new(binary);
    command.arg("agent").arg("--config").arg(config::file(folder)).env_remove("RUST_LOG");
    Process::spawn(&format!("agent of {}", config.site()), &mut command, &folder.join("agent.log"))
}

/// `FARSHORE_BIN`, or `farshore` in the folder above the test executable's.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FARSHORE_BIN") {
        return Ok(path.into());
    }
    let this = std::env::current_exe().context("find the test executable")?;
    let found = this.ancestors().skip(1).take(2).map(|folder| folder.join("farshore")).find(|path| path.is_file());
    found.with_context(|| format!("no farshore beside {}: build it, or set FARSHORE_BIN", this.display()))
}

#[cfg(test)]
mod tests {
    use super::is_error;

    #[test]
    fn errors_are_found_in_json_and_text_logs_and_only_they() {
        assert!(is_error(r#"{"timestamp":"2025-11-20T21:00:00Z","level":"ERROR","message":"outbox full"}"#));
        assert!(is_error("2025-11-20T21:00:00Z ERROR farshore::outbox: full"));
        assert!(is_error("thread 'main' panicked at src/main.rs:1:1:"));
        assert!(!is_error(r#"{"level":"INFO","message":"ERROR is only a word here"}"#));
        assert!(!is_error("2025-11-20T21:00:00Z INFO farshore::outbox: no ERROR at all"));
    }
}
