//! The link with real mutual TLS on loopback.
#![allow(clippy::disallowed_methods, reason = "tests on real sockets and real time")]

mod pki;
mod sessions;
mod streams;
mod world;
