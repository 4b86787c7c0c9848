//! Real replica sets, agents as processes, certificates and proxies, for tests, the demo and benchmarks.
//!
//! - [`mongo`]: replica sets of one or three `mongod` with users, key file and optional TLS; warm ones for reuse.
//! - [`agent`], [`pair`]: the `farshore` binary as a process, and two sites of them.
//! - [`pki`]: the fleet's certificates, and bad ones.
//! - [`compare`], [`workload`]: whether two clusters are equal, and what is written to them.
//! - [`proxy`]: what lies between two sites: a TCP proxy (delay, bandwidth, cuts, partitions) and a gRPC proxy that
//!   loses, repeats, reorders and corrupts decoded frames.
//! - [`sizes`]: how much a test does, from the environment; what was skipped.
//! - [`process`], [`ports`], [`scratch`], [`wait`]: what the above is made of.
//!
//! Invariants: nothing outlives the test process, also when it panics or is killed ([`process`]); every process is
//! signalled by its own id; nothing sleeps for a fixed time, everything polls a condition with a deadline
//! ([`wait::until`]).
//!
//! `mongod` is found through `FARSHORE_MONGOD` (exported by `dev/env.sh`) or in the cache that `dev/setup` fills; the
//! agent's binary through `FARSHORE_BIN` or beside the test executable.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "deals with real processes and real time, outside the agent's supervisor"
)]

pub mod agent;
pub mod compare;
pub mod mongo;
pub mod pair;
pub mod pki;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod scratch;
pub mod sizes;
pub mod wait;
pub mod workload;
