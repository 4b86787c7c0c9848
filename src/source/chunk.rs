//! Cuts change stream replies into batches (pure).
//!
//! One reply becomes one batch, or several when it is large. Every change gets the position its own token names. A batch
//! ends at its last change, or past it when the last unit (all changes of one cluster time) is known to be complete:
//! because a later change follows, because the reply's own token is later, or because the server cannot emit more than
//! one change for it.

use std::sync::Arc;

use bson::raw::{RawBsonRef, RawDocument};
use bytes::Bytes;

use super::token::{self, Token, TokenError};
use crate::model::raw;
use crate::model::{Batch, BatchBuilder, Epoch, Flow, Incarnation, Op, Position, StreamHash, change};

/// A batch is cut when its changes exceed this many bytes.
pub const CUT_BYTES: usize = 1 << 20;

/// One `aggregate` or `getMore` reply; it may be 16 MB, so it stays where it was received.
#[derive(Clone)]
pub struct Reply(Arc<dyn AsRef<RawDocument> + Send + Sync>);

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reply({} bytes)", self.document().as_bytes().len())
    }
}

/// Why a reply cannot be turned into batches.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// Not shaped like a cursor reply.
    #[error("change stream reply: {0}")]
    Shape(&'static str),
    /// Not valid BSON.
    #[error("change stream reply: invalid bson: {0}")]
    Bson(#[from] bson::error::Error),
    /// A token cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl Reply {
    /// A reply that was received.
    pub fn new(reply: impl AsRef<RawDocument> + Send + Sync + 'static) -> Self {
        Self(Arc::new(reply))
    }

    fn document(&self) -> &RawDocument {
        (*self.0).as_ref()
    }

    /// The events, first or next batch.
    ///
    /// # Errors
    /// The reply has none.
    pub fn events(&self) -> Result<impl Iterator<Item = Result<&RawDocument, ChunkError>>, ChunkError> {
        let cursor = self.cursor()?;
        let batch = cursor.get_array("nextBatch").or_else(|_| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| ChunkError::Shape("no batch in the cursor"))?;
        Ok(batch.into_iter().map(|value| match value? {
            RawBsonRef::Document(event) => Ok(event),
            _ => Err(ChunkError::Shape("an event is not a document")),
        }))
    }

    /// The reply's own resume token.
    ///
    /// # Errors
    /// The reply has none.
    pub fn token(&self) -> Result<&RawDocument, ChunkError> {
        self.cursor()?.get_document("postBatchResumeToken").map_err(|_| ChunkError::Shape("no postBatchResumeToken"))
    }

    fn cursor(&self) -> Result<&RawDocument, ChunkError> {
        self.document().get_document("cursor").map_err(|_| ChunkError::Shape("no cursor"))
    }
}

/// A finished batch with the token to resume after it.
#[derive(Debug)]
pub struct Cut {
    /// The batch.
    pub batch: Batch,
    /// Resume token document of its end.
    pub token: Bytes,
    /// What it holds.
    pub flow: Flow,
}

/// Assigns positions and cuts batches.
#[derive(Debug)]
pub struct Chunker {
    incarnation: Incarnation,
    epoch: Epoch,
    /// End of the last batch.
    end: Position,
    hash: StreamHash,
    /// The server emits one change per cluster time outside of transactions (MongoDB before 6.1).
    single_change_units: bool,
    /// The reply's own token; what a change stream can be resumed after when no batch is cut.
    token: Option<Bytes>,
    /// Token of the newest event. Only such a one is looked for in the oplog: resumed after it, a history that was rewound
    /// (a restored backup) is noticed; the token of a reply is a mere time.
    newest: Option<Bytes>,
}

impl Chunker {
    /// Continues a log that ends at `end` with `hash`.
    pub fn new(incarnation: Incarnation, epoch: Epoch, end: Position, hash: StreamHash) -> Self {
        Self { incarnation, epoch, end, hash, single_change_units: false, token: None, newest: None }
    }

    /// Whether the server that is read now makes one change of each cluster time outside of transactions.
    pub fn single_change_units(&mut self, single: bool) {
        self.single_change_units = single;
    }

    /// End of the last batch.
    pub fn end(&self) -> Position {
        self.end
    }

    /// Whether the last unit may have more changes to come.
    pub fn unit_open(&self) -> bool {
        self.end.ordinal > 0
    }

    /// Token of the newest reply, to be persisted while nothing is cut.
    pub fn idle_token(&self) -> Option<&Bytes> {
        self.token.as_ref()
    }

    /// Cuts one reply.
    ///
    /// # Errors
    /// The reply is malformed; nothing of it may be used.
    pub fn cut(&mut self, reply: &Reply) -> Result<Vec<Cut>, ChunkError> {
        let mut cuts = Vec::new();
        let (mut builder, mut flow) = (self.builder(), Flow::default());
        let mut last: Option<(&RawDocument, bool)> = None;
        for event in reply.events()? {
            let event = event?;
            let Stripped { token: own_token, length, around: [before, after] } = strip(event)?;
            let Token::Change(position) = token::decode(own_token)? else {
                return Err(ChunkError::Shape("an event carries a high-water token"));
            };
            if position <= builder.last() {
                continue;
            }
            if builder.len() >= CUT_BYTES {
                let (token, _) = last.expect("a builder with bytes has a last event");
                let end =
                    if position.time > builder.last().time { Position::before(position.time) } else { builder.last() };
                cuts.push(self.finish(builder, end, token, std::mem::take(&mut flow)));
                builder = self.builder();
            }
            builder.push(position, &[&length, before, after]);
            if !change::is_mark(event) {
                flow.count(Op::of(event), length.len() + before.len() + after.len());
            }
            last = Some((own_token, raw::get(event, "txnNumber").is_some()));
        }
        let reply_token = reply.token()?;
        let reply_time = token::decode(reply_token)?;
        if let Some((own_token, in_transaction)) = last {
            let position = builder.last();
            let end = match reply_time {
                Token::HighWater(time) if time > position.time => Position::before(time),
                _ if self.single_change_units && !in_transaction => Position::through(position.time),
                _ => position,
            };
            cuts.push(self.finish(builder, end, own_token, flow));
            self.newest = cuts.last().map(|cut| cut.token.clone());
        } else if let Token::HighWater(time) = reply_time
            && self.unit_open()
            && time > self.end.time
        {
            let mut cut = self.finish(builder, Position::before(time), reply_token, flow);
            if let Some(newest) = &self.newest {
                cut.token = newest.clone();
            }
            cuts.push(cut);
        }
        self.token = Some(Bytes::copy_from_slice(reply_token.as_bytes()));
        Ok(cuts)
    }

    fn builder(&self) -> BatchBuilder {
        BatchBuilder::new(self.incarnation, self.epoch, self.end, self.hash)
    }

    fn finish(&mut self, builder: BatchBuilder, end: Position, token: &RawDocument, flow: Flow) -> Cut {
        self.hash = builder.hash();
        let batch = builder.finish(end);
        self.end = end;
        Cut { batch, token: Bytes::copy_from_slice(token.as_bytes()), flow }
    }
}

/// An event without its token, as the parts to be written one after the other.
struct Stripped<'a> {
    token: &'a RawDocument,
    length: [u8; 4],
    around: [&'a [u8]; 2],
}

/// Takes the token out of an event: it is as long as the document key and of no use at the target.
fn strip(event: &RawDocument) -> Result<Stripped<'_>, ChunkError> {
    const NONE: ChunkError = ChunkError::Shape("an event has no resume token");
    let (before, token, after) = raw::split_around(event, "_id").ok_or(NONE)?;
    let length =
        i32::try_from(4 + before.len() + after.len()).map_err(|_| ChunkError::Shape("an event is too large"))?;
    Ok(Stripped { token: token.document().ok_or(NONE)?, length: length.to_le_bytes(), around: [before, after] })
}

#[cfg(test)]
pub(super) mod tests {
    use bson::{RawDocumentBuf, raw::RawArrayBuf, rawdoc};

    use super::*;
    use crate::model::ClusterTime;

    /// A token as the server writes it, for small indexes.
    pub(crate) fn token_of(time: ClusterTime, index: Option<u8>) -> RawDocumentBuf {
        let head = format!("82{:016X}2B02", time.0);
        let tail = match index {
            None => "29296E04".to_owned(),
            Some(0) => "2C0100296E04".to_owned(),
            Some(i) => format!("2C01002B{:02X}6E04", i << 1),
        };
        rawdoc! {"_data": head + &tail}
    }

    fn event(time: ClusterTime, index: u8, transaction: bool) -> RawDocumentBuf {
        let mut event = rawdoc! {"_id": token_of(time, Some(index)), "operationType": "delete"};
        if transaction {
            event.append(bson::cstr!("txnNumber"), 1_i64);
        }
        event
    }

    fn reply(events: &[RawDocumentBuf], token: RawDocumentBuf) -> Reply {
        let mut batch = RawArrayBuf::new();
        for event in events {
            batch.push(event.clone());
        }
        Reply::new(rawdoc! {"cursor": {"nextBatch": batch, "postBatchResumeToken": token}, "ok": 1})
    }

    fn chunker(single: bool) -> Chunker {
        let begin = Position::before(ClusterTime::new(1, 0));
        let mut chunker = Chunker::new(Incarnation([1; 16]), Epoch(1), begin, StreamHash::default());
        chunker.single_change_units(single);
        chunker
    }

    fn at(seconds: u32) -> ClusterTime {
        ClusterTime::new(seconds, 1)
    }

    #[test]
    fn a_cut_counts_its_changes_and_their_bytes_but_no_marks() {
        let (mut create, mut mark) = (event(at(3), 0, false), event(at(4), 0, false));
        create.append(bson::cstr!("ns"), rawdoc! {"db": "shop", "coll": "items"});
        mark.append(bson::cstr!("ns"), rawdoc! {"db": "farshore", "coll": "marks"});
        let counted = |events: &[RawDocumentBuf]| {
            let cuts = chunker(false).cut(&reply(events, token_of(at(9), None))).expect("cut");
            let [Cut { batch, flow, .. }] = &cuts[..] else { panic!("{cuts:?}") };
            (*flow, batch.header().count, u64::from(batch.header().raw_len))
        };
        let (flow, count, raw) = counted(&[event(at(2), 0, false), create.clone()]);
        assert_eq!((flow.deletes, flow.changes(), count), (2, 2, 2));
        assert_eq!(flow.bytes, raw - 2 * Position::LEN as u64);
        assert_eq!(counted(&[event(at(2), 0, false), create, mark]).0, flow);
    }

    #[test]
    fn a_unit_stays_open_until_something_is_past_it() {
        let mut chunker = chunker(false);
        let own = token_of(at(2), Some(1));
        let cuts = chunker.cut(&reply(&[event(at(2), 0, true), event(at(2), 1, true)], own)).expect("cut");
        assert_eq!(cuts.len(), 1);
        assert_eq!(cuts[0].batch.header().end, Position::new(at(2), 2));
        assert!(chunker.unit_open());
        let cuts = chunker.cut(&reply(&[], token_of(at(2), Some(1)))).expect("cut");
        assert!(cuts.is_empty(), "the same token says nothing new");
        let cuts = chunker.cut(&reply(&[], token_of(at(3), None))).expect("cut");
        assert_eq!(cuts[0].batch.header().end, Position::before(at(3)));
        assert_eq!(cuts[0].batch.header().count, 0);
        let event = token_of(at(2), Some(1));
        assert_eq!(cuts[0].token, event.as_bytes(), "a mere time would hide that the history was rewound");
        assert!(!chunker.unit_open());
    }

    #[test]
    fn before_6_1_a_change_outside_a_transaction_is_a_whole_unit() {
        let mut chunker = chunker(true);
        let cuts = chunker.cut(&reply(&[event(at(2), 0, false)], token_of(at(2), Some(0)))).expect("cut");
        assert_eq!(cuts[0].batch.header().end, Position::through(at(2)));
    }

    #[test]
    fn a_batch_is_resumed_after_its_last_event() {
        let cuts = chunker(true).cut(&reply(&[event(at(2), 0, false)], token_of(at(9), None))).expect("cut");
        assert_eq!(cuts[0].batch.header().end, Position::before(at(9)));
        assert_eq!(cuts[0].token, token_of(at(2), Some(0)).as_bytes());
    }

    #[test]
    fn changes_already_logged_are_skipped() {
        let mut chunker = chunker(true);
        let first = reply(&[event(at(2), 0, false), event(at(3), 0, false)], token_of(at(3), Some(0)));
        chunker.cut(&first).expect("cut");
        let again =
            reply(&[event(at(2), 0, false), event(at(3), 0, false), event(at(4), 0, false)], token_of(at(4), Some(0)));
        let cuts = chunker.cut(&again).expect("cut");
        assert_eq!(cuts[0].batch.header().count, 1);
        assert_eq!(cuts[0].batch.header().previous, Position::through(at(3)));
    }

    #[test]
    fn large_replies_are_cut_at_units_where_possible_and_hashes_chain() {
        let mut chunker = chunker(true);
        let big = |seconds| {
            let mut event = event(at(seconds), 0, false);
            event.append(bson::cstr!("pad"), "x".repeat(CUT_BYTES));
            event
        };
        let cuts = chunker.cut(&reply(&[big(2), big(3), big(4)], token_of(at(4), Some(0)))).expect("cut");
        assert_eq!(cuts.len(), 3);
        assert_eq!(cuts[0].batch.header().end, Position::before(at(3)));
        for pair in cuts.windows(2) {
            let (a, b) = (pair[0].batch.header(), pair[1].batch.header());
            assert_eq!((a.end, a.hash), (b.previous, b.hash_before));
        }
    }

    #[test]
    fn the_token_is_left_out_of_the_stored_change() {
        let mut chunker = chunker(true);
        let cuts = chunker.cut(&reply(&[event(at(2), 0, false)], token_of(at(2), Some(0)))).expect("cut");
        let changes = cuts[0].batch.changes().expect("changes");
        let (_, document) = changes.entries().next().expect("one").expect("valid");
        assert_eq!(document, &*rawdoc! {"operationType": "delete"});
    }

    /// MongoDB 6.0.5 puts the new name of a rename before the token.
    #[test]
    fn the_token_need_not_come_first() {
        let token = token_of(at(2), Some(0));
        let rename = rawdoc! {"to": {"db": "d", "coll": "c"}, "_id": token.clone(), "operationType": "rename"};
        let cuts = chunker(true).cut(&reply(&[rename], token)).expect("cut");
        let changes = cuts[0].batch.changes().expect("changes");
        let (_, document) = changes.entries().next().expect("one").expect("valid");
        assert_eq!(document, &*rawdoc! {"to": {"db": "d", "coll": "c"}, "operationType": "rename"});
    }

    #[test]
    fn an_event_without_token_is_refused() {
        let bad = reply(&[rawdoc! {"operationType": "delete"}], token_of(at(2), None));
        assert!(matches!(chunker(true).cut(&bad), Err(ChunkError::Shape(_))));
    }
}
