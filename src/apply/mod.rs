//! The target side: batches from the inbox are applied to the local MongoDB, exactly once.
//!
//! ```text
//! inbox ─► route (units) ─► lanes (what may run) ─► plan (commands) ─► target (one transaction) ─► mongod
//!                              ▲        │ DDL ─► ddl (by UUID) ─► catalog
//!                              └────────┴── session drives all of it, engine the sessions
//! ```
//!
//! [`lanes`], [`plan`], [`diff`], [`route`], [`suspects`] and [`store`] are pure; [`engine`] is the task, one `session` after
//! another, [`heal`] applies a job of one; [`mongo`] and `ddl` talk to MongoDB behind the trait in [`target`], which
//! simulations implement in memory.

pub mod catalog;
mod ddl;
pub mod diff;
pub mod engine;
pub mod heal;
mod holders;
pub mod lanes;
pub mod mongo;
mod patch;
pub mod plan;
pub mod reconcile;
mod reply;
pub mod route;
mod session;
pub mod status;
pub mod store;
pub mod suspects;
pub mod target;
