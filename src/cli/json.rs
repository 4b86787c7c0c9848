//! The protocol's messages as JSON for `-o json`. Names are stable: a field is added, never renamed.
//!
//! Positions are written as commands take them back; times are milliseconds since the Unix epoch as the agent gave them;
//! what is unknown is null.

use farshore_api::control::v1::{
    LagSample, LinkStatus, LogStatus, MemberPosition, OutboxStatsResponse, Position as WirePosition, Problem,
    RefusedCollection, StatusResponse, StreamStatus,
};
use serde_json::{Value, json};

use super::words;
use crate::model::Position;

pub(super) fn status(status: &StatusResponse) -> Value {
    let mongodb = status.mongodb.as_ref().map(|m| {
        json!({
            "reachable": m.reachable, "replicaSet": m.replica_set, "version": m.version, "error": text(&m.error),
            "oplogWindowSeconds": (m.oplog_window_seconds > 0).then_some(m.oplog_window_seconds),
        })
    });
    json!({
        "site": status.site, "group": status.group, "agent": status.agent, "version": status.version, "role": status.role,
        "epoch": status.epoch, "term": status.term, "leader": status.leader, "time": words::time(status.now_ms), "nowMs": status.now_ms,
        "mongodb": mongodb,
        "streams": list(&status.streams, stream),
        "links": list(&status.links, link),
        "outbox": status.outbox.as_ref().map(log),
        "inbox": status.inbox.as_ref().map(log),
        "problems": list(&status.problems, problem),
        "memoryBytes": status.memory_bytes, "memoryLimitBytes": status.memory_limit_bytes,
    })
}

pub(super) fn stream(s: &StreamStatus) -> Value {
    json!({
        "stream": format!("{}/{}", s.source, s.target), "source": s.source, "target": s.target,
        "state": s.state, "reason": text(&s.reason), "incarnation": s.incarnation,
        "positions": {
            "head": position(s.head), "captured": position(s.captured), "sent": position(s.sent),
            "received": position(s.received), "applied": position(s.applied), "verified": position(s.verified),
        },
        "dataLossExposureMs": known(s.data_loss_exposure_ms), "applyLagMs": known(s.apply_lag_ms), "datumAgeMs": known(s.datum_age_ms),
        "captureLagSeconds": words::distance_seconds(s.head, s.captured),
        "shipLagSeconds": words::distance_seconds(s.captured, s.received),
        "changes": s.changes, "bytes": s.bytes, "transactions": s.transactions,
        "targetTransactions": s.target_transactions, "ddl": s.ddl,
        "diverged": s.diverged, "divergedKinds": s.diverged_kinds, "healed": s.healed, "corruptRecords": s.corrupt_records,
        "atCut": s.at_cut, "consistentFrom": position(s.consistent_from), "hash": s.hash,
        "refused": list(&s.refused, refused),
    })
}

pub(super) fn lag(sample: &LagSample) -> Value {
    json!({"time": words::time(sample.now_ms), "nowMs": sample.now_ms, "streams": list(&sample.streams, stream)})
}

pub(super) fn outbox(stats: &OutboxStatsResponse) -> Value {
    let member =
        |m: &MemberPosition| json!({"site": m.site, "received": position(m.received), "applied": position(m.applied)});
    json!({
        "outbox": stats.outbox.as_ref().map(log), "inbox": stats.inbox.as_ref().map(log), "members": list(&stats.members, member),
    })
}

fn link(l: &LinkStatus) -> Value {
    json!({
        "peer": l.peer, "state": l.state, "address": l.address, "error": text(&l.error), "rttMicros": (l.rtt_us > 0).then_some(l.rtt_us),
        "sinceMs": l.since_ms, "certificateExpiresMs": (l.certificate_expires_ms > 0).then_some(l.certificate_expires_ms),
    })
}

fn log(l: &LogStatus) -> Value {
    json!({
        "bytes": l.bytes, "limitBytes": l.limit_bytes, "batches": l.batches, "first": position(l.first), "last": position(l.last),
        "encrypted": l.encrypted, "stopped": text(&l.stopped),
    })
}

fn problem(p: &Problem) -> Value {
    json!({"severity": p.severity, "subject": p.subject, "message": p.message, "hint": p.hint})
}

fn refused(r: &RefusedCollection) -> Value {
    json!({"namespace": r.namespace, "reason": r.reason, "hint": r.hint})
}

fn list<T>(items: &[T], value: impl Fn(&T) -> Value) -> Value {
    items.iter().map(value).collect()
}

fn position(position: Option<WirePosition>) -> Option<String> {
    position.map(|position| Position::from(position).to_string())
}

fn known(ms: i64) -> Option<i64> {
    (ms >= 0).then_some(ms)
}

fn text(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
