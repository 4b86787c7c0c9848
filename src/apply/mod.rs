//! The target side: batches from the inbox are applied to the local MongoDB, exactly once.
pub mod delta;
pub mod lanes;
