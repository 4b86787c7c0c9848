//! Whole agents on real replica sets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests deal with real processes and real time")]

mod corruption;
mod divergence;
mod handover;
mod kills;
mod large;
mod links;
mod metrics;
mod orphans;
mod refusals;
mod replicate;
mod secrets;
mod starting;
mod support;
mod takeover;
mod tls;
