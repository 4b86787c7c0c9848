//! What an agent shows of itself: health and metrics on a plain port, the control service over mutual TLS, the log.
//!
//! The plain port answers from its own thread and runtime, so a stuck data plane cannot silence the probes that would
//! restart it. Nothing it serves names a collection or a document.

pub mod control;
pub mod counted;
pub mod health;
pub mod metrics;
mod observed;
pub mod roles;
pub mod telemetry;
#[cfg(test)]
mod tests;
