//! The figures, what they must be, the table and the JSON.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::load::Kind;
use crate::sites::Usages;

/// Megabytes an agent may take.
const RSS_MUST: f64 = 256.0;

/// How a secondary caught up.
#[derive(Clone, Copy)]
pub(crate) struct CaughtUp {
    pub(crate) changes: u64,
    /// Since the server was started.
    pub(crate) since_start: Duration,
    /// Since it began to apply.
    pub(crate) draining: Duration,
    pub(crate) secondary_cpu: Duration,
    pub(crate) primary_cpu: Duration,
}

/// How agents drained a backlog.
#[derive(Clone, Copy)]
pub(crate) struct Drained {
    changes: u64,
    /// Since the agents were started.
    since_start: Duration,
    /// Since the first change was applied.
    draining: Duration,
    source_cpu: Duration,
    target_cpu: Duration,
    source_mongod_cpu: Duration,
    target_mongod_cpu: Duration,
    source_rss: u64,
    target_rss: u64,
}

impl Drained {
    pub(crate) fn new(
        changes: u64,
        since_start: Duration,
        draining: Duration,
        before: &Usages,
        after: &Usages,
    ) -> Self {
        let agent = |usage: Option<farshore_testkit::process::Usage>| usage.map_or(Duration::ZERO, |usage| usage.cpu);
        let rss = |usage: Option<farshore_testkit::process::Usage>| usage.map_or(0, |usage| usage.peak_rss);
        Self {
            changes,
            since_start,
            draining,
            source_cpu: agent(after.source).saturating_sub(agent(before.source)),
            // The target agent is always a new process.
            target_cpu: agent(after.target),
            source_mongod_cpu: after.source_mongod.cpu.saturating_sub(before.source_mongod.cpu),
            target_mongod_cpu: after.target_mongod.cpu.saturating_sub(before.target_mongod.cpu),
            source_rss: rss(after.source),
            target_rss: rss(after.target),
        }
    }

    /// Counts what the source agent used since another moment.
    pub(crate) fn price_source_from(&mut self, before: &Usages, after: &Usages) {
        if let (Some(before), Some(after)) = (before.source, after.source) {
            self.source_cpu = after.cpu.saturating_sub(before.cpu);
        }
    }

    fn json(&self) -> Value {
        json!({
            "changes": self.changes,
            "seconds_since_start": self.since_start.as_secs_f64(),
            "seconds_draining": self.draining.as_secs_f64(),
            "changes_per_second": rate(self.changes, self.draining),
            "cpu_us_per_change": {
                "source_agent": each(self.source_cpu, self.changes),
                "target_agent": each(self.target_cpu, self.changes),
                "source_mongod": each(self.source_mongod_cpu, self.changes),
                "target_mongod": each(self.target_mongod_cpu, self.changes),
            },
            "peak_rss_mb": {"source_agent": mb(self.source_rss), "target_agent": mb(self.target_rss)},
        })
    }
}

impl fmt::Display for CaughtUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:7.0}/s, {:.2} s ({:.2} s since start); µs each: secondary {:.1}, primary {:.1}",
            rate(self.changes, self.draining),
            self.draining.as_secs_f64(),
            self.since_start.as_secs_f64(),
            each(self.secondary_cpu, self.changes),
            each(self.primary_cpu, self.changes),
        )
    }
}

impl fmt::Display for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:7.0}/s, {:.2} s ({:.2} s since start); µs each: agents {:.1} and {:.1}, servers {:.1} and {:.1}; {:.0} and {:.0} MB",
            rate(self.changes, self.draining),
            self.draining.as_secs_f64(),
            self.since_start.as_secs_f64(),
            each(self.source_cpu, self.changes),
            each(self.target_cpu, self.changes),
            each(self.source_mongod_cpu, self.changes),
            each(self.target_mongod_cpu, self.changes),
            mb(self.source_rss),
            mb(self.target_rss),
        )
    }
}

/// All rounds of a kind.
pub(crate) struct Drains {
    kind: Kind,
    secondary: Vec<CaughtUp>,
    both: Vec<Drained>,
    filled: Vec<Drained>,
}

impl Drains {
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, secondary: Vec::new(), both: Vec::new(), filled: Vec::new() }
    }

    pub(crate) fn round(&mut self, secondary: CaughtUp, both: Drained, filled: Drained) {
        self.secondary.push(secondary);
        self.both.push(both);
        self.filled.push(filled);
    }

    /// The fastest round of each.
    fn best(&self) -> Option<(CaughtUp, Drained, Drained)> {
        let secondary = self.secondary.iter().min_by_key(|round| round.draining)?;
        let fastest = |rounds: &[Drained]| rounds.iter().min_by_key(|round| round.draining).copied();
        Some((*secondary, fastest(&self.both)?, fastest(&self.filled)?))
    }

    /// What the ratio to a secondary must be and should be.
    fn bar(&self) -> Option<Bar> {
        match self.kind {
            Kind::Inserts => Some(Bar::at_least(0.35, 0.6)),
            Kind::Set => Some(Bar::at_least(0.6, 0.9)),
            Kind::Deletes => Some(Bar::at_least(0.45, 0.7)),
            Kind::Mixed | Kind::Hot => None,
        }
    }

    fn rows(&self, rows: &mut Vec<Row>) {
        let Some((secondary, both, filled)) = self.best() else { return };
        let name = self.kind.name();
        let (theirs, since) = (secondary.draining.as_secs_f64(), secondary.since_start.as_secs_f64());
        rows.push(Row::plain(format!("{name}: secondary, changes/s"), rate(secondary.changes, secondary.draining), 0));
        for (mode, drained) in [("both stopped", both), ("prefilled", filled)] {
            let what = |text: &str| format!("{name}, {mode}: {text}");
            rows.push(Row::plain(what("changes/s"), rate(drained.changes, drained.draining), 0));
            rows.push(Row {
                what: what("against the secondary"),
                figure: theirs / drained.draining.as_secs_f64(),
                digits: 2,
                bar: self.bar(),
            });
            let ratio = since / drained.since_start.as_secs_f64();
            rows.push(Row::plain(what("the same, starting included"), ratio, 2));
            let cpu = |cpu| each(cpu, drained.changes);
            let must = |must, goal| Some(Bar::at_most(must, goal));
            rows.push(Row {
                what: what("source agent µs/change"),
                figure: cpu(drained.source_cpu),
                digits: 1,
                bar: must(8.0, 4.0),
            });
            rows.push(Row {
                what: what("target agent µs/change"),
                figure: cpu(drained.target_cpu),
                digits: 1,
                bar: must(10.0, 5.0),
            });
            rows.push(Row::plain(what("source mongod µs/change"), cpu(drained.source_mongod_cpu), 1));
            rows.push(Row::plain(what("target mongod µs/change"), cpu(drained.target_mongod_cpu), 1));
        }
        let peak = |of: fn(&Drained) -> u64| self.both.iter().chain(&self.filled).map(of).max().map_or(0.0, mb);
        let bar = || Some(Bar::at_most(RSS_MUST, RSS_MUST));
        rows.push(Row {
            what: format!("{name}: source agent peak MB"),
            figure: peak(|d| d.source_rss),
            digits: 0,
            bar: bar(),
        });
        rows.push(Row {
            what: format!("{name}: target agent peak MB"),
            figure: peak(|d| d.target_rss),
            digits: 0,
            bar: bar(),
        });
    }

    fn json(&self) -> Value {
        let secondary = |round: &CaughtUp| {
            json!({
                "changes": round.changes,
                "seconds_since_start": round.since_start.as_secs_f64(),
                "seconds_draining": round.draining.as_secs_f64(),
                "changes_per_second": rate(round.changes, round.draining),
                "cpu_us_per_change": {
                    "secondary": each(round.secondary_cpu, round.changes),
                    "primary": each(round.primary_cpu, round.changes),
                },
            })
        };
        json!({
            "kind": self.kind.name(),
            "secondary": self.secondary.iter().map(secondary).collect::<Vec<_>>(),
            "both_stopped": self.both.iter().map(Drained::json).collect::<Vec<_>>(),
            "prefilled": self.filled.iter().map(Drained::json).collect::<Vec<_>>(),
        })
    }
}

/// Memory with a large backlog.
pub(crate) struct Memory {
    pub(crate) backlog: u64,
    pub(crate) took: Duration,
    /// The source agent when all was captured and nothing shipped.
    pub(crate) source_captured: u64,
    pub(crate) source: u64,
    pub(crate) target: u64,
}

impl Memory {
    fn rows(&self, rows: &mut Vec<Row>) {
        let name = format!("backlog of {:.0} MB", mb(self.backlog));
        let bar = || Some(Bar::at_most(RSS_MUST, RSS_MUST));
        rows.push(Row {
            what: format!("{name}: source agent peak MB, captured"),
            figure: mb(self.source_captured),
            digits: 0,
            bar: bar(),
        });
        rows.push(Row {
            what: format!("{name}: source agent peak MB, drained"),
            figure: mb(self.source),
            digits: 0,
            bar: bar(),
        });
        rows.push(Row {
            what: format!("{name}: target agent peak MB, drained"),
            figure: mb(self.target),
            digits: 0,
            bar: bar(),
        });
        rows.push(Row::plain(format!("{name}: seconds to drain"), self.took.as_secs_f64(), 1));
    }

    fn json(&self) -> Value {
        json!({
            "backlog_mb": mb(self.backlog),
            "seconds": self.took.as_secs_f64(),
            "peak_rss_mb": {"source_captured": mb(self.source_captured), "source": mb(self.source), "target": mb(self.target)},
        })
    }
}

/// Lags of an open-loop writer, microseconds after the intended time.
pub(crate) struct Lag {
    pub(crate) rate: u64,
    pub(crate) seconds: u64,
    /// The source's answer to the writer.
    pub(crate) acknowledged: Histogram<u64>,
    /// A change stream at the source.
    pub(crate) source: Histogram<u64>,
    /// A change stream at the target.
    pub(crate) target: Histogram<u64>,
    /// A reader at the target.
    pub(crate) visible: Histogram<u64>,
}

impl Lag {
    fn probes(&self) -> [(&'static str, &Histogram<u64>, Option<Bar>); 4] {
        [
            ("acknowledged at the source", &self.acknowledged, None),
            ("change stream at the source (floor)", &self.source, None),
            ("reader at the target", &self.visible, Some(Bar::at_most(100.0, 30.0))),
            ("change stream at the target", &self.target, Some(Bar::at_most(100.0, 30.0))),
        ]
    }

    fn rows(&self, rows: &mut Vec<Row>) {
        for (name, lags, bar) in self.probes() {
            let what = |text: &str| format!("lag ms at {}/s, {name}: {text}", self.rate);
            let at = |quantile| lags.value_at_quantile(quantile) as f64 / 1000.0;
            rows.push(Row::plain(what("p50"), at(0.5), 1));
            rows.push(Row { what: what("p99"), figure: at(0.99), digits: 1, bar });
            rows.push(Row::plain(what("p99.9"), at(0.999), 1));
            rows.push(Row::plain(what("max"), lags.max() as f64 / 1000.0, 1));
        }
    }

    fn json(&self) -> Value {
        let one = |lags: &Histogram<u64>| {
            let at = |quantile| lags.value_at_quantile(quantile) as f64 / 1000.0;
            json!({"count": lags.len(), "p50_ms": at(0.5), "p99_ms": at(0.99), "p999_ms": at(0.999), "max_ms": lags.max() as f64 / 1000.0})
        };
        json!({
            "writes_per_second": self.rate,
            "seconds": self.seconds,
            "acknowledged": one(&self.acknowledged),
            "source_change_stream": one(&self.source),
            "target_reader": one(&self.visible),
            "target_change_stream": one(&self.target),
        })
    }
}

/// What a figure must be, and should be.
#[derive(Clone, Copy)]
struct Bar {
    must: f64,
    goal: f64,
    larger_is_better: bool,
}

impl Bar {
    fn at_least(must: f64, goal: f64) -> Self {
        Self { must, goal, larger_is_better: true }
    }

    fn at_most(must: f64, goal: f64) -> Self {
        Self { must, goal, larger_is_better: false }
    }

    fn verdict(&self, figure: f64) -> &'static str {
        let reaches = |bar: f64| if self.larger_is_better { figure >= bar } else { figure <= bar };
        match (reaches(self.must), reaches(self.goal)) {
            (_, true) => "goal",
            (true, false) => "ok",
            (false, false) => "BELOW",
        }
    }
}

struct Row {
    what: String,
    figure: f64,
    digits: usize,
    bar: Option<Bar>,
}

impl Row {
    fn plain(what: String, figure: f64, digits: usize) -> Self {
        Self { what, figure, digits, bar: None }
    }
}

/// Everything measured.
pub(crate) struct Report {
    changes: u64,
    rounds: u32,
    pub(crate) drains: Vec<Drains>,
    pub(crate) lag: Option<Lag>,
    pub(crate) memory: Option<Memory>,
}

impl Report {
    pub(crate) fn new(changes: u64, rounds: u32) -> Self {
        Self { changes, rounds, drains: Vec::new(), lag: None, memory: None }
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for drains in &self.drains {
            drains.rows(&mut rows);
        }
        if let Some(lag) = &self.lag {
            lag.rows(&mut rows);
        }
        if let Some(memory) = &self.memory {
            memory.rows(&mut rows);
        }
        rows
    }

    /// All rounds, and the verdicts of the table.
    pub(crate) fn json(&self) -> Value {
        let verdict = |row: &Row| {
            let bar = row.bar?;
            Some(json!({
                "what": row.what, "figure": row.figure, "must": bar.must, "goal": bar.goal,
                "verdict": bar.verdict(row.figure).to_lowercase(),
            }))
        };
        json!({
            "changes": self.changes,
            "rounds": self.rounds,
            "drains": self.drains.iter().map(Drains::json).collect::<Vec<_>>(),
            "lag": self.lag.as_ref().map(Lag::json),
            "memory": self.memory.as_ref().map(Memory::json),
            "verdicts": self.rows().iter().filter_map(verdict).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "backlogs of {} changes, best of {} rounds", self.changes, self.rounds)?;
        writeln!(f, "{:<68} {:>9} {:>6} {:>6}", "", "figure", "must", "goal")?;
        for Row { what, figure, digits, bar } in self.rows() {
            write!(f, "{what:<68} {figure:>9.digits$}")?;
            match bar {
                Some(bar) => writeln!(f, " {:>6} {:>6} {}", bar.must, bar.goal, bar.verdict(figure))?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

fn rate(changes: u64, time: Duration) -> f64 {
    changes as f64 / time.as_secs_f64()
}

/// Microseconds for each change.
fn each(time: Duration, changes: u64) -> f64 {
    time.as_secs_f64() * 1e6 / changes as f64
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
