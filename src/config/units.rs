//! Durations and sizes as people write them: `500ms`, `10s`, `24h`, `64KiB`, `10GiB`.
//!
//! A bare number is refused: a unit that is guessed is a unit that is wrong one day.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes, written with a binary unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const SIZES: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const TIMES: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

impl ByteSize {
    /// A number of mebibytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// A number of gibibytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

/// A text that is not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("write a whole number and B, KiB, MiB, GiB or TiB, for example \"64MiB\"")]
pub struct InvalidSize;

/// A text that is not a duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("write a whole number and ms, s, m, h or d, for example \"500ms\" or \"24h\"")]
pub struct InvalidDuration;

impl FromStr for ByteSize {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, InvalidSize> {
        quantity(text, &SIZES).map(Self).ok_or(InvalidSize)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        exact(f, self.0, &SIZES)
    }
}

/// Reads `500ms`, `10s`, `5m`, `24h` or `7d`.
///
/// # Errors
/// The text is something else or too large.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidDuration> {
    quantity(text, &TIMES).map(Duration::from_millis).ok_or(InvalidDuration)
}

/// The shortest text that [`parse_duration`] reads as the same milliseconds.
pub fn format_duration(duration: Duration) -> String {
    struct Exact(u64);
    impl fmt::Display for Exact {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            exact(f, self.0, &TIMES)
        }
    }
    Exact(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)).to_string()
}

fn quantity(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(split);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn exact(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    let smallest = units[units.len() - 1];
    let (name, factor) =
        units.iter().find(|(_, n)| value >= *n && value.is_multiple_of(*n)).copied().unwrap_or(smallest);
    write!(f, "{}{name}", value / factor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_are_read_and_bare_numbers_refused() {
        assert_eq!("10GiB".parse(), Ok(ByteSize::gib(10)));
        assert_eq!("0B".parse(), Ok(ByteSize(0)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        for bad in ["", "10", "GiB", "10GB", "1.5GiB", "-1B", "99999999999TiB", "10 MiB"] {
            assert_eq!(bad.parse::<ByteSize>(), Err(InvalidSize), "{bad}");
        }
        for bad in ["", "10", "s", "1h30m", "99999999999999999d", "10sec"] {
            assert_eq!(parse_duration(bad), Err(InvalidDuration), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn text_form_round_trips(bytes in any::<u64>(), ms in any::<u64>()) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
            let duration = Duration::from_millis(ms);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,20}") {
            drop(text.parse::<ByteSize>());
            drop(parse_duration(&text));
        }
    }
}
