//! A replica set in the hands of a test.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bson::doc;
use mongodb::Client;
use mongodb::options::ServerAddress;

use super::clients::{Access, Clients, User};
use super::member::Member;
use super::options::Options;
use super::setup;
use super::warm::{self, Warm};
use crate::pki::{self, Pki, ServerFiles};
use crate::process::Usage;
use crate::scratch::Scratch;
use crate::wait;

/// A member that does not answer within this is not asked further (it may be stopped).
const ANSWER: Duration = Duration::from_millis(500);
/// A server that ends writes what it has to disk first.
const SHUTDOWN: Duration = Duration::from_secs(60);

/// The servers; shared by nobody but handed on between tests when warm.
pub(super) struct Servers {
    pub(super) access: Access,
    members: Vec<Mutex<Member>>,
    /// Its files are read again at every start.
    _pki: Option<Arc<Pki>>,
    // Last: the folder goes after the processes in it.
    folder: Scratch,
}

/// A replica set; its servers are killed when it is dropped, or go back to the pool.
pub struct ReplicaSet {
    servers: Option<Arc<Servers>>,
    clients: Clients,
    kind: Option<Warm>,
}

impl ReplicaSet {
    /// Starts a new set and waits until every member is in service.
    pub async fn start(options: Options) -> Result<Self> {
        ensure!(matches!(options.members, 1 | 3), "a replica set has 1 or 3 members, not {}", options.members);
        let servers = Servers::start(&options)?;
        setup::initiate(&servers.access)
            .await
            .with_context(|| format!("set up the replica set in {}", servers.folder.path().display()))?;
        Ok(Self::of(Arc::new(servers), None))
    }

    /// A set of that kind, started now or by an earlier test, with no user databases and no database `farshore`.
    pub async fn warm(kind: Warm) -> Result<Self> {
        warm::take(kind).await
    }

    pub(super) fn of(servers: Arc<Servers>, kind: Option<Warm>) -> Self {
        Self { servers: Some(servers), clients: Clients::default(), kind }
    }

    /// The same set, to go back to the pool when dropped.
    pub(super) fn pooled(mut self, kind: Warm) -> Self {
        self.kind = Some(kind);
        self
    }

    /// The same set, to be killed when dropped.
    pub(super) fn unpooled(mut self) -> Self {
        self.kind = None;
        self
    }

    pub(super) fn servers(&self) -> &Servers {
        self.servers.as_ref().expect("only drop takes the servers")
    }

    /// URI of the set without user and password.
    pub fn uri(&self) -> String {
        let access = &self.servers().access;
        let hosts: Vec<String> = access.hosts.iter().map(ToString::to_string).collect();
        format!("mongodb://{}/?replicaSet={}", hosts.join(","), access.replica_set)
    }

    /// URI with user and password, for people and foreign programs.
    pub fn uri_as(&self, user: User) -> String {
        let uri = self.uri();
        match self.password(user) {
            Some(password) => uri.replacen("//", &format!("//{}:{password}@", user.name()), 1) + "&authSource=admin",
            None => uri,
        }
    }

    /// The user's password; none without `auth`.
    pub fn password(&self, user: User) -> Option<String> {
        self.servers().access.password(user)
    }

    /// Certificate files, when the set has TLS.
    pub fn tls(&self) -> Option<&ServerFiles> {
        self.servers().access.tls.as_ref()
    }

    /// A client that follows the primary; cached.
    pub fn client(&self, user: User) -> Result<Client> {
        self.clients.get(&self.servers().access, user, None)
    }

    /// A client of one member only, whatever its state; cached.
    pub fn member_client(&self, member: usize, user: User) -> Result<Client> {
        self.clients.get(&self.servers().access, user, Some(member))
    }

    /// Number of members.
    pub fn members(&self) -> usize {
        self.servers().members.len()
    }

    /// Process id of the member's server.
    pub fn pid(&self, member: usize) -> u32 {
        self.member(member).process.pid()
    }

    /// CPU time and memory of the member's server.
    pub fn usage(&self, member: usize) -> Result<Usage> {
        self.member(member).process.usage()
    }

    /// Index of the member that is primary now.
    pub async fn primary(&self) -> Result<usize> {
        let mut said = Vec::new();
        for member in 0..self.members() {
            if !self.member(member).process.is_running() {
                said.push(format!("{member} is down"));
                continue;
            }
            let admin = self.member_client(member, User::Root)?.database("admin");
            match tokio::time::timeout(ANSWER, admin.run_command(doc! { "hello": 1 })).await {
                Ok(Ok(hello)) if setup::says(&hello, "isWritablePrimary") => {
                    return Ok(member);
                }
                Ok(Ok(_)) => said.push(format!("{member} is not primary")),
                Ok(Err(error)) => said.push(format!("{member}: {error}")),
                Err(_) => said.push(format!("{member} is silent")),
            }
        }
        anyhow::bail!("no primary: {}", said.join(", "))
    }

    /// Waits for a primary and returns its index.
    pub async fn wait_primary(&self, deadline: Duration) -> Result<usize> {
        wait::until("a primary", deadline, || self.primary()).await
    }

    /// Waits until every running member is primary or secondary.
    pub async fn wait_all(&self) -> Result<()> {
        setup::all_in_service(&self.servers().access).await
    }

    /// SIGKILL.
    pub fn kill9(&self, member: usize) -> Result<()> {
        self.member(member).process.kill9()
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(&self, member: usize) -> Result<()> {
        self.member(member).process.terminate()?;
        wait::until("a member to end", SHUTDOWN, || async {
            ensure!(!self.member(member).process.is_running(), "member {member} still runs");
            Ok(())
        })
        .await
    }

    /// SIGSTOP.
    pub fn stop(&self, member: usize) -> Result<()> {
        self.member(member).process.stop()
    }

    /// SIGCONT.
    pub fn cont(&self, member: usize) -> Result<()> {
        self.member(member).process.cont()
    }

    /// Copies the data of a member that is down to a folder that is not there yet, as a snapshot of its volume would.
    pub fn save_data(&self, member: usize, to: &Path) -> Result<()> {
        self.member(member).save_data(to)
    }

    /// Puts such a copy in the place of the data of a member that is down.
    pub fn restore_data(&self, member: usize, from: &Path) -> Result<()> {
        self.member(member).restore_data(from)
    }

    /// Starts a member that was killed, with its data; returns when it listens.
    pub async fn restart(&self, member: usize) -> Result<()> {
        self.member(member).restart()?;
        setup::answering(&self.servers().access_of(member)).await
    }

    /// Makes the primary step down; a set of one elects the same member again a second later.
    pub async fn step_down(&self) -> Result<()> {
        let primary = self.primary().await?;
        let seconds = if self.members() == 1 { 1 } else { 10 };
        let command = doc! { "replSetStepDown": seconds, "secondaryCatchUpPeriodSecs": seconds / 2, "force": true };
        self.member_client(primary, User::Root)?.database("admin").run_command(command).await.context("step down")?;
        Ok(())
    }

    fn member(&self, member: usize) -> MutexGuard<'_, Member> {
        self.servers().member(member)
    }
}

impl Drop for ReplicaSet {
    fn drop(&mut self) {
        if let (Some(kind), Some(servers)) = (self.kind, self.servers.take()) {
            warm::give_back(kind, servers);
        }
    }
}

impl Servers {
    fn start(options: &Options) -> Result<Self> {
        let folder = Scratch::new("mongo")?;
        let secret = options.auth.then(|| uuid::Uuid::new_v4().simple().to_string());
        let key_file = folder.path().join("key");
        if let Some(secret) = &secret {
            pki::write(&key_file, secret.as_bytes(), 0o600)?;
        }
        let tls = options.tls.as_ref().map(|pki| pki.mongod()).transpose()?;
        let key_file = secret.as_ref().map(|_| key_file.as_path());
        let start =
            |member: usize| Member::start(&folder.path().join(member.to_string()), options, key_file, tls.as_ref());
        let members = (0..options.members).map(start).collect::<Result<Vec<_>>>()?;
        let host =
            |member: &Member| ServerAddress::Tcp { host: "127.0.0.1".to_owned(), port: Some(member.port.number()) };
        let hosts = members.iter().map(host).collect();
        let access = Access { replica_set: options.name.clone(), hosts, secret, tls };
        Ok(Self { access, members: members.into_iter().map(Mutex::new).collect(), _pki: options.tls.clone(), folder })
    }

    fn member(&self, member: usize) -> MutexGuard<'_, Member> {
        self.members[member].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn access_of(&self, member: usize) -> Access {
        Access { hosts: vec![self.access.hosts[member].clone()], ..self.access.clone() }
    }

    /// Whether every member runs, after letting stopped ones go on.
    pub(super) fn revive(&self) -> bool {
        (0..self.members.len()).all(|member| {
            let mut member = self.member(member);
            member.process.is_running() && member.process.cont().is_ok()
        })
    }
}
