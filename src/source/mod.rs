//! The source side: the change stream of the local MongoDB becomes batches in the outbox.
//!
//! [`tail`] reads replies (the real one from `mongod`, an in-memory one in simulations), [`chunk`] cuts them into batches
//! (pure), [`capture`] joins both to the outbox, [`heartbeat`] keeps positions moving while users are idle, [`fetch`]
//! answers a target that needs a document again, [`origin`] knows the identity of the source's history, [`serving`] decides
//! whether the outbox serves a target or begins again for it (pure but for waiting).

pub mod capture;
pub mod chunk;
pub mod fetch;
pub mod heartbeat;
pub mod origin;
pub mod serving;
pub mod tail;
pub mod token;
