//! The agent as a process: signals that stop it, panics that end it, and starting again in place.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT; caught from when this is made until the process ends.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them.
    ///
    /// # Errors
    /// The system does not let us.
    pub(super) fn catch() -> Result<Self, String> {
        let catch = |kind| signal(kind).map_err(|error| format!("signals cannot be received: {error}"));
        Ok(Self { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    /// Waits for one.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Whether one came and was not waited for.
    pub(super) fn came(&mut self) -> bool {
        self.next().now_or_never().is_some()
    }
}

/// Time for what is left in the runtime when all work has ended.
pub(super) const ENDING: Duration = Duration::from_secs(2);

/// All state is closed; what is left are tasks of libraries.
static ENDED: AtomicBool = AtomicBool::new(false);

/// A panic is a broken invariant: the process ends at once and starts again from what is stored.
pub(super) fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // The driver's tasks take each other for granted, which a runtime that ends does not.
        if !ENDED.load(Ordering::SeqCst) {
            print(info);
            std::process::abort();
        }
    }));
}

/// Ends the runtime after the agent.
pub(super) fn end(runtime: tokio::runtime::Runtime) {
    ENDED.store(true, Ordering::SeqCst);
    runtime.shutdown_timeout(ENDING);
}

/// Puts a new agent, as if just started, into the place of this one: same process id, same arguments, nothing left over.
/// Returns only when that fails; then whatever started this process has to do it again.
pub(super) fn start_again() -> ExitCode {
    let error = replace([]);
    tracing::error!(%error, "the agent cannot start again by itself");
    ExitCode::FAILURE
}

/// What the C library's allocator is told, see mallopt(3): two arenas, as the runtime has two workers; buffers from 2 MiB go
/// back to the system when they are freed, and so does what is free beyond 4 MiB. Without limits glibc keeps, with a large
/// backlog, as much again as is in use; with tighter ones the pages of every buffer are faulted in anew, which was half of
/// the source agent's time. Large pages are asked for (glibc 2.35) for the same reason. Figures are in docs/PERFORMANCE.md. Other
/// C libraries ignore all this.
const ALLOCATOR: [(&str, &str); 4] = [
    ("MALLOC_ARENA_MAX", "2"),
    ("MALLOC_MMAP_THRESHOLD_", "2097152"),
    ("MALLOC_TRIM_THRESHOLD_", "4194304"),
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
];

/// Returns in a process whose allocator has its limits; whoever sets one himself keeps it. They are read when a process
/// starts and have no safe call, so they go into the environment of the same process started once more.
pub(super) fn bound_allocator() {
    let unset: Vec<_> = ALLOCATOR.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if unset.is_empty() {
        return;
    }
    let error = replace(unset);
    // Only more memory than need be; no reason not to run.
    eprintln!("farshore: cannot start again with limits for the allocator, going on without them: {error}");
}

/// Starts this program in the place of this process; returns only when that fails.
fn replace<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> io::Error {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return error,
    };
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).envs(variables).exec()
}
