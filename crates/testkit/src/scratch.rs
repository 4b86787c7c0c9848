//! Scratch folders, and the reaper that cleans up after a test process however it ended.
//!
//! Statics are not dropped and a killed process drops nothing, so each test process starts one small shell that reads
//! from a pipe held by the test process. When the pipe closes (for whatever reason the process ended), the shell kills
//! the children it was told about and removes the process's scratch folder. It runs in its own process group, so that
//! an interrupt on the terminal does not take it along.
//!
//! After a panic the folder stays, without databases: it holds logs and configuration. `FARSHORE_KEEP=1` keeps all.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// Reads `watch PID`, `done PID` and `keep`; acts at the end of input. A folder named `db` holds data of a mongod.
const REAPER: &str = r#"
trap '' INT TERM HUP
pids=' '
keep=
while read -r verb pid; do
    case $verb in
    watch) pids="$pids$pid " ;;
    done) case $pids in *" $pid "*) pids="${pids%%" $pid "*} ${pids#*" $pid "}" ;; esac ;;
    keep) keep=1 ;;
    esac
done
for pid in $pids; do kill -KILL "$pid" 2>/dev/null; done
if [ -n "$FARSHORE_KEEP" ]; then exit; fi
for attempt in 1 2 3 4 5; do
    if [ -n "$keep" ]; then
        find "$1" -name db -type d -prune -exec rm -rf {} + && exit
    else
        rm -rf "$1" && exit
    fi
    sleep 0.2
done
"#;

struct Reaper {
    root: PathBuf,
    orders: Mutex<ChildStdin>,
}

impl Reaper {
    fn start() -> Result<Self> {
        let root = tempfile::Builder::new()
            .prefix(&format!("farshore-test-{}-", std::process::id()))
            .tempdir()
            .context("make the scratch folder")?
            .keep();
        let mut shell = Command::new("/bin/sh")
            .arg("-c")
            .arg(REAPER)
            .arg("farshore-reaper")
            .arg(&root)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start the reaper")?;
        let orders = shell.stdin.take().expect("stdin is piped");
        Ok(Self { root, orders: Mutex::new(orders) })
    }

    fn get() -> Result<&'static Self> {
        static REAPER: OnceLock<Result<Reaper, String>> = OnceLock::new();
        REAPER
            .get_or_init(|| Self::start().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))
    }

    fn order(&self, line: &str) -> Result<()> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(orders, "{line}").context("tell the reaper")
    }
}

/// Makes the reaper kill this child when the test process ends.
pub(crate) fn watch(pid: u32) -> Result<()> {
    Reaper::get()?.order(&format!("watch {pid}"))
}

/// To be called before the child is reaped: afterwards its id may belong to somebody else.
pub(crate) fn unwatch(pid: u32) {
    if let Ok(reaper) = Reaper::get() {
        // A reaper that died cannot kill the wrong process either.
        let _ = reaper.order(&format!("done {pid}"));
    }
}

/// A folder of its own that goes when this is dropped, unless the thread is panicking.
#[derive(Debug)]
pub struct Scratch {
    folder: Option<TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// Makes a folder whose name begins with `name`.
    pub fn new(name: &str) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("{name}-"))
            .tempdir_in(&Reaper::get()?.root)
            .context("make a scratch folder")?;
        let path = folder.path().to_path_buf();
        Ok(Self { folder: Some(folder), path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(folder) = self.folder.take() else {
            return;
        };
        if !std::thread::panicking() && std::env::var_os("FARSHORE_KEEP").is_none() {
            return drop(folder);
        }
        let path = folder.keep();
        eprintln!("logs and configuration stay in {}", path.display());
        if let Ok(reaper) = Reaper::get() {
            let _ = reaper.order("keep");
        }
    }
}
