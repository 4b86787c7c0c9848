//! Asking the agents, as an operator would: over mTLS, with an operator's certificate.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use farshore_api::control::v1::control_client::ControlClient;
use farshore_api::control::v1::{StatusRequest, StreamStatus};
use farshore_api::tls::{Expected, Reloading, TlsFiles};
use farshore_testkit::agent::AgentProcess;
use farshore_testkit::pki::{Identity, Pki, Role};

/// A killed agent refuses at once; a busy machine is slower than that.
const ANSWER: Duration = Duration::from_secs(2);

/// An operator of the fleet.
pub(crate) struct Operator {
    identity: Identity,
    tls: Arc<Reloading>,
}

impl Operator {
    pub(crate) fn new(pki: &Pki) -> Result<Self> {
        let identity = pki.identity(Role::Operator, "demo")?;
        let files = TlsFiles {
            certificate: identity.certificate_file.clone(),
            key: identity.key_file.clone(),
            ca: identity.ca_file.clone(),
        };
        let tls = Reloading::load(files, pki.domain()).context("read the operator's certificate")?;
        Ok(Self { identity, tls: Arc::new(tls) })
    }

    /// Its certificate, for the commands that people may paste.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What an agent says of the stream from north to south.
    pub(crate) async fn stream(&self, agent: &AgentProcess) -> Result<StreamStatus> {
        let asked = async {
            let address = agent.link_address().to_string();
            let channel = farshore_api::client::connect(&address, Arc::clone(&self.tls), Expected::AnySite).await?;
            anyhow::Ok(ControlClient::new(channel).status(StatusRequest {}).await?.into_inner())
        };
        let status = tokio::time::timeout(ANSWER, asked).await.context("the agent is silent")??;
        status.streams.into_iter().next().context("the agent has no stream")
    }
}

/// How far the target is behind, as that agent knows it: what it lacks, and what it has but did not apply yet.
pub(crate) fn lag(stream: &StreamStatus) -> Option<Duration> {
    let known = |ms: i64| u64::try_from(ms).ok();
    let ms = known(stream.data_loss_exposure_ms)? + known(stream.apply_lag_ms)?;
    Some(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_the_sum_of_its_parts_or_unknown() {
        let mut stream = StreamStatus { data_loss_exposure_ms: 1_500, apply_lag_ms: 700, ..StreamStatus::default() };
        assert_eq!(lag(&stream), Some(Duration::from_millis(2_200)));
        stream.apply_lag_ms = -1;
        assert_eq!(lag(&stream), None);
    }
}
