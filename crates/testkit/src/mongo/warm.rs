//! Started replica sets handed from test to test of one binary.
//!
//! A lease is exclusive; when none of the kind is idle, another is started, so a test may take two without waiting for
//! others. Idle sets live in a static, which is never dropped: the reaper ends them with the process.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bson::{Document, doc};
use mongodb::options::WriteConcern;

use super::clients::User;
use super::options::Options;
use super::set::{ReplicaSet, Servers};

/// Kinds of sets that are kept warm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warm {
    /// One member, with users.
    One,
    /// One member, without users.
    Open,
    /// Three members, with users.
    Three,
}

static IDLE: Mutex<Vec<(Warm, Arc<Servers>)>> = Mutex::new(Vec::new());

pub(super) async fn take(kind: Warm) -> Result<ReplicaSet> {
    while let Some(servers) = idle(kind) {
        let set = ReplicaSet::of(servers, Some(kind));
        if !set.servers().revive() {
            drop(set.unpooled());
            continue;
        }
        clean(&set).await.context("clean a warm replica set")?;
        return Ok(set);
    }
    let members = if kind == Warm::Three { 3 } else { 1 };
    let set = ReplicaSet::start(Options { members, auth: kind != Warm::Open, ..Options::default() }).await?;
    Ok(set.pooled(kind))
}

pub(super) fn give_back(kind: Warm, servers: Arc<Servers>) {
    // A test that failed may have left anything: its servers go, their logs stay.
    if !std::thread::panicking() {
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).push((kind, servers));
    }
}

fn idle(kind: Warm) -> Option<Arc<Servers>> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let found = idle.iter().position(|(its_kind, _)| *its_kind == kind)?;
    Some(idle.swap_remove(found).1)
}

/// Ends what earlier tests left open, lifts the write block, drops their databases.
async fn clean(set: &ReplicaSet) -> Result<()> {
    set.wait_all().await?;
    set.wait_primary(Duration::from_secs(30)).await?;
    let client = set.client(User::Root)?;
    let admin = client.database("admin");
    admin.run_command(doc! { "killAllSessions": [] }).await.context("kill sessions")?;
    let status: Document = admin.run_command(doc! { "serverStatus": 1 }).await.context("read serverStatus")?;
    let blocked = status.get_document("repl").ok().and_then(|repl| repl.get("userWriteBlockMode").cloned());
    // 1: not blocked; an unset mode is not reported.
    if blocked.is_some_and(|mode| mode != 1.into()) {
        admin
            .run_command(doc! { "setUserWriteBlockMode": 1, "global": false })
            .await
            .context("lift the write block")?;
    }
    for name in client.list_database_names().await.context("list databases")? {
        if !matches!(name.as_str(), "admin" | "config" | "local") {
            let database = client.database(&name);
            let drop = database.drop().write_concern(WriteConcern::majority());
            drop.await.with_context(|| format!("drop {name}"))?;
        }
    }
    Ok(())
}
