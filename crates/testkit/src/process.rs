//! A child process that cannot outlive the test.
//!
//! Killed on drop, also while panicking; killed by the reaper ([`crate::scratch`]) when the test process itself dies.
//! Output goes to a log file, appended to over restarts. Signals go to its own id only, and only before it is reaped.
//! (`PR_SET_PDEATHSIG` would fire when the spawning *thread* ends, which a test's thread does.)

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use crate::scratch;

/// Lines of its log that a process shows when the test panics.
const TAIL_LINES: usize = 20;

/// A process that waits for its disk stops when that has answered.
const STOP: Duration = Duration::from_secs(10);

/// What a process has used, from /proc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// User and system time, in steps of 10 ms.
    pub cpu: Duration,
    /// Resident memory now, bytes.
    pub rss: u64,
    /// Highest resident memory so far, bytes.
    pub peak_rss: u64,
}

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    pid: u32,
    child: Option<Child>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with both outputs appended to `log`.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let out = OpenOptions::new().create(true).append(true).open(log);
        let out = out.with_context(|| format!("open {}", log.display()))?;
        let err = out.try_clone().context("share the log file")?;
        // A process group of its own: an interrupt on the terminal is for the test, which then ends its children.
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name} ({})", command.get_program().display()))?;
        let pid = child.id();
        let process = Self { name: name.to_owned(), log: log.to_owned(), pid, child: Some(child), status: None };
        scratch::watch(pid)?;
        Ok(process)
    }

    /// Its process id; stays the same after its end.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it has not ended yet (a stopped process has not).
    pub fn is_running(&mut self) -> bool {
        matches!(self.try_wait(), Ok(None))
    }

    /// SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGSTOP; returns when every thread has stopped.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        // The signal is only sent by then: threads stop one by one, and one in a disk write later.
        let end = Instant::now() + STOP;
        while !is_stopped(self.pid)? {
            if Instant::now() >= end {
                bail!("{} has not stopped after {STOP:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// SIGCONT.
    pub fn cont(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// SIGKILL, and waits for its end. Nothing to do when it has ended.
    pub fn kill9(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        scratch::unwatch(self.pid);
        child.kill().with_context(|| format!("kill {}", self.name))?;
        self.status = Some(child.wait().with_context(|| format!("wait for {}", self.name))?);
        Ok(())
    }

    /// Waits for its end; an error when it still runs at the deadline.
    pub async fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= end {
                bail!("{} still runs after {deadline:?}", self.name);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// How it ended, when it has.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else {
            return Ok(self.status);
        };
        let status = child.try_wait().with_context(|| format!("wait for {}", self.name))?;
        if status.is_some() {
            scratch::unwatch(self.pid);
            self.child = None;
            self.status = status;
        }
        Ok(status)
    }

    /// CPU time and memory so far.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.pid)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let Some(child) = &self.child else { bail!("{} has ended", self.name) };
        let pid = Pid::from_child(child);
        kill_process(pid, signal).with_context(|| format!("signal {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = fs::read(&self.log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
            eprintln!("--- end of {} ({}):\n{}", self.log.display(), self.name, tail.join("\n"));
        }
        if let Err(error) = self.kill9() {
            eprintln!("{error:#}");
        }
    }
}

/// CPU time and memory of a running process.
pub fn usage(pid: u32) -> Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read the process's stat")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read the process's status")?;
    Ok(Usage { cpu: cpu_of(&stat)?, rss: kib(&status, "VmRSS:")?, peak_rss: kib(&status, "VmHWM:")? })
}

fn is_stopped(pid: u32) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("list the process's threads")? {
        // A thread that has ended meanwhile has no state.
        let stat = thread.and_then(|thread| fs::read_to_string(thread.path().join("stat")));
        let state = stat.ok().and_then(|stat| stat.rsplit_once(") ")?.1.chars().next());
        if state.is_some_and(|state| state != 'T') {
            return Ok(false);
        }
    }
    Ok(true)
}

fn cpu_of(stat: &str) -> Result<Duration> {
    // The second field is the program's name in parentheses and may hold anything; utime and stime are 14 and 15.
    let (_, rest) = stat.rsplit_once(')').context("read the process's stat: no name in it")?;
    let ticks: u64 = rest
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().context("read the process's times"))
        .sum::<Result<u64>>()?;
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

fn kib(status: &str, key: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let line = line.with_context(|| format!("read the process's status: no {key} (has it ended?)"))?;
    let number = line.trim().trim_end_matches("kB").trim();
    Ok(number.parse::<u64>().with_context(|| format!("read {key} {number}"))? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use crate::wait;

    fn shell(script: &str, scratch: &Scratch) -> Process {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        Process::spawn("shell", &mut command, &scratch.path().join("log")).expect("a shell starts")
    }

    fn state(pid: u32) -> Option<char> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    #[tokio::test]
    async fn output_goes_to_the_log_and_the_status_is_seen() {
        let scratch = Scratch::new("process").expect("a scratch folder");
        let mut process = shell("echo out; echo err >&2; exit 3", &scratch);
        let status = process.wait(Duration::from_secs(5)).await.expect("ends");
        assert_eq!(status.code(), Some(3));
        assert_eq!(fs::read_to_string(process.log()).expect("a log"), "out\nerr\n");
        assert!(process.terminate().is_err(), "its id may belong to another process by now");
    }

    #[tokio::test]
    async fn stops_goes_on_and_dies_on_drop() {
        let scratch = Scratch::new("process").expect("a scratch folder");
        let process = shell("while :; do :; done", &scratch);
        let pid = process.pid();
        process.stop().expect("a running process can be stopped");
        assert_eq!(state(pid), Some('T'));
        process.cont().expect("a stopped process can go on");
        let before = process.usage().expect("it runs");
        let busy = || async {
            let now = usage(pid)?;
            anyhow::ensure!(now.cpu >= before.cpu + Duration::from_millis(20), "used {now:?}");
            anyhow::Ok(())
        };
        wait::until("CPU time", Duration::from_secs(10), busy).await.expect("goes on");
        assert!(before.peak_rss >= before.rss && before.rss > 0, "{before:?}");
        drop(process);
        assert_eq!(state(pid), None);
    }

    #[test]
    fn dies_with_a_panicking_test() {
        let (send, receive) = std::sync::mpsc::channel();
        // Not the panicking thread's own, which would keep it for people to look at.
        let scratch = Scratch::new("process").expect("a scratch folder");
        let log = scratch.path().join("log");
        let thread = std::thread::spawn(move || {
            let mut command = Command::new("/bin/sleep");
            let process = Process::spawn("sleep", command.arg("600"), &log).expect("sleep starts");
            send.send(process.pid()).expect("somebody listens");
            panic!("this panic is part of the test");
        });
        let pid = receive.recv().expect("a pid");
        assert!(thread.join().is_err());
        assert_eq!(state(pid), None);
    }

    #[test]
    fn a_name_with_parentheses_and_blanks_does_not_confuse_the_times() {
        let stat = "42 (a) b ( c) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0";
        assert_eq!(cpu_of(stat).expect("well formed"), Duration::from_secs(3));
    }
}
