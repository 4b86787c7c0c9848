//! `farshore version`: what this program is. Never asks the network.

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::output::{self, Plain};

/// Flags of the verb.
#[derive(Args, Debug)]
pub struct VersionArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Plain,
}

pub(super) fn run(args: &VersionArgs) -> Result<Exit, Failure> {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), option_env!("FARSHORE_COMMIT").unwrap_or("unknown"));
    let text = match args.output {
        Plain::Table => format!("farshore {version} (commit {commit})\n"),
        Plain::Json => output::document("Version", json!({"version": version, "commit": commit})),
    };
    output::print(&text)?;
    Ok(Exit::Ok)
}
