//! `farshore status`: one agent's view of its site, its streams and its links.

use clap::Args;
use farshore_api::control::v1::{LinkStatus, LogStatus, Problem, StatusRequest, StatusResponse, StreamStatus};

use super::exit::{Exit, Failure};
use super::json;
use super::output::{self, Cell, Format, Style, Tone, table};
use super::remote::{Remote, RemoteArgs};
use super::words;

/// A certificate that ends sooner is worth a look.
const CERTIFICATE_DOUBT_MS: i64 = 21 * 86_400_000;

/// Flags of the verb.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 healthy, 1 not reachable, 3 warnings with --fail-on-warn, 4 a stream is failed or refused or a problem \
                        is an error, 9 certificate not accepted"
)]
pub struct StatusArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
    /// Exit with 3 when there are warnings
    #[arg(long)]
    pub fail_on_warn: bool,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

pub(super) async fn run(args: &StatusArgs, style: Style) -> Result<Exit, Failure> {
    let remote = Remote::connect(&args.remote).await?;
    let status = remote.ask(remote.control.clone().status(StatusRequest {})).await?.into_inner();
    let text = match args.output {
        Format::Table => render(&status, style, false),
        Format::Wide => render(&status, style, true),
        Format::Json => output::document("Status", json::status(&status)),
    };
    output::print(&text)?;
    Ok(verdict(&status, args.fail_on_warn))
}

/// The exit code a status stands for.
pub fn verdict(status: &StatusResponse, fail_on_warn: bool) -> Exit {
    let broken = |stream: &StreamStatus| matches!(stream.state.as_str(), "failed" | "refused");
    if status.streams.iter().any(broken) || status.problems.iter().any(|p| p.severity == "error") {
        Exit::NotReady
    } else if fail_on_warn && !status.problems.is_empty() {
        Exit::Warnings
    } else {
        Exit::Ok
    }
}

/// The status as tables. Pure.
pub fn render(status: &StatusResponse, style: Style, wide: bool) -> String {
    let mut parts = vec![site(status, style, wide)];
    if !status.streams.is_empty() {
        parts.push(streams(status, style, wide));
    }
    if !status.links.is_empty() {
        parts.push(links(status, style, wide));
    }
    parts.push(logs(status.outbox.as_ref(), status.inbox.as_ref(), status.now_ms, style));
    let problems = problems(status, style);
    if !problems.is_empty() {
        parts.push(problems);
    }
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

fn site(status: &StatusResponse, style: Style, wide: bool) -> String {
    let mongodb = match &status.mongodb {
        None => Cell::new("unknown", Tone::Doubt),
        Some(m) if m.reachable => Cell::from(format!("{} {}", m.replica_set, m.version)),
        Some(m) => Cell::new(format!("unreachable: {}", m.error), Tone::Bad),
    };
    let window = match status.mongodb.as_ref().map_or(0, |m| m.oplog_window_seconds) {
        0 => "unknown".to_owned(),
        seconds => words::span(i64::try_from(seconds).unwrap_or(i64::MAX / 1000).saturating_mul(1000)),
    };
    let leader = if status.leader { "yes" } else { "no" };
    let mut header = vec!["SITE", "GROUP", "ROLE", "EPOCH", "TERM", "LEADER", "VERSION", "MONGODB", "OPLOG WINDOW"];
    let mut row: Vec<Cell> = vec![
        (&status.site).into(),
        (&status.group).into(),
        (&status.role).into(),
        status.epoch.to_string().into(),
        status.term.to_string().into(),
        leader.into(),
        (&status.version).into(),
        mongodb,
        window.into(),
    ];
    if wide {
        header.extend(["AGENT", "MEMORY", "TIME"]);
        row.push((&status.agent).into());
        row.push(
            format!("{} of {}", words::bytes(status.memory_bytes), words::bytes(status.memory_limit_bytes)).into(),
        );
        row.push(words::time(status.now_ms).into());
    }
    table(style, &header, vec![row])
}

pub(super) fn state(state: &str) -> Cell {
    let tone = match state {
        "streaming" | "connected" => Tone::Good,
        "failed" | "refused" => Tone::Bad,
        _ => Tone::Doubt,
    };
    Cell::new(state, tone)
}

fn streams(status: &StatusResponse, style: Style, wide: bool) -> String {
    let mut header = vec!["STREAM", "STATE", "EXPOSURE", "CAPTURE", "SHIP", "APPLY", "APPLIED", "HEARD", "DIVERGED"];
    if wide {
        header.extend([
            "CHANGES",
            "TXNS",
            "TARGET TXNS",
            "DDL",
            "CORRUPT",
            "CUT",
            "RECEIVED AT",
            "APPLIED AT",
            "HASH",
            "INCARNATION",
        ]);
    }
    let row = |s: &StreamStatus| {
        let heard =
            if s.datum_age_ms < 0 { "never".to_owned() } else { format!("{} ago", words::span(s.datum_age_ms)) };
        let diverged = if s.diverged == 0 {
            Cell::from("0")
        } else {
            Cell::new(format!("{} ({} healed)", s.diverged, s.healed), Tone::Doubt)
        };
        let mut row: Vec<Cell> = vec![
            format!("{}/{}", s.source, s.target).into(),
            state(&s.state),
            words::span(s.data_loss_exposure_ms).into(),
            words::distance(s.head, s.captured).into(),
            words::distance(s.captured, s.received).into(),
            words::span(s.apply_lag_ms).into(),
            words::position_time(s.applied, status.now_ms).into(),
            heard.into(),
            diverged,
        ];
        if wide {
            let cut = if s.at_cut { "yes" } else { "no" };
            let numbers = [s.changes, s.transactions, s.target_transactions, s.ddl, s.corrupt_records];
            row.extend(numbers.map(|n| Cell::from(n.to_string())));
            row.extend([cut.into(), words::position(s.received).into(), words::position(s.applied).into()]);
            row.extend([Cell::from(&s.hash), Cell::from(&s.incarnation)]);
        }
        row
    };
    table(style, &header, status.streams.iter().map(row).collect())
}

fn links(status: &StatusResponse, style: Style, wide: bool) -> String {
    let mut header = vec!["LINK", "STATE", "ADDRESS", "RTT", "CERTIFICATE"];
    if wide {
        header.push("SINCE");
    }
    let row = |l: &LinkStatus| {
        let left = l.certificate_expires_ms - status.now_ms;
        let certificate = match l.certificate_expires_ms {
            ..=0 => Cell::from("-"),
            _ if left <= 0 => Cell::new("expired", Tone::Bad),
            _ if left < CERTIFICATE_DOUBT_MS => {
                Cell::new(format!("{} left, renew soon", words::span(left)), Tone::Doubt)
            }
            _ => Cell::from(format!("{} left", words::span(left))),
        };
        let mut row: Vec<Cell> =
            vec![(&l.peer).into(), state(&l.state), (&l.address).into(), words::rtt(l.rtt_us).into(), certificate];
        if wide {
            row.push(words::since(l.since_ms, status.now_ms).into());
        }
        row
    };
    table(style, &header, status.links.iter().map(row).collect())
}

/// Outbox and inbox as a table; nothing when there is neither.
pub(super) fn logs(outbox: Option<&LogStatus>, inbox: Option<&LogStatus>, now_ms: i64, style: Style) -> String {
    let row = |(name, log): (&str, &LogStatus)| -> Vec<Cell> {
        let limit = if log.limit_bytes == 0 { "-".to_owned() } else { words::bytes(log.limit_bytes) };
        let encrypted = if log.encrypted { "yes" } else { "no" };
        let accepts = if log.stopped.is_empty() {
            Cell::new("yes", Tone::Good)
        } else {
            Cell::new(format!("no: {}", log.stopped), Tone::Bad)
        };
        vec![
            name.into(),
            words::bytes(log.bytes).into(),
            limit.into(),
            log.batches.to_string().into(),
            encrypted.into(),
            words::position_time(log.first, now_ms).into(),
            words::position_time(log.last, now_ms).into(),
            accepts,
        ]
    };
    let rows: Vec<_> =
        [("outbox", outbox), ("inbox", inbox)].into_iter().filter_map(|(name, log)| Some(row((name, log?)))).collect();
    if rows.is_empty() {
        return String::new();
    }
    table(style, &["LOG", "SIZE", "LIMIT", "BATCHES", "ENCRYPTED", "FROM", "TO", "ACCEPTS"], rows)
}

/// What a person must know: problems as the agent names them, among them failed and refused streams and collections that
/// are left out; then what streams and links wait for.
fn problems(status: &StatusResponse, style: Style) -> String {
    let mut text = String::new();
    let mut say = |tone: Tone, subject: &str, message: &str, hint: &str| {
        let sign = style.paint(tone, style.sign(tone));
        text.push_str(&format!("{sign} {}: {}\n", output::printable(subject), output::printable(message)));
        if !hint.is_empty() {
            text.push_str(&format!("    {}\n", output::printable(hint)));
        }
    };
    let tone = |problem: &Problem| if problem.severity == "error" { Tone::Bad } else { Tone::Doubt };
    for problem in &status.problems {
        say(tone(problem), &problem.subject, &problem.message, &problem.hint);
    }
    for stream in &status.streams {
        let name = format!("{}/{}", stream.source, stream.target);
        if !stream.reason.is_empty() && !matches!(stream.state.as_str(), "failed" | "refused") {
            say(Tone::Doubt, &name, &stream.reason, "");
        }
        if stream.consistent_from.is_some() {
            let from = words::position(stream.consistent_from);
            say(Tone::Doubt, &name, &format!("documents are being fetched again; consistent from {from} on"), "");
        }
    }
    for link in status.links.iter().filter(|link| !link.error.is_empty()) {
        let tone = if link.state == "refused" { Tone::Bad } else { Tone::Doubt };
        say(tone, &format!("link to {}", link.peer), &link.error, "");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    const ASCII: Style = Style { color: false, ascii: true };

    #[test]
    fn a_healthy_site() {
        insta::assert_snapshot!(render(&samples::healthy(), ASCII, false));
    }

    #[test]
    fn a_healthy_site_wide() {
        insta::assert_snapshot!(render(&samples::healthy(), ASCII, true));
    }

    #[test]
    fn a_troubled_site() {
        insta::assert_snapshot!(render(&samples::troubled(), Style::default(), false));
    }

    #[test]
    fn a_silent_agent_renders_too() {
        insta::assert_snapshot!(render(&StatusResponse::default(), ASCII, false));
    }

    #[test]
    fn as_json() {
        insta::assert_snapshot!(output::document("Status", json::status(&samples::troubled())));
    }

    #[test]
    fn colour_changes_no_words() {
        let strip = |text: &str| {
            let mut plain = String::new();
            let mut rest = text;
            while let Some((before, after)) = rest.split_once("\u{1b}[") {
                plain.push_str(before);
                rest = after.split_once('m').expect("an escape ends").1;
            }
            plain + rest
        };
        let colored = render(&samples::troubled(), Style { color: true, ascii: false }, true);
        assert!(colored.contains("\u{1b}[31m"));
        assert_eq!(strip(&colored), render(&samples::troubled(), Style::default(), true));
    }

    #[test]
    fn exit_codes_follow_the_state() {
        assert_eq!(verdict(&samples::healthy(), true), Exit::Ok);
        assert_eq!(verdict(&samples::troubled(), false), Exit::NotReady);
        let mut warned = samples::healthy();
        warned.problems.push(Problem { severity: "warning".into(), ..Default::default() });
        assert_eq!((verdict(&warned, false), verdict(&warned, true)), (Exit::Ok, Exit::Warnings));
        let mut refused = samples::healthy();
        refused.streams[0].state = "refused".into();
        assert_eq!(verdict(&refused, false), Exit::NotReady);
    }

    #[test]
    fn names_cannot_drive_the_terminal() {
        let mut status = samples::troubled();
        status.problems[0].subject = "a\u{1b}[2J".into();
        assert!(!render(&status, Style::default(), true).contains('\u{1b}'));
    }
}
