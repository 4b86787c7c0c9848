//! Follows a log from a position: recent records come from the ring, older ones from the store, read ahead.
//!
//! A reader belongs to one generation of the log. `begin` and `rewind` end it, because what it has handed out may no
//! longer be part of the log.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::logs::{Channel, Shared};
use super::{Error, LogState, Stored};
use crate::model::Position;

/// Bytes read from the store at once; a reader holds at most two such pieces.
const READ_BYTES: usize = 2 << 20;

/// A read of the store on a blocking thread.
type Reading = JoinHandle<Result<Vec<Stored>, Error>>;

/// A cursor over one log.
pub struct Reader {
    shared: Arc<Shared>,
    channel: Arc<Channel>,
    states: watch::Receiver<Option<LogState>>,
    generation: Option<u64>,
    position: Position,
    ready: VecDeque<Stored>,
    /// A read of the store from that position, under way.
    ahead: Option<(Position, Reading)>,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, channel: Arc<Channel>, position: Position) -> Self {
        let states = channel.state.subscribe();
        let generation = states.borrow().as_ref().map(|state| state.generation);
        Self { shared, channel, states, generation, position, ready: VecDeque::new(), ahead: None }
    }

    /// Everything at or below was returned, or lies before where it started.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The next record; waits for it. Cancel-safe: a dropped call loses nothing.
    ///
    /// # Errors
    /// `Error::Trimmed` when the position is below what is kept, `Error::Restarted` after a `begin` or `rewind`,
    /// `Error::Corrupt`, `Error::Closed`.
    pub async fn next(&mut self) -> Result<Stored, Error> {
        loop {
            let state = self.states.borrow_and_update().clone();
            let generation = self.generation.or(state.as_ref().map(|state| state.generation));
            self.generation = generation;
            let (Some(state), Some(generation)) = (state, generation) else {
                self.changed().await?;
                continue;
            };
            if state.generation != generation {
                return Err(Error::Restarted { log: self.channel.id.clone() });
            }
            if let Some(stored) = self.ready.pop_front() {
                return Ok(self.advance(stored));
            }
            if state.end <= self.position {
                self.changed().await?;
                continue;
            }
            if let Some(stored) = self.recent(generation, self.position) {
                self.ahead = None;
                return Ok(self.advance(stored));
            }
            self.ready = self.load(generation).await?.into();
            self.read_ahead(generation, state.end);
        }
    }

    fn advance(&mut self, stored: Stored) -> Stored {
        assert!(stored.skip_through <= self.position, "a record was left out");
        self.position = stored.batch.header().end;
        stored
    }

    fn recent(&self, generation: u64, after: Position) -> Option<Stored> {
        self.channel.ring.lock().expect("no holder panics").next(generation, after)
    }

    async fn changed(&mut self) -> Result<(), Error> {
        tokio::select! {
            biased;
            () = self.shared.done.cancelled() => Err(Error::Closed),
            changed = self.states.changed() => changed.map_err(|_| Error::Closed),
        }
    }

    /// Starts reading what follows the records at hand, unless the ring will have it.
    fn read_ahead(&mut self, generation: u64, end: Position) {
        let Some(last) = self.ready.back().map(|stored| stored.batch.header().end) else { return };
        if self.shared.store.blocking() && last < end && self.recent(generation, last).is_none() {
            self.ahead = Some((last, self.spawn(generation, last)));
        }
    }

    fn spawn(&self, generation: u64, after: Position) -> Reading {
        let (store, log) = (Arc::clone(&self.shared.store), self.channel.id.clone());
        self.shared.tasks.spawn_blocking(move || store.read_of(&log, Some(generation), after, READ_BYTES))
    }

    async fn load(&mut self, generation: u64) -> Result<Vec<Stored>, Error> {
        if !self.shared.store.blocking() {
            return self.shared.store.read_of(&self.channel.id, Some(generation), self.position, READ_BYTES);
        }
        self.ahead = self.ahead.take().filter(|(after, _)| *after == self.position);
        let (after, handle) = match self.ahead.as_mut() {
            Some(ahead) => ahead,
            None => {
                let handle = self.spawn(generation, self.position);
                self.ahead.insert((self.position, handle))
            }
        };
        debug_assert_eq!(*after, self.position);
        let read = handle.await.expect("the store does not panic");
        self.ahead = None;
        read
    }
}
