//! The link: carries the streams of a group between two sites over one gRPC session, whichever side opened it.
//!
//! ```text
//!  wire       what frames mean, who may say what              (pure)
//!  sender     the source's half of a stream: credit, start    (pure)
//!  receiver   the target's half: crc, chain, fencing, acks    (pure)
//!  registry   one session per peer
//!  ship       shell of sender: outbox -> frames               take   shell of receiver: frames -> inbox
//!  greet      Hello of both sides
//!  session    one session over any pair of frame streams      dial, server   sessions over tonic
//!  transport  streams with an identity                        tls    the product's transport
//!  hub        the handle for everybody else
//! ```
//!
//! Invariants: only fsynced batches are shipped, only fsynced batches are acknowledged; a stream comes from the site that its
//! certificate names; all that waits in memory is bounded by the credit. `tonic` is imported in [`dial`], [`server`] and [`transport`] only.

pub mod hub;
pub mod receiver;
pub mod registry;
pub mod sender;
pub mod server;
pub mod tls;
pub mod transport;
pub mod wire;

mod dial;
mod greet;
mod session;
mod ship;
mod status;
mod take;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use hub::{
    FetchSource, Hub, HubConfig, HubInputs, Leadership, PeerConfig, SourceProgress, StartGate, StartRefusal,
};
pub use status::{Counters, LinkState, PeerStatus, StreamView};
pub use tls::{TlsTransport, follow_files};
pub use transport::{Connection, Listener, Peer, Transport};
pub use wire::{REASONS, Receiving, Rejection, Standing};
