//! The `farshore` binary: the command line decides, the library does.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // Whatever this process writes is its own user's business only.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    farshore::cli::run(farshore::cli::Cli::parse(), |config| farshore::agent::run(&config))
}
