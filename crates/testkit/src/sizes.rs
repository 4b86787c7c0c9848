//! How much a test does, and what it tells the scripts that started it.
//!
//! Sizes come from the environment, so that `dev/test` runs a small round and `dev/soak` a large one of the same test.
//! Each has a small default that stands in one place: here. Unreadable values fail the test; they are never ignored.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `FARSHORE_SOAK_SEED` | first seed; a test uses it and those that follow | 1 |
//! | `FARSHORE_SOAK_SEEDS` | simulated histories | 100 |
//! | `FARSHORE_SOAK_KILLS` | kills of real processes | 15 |
//! | `FARSHORE_SOAK_MINUTES` | at most so long; a test ends its round early and reports what it did | none |
//! | `FARSHORE_SOAK_REPORT` | file that takes [`report`]'s lines | none |
//! | `FARSHORE_SKIPS` | file that takes [`skip`]'s lines | none |

use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;

/// First seed.
pub fn seed() -> u64 {
    number("FARSHORE_SOAK_SEED", 1)
}

/// Simulated histories.
pub fn seeds() -> u64 {
    number("FARSHORE_SOAK_SEEDS", 100)
}

/// Kills of real processes.
pub fn kills() -> u64 {
    number("FARSHORE_SOAK_KILLS", 15)
}

/// Longest time a round may take, when there is a limit.
pub fn time_limit() -> Option<Duration> {
    let minutes = number("FARSHORE_SOAK_MINUTES", 0);
    (minutes > 0).then(|| Duration::from_secs(minutes * 60))
}

/// Any other size.
///
/// # Panics
/// The variable holds no number.
pub fn number(variable: &str, default: u64) -> u64 {
    let value = std::env::var(variable).ok();
    parse(value.as_deref(), default).unwrap_or_else(|value| panic!("{variable} is {value:?}: expected a whole number"))
}

fn parse(value: Option<&str>, default: u64) -> Result<u64, String> {
    let Some(value) = value.map(str::trim).filter(|value| !value.is_empty()) else { return Ok(default) };
    value.parse().map_err(|_| value.to_owned())
}

/// Tells `dev/soak` what a round has done; a line on stdout besides. `counts` is a JSON object with a number `done` in
/// the soak's unit (kills, seeds), and `failures`.
///
/// # Panics
/// The report cannot be written: a round that is not counted must not pass.
pub fn report(name: &str, counts: &Value) {
    let line = format!("{}\n", serde_json::json!({ "name": name, "seed": seed(), "counts": counts }));
    print!("soak: {line}");
    append("FARSHORE_SOAK_REPORT", &line);
}

/// Says that a test cannot run here and why; the test then returns. `dev/test` counts it as skipped, by name, and CI
/// fails on it.
///
/// # Panics
/// The line cannot be written: a skipped test must not pass unseen.
pub fn skip(test: &str, reason: &str) {
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    print!("skipped: {line}");
    append("FARSHORE_SKIPS", &line);
}

/// Appends in one write, so that lines of two test processes do not mix.
fn append(variable: &str, line: &str) {
    let Some(path) = std::env::var_os(variable) else { return };
    let appended =
        OpenOptions::new().create(true).append(true).open(&path).and_then(|mut f| f.write_all(line.as_bytes()));
    appended.unwrap_or_else(|error| panic!("cannot append to {variable}={}: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_size_is_read_or_refused_and_never_guessed() {
        assert_eq!(parse(None, 7), Ok(7));
        assert_eq!(parse(Some(""), 7), Ok(7));
        assert_eq!(parse(Some(" 200 "), 7), Ok(200));
        assert_eq!(parse(Some("many"), 7), Err("many".to_owned()));
        assert_eq!(parse(Some("-1"), 7), Err("-1".to_owned()));
    }
}
