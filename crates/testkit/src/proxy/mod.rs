//! What lies between two sites.
//!
//! [`tcp`] treats the link as bytes: delay, bandwidth, cuts, partitions in one direction. [`grpc`] treats it as frames:
//! it ends mTLS on both sides and loses, repeats, swaps and corrupts decoded frames by a seed ([`faults`], over [`tls`]).

pub mod faults;
pub mod grpc;
pub mod tcp;
pub mod tls;
