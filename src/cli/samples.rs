//! Messages of an agent for golden tests.

use farshore_api::ClusterTime;
use farshore_api::control::v1::{
    LinkStatus, LogStatus, MongoStatus, Position, Problem, RefusedCollection, StatusResponse, StreamStatus,
};

/// 2025-11-20T20:05:00Z
const NOW: i64 = 1_763_669_100;

/// A position some seconds from the samples' present.
pub(super) fn at(seconds: i64, ordinal: u32) -> Option<Position> {
    let seconds = u32::try_from(NOW + seconds).expect("this century");
    Some(Position { time: ClusterTime::new(seconds, 1).0, ordinal })
}

fn log(bytes: u64) -> LogStatus {
    LogStatus {
        bytes,
        limit_bytes: 10 << 30,
        batches: 41,
        first: at(-3600, 0),
        last: at(0, 2),
        encrypted: true,
        stopped: String::new(),
    }
}

pub(super) fn healthy() -> StatusResponse {
    let stream = StreamStatus {
        source: "north".into(),
        target: "south".into(),
        state: "streaming".into(),
        incarnation: "6a1f6c1e-94d4-4b8e-9a38-6a5a1d3c7b11".into(),
        head: at(0, 2),
        captured: at(0, 1),
        sent: at(-1, 4),
        received: at(-1, 4),
        applied: at(-2, 1),
        data_loss_exposure_ms: 1800,
        apply_lag_ms: 600,
        datum_age_ms: 240,
        changes: 41_200,
        bytes: 12 << 20,
        transactions: 17,
        target_transactions: 412,
        ddl: 3,
        at_cut: true,
        hash: "00c0ffee00c0ffee".into(),
        ..Default::default()
    };
    let link = LinkStatus {
        peer: "south".into(),
        state: "connected".into(),
        address: "10.2.0.5:7443".into(),
        rtt_us: 18_400,
        since_ms: (NOW - 185) * 1000,
        certificate_expires_ms: (NOW + 71 * 86_400) * 1000,
        ..Default::default()
    };
    StatusResponse {
        site: "north".into(),
        group: "bank".into(),
        agent: "0b9f2c0e-4b1c-4c4e-8d5c-0d6f3b1e2a77".into(),
        version: "0.1.0".into(),
        role: "primary".into(),
        epoch: 1,
        term: 3,
        leader: true,
        now_ms: NOW * 1000,
        mongodb: Some(MongoStatus {
            reachable: true,
            replica_set: "rs0".into(),
            version: "6.0.5".into(),
            error: String::new(),
            oplog_window_seconds: 111_600,
        }),
        streams: vec![stream],
        links: vec![link],
        outbox: Some(log(12 << 20)),
        inbox: None,
        problems: Vec::new(),
        memory_bytes: 88 << 20,
        memory_limit_bytes: 256 << 20,
    }
}

pub(super) fn troubled() -> StatusResponse {
    let mut status = healthy();
    status.role = "standby".into();
    status.leader = false;
    status.mongodb = Some(MongoStatus { reachable: false, error: "no primary for 12 s".into(), ..Default::default() });
    let stream = &mut status.streams[0];
    stream.state = "refused".into();
    stream.reason = "the target is not empty: collection shop.items; declare start_at or empty it".into();
    stream.applied = None;
    stream.received = at(-95, 1);
    stream.data_loss_exposure_ms = 95_000;
    stream.apply_lag_ms = -1;
    stream.datum_age_ms = -1;
    stream.diverged = 2;
    stream.diverged_kinds = [("update".to_owned(), 2)].into();
    stream.healed = 1;
    stream.consistent_from = at(-5, 1);
    stream.refused.push(RefusedCollection {
        namespace: "shop.log".into(),
        reason: "it is capped".into(),
        hint: "convert it to a normal collection".into(),
    });
    let link = &mut status.links[0];
    link.state = "connecting".into();
    link.error = "connection refused".into();
    link.rtt_us = 0;
    link.certificate_expires_ms = (NOW + 86_400) * 1000;
    let mut inbox = log(9 << 30);
    inbox.encrypted = false;
    inbox.stopped = "the quota is used up".into();
    status.inbox = Some(inbox);
    status.problems.push(Problem {
        severity: "error".into(),
        subject: "mongodb".into(),
        message: "no primary for 12 s".into(),
        hint: "look at rs.status() of rs0".into(),
    });
    let subject = "stream north/south".to_owned();
    status.problems.push(Problem {
        severity: "error".into(),
        subject: subject.clone(),
        message: status.streams[0].reason.clone(),
        hint: String::new(),
    });
    status.problems.push(Problem {
        severity: "error".into(),
        subject,
        message: "shop.log is not replicated: it is capped".into(),
        hint: "convert it to a normal collection".into(),
    });
    status.problems.push(Problem {
        severity: "warning".into(),
        subject: "oplog".into(),
        message: "the oplog reaches back 3 h only".into(),
        hint: String::new(),
    });
    status
}
