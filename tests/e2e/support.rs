//! What the end-to-end tests share: asking agents for their status, waiting for a stream to catch up.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bson::doc;
use farshore_api::control::v1::control_client::ControlClient;
use farshore_api::control::v1::{StatusRequest, StatusResponse, StreamStatus};
use farshore_api::tls::{Expected, Reloading, TlsFiles};
use farshore_api::{ClusterTime, Position};
use farshore_testkit::agent::AgentProcess;
use farshore_testkit::compare::{self, Comparison};
use farshore_testkit::mongo::User;
use farshore_testkit::pair::{Pair, PairOptions, Side, Site};
use farshore_testkit::pki::{Pki, Role};
use farshore_testkit::wait;
use mongodb::Client;

/// How long a stream may take to catch up with a source at rest.
pub(crate) const CATCH_UP: Duration = Duration::from_secs(120);

/// Two sites with running, connected agents.
pub(crate) async fn pair(options: PairOptions) -> Result<Pair> {
    let pair = Pair::start(&options).await?;
    pair.wait_ready(Duration::from_secs(60)).await?;
    streaming(&pair).await?;
    Ok(pair)
}

/// Waits until the stream runs.
pub(crate) async fn streaming(pair: &Pair) -> Result<()> {
    wait::until("the stream to run", Duration::from_secs(60), || async {
        let stream = stream(pair).await?;
        match stream.state.as_str() {
            "streaming" => Ok(()),
            state => bail!("{state} ({})", stream.reason),
        }
    })
    .await
}

/// A client of the users of a site.
pub(crate) fn client(pair: &mut Pair, side: Side) -> Result<Client> {
    pair.site(side).mongo.client(User::Root)
}

/// The status of an agent, asked as an operator would.
pub(crate) async fn status(pki: &Pki, agent: &AgentProcess) -> Result<StatusResponse> {
    let operator = pki.identity(Role::Operator, "tester")?;
    let files = TlsFiles {
        certificate: operator.certificate_file.clone(),
        key: operator.key_file.clone(),
        ca: operator.ca_file.clone(),
    };
    let tls = Arc::new(Reloading::load(files, "farshore")?);
    let channel = farshore_api::client::connect(&agent.link_address().to_string(), tls, Expected::AnySite).await?;
    let mut control = ControlClient::new(channel);
    let asked = tokio::time::timeout(Duration::from_secs(5), control.status(StatusRequest {})).await;
    Ok(asked.context("status")??.into_inner())
}

/// A site by name of its side.
pub(crate) fn site(pair: &Pair, side: Side) -> &Site {
    match side {
        Side::North => &pair.north,
        Side::South => &pair.south,
    }
}

/// Which of a site's agents leads, once one does.
pub(crate) async fn leader(pair: &Pair, side: Side) -> Result<usize> {
    wait::until("an agent to lead", Duration::from_secs(30), || async {
        for (index, agent) in site(pair, side).agents.iter().enumerate() {
            if status(&pair.pki, agent).await.is_ok_and(|said| said.leader) {
                return Ok(index);
            }
        }
        bail!("none of {} does", side.name())
    })
    .await
}

/// The status of the stream north/south at the agent of south that leads.
pub(crate) async fn stream(pair: &Pair) -> Result<StreamStatus> {
    let mut said = String::new();
    for agent in &pair.south.agents {
        match status(&pair.pki, agent).await {
            Ok(status) if status.leader => return status.streams.into_iter().next().context("no stream"),
            Ok(_) => said.push_str("not leading; "),
            Err(error) => said = format!("{said}{error:#}; "),
        }
    }
    bail!("no agent of south leads: {said}")
}

/// A cluster time of the source at or past everything written so far.
pub(crate) async fn now_at(source: &Client) -> Result<ClusterTime> {
    let statement = doc! {"q": {"_id": "now"}, "u": {"$inc": {"n": 1}}, "upsert": true};
    let command = doc! {"update": "test", "updates": [statement], "writeConcern": {"w": "majority"}};
    let reply = source.database("farshore").run_command(command).await?;
    let time = reply.get_timestamp("operationTime")?;
    Ok(ClusterTime::new(time.time, time.increment))
}

/// Waits until the target has applied everything the source has now.
pub(crate) async fn caught_up(pair: &mut Pair) -> Result<()> {
    let source = client(pair, Side::North)?;
    let now = wait::until("the source to take a write", CATCH_UP, || async { now_at(&source).await }).await?;
    let pair = &*pair;
    wait::until("the stream to catch up", CATCH_UP, || async {
        let stream = stream(pair).await?;
        let applied: Option<Position> = stream.applied.map(Into::into);
        match applied {
            Some(applied) if applied >= Position::before(now) => Ok(()),
            _ => bail!("{} ({}), applied {applied:?} of {now}", stream.state, stream.reason),
        }
    })
    .await
}

/// Waits until both sites hold the same and says how much that is.
pub(crate) async fn equal(pair: &mut Pair, options: &compare::Options) -> Result<Comparison> {
    caught_up(pair).await?;
    let (north, south) = (client(pair, Side::North)?, client(pair, Side::South)?);
    let comparison = compare::compare(&north, &south, options).await?;
    comparison.ensure_equal()?;
    Ok(comparison)
}
