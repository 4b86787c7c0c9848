//! The command line: one file per verb, rendering apart from asking.
//!
//! Data goes to stdout, talk to stderr; every JSON document carries its version; exit codes are [`Exit`]. The `agent` verb
//! is the caller's: this module knows nothing of what an agent is made of.

pub mod completion;
pub mod config;
#[cfg(test)]
mod e2e;
mod exit;
mod json;
pub mod lag;
pub mod outbox;
pub mod output;
pub mod remote;
#[cfg(test)]
mod samples;
pub mod status;
pub mod version;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

pub use exit::{Exit, Failure};
use output::{Format, Plain, Style, When};

/// The command line of `farshore`.
#[derive(Parser, Debug)]
#[command(
    name = "farshore",
    version,
    about = "Replicates one site's MongoDB to another, exactly once",
    after_help = "Exit codes: 0 ok, 1 failed, 2 usage, 3 warnings (--fail-on-warn), 4 not ready or check failed, 5 refused by a guard,\n\
                  6 declined, 7 timed out with unknown outcome, 8 stopped half-way, 9 not authenticated",
    propagate_version = true
)]
pub struct Cli {
    /// When to use colour
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: When,
    /// Write ASCII only
    #[arg(long, global = true)]
    pub ascii: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// A verb.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the agent of a site
    Agent(AgentArgs),
    /// Look at configuration files
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Show the state of a site, its streams and its links
    Status(status::StatusArgs),
    /// Show how far behind the streams are
    Lag(lag::LagArgs),
    /// Look into the durable logs of an agent
    #[command(subcommand)]
    Outbox(outbox::OutboxCommand),
    /// Show the version
    Version(version::VersionArgs),
    /// Write a completion script for a shell
    Completion(completion::CompletionArgs),
}

/// Flags of `agent`.
#[derive(Args, Debug)]
pub struct AgentArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE", env = "FARSHORE_CONFIG")]
    pub config: PathBuf,
}

/// Does what the command line says. `agent` runs an agent with that configuration file.
pub fn run(cli: Cli, agent: impl FnOnce(PathBuf) -> ExitCode) -> ExitCode {
    let style = Style::detect(cli.color, cli.ascii);
    let json = wants_json(&cli.command);
    let done = match cli.command {
        Command::Agent(args) => return agent(args.config),
        Command::Config(config::ConfigCommand::Check(args)) => config::run(&args, style),
        Command::Version(args) => version::run(&args),
        Command::Completion(args) => completion::run(&args),
        Command::Status(args) => block_on(status::run(&args, style)),
        Command::Lag(args) => block_on(lag::run(&args, style)),
        Command::Outbox(command) => block_on(outbox::run(&command, style)),
    };
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => {
            output::complain(&failure, json);
            failure.exit.into()
        }
    }
}

fn wants_json(command: &Command) -> bool {
    match command {
        Command::Agent(_) | Command::Completion(_) => false,
        Command::Config(config::ConfigCommand::Check(args)) => args.output == Plain::Json,
        Command::Status(args) => args.output == Format::Json,
        Command::Lag(args) => args.output == Plain::Json,
        Command::Outbox(outbox::OutboxCommand::Stats(args)) => args.output == Plain::Json,
        // Its data is JSON always, so its errors are too.
        Command::Outbox(outbox::OutboxCommand::Peek(_)) => true,
        Command::Version(args) => args.output == Plain::Json,
    }
}

fn block_on(work: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(format!("cannot start: {error}"), ""))?;
    runtime.block_on(work)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    const REMOTE: [&str; 8] = ["--address", "a:1", "--cert", "c", "--key", "k", "--ca", "a"];

    fn parse(words: &[&str], remote: bool) -> Result<Cli, clap::Error> {
        let remote: &[&str] = if remote { &REMOTE } else { &[] };
        Cli::try_parse_from(["farshore"].iter().chain(words).chain(remote))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_parses() {
        for words in [
            vec!["status", "-o", "wide", "--ascii"],
            vec!["lag"],
            vec!["lag", "north/south", "--watch", "--interval", "500ms", "--count", "3", "-o", "json"],
            vec!["outbox", "stats", "-o", "json"],
            vec!["outbox", "peek", "--log", "inbox", "--after", "1763669100:1/1", "--limit", "5"],
        ] {
            assert!(parse(&words, true).is_ok(), "{words:?}");
        }
        for words in [
            vec!["agent", "--config", "f.toml"],
            vec!["config", "check", "f.toml"],
            vec!["config", "check", "--config", "f.toml", "-o", "json", "--fail-on-warn"],
            vec!["version"],
            vec!["completion", "bash"],
            vec!["--color", "never", "version", "-o", "json"],
        ] {
            assert!(parse(&words, false).is_ok(), "{words:?}");
        }
    }

    #[test]
    fn usage_errors_exit_with_2_and_suggest() {
        let kind = |words: &[&str], remote| parse(words, remote).expect_err("wrong").kind();
        assert_eq!(kind(&["config", "check"], false), ErrorKind::MissingRequiredArgument);
        assert_eq!(kind(&["outbox", "peek", "--limit", "0"], true), ErrorKind::ValueValidation);
        assert_eq!(kind(&["outbox", "peek", "--after", "x"], true), ErrorKind::ValueValidation);
        assert_eq!(kind(&["lag", "--interval", "5"], true), ErrorKind::ValueValidation);
        let error = parse(&["statsu"], true).expect_err("a typing error");
        assert_eq!(error.exit_code(), i32::from(Exit::Usage as u8));
        assert!(error.to_string().contains("status"), "{error}");
    }

    #[test]
    fn the_agent_verb_is_handed_over() {
        let cli = parse(&["agent", "--config", "f.toml"], false).expect("valid");
        let mut seen = None;
        let _code = run(cli, |path| {
            seen = Some(path);
            ExitCode::SUCCESS
        });
        assert_eq!(seen, Some(PathBuf::from("f.toml")));
    }

    #[test]
    fn an_agent_that_is_not_there_is_a_failure() {
        let cli = parse(&["status", "-o", "json"], true).expect("valid");
        let code = run(cli, |_| ExitCode::SUCCESS);
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(1)));
    }
}
