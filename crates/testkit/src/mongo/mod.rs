//! Real replica sets of `mongod` 6.0 on 127.0.0.1.
//!
//! A set of one member takes about a second to start, and [`ReplicaSet::warm`] reuses started ones. With `auth` (the
//! default) a set has a key file and three users: [`User::Root`], [`User::App`] (an application: reads and writes any
//! database, does not bypass the write block) and [`User::Farshore`] with [`farshore_role`] and nothing else.

mod clients;
mod member;
mod oplog;
mod options;
mod role;
mod set;
mod setup;
mod standalone;
mod warm;

pub use self::clients::User;
pub use self::options::Options;
pub use self::role::farshore_role;
pub use self::set::ReplicaSet;
pub use self::standalone::Standalone;
pub use self::warm::Warm;
