//! The log: lines to stderr, as JSON or text, and a helper that keeps retry loops quiet.
//!
//! ERROR means that a person must look; a loop that retries says so once and says once that it recovered.

use std::fmt::Display;
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogFormat;

/// Overrides the configured level.
pub const LEVEL_VARIABLE: &str = "FARSHORE_LOG";

/// Why the log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a level.
    #[error(
        "'{level}' is not a log level: {reason}; write info or info,farshore::link=debug in log.level or FARSHORE_LOG"
    )]
    Level { level: String, reason: String },
    /// Somebody else was first.
    #[error("the log is already set up: {0}")]
    Taken(String),
}

/// Sends everything at or above `level` to stderr from now on. `over`: the value of [`LEVEL_VARIABLE`], which wins.
///
/// # Errors
/// The level is none, or a log is already set up.
pub fn init(format: LogFormat, level: &str, over: Option<&str>) -> Result<(), Error> {
    let level = over.filter(|level| !level.is_empty()).unwrap_or(level);
    let filter =
        EnvFilter::try_new(level).map_err(|e| Error::Level { level: level.to_owned(), reason: e.to_string() })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match format {
        LogFormat::Json => {
            builder.json().flatten_event(true).with_current_span(true).with_span_list(false).finish().try_init()
        }
        LogFormat::Text => builder.with_ansi(false).finish().try_init(),
    };
    done.map_err(|e| Error::Taken(e.to_string()))
}

/// What there is to say after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The first failure after success.
    Failing,
    /// Success after failures: how many, and for how long.
    Recovered { failures: u64, after: Duration },
}

/// Remembers whether a retried operation is failing, so that it is logged once and once on recovery.
#[derive(Debug, Default)]
pub struct Flapping {
    failing: Option<(Instant, u64)>,
}

impl Flapping {
    /// Notes a failure. A word only for the first.
    pub fn failed(&mut self, now: Instant) -> Option<Word> {
        match &mut self.failing {
            Some((_, failures)) => {
                *failures += 1;
                None
            }
            None => {
                self.failing = Some((now, 1));
                Some(Word::Failing)
            }
        }
    }

    /// Notes a success. A word only for the first after a failure.
    pub fn succeeded(&mut self, now: Instant) -> Option<Word> {
        let (since, failures) = self.failing.take()?;
        Some(Word::Recovered { failures, after: now.saturating_duration_since(since) })
    }

    /// Failing now.
    pub fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// [`Self::failed`], with one WARN for the first failure and DEBUG for the rest.
    pub fn warn(&mut self, now: Instant, what: &'static str, error: &dyn Display) {
        match self.failed(now) {
            Some(_) => tracing::warn!(%error, "{what}: failing, will retry"),
            None => tracing::debug!(%error, "{what}: still failing"),
        }
    }

    /// [`Self::succeeded`], with one INFO after failures.
    pub fn recovered(&mut self, now: Instant, what: &'static str) {
        if let Some(Word::Recovered { failures, after }) = self.succeeded(now) {
            tracing::info!(
                failures,
                after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
                "{what}: recovered"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_loop_speaks_once_and_once_on_recovery() {
        let start = Instant::now();
        let mut flapping = Flapping::default();
        assert_eq!(flapping.succeeded(start), None);
        assert_eq!(flapping.failed(start), Some(Word::Failing));
        for _ in 0..99 {
            assert_eq!(flapping.failed(start), None);
        }
        assert!(flapping.is_failing());
        let after = Duration::from_secs(7);
        assert_eq!(flapping.succeeded(start + after), Some(Word::Recovered { failures: 100, after }));
        assert_eq!(flapping.succeeded(start + after), None);
        assert_eq!(flapping.failed(start + after), Some(Word::Failing));
    }

    #[test]
    fn a_bad_level_is_told() {
        let error = init(LogFormat::Text, "info", Some("farshore=loud")).expect_err("not a level").to_string();
        assert!(error.contains("FARSHORE_LOG"), "{error}");
    }
}
