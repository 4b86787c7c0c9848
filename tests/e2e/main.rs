//! Whole agents on real replica sets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod replicate;
mod support;
