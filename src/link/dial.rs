//! Keeps one session to a peer alive by dialling its addresses in turn.
//!
//! A connection is made first, with its own errors and identity, and then handed to a channel that is used for one session and
//! thrown away: what reconnects is this loop, never the channel behind our back.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use farshore_api::client::{endpoint, root_cause};
use farshore_api::replication::v1::replication_client::ReplicationClient;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Uri};

use super::hub::Shared;
use super::server::{FRAME_SIZE, IN_TRANSPORT, MESSAGE, WINDOW};
use super::session::{self, Ended, Summary, Wire};
use super::transport::{Connection, Peer};
use super::wire::{Reason, Rejection};
use crate::model::SiteName;

/// A connection that takes longer is given up.
const CONNECT: Duration = Duration::from_secs(5);
/// Opening a session on it, likewise.
const OPEN: Duration = Duration::from_secs(10);
/// First and longest wait between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Wait before another address of the peer is tried.
const NEXT_ADDRESS: Duration = Duration::from_millis(20);
/// Wait after a refusal that only a person can change.
const REFUSED: Duration = Duration::from_secs(3);

/// Growing waits with jitter from a seed, so that a run can be repeated.
#[derive(Debug)]
struct Backoff {
    step: u32,
    seed: u64,
}

impl Backoff {
    fn new(seed: u64) -> Self {
        Self { step: 0, seed }
    }

    fn reset(&mut self) {
        self.step = 0;
    }

    fn next(&mut self) -> Duration {
        let full = BACKOFF.1.min(BACKOFF.0 * 2u32.saturating_pow(self.step));
        self.step = (self.step + 1).min(16);
        self.jitter(full)
    }

    /// Between half and all of `full` (splitmix64).
    fn jitter(&mut self, full: Duration) -> Duration {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let share = f64::from((mixed >> 40) as u32) / f64::from(1u32 << 24);
        full.mul_f64(0.5 + share / 2.0)
    }

    fn after(&mut self, summary: &Summary, more_addresses: bool) -> Duration {
        if summary.established && summary.progressed {
            self.reset();
        }
        match &summary.ended {
            ended if ended.is_refusal() => self.jitter(REFUSED),
            _ if more_addresses && !summary.established => NEXT_ADDRESS,
            _ => self.next(),
        }
    }
}

/// Dials `site` until the hub is cancelled: while we lead, and while no session with it lives.
pub(super) async fn keep(shared: Arc<Shared>, site: SiteName, seed: u64) {
    let entry = shared.peers.get(&site).expect("dialled peers are known");
    let addresses = &entry.config.addresses;
    let (mut backoff, mut turn, mut round) = (Backoff::new(seed), 0, Round::default());
    let mut leadership = shared.inputs.leadership.clone();
    loop {
        let due = async {
            // The agent drops the sender only when it ends.
            if leadership.wait_for(|leadership| leadership.leader).await.is_err() {
                std::future::pending::<()>().await;
            }
            entry.slot.free().await;
        };
        if shared.cancel.run_until_cancelled(due).await.is_none() {
            return;
        }
        let address = &addresses[turn % addresses.len()];
        let summary = match shared.cancel.run_until_cancelled(open(&shared, &site, address)).await {
            None => return,
            Some(Ok((wire, client))) => {
                let summary = session::run(&shared, wire).await;
                drop(client);
                summary
            }
            Some(Err(ended)) => {
                shared.count_end(entry, &ended);
                Summary { ended, established: false, progressed: false }
            }
        };
        if !summary.established {
            turn += 1;
        }
        let more_addresses = turn % addresses.len() != 0;
        if round.shows(&summary, more_addresses) && !entry.slot.is_taken() {
            shared.link_failed(entry, Some(address), &summary.ended);
        }
        let wait = backoff.after(&summary, more_addresses);
        if shared.cancel.run_until_cancelled(sleep(wait)).await.is_none() {
            return;
        }
    }
}

/// The addresses of a peer, tried one after the other.
#[derive(Debug, Default)]
struct Round {
    refused: bool,
}

impl Round {
    /// Whether an attempt is to be shown: a refusal that only a person can change at once, and anything else when all
    /// addresses were tried and none refused so.
    fn shows(&mut self, summary: &Summary, more_addresses: bool) -> bool {
        let refusal = summary.ended.is_refusal();
        let shown = !summary.established && (refusal || !more_addresses && !self.refused);
        self.refused = more_addresses && !summary.established && (self.refused || refusal);
        shown
    }
}

async fn open(shared: &Shared, site: &SiteName, address: &str) -> Result<(Wire, ReplicationClient<Channel>), Ended> {
    let connecting = timeout(CONNECT, shared.inputs.transport.connect(address, site)).await;
    let late = |_| Ended::Lost(format!("no connection within {} s", CONNECT.as_secs()));
    let connection = connecting.map_err(late)?.map_err(Ended::Lost)?;
    let peer = Peer { address: address.to_owned(), ..connection.peer().clone() };
    let opening = async {
        let channel = channel(connection).await.map_err(Ended::Lost)?;
        let mut client =
            ReplicationClient::new(channel).max_decoding_message_size(MESSAGE).max_encoding_message_size(MESSAGE);
        let (out, frames) = mpsc::channel(IN_TRANSPORT);
        let answer = client.session(ReceiverStream::new(frames)).await.map_err(|status| denied(&status))?;
        let incoming = answer.into_inner().map(|frame| frame.map_err(|status| root_cause(&status))).boxed();
        Ok((Wire { out, incoming, peer, site: site.clone(), dialled: true }, client))
    };
    timeout(OPEN, opening).await.unwrap_or_else(|_| Err(Ended::Lost("the peer did not open a session in time".into())))
}

/// A peer that does not know us says so before any frame.
fn denied(status: &tonic::Status) -> Ended {
    match status.code() {
        tonic::Code::PermissionDenied => {
            let hint = "check the certificate here and [[peers]] at the peer";
            Ended::Rejected(Rejection::new(Reason::Identity, status.message(), hint))
        }
        _ => Ended::Lost(format!("the peer did not open a session: {}", root_cause(status))),
    }
}

/// A channel over one connection; it cannot connect again.
async fn channel(connection: Connection) -> Result<Channel, String> {
    let mut connection = Some(connection);
    let connector = tower::service_fn(move |_: Uri| {
        let taken = connection.take().map(TokioIo::new);
        std::future::ready(taken.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection is gone")))
    });
    endpoint()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME_SIZE)
        .connect_with_connector(connector)
        .await
        .map_err(|error| root_cause(&error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn waits_grow_within_bounds_and_repeat_with_the_seed(seed in any::<u64>()) {
            let (mut a, mut b) = (Backoff::new(seed), Backoff::new(seed));
            for step in 0..40u32 {
                let wait = a.next();
                prop_assert_eq!(wait, b.next());
                let full = BACKOFF.1.min(BACKOFF.0 * 2u32.saturating_pow(step));
                prop_assert!(wait >= full / 2 && wait <= full, "step {}: {:?}", step, wait);
            }
            a.reset();
            prop_assert!(a.next() <= BACKOFF.0);
        }
    }

    #[test]
    fn a_refusal_of_one_address_is_not_hidden_by_another_that_cannot_serve() {
        let ended = |ended, established| Summary { ended, established, progressed: false };
        let rejected = |reason| ended(Ended::Rejected(Rejection::new(reason, "", "")), false);
        let mut round = Round::default();
        let mut shows = |summary, more_addresses| round.shows(&summary, more_addresses);
        assert!(shows(rejected(Reason::Start), true));
        assert!(!shows(rejected(Reason::NotLeader), false), "the refusal stands");
        assert!(!shows(rejected(Reason::NotLeader), true));
        assert!(shows(rejected(Reason::Term), false));
        assert!(!shows(rejected(Reason::NotLeader), true));
        assert!(shows(ended(Ended::Lost("no route".into()), false), false), "nothing but ways of not being reached");
        assert!(shows(rejected(Reason::Start), true));
        assert!(!shows(ended(Ended::Closed, true), true));
        assert!(shows(ended(Ended::Lost("no route".into()), false), false), "a session lived since");
    }

    #[test]
    fn a_refusal_waits_for_people_and_a_non_leader_for_nobody() {
        let refused = |reason| Summary {
            ended: Ended::Rejected(Rejection::new(reason, "", "")),
            established: false,
            progressed: false,
        };
        let mut backoff = Backoff::new(1);
        assert!(backoff.after(&refused(Reason::Start), true) >= REFUSED / 2);
        assert_eq!(backoff.after(&refused(Reason::NotLeader), true), NEXT_ADDRESS);
        assert!(backoff.after(&refused(Reason::NotLeader), false) <= BACKOFF.0);
    }
}
