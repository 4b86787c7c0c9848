//! What other programs need of a Farshore agent: the generated protocol, the positions it speaks of, who may speak to
//! it, and the client.
//!
//! The protocol is generated from `proto/` at build time. Conversions between its messages and the vocabulary live
//! beside the vocabulary types, so a field is translated in one place.

pub mod client;
mod frame;
pub mod identity;
pub mod position;
pub mod tls;
mod verify;

pub mod replication {
    //! The link between two sites.
    #[allow(clippy::all, clippy::allow_attributes_without_reason, unreachable_pub, reason = "generated code")]
    pub mod v1 {
        tonic::include_proto!("farshore.replication.v1");
    }
}

pub mod control {
    //! What operators, the router and the status page ask an agent.
    #[allow(clippy::all, clippy::allow_attributes_without_reason, unreachable_pub, reason = "generated code")]
    pub mod v1 {
        tonic::include_proto!("farshore.control.v1");
    }
}

pub use identity::{Identity, Role};
pub use position::{ClusterTime, Position};
