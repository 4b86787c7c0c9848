//! Bounds what the C library's allocator keeps for itself.
//!
//! Batches are large buffers of many sizes. By default glibc gives each thread an arena of its own and, after the first
//! large buffer was freed, keeps all that follow: with a large backlog as much again as is in use. The limits are read
//! when a process starts and have no safe call, so the agent sets them in its environment and starts itself once more, as
//! the same process. Other C libraries ignore them.
//!
//! What the limits mean: mallopt(3), "M_ARENA_MAX" and "M_MMAP_THRESHOLD". Figures: `docs/PERFORMANCE.md`.

use std::env;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Two arenas, as the runtime has two workers; buffers from 1 MiB go back to the system when they are freed.
const LIMITS: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "1048576")];

/// Returns in a process that has the limits; whoever sets one himself keeps it.
pub(super) fn bound() {
    let unset: Vec<_> = LIMITS.into_iter().filter(|(name, _)| env::var_os(name).is_none()).collect();
    let Ok(this) = env::current_exe() else { return };
    if unset.is_empty() {
        return;
    }
    let mut arguments = env::args_os();
    let mut again = Command::new(this);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    let error = again.args(arguments).envs(unset).exec();
    // Only more memory than need be; no reason not to run.
    eprintln!("farshore: cannot start again with limits for the allocator, going on without them: {error}");
}
