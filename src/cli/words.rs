//! Numbers as people read them. Times are UTC.

use farshore_api::control::v1::Position as WirePosition;
use jiff::Timestamp;

use crate::model::Position;

/// `12 MiB`, `1.5 GiB`, `0 B`.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    // Rounds up to the next unit rather than to "1024 KiB".
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 9.95);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// `12`, `4.1k`, `41.2M`.
pub(super) fn count(n: f64) -> String {
    match n {
        n if n < 999.5 => format!("{n:.0}"),
        n if n < 999_950.0 => format!("{:.1}k", n / 1e3),
        n if n < 999_950_000.0 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}G", n / 1e9),
    }
}

/// `0.3s`, `42s`, `5m12s`, `3h10m`, `2d4h`; `unknown` when negative.
pub(super) fn span(ms: i64) -> String {
    let Ok(ms) = u64::try_from(ms) else { return "unknown".to_owned() };
    let seconds = ms / 1000;
    match seconds {
        0..10 => format!("{}.{}s", seconds, ms % 1000 / 100),
        10..120 => format!("{seconds}s"),
        120..7200 => format!("{}m{}s", seconds / 60, seconds % 60),
        7200..172_800 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// `0.4ms` or `18ms`; `-` when unknown.
pub(super) fn rtt(us: i64) -> String {
    match us {
        ..=0 => "-".to_owned(),
        us if us < 10_000 => format!("{}.{}ms", us / 1000, us % 1000 / 100),
        us => format!("{}ms", us / 1000),
    }
}

/// `2026-11-20T14:02:10Z`; empty when it is no time.
pub(super) fn time(ms: i64) -> String {
    Timestamp::from_second(ms.div_euclid(1000)).map(|time| time.to_string()).unwrap_or_default()
}

/// `14:02:10Z`
pub(super) fn clock(ms: i64) -> String {
    let of_day = ms.div_euclid(1000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// `2026-11-20T14:02:10Z (3m5s ago)`; `-` for 0, which means never.
pub(super) fn since(ms: i64, now_ms: i64) -> String {
    if ms <= 0 { "-".to_owned() } else { format!("{} ({} ago)", time(ms), span((now_ms - ms).max(0))) }
}

/// A position as commands take it back.
pub(super) fn position(position: Option<WirePosition>) -> String {
    position.map(|position| Position::from(position).to_string()).unwrap_or_default()
}

/// A position's cluster time, with its age.
pub(super) fn position_time(position: Option<WirePosition>, now_ms: i64) -> String {
    position.map_or_else(|| "-".to_owned(), |position| since(Position::from(position).time.millis(), now_ms))
}

/// How far `behind` is behind `ahead`. Cluster times count whole seconds, so less than one is told as such.
pub(super) fn distance(ahead: Option<WirePosition>, behind: Option<WirePosition>) -> String {
    match distance_seconds(ahead, behind) {
        None => "-".to_owned(),
        Some(0) if ahead != behind => "<1s".to_owned(),
        Some(seconds) if seconds < 10 => format!("{seconds}s"),
        Some(seconds) => span(i64::try_from(seconds).unwrap_or(i64::MAX / 1000).saturating_mul(1000)),
    }
}

/// The same in whole seconds.
pub(super) fn distance_seconds(ahead: Option<WirePosition>, behind: Option<WirePosition>) -> Option<u64> {
    let (ahead, behind) = (Position::from(ahead?), Position::from(behind?));
    Some(u64::from(ahead.time.seconds().saturating_sub(behind.time.seconds())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let sizes = [0, 1023, 1024, 1536, 12 << 20, (1 << 20) - 1, 10 << 30, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "12 MiB", "1.0 MiB", "10 GiB", "16 EiB"]);
        let spans = [-1, 0, 349, 9_999, 10_000, 119_999, 312_000, 11_400_000, 187_200_000].map(span);
        assert_eq!(spans, ["unknown", "0.0s", "0.3s", "9.9s", "10s", "119s", "5m12s", "3h10m", "2d4h"]);
        assert_eq!([0.0, 999.0, 4_100.0, 41_200_000.0].map(count), ["0", "999", "4.1k", "41.2M"]);
        assert_eq!([0, 400, 18_000].map(rtt), ["-", "0.4ms", "18ms"]);
    }

    #[test]
    fn times_are_utc_with_their_age() {
        assert_eq!(since(1_763_669_100_000, 1_763_669_103_500), "2025-11-20T20:05:00Z (3.5s ago)");
        assert_eq!(clock(1_763_669_100_999), "20:05:00Z");
        assert_eq!((since(0, 5), time(i64::MAX)), ("-".to_owned(), String::new()));
    }

    #[test]
    fn distances_are_in_source_time() {
        let at = |seconds: u64, ordinal| Some(WirePosition { time: seconds << 32 | 1, ordinal });
        assert_eq!(distance(at(9, 1), at(9, 1)), "0s");
        assert_eq!(distance(at(9, 2), at(9, 1)), "<1s");
        assert_eq!(distance(at(90, 2), at(9, 1)), "81s");
        assert_eq!(distance(at(9, 2), None), "-");
    }
}
