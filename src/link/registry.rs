//! One session per peer: which one lives when there are several.
//!
//! Both sides may dial, and a connection may be dead at one end only, so two sessions with one peer can exist for a
//! moment. Both sides decide by the same rule and end up with the same one:
//! 1. An agent of a higher term beats one of a lower term.
//! 2. A newer session dialled by the same side replaces the older one: its dialler would not have dialled while the older one lived.
//! 3. Otherwise the one dialled by the site with the smaller name lives.
//!
//! A replaced session is ended and awaited before the new one goes on, so only one ever writes an inbox.

use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::model::{AgentId, SiteName, Term};

/// What distinguishes a session from others with the same peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The site that opened the connection.
    pub dialler: SiteName,
    /// The peer's agent.
    pub agent: AgentId,
    /// The term it claims.
    pub term: Term,
}

/// Whether `new` takes the place of `old`; `own` and the peer's site are the possible diallers.
pub fn replaces(new: &Claim, old: &Claim) -> bool {
    if new.term != old.term {
        return new.term > old.term;
    }
    new.dialler <= old.dialler
}

#[derive(Clone, Debug)]
struct Live {
    id: u64,
    claim: Claim,
    cancel: CancellationToken,
}

/// The place of the one session with a peer. Those that wait for it are woken in the order in which they came (a watch has
/// an order of its own), so that a simulation repeats.
#[derive(Debug, Default)]
pub struct Slot {
    live: Mutex<Option<Live>>,
    moved: Notify,
    ids: std::sync::atomic::AtomicU64,
}

/// Held by the session that lives; frees the place when dropped.
#[derive(Debug)]
pub struct Place<'a> {
    slot: &'a Slot,
    id: u64,
}

impl Slot {
    fn live(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().expect("no holder panics")
    }

    /// Whether a session lives.
    pub fn is_taken(&self) -> bool {
        self.live().is_some()
    }

    /// Ends the session that lives, if any.
    pub fn end(&self) {
        if let Some(live) = &*self.live() {
            live.cancel.cancel();
        }
    }

    /// Waits until no session lives.
    pub async fn free(&self) {
        self.until(|live| live.is_none()).await;
    }

    async fn until(&self, wanted: impl Fn(Option<&Live>) -> bool) {
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            // Listening before looking, so that nothing is missed in between.
            moved.as_mut().enable();
            if wanted(self.live().as_ref()) {
                return;
            }
            moved.await;
        }
    }

    /// Takes the place, ending an older session that the rule lets go; `None` when the older one stays. `cancel` ends the new
    /// session when it is itself replaced.
    pub async fn admit(&self, claim: Claim, cancel: CancellationToken) -> Option<Place<'_>> {
        let id = self.ids.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        loop {
            let Some(old) = self.take(id, &claim, &cancel) else { return Some(Place { slot: self, id }) };
            if !replaces(&claim, &old.claim) {
                return None;
            }
            old.cancel.cancel();
            self.until(|live| live.is_none_or(|live| live.id != old.id)).await;
        }
    }

    /// Takes the place if it is free; else tells who has it.
    fn take(&self, id: u64, claim: &Claim, cancel: &CancellationToken) -> Option<Live> {
        let mut live = self.live();
        if live.is_none() {
            *live = Some(Live { id, claim: claim.clone(), cancel: cancel.clone() });
            return None;
        }
        live.clone()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut live = self.slot.live();
        if live.as_ref().is_some_and(|live| live.id == self.id) {
            *live = None;
            drop(live);
            self.slot.moved.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::link::testing::site;

    fn claim(dialler: &str, term: u64) -> Claim {
        Claim { dialler: site(dialler), agent: AgentId([1; 16]), term: Term(term) }
    }

    /// What a side is left with that admits `claims` in this order.
    fn survivor(claims: &[Claim]) -> Claim {
        let first = claims[0].clone();
        claims[1..].iter().fold(first, |old, new| if replaces(new, &old) { new.clone() } else { old })
    }

    proptest! {
        #[test]
        fn both_sides_agree_in_whatever_order_they_see_the_two_sessions(terms in (0u64..3, 0u64..3)) {
            let (a, b) = (claim("north", terms.0), claim("south", terms.1));
            prop_assert_eq!(survivor(&[a.clone(), b.clone()]), survivor(&[b, a]));
        }
    }

    #[tokio::test]
    async fn a_redialled_session_replaces_the_dead_one_after_its_end() {
        let slot = Slot::default();
        let (old, new) = (CancellationToken::new(), CancellationToken::new());
        let place = slot.admit(claim("south", 1), old.clone()).await.expect("free");
        assert!(slot.admit(claim("tokyo", 1), new.clone()).await.is_none(), "the smaller name's stays");
        let admitting = slot.admit(claim("south", 1), new.clone());
        let ending = async {
            old.cancelled().await;
            drop(place);
        };
        let (admitted, ()) = tokio::join!(admitting, ending);
        assert!(slot.is_taken() && !new.is_cancelled());
        drop(admitted);
        slot.free().await;
    }
}
