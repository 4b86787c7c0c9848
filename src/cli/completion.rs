//! `farshore completion SHELL`: a script for the shell to source.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::exit::{Exit, Failure};
use super::{Cli, output};

/// Flags of the verb.
#[derive(Args, Debug)]
pub struct CompletionArgs {
    /// Shell to write for
    #[arg(value_enum)]
    pub shell: Shell,
}

pub(super) fn run(args: &CompletionArgs) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "farshore", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Ok)
}
