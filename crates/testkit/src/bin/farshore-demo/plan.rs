//! What happens when. Pure: the running time goes in, the next event comes out.

use std::time::Duration;

use farshore_testkit::pair::Side;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Kill(Side),
    Restart(Side),
}

/// Events with their times, first to last.
pub(crate) struct Plan {
    events: std::vec::IntoIter<(Duration, Event)>,
    end: Duration,
}

impl Plan {
    /// Of a live part of that length: in 50 s the target's agent dies after 15 s for 7 s, the source's after 32 s for 6 s.
    pub(crate) fn new(length: Duration) -> Self {
        let at = |hundredths: u32| length * hundredths / 100;
        let events = vec![
            (at(30), Event::Kill(Side::South)),
            (at(44), Event::Restart(Side::South)),
            (at(64), Event::Kill(Side::North)),
            (at(76), Event::Restart(Side::North)),
        ];
        Self { events: events.into_iter(), end: length }
    }

    /// The next event that is due.
    pub(crate) fn due(&mut self, elapsed: Duration) -> Option<Event> {
        let (at, event) = *self.events.as_slice().first()?;
        (elapsed >= at).then(|| {
            self.events.next();
            event
        })
    }

    /// Whether the writer may stop.
    pub(crate) fn is_over(&self, elapsed: Duration) -> bool {
        elapsed >= self.end && self.events.as_slice().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_comes_once_and_in_order_also_when_time_jumps() {
        let mut plan = Plan::new(Duration::from_secs(50));
        assert_eq!(plan.due(Duration::from_secs(14)), None);
        let late = Duration::from_secs(60);
        assert!(!plan.is_over(late), "events are left");
        let events: Vec<_> = std::iter::from_fn(|| plan.due(late)).collect();
        let both = |side| [Event::Kill(side), Event::Restart(side)];
        assert_eq!(events, [both(Side::South), both(Side::North)].concat());
        assert!(plan.is_over(late) && !plan.is_over(Duration::from_secs(49)));
    }
}
