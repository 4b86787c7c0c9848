//! The link with real mutual TLS on loopback.

mod pki;
mod sessions;
mod streams;
mod world;
