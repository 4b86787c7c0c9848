//! One session per peer: which one lives when there are several.
//!
//! Both sides may dial, and a connection may be dead at one end only, so two sessions with one peer can exist for a
//! moment. Both sides decide by the same rule and end up with the same one:
//! 1. An agent of a higher term beats one of a lower term.
//! 2. A newer session dialled by the same side replaces the older one: its dialler would not have dialled while the older one lived.
//! 3. Otherwise the one dialled by the site with the smaller name lives.
//!
//! A replaced session is ended and awaited before the new one goes on, so only one ever writes an inbox.

use tokio::sync::watch;
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

/// The place of the one session with a peer.
#[derive(Debug)]
pub struct Slot {
    live: watch::Sender<Option<Live>>,
    ids: std::sync::atomic::AtomicU64,
}

/// Held by the session that lives; frees the place when dropped.
#[derive(Debug)]
pub struct Place<'a> {
    slot: &'a Slot,
    id: u64,
}

impl Default for Slot {
    fn default() -> Self {
        Self { live: watch::Sender::new(None), ids: Default::default() }
    }
}

impl Slot {
    /// Whether a session lives.
    pub fn is_taken(&self) -> bool {
        self.live.borrow().is_some()
    }

    /// Waits until no session lives.
    pub async fn free(&self) {
        let mut watch = self.live.subscribe();
        // The sender lives in `self`.
        drop(watch.wait_for(Option::is_none).await);
    }

    /// Takes the place, ending an older session that the rule lets go; `None` when the older one stays. `cancel` ends the new
    /// session when it is itself replaced.
    pub async fn admit(&self, claim: Claim, cancel: CancellationToken) -> Option<Place<'_>> {
        let id = self.ids.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        loop {
            let mut old = None;
            let taken = self.live.send_if_modified(|live| match live {
                Some(live) => {
                    old = Some(live.clone());
                    false
                }
                None => {
                    *live = Some(Live { id, claim: claim.clone(), cancel: cancel.clone() });
                    true
                }
            });
            match old {
                _ if taken => return Some(Place { slot: self, id }),
                Some(old) if replaces(&claim, &old.claim) => {
                    old.cancel.cancel();
                    let mut watch = self.live.subscribe();
                    drop(watch.wait_for(|live| live.as_ref().is_none_or(|live| live.id != old.id)).await);
                }
                _ => return None,
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.slot.live.send_if_modified(|live| {
            let ours = live.as_ref().is_some_and(|live| live.id == self.id);
            if ours {
                *live = None;
            }
            ours
        });
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
