//! What a replica set is made with.

use std::sync::Arc;

use crate::pki::Pki;

/// How to start a replica set; `..Options::default()` for the rest.
#[derive(Clone)]
pub struct Options {
    /// 1 or 3.
    pub members: usize,
    /// Key file and users; without it no write block takes exceptions.
    pub auth: bool,
    /// TLS required, with a certificate of this CA; clients need none.
    pub tls: Option<Arc<Pki>>,
    /// WiredTiger cache of each member; 0.25 is the least mongod takes.
    pub cache_gb: f64,
    /// Size of the oplog; below [`Self::SMALL_OPLOG_MB`] it is made to roll over soon.
    pub oplog_mb: u32,
    /// More `--setParameter` arguments, such as `("enableTestCommands", "1")`.
    pub set_parameters: Vec<(String, String)>,
    /// Replica set name; empty for a server on its own.
    pub name: String,
}

impl Options {
    /// Servers with a smaller oplog take a checkpoint every second instead of every minute: they keep the oplog back
    /// to the last one (see [`super::ReplicaSet::roll_oplog`]).
    pub const SMALL_OPLOG_MB: u32 = 100;
}

impl Default for Options {
    fn default() -> Self {
        Self {
            members: 1,
            auth: true,
            tls: None,
            cache_gb: 0.25,
            oplog_mb: 1024,
            set_parameters: Vec::new(),
            name: "rs0".to_owned(),
        }
    }
}
