//! Whether the outbox serves a target that stands somewhere, or must begin again there. Decides; asks nobody.

use std::time::Duration;

use super::capture::{CaptureHandle, Lost, Phase};
use crate::model::{Incarnation, Position};
use crate::outbox::{Log, LogState};

/// How long a capture that is neither reading nor lost may take to become one of them before the target is told.
const SETTLING: Duration = Duration::from_secs(10);

/// What is to be done for a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Course {
    /// The outbox holds what follows, or capture will reach it.
    Serve,
    /// The outbox begins at the target's position, if the oplog reaches back to it.
    Begin,
    /// Capture must first say whether it gets there; meanwhile it is doing this.
    Unsettled(String),
    /// What follows the outbox is gone, and the target has nothing of it.
    Lost(Lost),
}

/// The course for a target that stands at `at`, with an `outbox` of the same history.
pub fn course(outbox: Option<&LogState>, phase: &Phase, at: Position) -> Course {
    let Some(outbox) = outbox.filter(|outbox| outbox.first <= at) else { return Course::Begin };
    match phase {
        Phase::Lost(lost) if at == outbox.end || at > outbox.end && lost.rewound => Course::Lost(lost.clone()),
        _ if at <= outbox.end => Course::Serve,
        // The target has more than this outbox: another agent of the site has shipped it. A full one is trimmed once targets
        // say what they have applied, which they do in sessions; what another target may need is not dropped for this one.
        Phase::Streaming | Phase::Full(_) => Course::Serve,
        Phase::Lost(_) => Course::Begin,
        Phase::Waiting => Course::Unsettled("the change stream is being opened".into()),
        Phase::Retrying(reason) | Phase::Failed(reason) => Course::Unsettled(reason.clone()),
    }
}

/// The course as it is once capture is reading or has lost its history, or after a while.
pub async fn settled(outbox: &Log, incarnation: Incarnation, capture: &CaptureHandle, at: Position) -> Course {
    let mut status = capture.status();
    let deadline = tokio::time::Instant::now() + SETTLING;
    loop {
        let phase = status.borrow_and_update().phase.clone();
        let state = outbox.state().filter(|state| state.incarnation == incarnation);
        let course = course(state.as_ref(), &phase, at);
        let settled = !matches!(course, Course::Unsettled(_));
        if settled || !matches!(tokio::time::timeout_at(deadline, status.changed()).await, Ok(Ok(()))) {
            return course;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ClusterTime, Epoch, StreamHash, Term};

    fn at(time: u64) -> Position {
        Position::before(ClusterTime(time))
    }

    fn outbox(first: u64, end: u64) -> LogState {
        LogState {
            incarnation: Incarnation([1; 16]),
            epoch: Epoch(1),
            first: at(first),
            end: at(end),
            hash: StreamHash(0),
            token: None,
            term: Term(0),
            bytes: 1,
            batches: 1,
            generation: 1,
            appended: 1,
        }
    }

    fn phases() -> [Phase; 7] {
        let reason = || "why".to_owned();
        [
            Phase::Waiting,
            Phase::Streaming,
            Phase::Retrying(reason()),
            Phase::Full(reason()),
            Phase::Lost(Lost { reason: reason(), rewound: false }),
            Phase::Lost(Lost { reason: reason(), rewound: true }),
            Phase::Failed(reason()),
        ]
    }

    #[test]
    fn what_the_outbox_holds_is_served_and_what_it_does_not_reach_back_to_begins() {
        for phase in phases() {
            assert_eq!(course(None, &phase, at(15)), Course::Begin, "{phase:?}");
            assert_eq!(course(Some(&outbox(10, 20)), &phase, at(9)), Course::Begin, "{phase:?}");
            for time in [10, 15, 19] {
                assert_eq!(course(Some(&outbox(10, 20)), &phase, at(time)), Course::Serve, "{phase:?}");
            }
            let expected = match &phase {
                Phase::Lost(lost) => Course::Lost(lost.clone()),
                _ => Course::Serve,
            };
            assert_eq!(course(Some(&outbox(10, 20)), &phase, at(20)), expected, "{phase:?}");
        }
    }

    #[test]
    fn a_target_that_is_ahead_is_waited_for_while_capture_may_get_there() {
        let courses = phases().map(|phase| course(Some(&outbox(10, 20)), &phase, at(99)));
        let unsettled = || Course::Unsettled("why".into());
        let lost = Course::Lost(Lost { reason: "why".into(), rewound: true });
        let opening = Course::Unsettled("the change stream is being opened".into());
        assert_eq!(courses, [opening, Course::Serve, unsettled(), Course::Serve, Course::Begin, lost, unsettled()]);
    }
}
