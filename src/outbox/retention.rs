//! What to trim, and when. Pure: time is the source's, read from positions.
//!
//! Nothing above `released` goes. Below it records stay (they are needed to reinstate) while they are younger than
//! `time` and within `bytes` below the released point; a nearly full disk overrides that, never the release.

use std::collections::VecDeque;

use super::{LogState, Mark, Quota};
use crate::model::Position;

/// Disk is given back in steps of this size; smaller ones would only cost commits.
pub(super) const STEP_BYTES: u64 = 32 << 20;
/// Distance of the marks kept in memory.
pub(super) const MARK_BYTES: u64 = 4 << 20;

/// How much room is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pressure {
    /// Enough.
    None,
    /// Above the warn level: retention is given up, in steps.
    High,
    /// The next append does not fit: everything released goes.
    Full,
}

/// The position to trim through, if it is worth it.
pub(super) fn trim_through(
    state: &LogState,
    marks: &VecDeque<Mark>,
    released: Position,
    quota: &Quota,
    pressure: Pressure,
) -> Option<Position> {
    let released = released.min(state.end);
    if released <= state.first {
        return None;
    }
    if pressure == Pressure::Full {
        return Some(released);
    }
    let trimmed = state.appended - state.bytes;
    let all = (released == state.end).then_some(Mark { end: state.end, appended: state.appended });
    let below = marks.partition_point(|mark| mark.end <= released);
    let newest = all.or_else(|| below.checked_sub(1).map(|last| marks[last]))?;
    let expired = |mark: &Mark| {
        let age = u64::from(state.end.time.seconds()).saturating_sub(u64::from(mark.end.time.seconds()));
        let above = newest.appended.saturating_sub(mark.appended);
        pressure != Pressure::None || age >= quota.retention_time.as_secs() || above >= quota.retention_bytes
    };
    // Both conditions hold for everything older than a mark they hold for.
    let expired_marks = marks.partition_point(|mark| mark.end <= released && expired(mark));
    let mark = if expired(&newest) { newest } else { *marks.get(expired_marks.checked_sub(1)?)? };
    let step = if pressure == Pressure::High { STEP_BYTES.min(quota.limit_bytes / 16) } else { STEP_BYTES };
    (mark.end > state.first && mark.appended.saturating_sub(trimmed) >= step).then_some(mark.end)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{ClusterTime, Epoch, Incarnation, StreamHash, Term};

    const MIB: u64 = 1 << 20;

    fn second(n: u32) -> Position {
        Position::before(ClusterTime::new(n, 0))
    }

    /// One mark of 4 MiB per second.
    fn log(first: u32, end: u32) -> (LogState, VecDeque<Mark>) {
        let state = LogState {
            incarnation: Incarnation([0; 16]),
            epoch: Epoch(1),
            first: second(first),
            end: second(end),
            hash: StreamHash(0),
            token: None,
            term: Term(0),
            bytes: u64::from(end - first) * MARK_BYTES,
            batches: 1,
            generation: 1,
            appended: u64::from(end) * MARK_BYTES,
        };
        let marks = (first + 1..=end).map(|n| Mark { end: second(n), appended: u64::from(n) * MARK_BYTES });
        (state, marks.collect())
    }

    fn quota(retention_mib: u64, seconds: u64) -> Quota {
        Quota {
            limit_bytes: 1024 * MIB,
            retention_bytes: retention_mib * MIB,
            retention_time: Duration::from_secs(seconds),
        }
    }

    #[test]
    fn nothing_goes_without_release_even_when_full() {
        let (state, marks) = log(10, 100);
        for pressure in [Pressure::None, Pressure::High, Pressure::Full] {
            assert_eq!(trim_through(&state, &marks, second(10), &quota(0, 0), pressure), None);
        }
    }

    #[test]
    fn retention_keeps_bytes_and_time_below_the_release() {
        let (state, marks) = log(10, 100);
        assert_eq!(trim_through(&state, &marks, second(80), &quota(40, 1000), Pressure::None), Some(second(70)));
        assert_eq!(trim_through(&state, &marks, second(80), &quota(9999, 75), Pressure::None), Some(second(25)));
        assert_eq!(trim_through(&state, &marks, second(80), &quota(9999, 1000), Pressure::None), None);
        assert_eq!(trim_through(&state, &marks, second(100), &quota(0, 1000), Pressure::None), Some(second(100)));
    }

    #[test]
    fn steps_are_large_unless_the_disk_is_full() {
        let (state, marks) = log(10, 100);
        assert_eq!(trim_through(&state, &marks, second(17), &quota(0, 0), Pressure::None), None);
        assert_eq!(trim_through(&state, &marks, second(18), &quota(0, 0), Pressure::None), Some(second(18)));
        assert_eq!(trim_through(&state, &marks, second(11), &quota(9999, 9999), Pressure::Full), Some(second(11)));
        assert_eq!(trim_through(&state, &marks, second(40), &quota(9999, 9999), Pressure::High), Some(second(40)));
    }

    proptest! {
        #[test]
        fn never_above_the_release_and_always_forward(
            first in 0u32..50, length in 0u32..200, released in 0u32..300,
            retention in 0u64..1000, seconds in 0u64..300, level in 0usize..3,
        ) {
            let (state, marks) = log(first, first + length);
            let pressure = [Pressure::None, Pressure::High, Pressure::Full][level];
            let quota = quota(retention, seconds);
            if let Some(through) = trim_through(&state, &marks, second(released), &quota, pressure) {
                prop_assert!(through <= second(released) && through > state.first && through <= state.end);
            }
        }
    }
}
