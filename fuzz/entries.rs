//! What is fuzzed: every decoder of bytes that come from a disk, a peer, a database or a person. Shared by the libFuzzer
//! targets here and by `tests/fuzz_smoke.rs`, which feeds them mutated samples in every test run.
//!
//! A decoder may refuse; it may not panic, and what it accepts must hold together.

use std::path::Path;

use bson::{Document, RawDocument, RawDocumentBuf};
use bytes::Bytes;
use farshore::apply::diff::Diff;
use farshore::apply::store;
use farshore::config::Config;
use farshore::link::wire::{Greeting, Rejection};
use farshore::model::raw::Writer;
use farshore::model::{Batch, Change, Epoch, Incarnation, Position, SiteName, StreamHash, hash};
use farshore::outbox::decode_stored_value;
use farshore::source::chunk::{Chunker, Reply};
use farshore::source::token;
use farshore_api::replication::v1 as pb;
use prost::Message as _;

/// A decoder, by name.
pub(crate) type Entry = (&'static str, fn(&[u8]));

/// All of them.
pub(crate) const ENTRIES: &[Entry] = &[
    ("record", record),
    ("stored_value", stored_value),
    ("change", change),
    ("resume_token", resume_token),
    ("reply", reply),
    ("diff", diff),
    ("config", config),
    ("frame", frame),
    ("stored_document", stored_document),
];

/// A batch record, as it is and with its lengths and crc put right, so that what lies behind the crc is reached.
pub(crate) fn record(bytes: &[u8]) {
    for bytes in [bytes.to_vec(), mended(bytes)] {
        let Ok(batch) = Batch::decode(Bytes::from(bytes)) else { continue };
        assert!(batch.header().end > batch.header().previous);
        let Ok(changes) = batch.changes() else { continue };
        let mut last = batch.header().previous;
        for change in changes.iter().flatten() {
            assert!(change.position > last);
            last = change.position;
        }
    }
}

fn mended(bytes: &[u8]) -> Vec<u8> {
    const HEADER: usize = 88;
    let mut bytes = bytes.to_vec();
    if bytes.len() >= HEADER {
        bytes[..5].copy_from_slice(b"FSHB\x01");
        bytes[6..8].copy_from_slice(&(HEADER as u16).to_le_bytes());
        let body = (bytes.len() - HEADER) as u32;
        bytes[8..12].copy_from_slice(&body.to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..16]);
        hasher.update(&bytes[20..]);
        let crc = hasher.finalize();
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}

/// A value or key of the outbox's database.
pub(crate) fn stored_value(bytes: &[u8]) {
    decode_stored_value(bytes);
}

/// A change event.
pub(crate) fn change(bytes: &[u8]) {
    let Ok(raw) = RawDocument::from_bytes(bytes) else { return };
    let Ok(change) = Change::parse(Position::ZERO, raw) else { return };
    if let (Some(id), Some(uuid)) = (change.id(), change.uuid) {
        assert_eq!(hash::lane_of(uuid, &id), hash::lane_of(uuid, &id));
        hash::key_identity(&id);
    }
    if let Some(update) = change.update {
        drop(Diff::parse(update));
    }
}

/// A resume token, as a document and as the text inside one.
pub(crate) fn resume_token(bytes: &[u8]) {
    if let Ok(raw) = RawDocument::from_bytes(bytes) {
        drop(token::decode(raw));
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && !text.contains('\0')
    {
        drop(token::decode(&bson::rawdoc! {"_data": text}));
    }
}

/// A change stream's reply.
pub(crate) fn reply(bytes: &[u8]) {
    let Ok(raw) = RawDocumentBuf::from_bytes(bytes.to_vec()) else { return };
    let before = Position::ZERO;
    let mut chunker = Chunker::new(Incarnation([1; 16]), Epoch(1), before, StreamHash::default());
    let Ok(cuts) = chunker.cut(&Reply::new(raw)) else { return };
    for cut in cuts {
        drop(Batch::decode(cut.batch.record().clone()).expect("what was cut is a record").changes());
    }
}

/// A diff, and the document it is applied to behind it.
pub(crate) fn diff(bytes: &[u8]) {
    let Some(length) = bytes.first_chunk::<4>().map(|b| i32::from_le_bytes(*b)) else { return };
    let Some((diff, document)) = usize::try_from(length).ok().and_then(|at| bytes.split_at_checked(at)) else {
        return;
    };
    let (Ok(diff), Ok(document)) = (RawDocument::from_bytes(diff), RawDocument::from_bytes(document)) else {
        return;
    };
    let Ok(diff) = Diff::parse(diff) else { return };
    if diff.is_plain() {
        for update in diff.plain_updates() {
            let mut out = Writer::document();
            update.write(&mut out);
            RawDocument::from_bytes(out.finish().as_bytes()).expect("an update is a document");
        }
    }
    if let Ok(after) = diff.apply(document) {
        RawDocument::from_bytes(after.as_bytes()).expect("what an update leaves is a document");
    }
}

/// A configuration file.
pub(crate) fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Err(problems) = Config::parse(text, Path::new("/"))
    {
        assert!(!problems.list().is_empty() && !problems.to_string().is_empty());
    }
}

/// A frame of the link and what its body holds.
pub(crate) fn frame(bytes: &[u8]) {
    let Ok(frame) = pb::Frame::decode(bytes) else { return };
    match frame.body {
        Some(pb::frame::Body::Hello(hello)) => {
            let peer = SiteName::try_from(hello.site.as_str());
            let peer = peer.unwrap_or_else(|_| SiteName::try_from("north").expect("a valid name"));
            if let Ok(greeting) = Greeting::parse(&hello, &peer) {
                let again = Greeting::parse(&greeting.to_hello(), &peer);
                assert_eq!(again, Ok(greeting));
            }
        }
        Some(pb::frame::Body::Batch(batch)) => record(&batch.record),
        Some(pb::frame::Body::Reject(reject)) => drop(Rejection::from(reject)),
        _ => {}
    }
}

/// A document of the target's database `farshore`.
pub(crate) fn stored_document(bytes: &[u8]) {
    let Ok(document) = RawDocument::from_bytes(bytes).and_then(Document::try_from) else { return };
    drop(store::read_lane(&document));
    drop(store::read_stream(&document));
    drop(store::read_entry(&document));
}
