//! The target side.
pub mod delta;
