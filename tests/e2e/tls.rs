//! Certificates: who has none of the fleet is nobody, who has one is held to it, and new ones are taken up in time.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use bson::{Document, doc};
use farshore_api::replication::v1 as wire;
use farshore_api::tls::{Expected, Reloading, TlsFiles};
use farshore_testkit::agent::{AgentConfig, AgentProcess};
use farshore_testkit::compare::Options;
use farshore_testkit::mongo::{self, ReplicaSet, Warm};
use farshore_testkit::pair::{Pair, PairOptions, Sets, Side};
use farshore_testkit::pki::{Identity, Pki, Role};
use farshore_testkit::wait;
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wire::replication_client::ReplicationClient;

use crate::handover::Load;
use crate::support::{caught_up, client, equal, pair, site, status, stream};

const DEADLINE: Duration = Duration::from_secs(60);

/// How a TLS connection to the agent goes: what the agent says first, or why it does not.
async fn knock(agent: &AgentProcess, config: Arc<ClientConfig>) -> Result<usize, String> {
    let knocking = async {
        let stream = tokio::net::TcpStream::connect(agent.link_address()).await.map_err(|error| error.to_string())?;
        let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
        let connector = tokio_rustls::TlsConnector::from(config);
        let mut stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        // The beginning of HTTP/2: whoever was let in gets the agent's settings.
        let sent = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        sent.map_err(|error| error.to_string())?;
        let mut said = [0; 64];
        match stream.read(&mut said).await {
            Ok(0) => Err("closed".to_owned()),
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(error.to_string()),
        }
    };
    tokio::time::timeout(Duration::from_secs(10), knocking).await.unwrap_or_else(|_| Err("silence".into()))
}

/// Opens a replication session with a Hello of that site.
async fn session(agent: &AgentProcess, identity: &Identity, site: &str) -> Result<wire::Frame, tonic::Status> {
    let files = TlsFiles {
        certificate: identity.certificate_file.clone(),
        key: identity.key_file.clone(),
        ca: identity.ca_file.clone(),
    };
    let tls = Arc::new(Reloading::load(files, "farshore").expect("good files"));
    let address = agent.link_address().to_string();
    let connecting = farshore_api::client::connect(&address, tls, Expected::AnySite);
    let channel = connecting.await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let hello = wire::Hello {
        version_min: 1,
        version_max: 1,
        site: site.into(),
        group: "bank".into(),
        agent: "01234567-89ab-4cde-8f01-23456789abcd".into(),
        epoch: 1,
        term: 99,
        leader: true,
        ..Default::default()
    };
    let first = wire::Frame::of(wire::frame::Body::Hello(hello));
    let frames = futures::StreamExt::chain(futures::stream::iter([first]), futures::stream::pending());
    let mut answer = ReplicationClient::new(channel).session(frames).await?.into_inner();
    // Its own Hello comes first, then what it thinks of ours.
    while let Some(frame) = answer.message().await? {
        if matches!(frame.body, Some(wire::frame::Body::Reject(_))) {
            return Ok(frame);
        }
    }
    Err(tonic::Status::aborted("closed without a word"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_certificate_of_the_fleet_is_not_let_in() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let pki = &pair.pki;
    let (member, strangers) = (pki.identity(Role::Operator, "jo")?, pki.stranger()?);
    let strange = strangers.identity(Role::Site, "north")?;
    // A stranger who trusts us: it is on the agent to refuse him.
    Pki::trust(&strange, &[pki])?;
    let expired = pki.expired(Role::Site, "north")?;
    let nameless = pki.anonymous()?;
    let elsewhere = pki.identity_with_uri("spiffe://another-fleet/site/north")?;
    for agent in [&pair.north.agents[0], &pair.south.agents[0]] {
        let settings = knock(agent, member.client_config()?).await;
        ensure!(settings.is_ok(), "a member of the fleet is not let in: {settings:?}");
        for (who, config) in [
            ("nobody", member.client_config_without_certificate()?),
            ("a stranger", strange.client_config()?),
            ("who has expired", expired.client_config()?),
            ("who has no name", nameless.client_config()?),
            ("who is of another domain", elsewhere.client_config()?),
        ] {
            let said = knock(agent, config).await;
            println!("{} to {who}: {said:?}", agent.config().site());
            ensure!(said.is_err_and(|error| error != "silence"), "{who} is let in");
        }
    }
    let failed = pair.south.agents[0].log()?.lines().filter(|line| line.contains("handshake failed")).count();
    ensure!(failed == 1, "one address is spoken of {failed} times within a minute");

    // Members are held to what their certificate says.
    let south = &pair.south.agents[0];
    for (role, name) in [(Role::Viewer, "jo"), (Role::Operator, "jo"), (Role::Router, "jo"), (Role::Site, "east")] {
        let identity = pki.identity(role, name)?;
        let refused = session(south, &identity, "north").await.err().context("a session is opened")?;
        println!("{} {name}: {}", role.name(), refused.message());
        ensure!(refused.code() == tonic::Code::PermissionDenied, "{refused}");
    }
    let north = pki.identity(Role::Site, "north")?;
    let told = session(south, &north, "east").await?;
    println!("site north as east: {told:?}");
    let Some(wire::frame::Body::Reject(reject)) = told.body else { bail!("it is not refused") };
    ensure!(reject.message.contains("the certificate names site/north"), "{}", reject.message);
    println!("{}", equal(&mut pair, &Options::default()).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_ships_no_stream_but_that_of_its_own_site() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let before = client(&mut pair, Side::South)?.list_database_names().await?;
    let set = ReplicaSet::warm(Warm::One).await?;
    let south = pair.south.agents[0].link_address();
    // A site of the fleet that south knows nothing of.
    let east = AgentConfig::new("east", "east", &set, &pair.pki)?.peer("south", &[south]);
    let east = AgentProcess::start(east)?;
    set.client(farshore_testkit::mongo::User::Root)?
        .database("app")
        .collection("planted")
        .insert_one(doc! {"_id": 1})
        .await?;
    let link = wait::until("the stranger to be refused", DEADLINE, || async {
        let link = status(&pair.pki, &east).await?.links.into_iter().next().context("no link")?;
        ensure!(link.state == "refused", "{} ({})", link.state, link.error);
        anyhow::Ok(link)
    })
    .await?;
    println!("east: {}", link.error);
    ensure!(link.error.contains("east is not a peer of south"), "{}", link.error);
    drop(east);

    // With the name of north and its own certificate it does not even start.
    let mut claimed = AgentConfig::new("north", "north", &set, &pair.pki)?.peer("south", &[south]);
    claimed.set_identity(pair.pki.identity(Role::Site, "east")?);
    let mut claimed = AgentProcess::start(claimed)?;
    ensure!(!claimed.wait_end(DEADLINE).await?.success(), "it runs under a name that is not its own");
    let log = claimed.log()?;
    ensure!(log.contains("is for site/east, this agent is site/north"), "{log}");
    println!("{}", log.lines().last().unwrap_or_default());

    caught_up(&mut pair).await?;
    let after = client(&mut pair, Side::South)?.list_database_names().await?;
    ensure!(before == after, "south had {before:?} and has {after:?}");
    Ok(())
}

/// Servers that take nothing but TLS; the agents log in with a password, then with certificates.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mongodb_that_wants_tls_is_replicated_with_passwords_and_with_certificates() -> Result<()> {
    let databases = Arc::new(Pki::new("databases")?);
    let sets = Sets::New(mongo::Options { tls: Some(databases.clone()), ..mongo::Options::default() });
    let mut pair = pair(PairOptions { sets, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let items = source.database("shop").collection::<Document>("items");
    items.insert_many((0..50).map(|id| doc! {"_id": id})).await?;
    let first = equal(&mut pair, &Options::default()).await?;
    for side in [Side::North, Side::South] {
        let user = doc! {"createUser": "CN=farshore test", "roles": [{"role": "farshore", "db": "admin"}]};
        client(&mut pair, side)?.database("$external").run_command(user).await?;
        let login = databases.mongod()?;
        let agent = &mut pair.site(side).agents[0];
        let config = agent.config_mut();
        config.unset("mongodb", "username");
        config.unset("mongodb", "password_file");
        config.set_text("mongodb", "tls_certificate_key_file", &login.certificate_key_file.display().to_string());
        agent.restart()?;
    }
    items.insert_many((50..100).map(|id| doc! {"_id": id})).await?;
    let second = equal(&mut pair, &Options::default()).await?;
    ensure!((first.documents, second.documents) == (50, 100), "{first}\n{second}");
    pair.check_logs(&[])
}

fn seconds_from_now(valid: Duration) -> Result<f64> {
    Ok((SystemTime::now() + valid).duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64())
}

/// Waits until every agent, in its metrics and at its peer, shows certificates that end about when `wanted` says.
async fn shown(pair: &Pair, what: &str, wanted: impl Fn(f64) -> bool) -> Result<()> {
    const METRIC: &str = "farshore_peer_certificate_expiry_timestamp_seconds";
    wait::until(what, DEADLINE, || async {
        for side in [Side::North, Side::South] {
            let agent = &site(pair, side).agents[0];
            let metrics = agent.metrics().await?;
            for kind in ["own", "peer"] {
                let ends =
                    metrics.total_where(METRIC, &[("kind", kind)]).with_context(|| format!("no {kind} expiry"))?;
                ensure!(wanted(ends), "{}: {kind} certificate ends at {ends}", side.name());
            }
        }
        anyhow::Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_outlives_certificates_that_are_renewed_in_time() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let source = client(&mut pair, Side::North)?;
    let load = Load::start(&source, 12);
    let valid = Duration::from_secs(10);
    let identities = [Side::North, Side::South].map(|side| site(&pair, side).agents[0].config().identity().clone());
    identities.iter().try_for_each(|identity| pair.pki.renew_for(identity, valid))?;
    let (short, end) = (seconds_from_now(valid)?, Instant::now() + valid);
    shown(&pair, "short-lived certificates", |ends| (ends - short).abs() < 3.0).await?;
    identities.iter().try_for_each(|identity| pair.pki.renew(identity))?;
    let renewed = Instant::now();
    shown(&pair, "renewed certificates", |ends| ends > short + 3600.0).await?;
    println!("renewed at both ends after {:?}, {:?} before the old ones end", renewed.elapsed(), end - Instant::now());
    ensure!(Instant::now() < end, "the sessions were not renewed before the old certificates ended");

    // Past the end of the old ones; the longest time without progress meanwhile.
    let (mut last, mut moved, mut longest) = (None, Instant::now(), Duration::ZERO);
    while Instant::now() < end + Duration::from_secs(3) {
        let applied = stream(&pair).await.ok().and_then(|stream| stream.applied).map(farshore_api::Position::from);
        if applied.is_some() && applied != last {
            longest = longest.max(moved.elapsed());
            (last, moved) = (applied, Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    longest = longest.max(moved.elapsed());
    let done = load.finish(&mut pair).await?;
    println!("{done} increments; the longest time without progress was {longest:?}");
    ensure!(longest < Duration::from_secs(3), "nothing was applied for {longest:?}");
    pair.check_logs(&["new certificates cannot be used"])
}
