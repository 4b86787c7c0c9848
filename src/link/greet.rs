//! The beginning of a session: both sides say Hello, and each checks the other's.

use std::sync::Arc;
use std::time::Duration;

use farshore_api::replication::v1 as pb;
use futures::StreamExt;
use pb::frame::Body;
use tokio::time::timeout;

use super::hub::{Leadership, Shared};
use super::session::{Ended, Wire};
use super::wire::{Greeting, Originating, Reason, Receiving, Rejection, Standing, corrupt, protocol};
use crate::model::SiteName;

/// Hello must come within this time, and our own be ready.
const GREETING: Duration = Duration::from_secs(10);

/// What both sides have said.
pub(super) struct Greeted {
    pub(super) own: Option<Receiving>,
    pub(super) theirs: Greeting,
    pub(super) leadership: Leadership,
}

/// Says Hello and hears the peer's; both must agree before anything else is said.
pub(super) async fn greet(shared: &Arc<Shared>, wire: &mut Wire) -> Result<Greeted, Ended> {
    let leadership = shared.leadership();
    if !leadership.leader {
        let message = format!("this agent of {} does not hold its site's lease", shared.config.site);
        return Err(Ended::Refused(Rejection::new(Reason::NotLeader, message, "")));
    }
    let own = receiving(shared, &wire.site).await?;
    let greeting = greeting(shared, leadership, own.clone());
    let hello = pb::Frame::of(Body::Hello(greeting.to_hello()));
    let gone = |_| Ended::Lost("the connection closed before Hello".into());
    wire.out.send(hello).await.map_err(gone)?;
    let first = timeout(GREETING, wire.incoming.next()).await.map_err(|_| Ended::Lost("no Hello in time".into()))?;
    let theirs = match first {
        None => return Err(Ended::Closed),
        Some(Err(error)) => return Err(Ended::Lost(error)),
        Some(Ok(frame)) if !frame.is_intact() => return Err(Ended::Refused(corrupt())),
        Some(Ok(pb::Frame { body: Some(Body::Hello(hello)), .. })) => {
            Greeting::parse(&hello, &wire.site).map_err(Ended::Refused)?
        }
        Some(Ok(pb::Frame { body: Some(Body::Reject(reject)), .. })) => return Err(Ended::Rejected(reject.into())),
        Some(Ok(_)) => return Err(Ended::Refused(protocol("the first frame is not Hello"))),
    };
    let seen = shared.inbox(&wire.site).state().map(|state| state.term).unwrap_or_default();
    greeting.accept(&theirs, seen).map_err(Ended::Refused)?;
    if own.is_some() && theirs.originating.is_none() {
        let message = format!("site {} does not originate writes, but its stream is expected here", wire.site);
        let hint = "set the same primary under [group] at both sites";
        return Err(Ended::Refused(Rejection::new(Reason::Start, message, hint)));
    }
    Ok(Greeted { own, theirs, leadership })
}

fn greeting(shared: &Shared, leadership: Leadership, receiving: Option<Receiving>) -> Greeting {
    let config = &shared.config;
    let captured = || shared.outbox().state().map(|state| (state.incarnation, state.end));
    let originating = config.originates.then(|| Originating { source: config.site.clone(), captured: captured() });
    Greeting {
        site: config.site.clone(),
        group: config.group.clone(),
        agent: config.agent,
        epoch: config.epoch,
        term: leadership.term,
        leader: leadership.leader,
        receiving: receiving.into_iter().collect(),
        originating,
    }
}

/// What we say of the peer's stream, if we receive it.
async fn receiving(shared: &Shared, source: &SiteName) -> Result<Option<Receiving>, Ended> {
    if !shared.config.receives.contains(source) {
        return Ok(None);
    }
    if let Some(state) = shared.inbox(source).state() {
        let received = Standing { position: state.end, incarnation: state.incarnation, hash: state.hash };
        let source = source.clone();
        return Ok(Some(Receiving { source, received: Some(received), start_at: None, empty: false }));
    }
    let answer = timeout(GREETING, shared.inputs.gate.receiving(source)).await;
    let refusal = |message, hint| Ended::Refused(Rejection::new(Reason::Start, message, hint));
    match answer {
        Ok(Ok(receiving)) => Ok(Some(Receiving { source: source.clone(), ..receiving })),
        Ok(Err(refused)) => Err(refusal(refused.message, refused.hint)),
        Err(_) => Err(refusal("the target's MongoDB does not answer".into(), "check [mongodb] at the target".into())),
    }
}
