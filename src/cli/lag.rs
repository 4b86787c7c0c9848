//! `farshore lag`: where the time goes between a commit at the source and the same change at the target.
//!
//! Exposure is what would be lost if the source site died now; capture, ship and apply are the parts of the way.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use farshore_api::control::v1::{LagSample, StreamStatus, WatchLagRequest};

use super::exit::{Exit, Failure};
use super::json;
use super::output::{self, Plain, Reader, Style, Tone, table};
use super::remote::{Remote, RemoteArgs};
use super::status::state;
use super::words;
use crate::config::parse_duration;

/// A part of less is not worth blaming.
const SLOW_SECONDS: u64 = 2;

/// Flags of the verb.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  farshore lag\n  farshore lag north/south --watch\n  farshore lag --watch --interval 500ms --count 20 -o json"
)]
pub struct LagArgs {
    /// Only this stream, as source/target
    #[arg(value_name = "STREAM")]
    pub stream: Option<String>,
    /// Go on, one line per stream and sample
    #[arg(short, long)]
    pub watch: bool,
    /// Time between samples, at least 100ms
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    pub interval: Duration,
    /// Stop after so many samples (implies --watch)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
    /// Output format; with --watch JSON is one document per line
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Plain,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

pub(super) async fn run(args: &LagArgs, style: Style) -> Result<Exit, Failure> {
    let interval_ms = u32::try_from(args.interval.as_millis()).ok().filter(|ms| *ms >= 100);
    let interval_ms = interval_ms
        .ok_or_else(|| Failure::new("--interval is out of range", "ask for 100ms or more").with(Exit::Usage))?;
    let watching = args.watch || args.count.is_some();
    let count = if watching { args.count.unwrap_or(0) } else { 1 };
    let remote = Remote::connect(&args.remote).await?;
    let mut samples =
        remote.ask(remote.control.clone().watch_lag(WatchLagRequest { interval_ms, count })).await?.into_inner();
    let mut rates = Rates::default();
    loop {
        let sample = match samples.message().await {
            Ok(Some(sample)) => select(sample, args.stream.as_deref())?,
            Ok(None) if watching && args.count.is_none() => {
                return Err(Failure::new("the agent ended the watch", "it is shutting down; ask again"));
            }
            Ok(None) => return Ok(Exit::Ok),
            Err(status) => return Err(remote.explain(status).await),
        };
        let text = match (args.output, watching) {
            (Plain::Json, true) => output::line("LagSample", json::lag(&sample)),
            (Plain::Json, false) => output::document("LagSample", json::lag(&sample)),
            (Plain::Table, true) => lines(&sample, &mut rates, style),
            (Plain::Table, false) => render(&sample, style),
        };
        if output::print(&text)? == Reader::Gone {
            return Ok(Exit::Ok);
        }
    }
}

/// Leaves one stream in a sample.
fn select(mut sample: LagSample, wanted: Option<&str>) -> Result<LagSample, Failure> {
    let Some(wanted) = wanted else { return Ok(sample) };
    let known: Vec<String> = sample.streams.iter().map(name).collect();
    sample.streams.retain(|stream| name(stream) == wanted);
    if sample.streams.is_empty() {
        let hint = if known.is_empty() {
            "this agent has no stream".to_owned()
        } else {
            format!("streams of this agent: {}", known.join(", "))
        };
        return Err(Failure::new(format!("there is no stream {wanted}"), hint));
    }
    Ok(sample)
}

fn name(stream: &StreamStatus) -> String {
    format!("{}/{}", stream.source, stream.target)
}

/// One sample as a table. Pure.
pub fn render(sample: &LagSample, style: Style) -> String {
    if sample.streams.is_empty() {
        return "no streams\n".to_owned();
    }
    let row = |s: &StreamStatus| {
        vec![
            name(s).into(),
            state(&s.state),
            words::span(s.data_loss_exposure_ms).into(),
            words::distance(s.head, s.captured).into(),
            words::distance(s.captured, s.received).into(),
            words::span(s.apply_lag_ms).into(),
            words::position_time(s.applied, sample.now_ms).into(),
        ]
    };
    table(
        style,
        &["STREAM", "STATE", "EXPOSURE", "CAPTURE", "SHIP", "APPLY", "APPLIED"],
        sample.streams.iter().map(row).collect(),
    )
}

/// Counters of the sample before, per stream.
#[derive(Default)]
pub struct Rates {
    last: BTreeMap<String, (i64, u64, u64)>,
}

impl Rates {
    /// Changes and bytes per second since the sample before; `None` for the first, and after a restart of the agent.
    fn update(&mut self, stream: &StreamStatus, now_ms: i64) -> Option<(f64, f64)> {
        let before = self.last.insert(name(stream), (now_ms, stream.changes, stream.bytes));
        let (then_ms, changes, bytes) = before?;
        let seconds = now_ms.checked_sub(then_ms).filter(|ms| *ms > 0)? as f64 / 1000.0;
        let changes = stream.changes.checked_sub(changes)? as f64 / seconds;
        let bytes = stream.bytes.checked_sub(bytes)? as f64 / seconds;
        Some((changes, bytes))
    }
}

/// One sample as a line per stream. Pure but for what `rates` remembers.
pub fn lines(sample: &LagSample, rates: &mut Rates, style: Style) -> String {
    let mut text = String::new();
    for stream in &sample.streams {
        let exposure = stream.data_loss_exposure_ms;
        let parts = format!(
            "{}  {}  exposure {:<7}  capture {:<4}  ship {:<4}  apply {:<5}",
            words::clock(sample.now_ms),
            output::printable(&name(stream)),
            words::span(exposure),
            words::distance(stream.head, stream.captured),
            words::distance(stream.captured, stream.received),
            words::span(stream.apply_lag_ms),
        );
        text.push_str(parts.trim_end());
        if let Some((changes, bytes)) = rates.update(stream, sample.now_ms) {
            text.push_str(&format!(" | {} changes/s  {}/s", words::count(changes), words::bytes(bytes as u64)));
        }
        if stream.state != "streaming" {
            text.push_str(&format!("  {}", style.paint(Tone::Doubt, &output::printable(&stream.state))));
        }
        if let Some(part) = slow_part(stream) {
            text.push_str(&format!("  {}", style.paint(Tone::Doubt, &format!("! {part} is the slow part"))));
        }
        text.push('\n');
    }
    text
}

/// The part that takes longer than the others together, when it is worth saying.
fn slow_part(stream: &StreamStatus) -> Option<&'static str> {
    let apply = u64::try_from(stream.apply_lag_ms).unwrap_or(0) / 1000;
    let parts = [
        ("capture", words::distance_seconds(stream.head, stream.captured).unwrap_or(0)),
        ("ship", words::distance_seconds(stream.captured, stream.received).unwrap_or(0)),
        ("apply", apply),
    ];
    let total: u64 = parts.iter().map(|(_, seconds)| seconds).sum();
    let (part, seconds) = parts.into_iter().max_by_key(|(_, seconds)| *seconds)?;
    (seconds >= SLOW_SECONDS && seconds * 2 > total).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    fn sample() -> LagSample {
        let status = samples::healthy();
        LagSample { now_ms: status.now_ms, streams: status.streams }
    }

    #[test]
    fn one_sample_is_a_table() {
        insta::assert_snapshot!(render(&sample(), Style::default()));
        assert_eq!(render(&LagSample::default(), Style::default()), "no streams\n");
    }

    #[test]
    fn a_watch_is_a_line_per_sample_with_rates_and_the_slow_part() {
        let mut rates = Rates::default();
        let first = sample();
        let mut second = sample();
        second.now_ms += 2000;
        second.streams[0].changes += 8200;
        second.streams[0].bytes += 5 << 20;
        let mut third = second.clone();
        third.now_ms += 2000;
        third.streams[0].received = samples::at(-9, 4);
        third.streams[0].data_loss_exposure_ms = 9400;
        third.streams[0].state = "catching_up".into();
        let mut restarted = third.clone();
        restarted.now_ms += 2000;
        restarted.streams[0].changes = 1;
        let text: String =
            [first, second, third, restarted].iter().map(|s| lines(s, &mut rates, Style::default())).collect();
        insta::assert_snapshot!(text);
    }

    #[test]
    fn an_unknown_stream_is_told_with_those_there_are() {
        assert_eq!(select(sample(), Some("north/south")).expect("known").streams.len(), 1);
        let failure = select(sample(), Some("north/west")).expect_err("unknown");
        assert!(failure.hint.contains("north/south"), "{failure:?}");
    }
}
