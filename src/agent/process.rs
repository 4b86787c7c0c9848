//! The agent as a process: signals that stop it, panics that end it, and starting again in place.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

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

/// A panic is a broken invariant: the process ends at once and starts again from what is stored.
pub(super) fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// Puts a new agent, as if just started, into the place of this one: same process id, same arguments, nothing left over.
/// Returns only when that fails; then whatever started this process has to do it again.
pub(super) fn start_again() -> ExitCode {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            tracing::error!(%error, "the agent cannot find its own program to start it again");
            return ExitCode::FAILURE;
        }
    };
    let mut arguments = std::env::args_os();
    let mut command = Command::new(&program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let error = command.args(arguments).exec();
    tracing::error!(%error, program = %program.display(), "the agent cannot start again by itself");
    ExitCode::FAILURE
}
