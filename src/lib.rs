//! Farshore's replication agent and operator CLI.
//!
//! A change goes from `mongod` to `mongod` through these modules in this order: [`source`] (change stream to batches),
//! [`outbox`] (durable log), [`link`] (gRPC session), [`outbox`] again as the inbox, [`apply`] (lanes and transactions).
//! [`model`] is the vocabulary they share; `agent` puts them together. See `docs/ARCHITECTURE.md`.

pub mod model;
