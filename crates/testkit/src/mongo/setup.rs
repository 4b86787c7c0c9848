//! From started processes to a usable replica set: initiate it, wait for the members, make role and users.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bson::{Bson, Document, doc};
use mongodb::Client;

use super::clients::{Access, User};
use super::role::farshore_role;
use crate::wait;

/// Generous: several sets may start at once on two cores.
const START: Duration = Duration::from_secs(60);

/// Initiates the set and makes its users through the localhost exception.
pub(super) async fn initiate(access: &Access) -> Result<()> {
    let first = access.connect(None, Some(0))?;
    answering(access).await?;
    let admin = first.database("admin");
    admin.run_command(doc! { "replSetInitiate": configuration(access) }).await.context("initiate the replica set")?;
    wait::until("the first primary", START, || async {
        let hello = admin.run_command(doc! { "hello": 1 }).await?;
        ensure!(says(&hello, "isWritablePrimary"), "hello says {hello}");
        Ok(())
    })
    .await?;
    if access.secret.is_some() {
        // The exception ends with the first user.
        let roles = [doc! { "role": "root", "db": "admin" }];
        create_user(access, &first, User::Root, &roles).await?;
        create_others(access).await?;
    }
    all_in_service(access).await
}

/// Waits until every member accepts connections.
pub(super) async fn answering(access: &Access) -> Result<()> {
    for host in &access.hosts {
        listening(&host.to_string()).await?;
    }
    Ok(())
}

/// Waits until somebody accepts connections at an address.
pub(super) async fn listening(address: &str) -> Result<()> {
    let what = format!("mongod on {address} to listen");
    wait::until(&what, START, || tokio::net::TcpStream::connect(address)).await?;
    Ok(())
}

fn configuration(access: &Access) -> Document {
    let members: Vec<Bson> =
        (0_i32..).zip(&access.hosts).map(|(id, host)| doc! { "_id": id, "host": host.to_string() }.into()).collect();
    doc! {
        "_id": &access.replica_set,
        "members": members,
        "settings": { "electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200 },
    }
}

async fn create_others(access: &Access) -> Result<()> {
    // A driver that logs in must be new: connections made before stay unauthenticated.
    let root = access.connect(Some(User::Root), Some(0))?;
    root.database("admin").run_command(farshore_role()).await.context("create the role farshore")?;
    let any = |role: &str| doc! { "role": role, "db": "admin" };
    create_user(access, &root, User::App, &[any("readWriteAnyDatabase"), any("dbAdminAnyDatabase")]).await?;
    create_user(access, &root, User::Farshore, &[any("farshore")]).await
}

async fn create_user(access: &Access, client: &Client, user: User, roles: &[Document]) -> Result<()> {
    let command = doc! {
        "createUser": user.name(),
        "pwd": access.password(user).context("a password needs auth")?,
        "mechanisms": ["SCRAM-SHA-256"],
        "roles": roles,
    };
    client.database("admin").run_command(command).await.with_context(|| format!("create user {}", user.name()))?;
    Ok(())
}

/// Waits until every member is primary or secondary.
pub(super) async fn all_in_service(access: &Access) -> Result<()> {
    for member in 0..access.hosts.len() {
        let client = access.connect(Some(User::Root), Some(member))?;
        wait::until(&format!("member {member} to be in service"), START, || async {
            let hello = client.database("admin").run_command(doc! { "hello": 1 }).await?;
            ensure!(says(&hello, "isWritablePrimary") || says(&hello, "secondary"), "hello says {hello}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Whether a flag of a server's hello is set.
pub(super) fn says(hello: &Document, flag: &str) -> bool {
    hello.get_bool(flag).unwrap_or(false)
}
