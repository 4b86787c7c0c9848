//! Gauges read off the agent's status at scrape time.
//!
//! One source for `farshore status` and for metrics, so that the two cannot disagree; and computed when asked, so that
//! lags grow while nothing arrives. What is unknown is left out rather than shown as zero.

use std::fmt;

use farshore_api::control::v1::{Position, StatusResponse, StreamStatus};
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;

const LINK_STATES: [&str; 3] = ["connected", "connecting", "refused"];

/// Writes all of them; `own_expiry_ms` is 0 while unknown.
pub(super) fn encode(
    encoder: DescriptorEncoder<'_>,
    status: &StatusResponse,
    own_expiry_ms: i64,
) -> Result<(), fmt::Error> {
    let mut gauges = Gauges { encoder };
    site(&mut gauges, status)?;
    streams(&mut gauges, &status.streams)?;
    logs(&mut gauges, status)?;
    links(&mut gauges, status, own_expiry_ms)
}

struct Gauges<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Gauges<'_> {
    fn family<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: &[([(&str, &str); N], f64)],
    ) -> Result<(), fmt::Error> {
        if values.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            metric.encode_family(labels)?.encode_gauge(value)?;
        }
        Ok(())
    }

    fn one(&mut self, name: &str, help: &str, value: f64) -> Result<(), fmt::Error> {
        self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }
}

fn site(gauges: &mut Gauges<'_>, status: &StatusResponse) -> Result<(), fmt::Error> {
    let labels = [("site", status.site.as_str()), ("role", status.role.as_str()), ("group", status.group.as_str())];
    gauges.family("farshore_site_info", "The site this agent serves", &[(labels, 1.0)])?;
    gauges.one(
        "farshore_leader",
        "1 while this agent ships and applies for its site",
        f64::from(u8::from(status.leader)),
    )?;
    gauges.one("farshore_term", "Term of the site's lease as this agent knows it", status.term as f64)?;
    match status.mongodb.as_ref().map(|mongodb| mongodb.oplog_window_seconds) {
        None | Some(0) => Ok(()),
        Some(seconds) => {
            gauges.one("farshore_oplog_window_seconds", "How far back the oplog of this site reaches", seconds as f64)
        }
    }
}

fn streams(gauges: &mut Gauges<'_>, streams: &[StreamStatus]) -> Result<(), fmt::Error> {
    let names: Vec<String> = streams.iter().map(|s| format!("{}/{}", s.source, s.target)).collect();
    let named = || names.iter().map(String::as_str).zip(streams);
    let positions: Vec<_> = named()
        .flat_map(|(name, stream)| stages(stream).map(move |(stage, at)| ([("stream", name), ("stage", stage)], at)))
        .filter_map(|(labels, at)| Some((labels, seconds(at?))))
        .collect();
    gauges.family(
        "farshore_position_timestamp_seconds",
        "Cluster time a stage of the stream has reached",
        &positions,
    )?;
    let known = |value: fn(&StreamStatus) -> i64| -> Vec<_> {
        let values = named().map(|(name, stream)| ([("stream", name)], value(stream)));
        values.filter(|(_, ms)| *ms >= 0).map(|(labels, ms)| (labels, ms as f64 / 1000.0)).collect()
    };
    let exposure = known(|stream| stream.data_loss_exposure_ms);
    gauges.family(
        "farshore_data_loss_exposure_seconds",
        "What would be lost if the source site died now",
        &exposure,
    )?;
    let lag = known(|stream| stream.apply_lag_ms);
    gauges.family("farshore_apply_lag_seconds", "Received and not yet applied, in source time", &lag)?;
    let refused: Vec<_> = named().map(|(name, stream)| ([("stream", name)], stream.refused.len() as f64)).collect();
    gauges.family("farshore_refused_collections", "Collections that are not replicated", &refused)
}

fn stages(stream: &StreamStatus) -> [(&'static str, Option<Position>); 6] {
    [
        ("head", stream.head),
        ("captured", stream.captured),
        ("sent", stream.sent),
        ("received", stream.received),
        ("applied", stream.applied),
        ("verified", stream.verified),
    ]
}

/// A cluster time has its seconds in the high half.
fn seconds(position: Position) -> f64 {
    (position.time >> 32) as f64
}

fn logs(gauges: &mut Gauges<'_>, status: &StatusResponse) -> Result<(), fmt::Error> {
    if let Some(outbox) = &status.outbox {
        gauges.one("farshore_outbox_bytes", "Bytes kept in the outbox", outbox.bytes as f64)?;
        gauges.one("farshore_outbox_capacity_bytes", "Bytes the logs may use together", outbox.limit_bytes as f64)?;
        gauges.one("farshore_outbox_batches", "Batches kept in the outbox", outbox.batches as f64)?;
    }
    match &status.inbox {
        Some(inbox) => gauges.one("farshore_inbox_bytes", "Bytes kept in the inbox", inbox.bytes as f64),
        None => Ok(()),
    }
}

fn links(gauges: &mut Gauges<'_>, status: &StatusResponse, own_expiry_ms: i64) -> Result<(), fmt::Error> {
    let is = |a: &str, b: &str| f64::from(u8::from(a == b));
    let links = || status.links.iter().map(|link| (link.peer.as_str(), link));
    let states: Vec<_> = links()
        .flat_map(|(peer, link)| LINK_STATES.map(|state| ([("peer", peer), ("state", state)], is(&link.state, state))))
        .collect();
    gauges.family("farshore_link_state", "1 for the state the link is in", &states)?;
    let up: Vec<_> = links().map(|(peer, link)| ([("peer", peer)], is(&link.state, "connected"))).collect();
    gauges.family("farshore_peer_up", "1 while the link to the peer is connected", &up)?;
    let rtt = links().filter(|(_, link)| link.rtt_us > 0);
    let rtt: Vec<_> = rtt.map(|(peer, link)| ([("peer", peer)], link.rtt_us as f64 / 1e6)).collect();
    gauges.family("farshore_peer_rtt_seconds", "Round trip of the newest ping through the session", &rtt)?;
    let own = ([("peer", status.site.as_str()), ("kind", "own")], own_expiry_ms);
    let expiries = links().map(|(peer, link)| ([("peer", peer), ("kind", "peer")], link.certificate_expires_ms));
    let expiries: Vec<_> =
        expiries.chain([own]).filter(|(_, ms)| *ms > 0).map(|(labels, ms)| (labels, ms as f64 / 1000.0)).collect();
    gauges.family("farshore_peer_certificate_expiry_timestamp_seconds", "When a certificate ends", &expiries)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use farshore_api::control::v1::{LinkStatus, LogStatus, MongoStatus, Problem, RefusedCollection};

    use crate::admin::metrics::{Metrics, Observation};

    use super::*;

    fn at(seconds: u64) -> Option<Position> {
        Some(Position { time: seconds << 32, ordinal: 1 })
    }

    fn status() -> StatusResponse {
        let stream = StreamStatus {
            source: "north".into(),
            target: "south".into(),
            head: at(1006),
            captured: at(1005),
            sent: at(1004),
            received: at(1003),
            applied: at(1002),
            verified: at(1001),
            data_loss_exposure_ms: 1800,
            apply_lag_ms: 600,
            refused: vec![RefusedCollection { namespace: "shop.patients".into(), ..Default::default() }],
            ..Default::default()
        };
        let link = LinkStatus {
            peer: "south".into(),
            state: "connecting".into(),
            rtt_us: 2500,
            certificate_expires_ms: 5000,
            ..Default::default()
        };
        StatusResponse {
            site: "north".into(),
            group: "bank".into(),
            role: "primary".into(),
            leader: true,
            term: 7,
            mongodb: Some(MongoStatus { oplog_window_seconds: 3600, ..Default::default() }),
            streams: vec![stream],
            links: vec![link],
            outbox: Some(LogStatus { bytes: 10, limit_bytes: 20, batches: 3, ..Default::default() }),
            inbox: Some(LogStatus { bytes: 11, ..Default::default() }),
            problems: vec![Problem { subject: "shop.patients".into(), ..Default::default() }],
            ..Default::default()
        }
    }

    fn scrape(status: StatusResponse) -> String {
        let metrics = Metrics::new();
        metrics.own_certificate_expires(9000);
        metrics.observe(move || Observation { status: status.clone(), ..Observation::default() });
        metrics.encode()
    }

    #[test]
    fn each_gauge_follows_the_status() {
        let text = scrape(status());
        for line in [
            "farshore_site_info{site=\"north\",role=\"primary\",group=\"bank\"} 1.0",
            "farshore_leader 1.0",
            "farshore_term 7.0",
            "farshore_oplog_window_seconds 3600.0",
            "farshore_position_timestamp_seconds{stream=\"north/south\",stage=\"head\"} 1006.0",
            "farshore_position_timestamp_seconds{stream=\"north/south\",stage=\"captured\"} 1005.0",
            "farshore_position_timestamp_seconds{stream=\"north/south\",stage=\"sent\"} 1004.0",
            "farshore_position_timestamp_seconds{stream=\"north/south\",stage=\"received\"} 1003.0",
            "farshore_position_timestamp_seconds{stream=\"north/south\",stage=\"applied\"} 1002.0",
            "farshore_position_timestamp_seconds{stream=\"north/south\",stage=\"verified\"} 1001.0",
            "farshore_data_loss_exposure_seconds{stream=\"north/south\"} 1.8",
            "farshore_apply_lag_seconds{stream=\"north/south\"} 0.6",
            "farshore_refused_collections{stream=\"north/south\"} 1.0",
            "farshore_outbox_bytes 10.0",
            "farshore_outbox_capacity_bytes 20.0",
            "farshore_outbox_batches 3.0",
            "farshore_inbox_bytes 11.0",
            "farshore_link_state{peer=\"south\",state=\"connecting\"} 1.0",
            "farshore_link_state{peer=\"south\",state=\"connected\"} 0.0",
            "farshore_peer_up{peer=\"south\"} 0.0",
            "farshore_peer_rtt_seconds{peer=\"south\"} 0.0025",
            "farshore_peer_certificate_expiry_timestamp_seconds{peer=\"south\",kind=\"peer\"} 5.0",
            "farshore_peer_certificate_expiry_timestamp_seconds{peer=\"north\",kind=\"own\"} 9.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn no_collection_is_named() {
        let text = scrape(status());
        assert!(!text.contains("shop") && !text.contains("patients"), "{text}");
    }

    #[test]
    fn what_is_unknown_is_left_out() {
        let unknown = StreamStatus { data_loss_exposure_ms: -1, apply_lag_ms: -1, ..Default::default() };
        let text = scrape(StatusResponse { streams: vec![unknown], ..Default::default() });
        for name in [
            "farshore_data_loss",
            "farshore_apply_lag",
            "farshore_position",
            "farshore_oplog",
            "farshore_outbox_bytes",
            "farshore_peer_up",
        ] {
            assert!(!text.contains(name), "{name}\n{text}");
        }
    }

    #[test]
    fn gauges_are_computed_at_each_scrape() {
        let metrics = Metrics::new();
        let ms = Arc::new(AtomicI64::new(1000));
        let read = Arc::clone(&ms);
        metrics.observe(move || {
            let mut status = status();
            status.streams[0].data_loss_exposure_ms = read.fetch_add(1000, Ordering::Relaxed);
            Observation { status, ..Observation::default() }
        });
        assert!(metrics.encode().contains("exposure_seconds{stream=\"north/south\"} 1.0"));
        assert!(metrics.encode().contains("exposure_seconds{stream=\"north/south\"} 2.0"));
    }
}
