//! Fuzzes `diff` of the decoders in `entries.rs`.
#![no_main]

#[path = "../entries.rs"]
#[allow(dead_code, reason = "shared by all targets, each uses one entry")]
mod entries;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| entries::diff(bytes));
