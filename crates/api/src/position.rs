//! Where something stands in a source's history.
//!
//! A position is (cluster time, ordinal). The ordinal is 1 + the index of the operation inside its cluster time, taken
//! from the change's own resume token, never counted; so every agent that tails one history gives every change the same
//! position. Ordinal 0 means "everything before this time". Byte order of the encoded form is log order.

use std::fmt;
use std::str::FromStr;

use crate::{control, replication};

/// A MongoDB cluster time: seconds since the Unix epoch in the high half, an increment in the low half.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterTime(pub u64);

impl ClusterTime {
    /// From the two halves of a BSON timestamp.
    pub fn new(seconds: u32, increment: u32) -> Self {
        Self((u64::from(seconds) << 32) | u64::from(increment))
    }

    /// Seconds since the Unix epoch.
    pub fn seconds(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The increment within the second.
    pub fn increment(self) -> u32 {
        (self.0 & u64::from(u32::MAX)) as u32
    }

    /// The next possible cluster time.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// Milliseconds since the Unix epoch (whole seconds: increments carry no time).
    pub fn millis(self) -> i64 {
        i64::from(self.seconds()) * 1000
    }
}

impl fmt::Display for ClusterTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seconds(), self.increment())
    }
}

impl fmt::Debug for ClusterTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not `<seconds>:<increment>`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not a cluster time; write <seconds>:<increment>, for example 1763669100:1")]
pub struct InvalidClusterTime(String);

impl FromStr for ClusterTime {
    type Err = InvalidClusterTime;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (seconds, increment) = text.split_once(':')?;
            Some(Self::new(seconds.parse().ok()?, increment.parse().ok()?))
        };
        parse().ok_or_else(|| InvalidClusterTime(text.to_owned()))
    }
}

/// A place in a source's history; see the module text.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Cluster time of the change.
    pub time: ClusterTime,
    /// 1 + index of the operation inside its cluster time; 0: everything before `time`.
    pub ordinal: u32,
}

impl Position {
    /// Length of the encoded form in bytes.
    pub const LEN: usize = 12;
    /// Before all history.
    pub const ZERO: Self = Self { time: ClusterTime(0), ordinal: 0 };

    /// The position of operation `ordinal - 1` of `time`.
    pub fn new(time: ClusterTime, ordinal: u32) -> Self {
        Self { time, ordinal }
    }

    /// Everything before `time`.
    pub fn before(time: ClusterTime) -> Self {
        Self { time, ordinal: 0 }
    }

    /// Everything up to and including `time`.
    pub fn through(time: ClusterTime) -> Self {
        Self::before(time.next())
    }

    /// The last position at which every unit (all changes of one cluster time) is known to be complete, for a log that
    /// ends here: a unit is complete only when something past its time is known.
    pub fn complete(self) -> Self {
        Self::before(self.time)
    }

    /// The largest position below this one, as far as changes can tell.
    pub fn predecessor(self) -> Self {
        match self.ordinal {
            0 => Self { time: ClusterTime(self.time.0.saturating_sub(1)), ordinal: u32::MAX },
            n => Self { time: self.time, ordinal: n - 1 },
        }
    }

    /// Big-endian bytes; their order is log order.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.time.0.to_be_bytes());
        bytes[8..].copy_from_slice(&self.ordinal.to_be_bytes());
        bytes
    }

    /// The inverse of [`Self::to_bytes`].
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let (time, ordinal) = bytes.split_at(8);
        Self {
            time: ClusterTime(u64::from_be_bytes(time.try_into().expect("8 bytes"))),
            ordinal: u32::from_be_bytes(ordinal.try_into().expect("4 bytes")),
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.time, self.ordinal)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not `<seconds>:<increment>/<ordinal>`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not a position; write <seconds>:<increment>/<ordinal>, for example 1763669100:1/1")]
pub struct InvalidPosition(String);

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (time, ordinal) = text.split_once('/')?;
            Some(Self { time: time.parse().ok()?, ordinal: ordinal.parse().ok()? })
        };
        parse().ok_or_else(|| InvalidPosition(text.to_owned()))
    }
}

macro_rules! convert {
    ($message:ty) => {
        impl From<Position> for $message {
            fn from(position: Position) -> Self {
                Self { time: position.time.0, ordinal: position.ordinal }
            }
        }

        impl From<$message> for Position {
            fn from(message: $message) -> Self {
                Self { time: ClusterTime(message.time), ordinal: message.ordinal }
            }
        }
    };
}

convert!(replication::v1::Position);
convert!(control::v1::Position);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn positions() -> impl Strategy<Value = Position> {
        (any::<u64>(), any::<u32>()).prop_map(|(t, o)| Position::new(ClusterTime(t), o))
    }

    proptest! {
        #[test]
        fn byte_order_is_log_order(a in positions(), b in positions()) {
            prop_assert_eq!(a.cmp(&b), a.to_bytes().cmp(&b.to_bytes()));
            prop_assert_eq!(Position::from_bytes(a.to_bytes()), a);
        }

        #[test]
        fn text_form_round_trips(a in positions()) {
            prop_assert_eq!(a.to_string().parse::<Position>(), Ok(a));
        }

        #[test]
        fn a_predecessor_is_just_below(a in positions(), b in positions()) {
            prop_assume!(a != Position::ZERO && a.time.0 > 0);
            prop_assert!(a.predecessor() < a);
            if b < a { prop_assert!(b <= a.predecessor()); }
        }
    }

    #[test]
    fn completeness_excludes_the_unit_in_progress() {
        let time = ClusterTime::new(5, 7);
        assert_eq!(Position::new(time, 3).complete(), Position::before(time));
        assert!(Position::through(time).complete() > Position::new(time, u32::MAX));
    }

    #[test]
    fn bad_text_is_refused_with_an_example() {
        let error = "12".parse::<ClusterTime>().expect_err("no increment");
        assert!(error.to_string().contains("1763669100:1"), "{error}");
        assert!("1:2".parse::<Position>().is_err());
    }
}
