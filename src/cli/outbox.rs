//! `farshore outbox stats|peek`: the durable logs of an agent, and the changes in them.

use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use farshore_api::control::v1::{
    MemberPosition, OutboxPeekRequest, OutboxStatsRequest, OutboxStatsResponse, PeekedChange,
};
use serde_json::Value;

use super::exit::{Exit, Failure};
use super::json;
use super::output::{self, Cell, Plain, Reader, Style, table};
use super::remote::{Remote, RemoteArgs};
use super::status::logs;
use super::words;
use crate::model::Position;

/// `farshore outbox ...`
#[derive(Subcommand, Debug)]
pub enum OutboxCommand {
    /// Size and ends of outbox and inbox, and how far each site is
    Stats(StatsArgs),
    /// Changes of a log as extended JSON, one per line (needs the role operator: it shows documents)
    #[command(
        after_help = "Examples:\n  farshore outbox peek --limit 5\n  farshore outbox peek --log inbox --after 1763669100:1/1"
    )]
    Peek(PeekArgs),
}

/// Flags of `outbox stats`.
#[derive(Args, Debug)]
pub struct StatsArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Plain,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

/// Flags of `outbox peek`.
#[derive(Args, Debug)]
pub struct PeekArgs {
    /// Log to look into
    #[arg(long, value_enum, default_value_t)]
    pub log: LogName,
    /// Start behind this position, as <seconds>:<increment>/<ordinal>
    #[arg(long, value_name = "POSITION", value_parser = Position::from_str)]
    pub after: Option<Position>,
    /// Show at most so many changes
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

/// A log by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogName {
    /// Changes of this site.
    #[default]
    Outbox,
    /// Changes of the other site.
    Inbox,
}

impl LogName {
    fn as_str(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::Inbox => "inbox",
        }
    }
}

pub(super) async fn run(command: &OutboxCommand, style: Style) -> Result<Exit, Failure> {
    match command {
        OutboxCommand::Stats(args) => stats(args, style).await,
        OutboxCommand::Peek(args) => peek(args).await,
    }
}

async fn stats(args: &StatsArgs, style: Style) -> Result<Exit, Failure> {
    let remote = Remote::connect(&args.remote).await?;
    let stats = remote.ask(remote.control.clone().outbox_stats(OutboxStatsRequest {})).await?.into_inner();
    let text = match args.output {
        Plain::Table => render(&stats, jiff::Timestamp::now().as_millisecond(), style),
        Plain::Json => output::document("OutboxStats", json::outbox(&stats)),
    };
    output::print(&text)?;
    Ok(Exit::Ok)
}

async fn peek(args: &PeekArgs) -> Result<Exit, Failure> {
    let request =
        OutboxPeekRequest { log: args.log.as_str().to_owned(), after: args.after.map(Into::into), limit: args.limit };
    let remote = Remote::connect(&args.remote).await?;
    let mut changes = remote.ask(remote.control.clone().outbox_peek(request)).await?.into_inner();
    loop {
        match changes.message().await {
            Ok(Some(change)) => {
                if output::print(&peeked(&change))? == Reader::Gone {
                    return Ok(Exit::Ok);
                }
            }
            Ok(None) => return Ok(Exit::Ok),
            Err(status) => return Err(remote.explain(status).await),
        }
    }
}

/// The logs and how far each site is. Pure.
pub fn render(stats: &OutboxStatsResponse, now_ms: i64, style: Style) -> String {
    let mut parts = vec![logs(stats.outbox.as_ref(), stats.inbox.as_ref(), now_ms, style)];
    if !stats.members.is_empty() {
        let row = |m: &MemberPosition| -> Vec<Cell> {
            vec![
                (&m.site).into(),
                words::position(m.received).into(),
                words::position_time(m.received, now_ms).into(),
                words::position(m.applied).into(),
                words::position_time(m.applied, now_ms).into(),
            ]
        };
        let header = ["SITE", "RECEIVED", "RECEIVED TIME", "APPLIED", "APPLIED TIME"];
        parts.push(table(style, &header, stats.members.iter().map(row).collect()));
    }
    parts.retain(|part| !part.is_empty());
    if parts.is_empty() { "no logs yet\n".to_owned() } else { parts.join("\n") }
}

/// One change as one line: its position, then the change as the agent wrote it (numbers keep their types and digits).
pub fn peeked(change: &PeekedChange) -> String {
    let position = Value::String(words::position(change.position));
    // The text is spliced, not parsed: what an agent sends as extended JSON is passed on byte for byte, on one line.
    let line = change.json.replace(['\n', '\r'], " ");
    format!(
        "{{\"apiVersion\":\"{}\",\"kind\":\"Change\",\"position\":{position},\"change\":{line}}}\n",
        output::API_VERSION
    )
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn stats_are_tables() {
        let status = samples::healthy();
        let member = MemberPosition { site: "south".into(), received: samples::at(-1, 4), applied: samples::at(-2, 1) };
        let stats = OutboxStatsResponse { outbox: status.outbox, inbox: None, members: vec![member] };
        insta::assert_snapshot!(render(&stats, status.now_ms, Style::default()));
        insta::assert_snapshot!(output::document("OutboxStats", json::outbox(&stats)));
        assert_eq!(render(&OutboxStatsResponse::default(), 0, Style::default()), "no logs yet\n");
    }

    #[test]
    fn a_peeked_change_is_one_line_of_json_with_its_types() {
        let json =
            "{\"operationType\": \"insert\",\n \"fullDocument\": {\"_id\": {\"$numberLong\": \"9007199254740993\"}}}";
        let line = peeked(&PeekedChange { position: samples::at(0, 2), json: json.into() });
        assert_eq!(line.lines().count(), 1);
        let value: Value = serde_json::from_str(&line).expect("json");
        assert_eq!(value["position"], "1763669100:1/2");
        assert_eq!(value["change"]["fullDocument"]["_id"]["$numberLong"], "9007199254740993");
    }
}
