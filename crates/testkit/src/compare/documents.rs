//! Streams one collection from both clusters and joins the documents.
//!
//! `Join` is pure: it gets documents of either side in any order and says what differs. A document
//! waits only for its partner, and both sides are read in step, so equal collections need two batches
//! of memory. Time-series collections have no usable `_id`: there the whole document is the key.

use std::collections::{BTreeMap, VecDeque};

use anyhow::Result;
use bson::doc;
use bson::raw::{RawDocument, RawDocumentBuf};
use futures::TryStreamExt;
use mongodb::Client;
use mongodb::options::Hint;
use mongodb::raw_batch_cursor::RawBatchCursor;
use xxhash_rust::xxh3::xxh3_64;

use super::bytes;
use super::catalog::{Collection, collect};
use super::difference::{Kind, Report};

/// Bytes of documents waiting for a partner at which a collection is given up.
const MAX_WAITING_BYTES: usize = 256 << 20;

/// Compares the documents of one collection; returns how many the first cluster has.
pub(super) async fn compare(
    a: &Client,
    b: &Client,
    l: &Collection,
    r: &Collection,
    report: &mut Report,
) -> Result<u64> {
    if l.capped && r.capped {
        compare_order(a, b, l, report).await?;
    }
    let by_id = l.kind == "collection" && r.kind == "collection";
    let order = if by_id { Order::Id } else { Order::Natural };
    let (mut left, mut right) = futures::try_join!(Reader::open(a, l, order), Reader::open(b, r, order))?;
    let mut join = Join::new(by_id);
    loop {
        let (x, y) = futures::try_join!(left.next(), right.next())?;
        if x.is_none() && y.is_none() {
            break;
        }
        join.step(x, y, &l.namespace(), report);
        if join.waiting_bytes > MAX_WAITING_BYTES {
            report.push(l.namespace(), Kind::TooFarApart { unmatched: join.waiting() });
            return Ok(join.documents);
        }
    }
    let documents = join.documents;
    join.finish(&l.namespace(), report);
    Ok(documents)
}

async fn compare_order(a: &Client, b: &Client, l: &Collection, report: &mut Report) -> Result<()> {
    let (mut left, mut right) =
        futures::try_join!(Reader::open(a, l, Order::Natural), Reader::open(b, l, Order::Natural))?;
    for position in 0.. {
        let (x, y) = futures::try_join!(left.next(), right.next())?;
        if x.is_none() && y.is_none() {
            break;
        }
        if x != y {
            let text = |d: Option<RawDocumentBuf>| d.map_or_else(|| "(end)".to_owned(), |d| bytes::shorten(&d, 200));
            let kind = Kind::NaturalOrder { position, a: text(x), b: text(y) };
            report.push(l.namespace(), kind);
            break;
        }
    }
    Ok(())
}

/// What one collection adds to a digest.
pub(super) struct Sum {
    pub(super) hash: u64,
    pub(super) documents: u64,
    pub(super) bytes: u64,
}

/// Hashes a collection: order counts where it is part of the state (capped), else not.
pub(super) async fn digest(client: &Client, collection: &Collection) -> Result<Sum> {
    let by_id = collection.kind == "collection" && !collection.capped;
    let order = if by_id { Order::Id } else { Order::Natural };
    let mut reader = Reader::open(client, collection, order).await?;
    let mut sum = Sum { hash: 0, documents: 0, bytes: 0 };
    while let Some(document) = reader.next().await? {
        if collection.capped {
            sum.hash = sum.hash.rotate_left(1);
        }
        sum.hash = sum.hash.wrapping_add(xxh3_64(document.as_bytes()));
        sum.documents += 1;
        sum.bytes += document.as_bytes().len() as u64;
    }
    Ok(sum)
}

#[derive(Clone, Copy)]
enum Order {
    Id,
    Natural,
}

/// Reads one collection, one server reply in memory at a time.
struct Reader {
    cursor: RawBatchCursor,
    ready: VecDeque<RawDocumentBuf>,
}

impl Reader {
    async fn open(client: &Client, collection: &Collection, order: Order) -> Result<Self> {
        // A hint and no sort: index order whatever the collation, and never a sort in memory.
        let hint = match order {
            Order::Id => doc! { "_id": 1 },
            Order::Natural => doc! { "$natural": 1 },
        };
        let db = client.database(&collection.database);
        let documents = db.collection::<RawDocumentBuf>(&collection.name);
        let mut find = documents.find(doc! {});
        if collection.kind != "timeseries" {
            find = find.hint(Hint::Keys(hint));
        }
        Ok(Self { cursor: find.batch().await?, ready: VecDeque::new() })
    }

    async fn next(&mut self) -> Result<Option<RawDocumentBuf>> {
        while self.ready.is_empty() {
            let Some(batch) = self.cursor.try_next().await? else {
                return Ok(None);
            };
            collect(batch.doc_slices()?, &mut self.ready)?;
        }
        Ok(self.ready.pop_front())
    }
}

type Waiting = BTreeMap<Vec<u8>, Vec<RawDocumentBuf>>;

/// Pairs documents of two sides by key.
struct Join {
    by_id: bool,
    left: Waiting,
    right: Waiting,
    waiting_bytes: usize,
    documents: u64,
}

impl Join {
    fn new(by_id: bool) -> Self {
        Self { by_id, left: Waiting::new(), right: Waiting::new(), waiting_bytes: 0, documents: 0 }
    }

    /// Takes the next document of each side, if it has one.
    fn step(&mut self, x: Option<RawDocumentBuf>, y: Option<RawDocumentBuf>, namespace: &str, report: &mut Report) {
        self.documents += u64::from(x.is_some());
        if x == y {
            return;
        }
        for (document, is_left) in [(x, true), (y, false)] {
            let Some(document) = document else { continue };
            if let Some((a, b)) = self.offer(document, is_left)
                && a != b
            {
                report.push(namespace.to_owned(), different(&a, &b));
            }
        }
    }

    /// Gives the pair when the partner of this document was waiting, else lets it wait.
    fn offer(&mut self, document: RawDocumentBuf, is_left: bool) -> Option<(RawDocumentBuf, RawDocumentBuf)> {
        let key = match self.by_id {
            true => bytes::id_bytes(&document),
            false => document.as_bytes().to_vec(),
        };
        let (own, other) = match is_left {
            true => (&mut self.left, &mut self.right),
            false => (&mut self.right, &mut self.left),
        };
        let Some(partners) = other.get_mut(&key) else {
            self.waiting_bytes += document.as_bytes().len();
            own.entry(key).or_default().push(document);
            return None;
        };
        let partner = partners.pop().expect("a waiting key has a document");
        if partners.is_empty() {
            other.remove(&key);
        }
        self.waiting_bytes -= partner.as_bytes().len();
        Some(if is_left { (document, partner) } else { (partner, document) })
    }

    fn waiting(&self) -> u64 {
        let count = |side: &Waiting| side.values().map(|d| d.len() as u64).sum::<u64>();
        count(&self.left) + count(&self.right)
    }

    /// Reports what found no partner; numerically equal `_id`s of other types count as one document.
    fn finish(self, namespace: &str, report: &mut Report) {
        let mut extra: Vec<_> = self.right.into_values().flatten().map(Some).collect();
        let mut numeric: BTreeMap<u64, usize> = BTreeMap::new();
        for (n, document) in extra.iter().enumerate() {
            if let Some(key) = document.as_ref().and_then(|d| bytes::numeric_key(d)) {
                numeric.insert(key, n);
            }
        }
        for a in self.left.into_values().flatten() {
            let partner = bytes::numeric_key(&a)
                .filter(|_| self.by_id)
                .and_then(|key| numeric.remove(&key))
                .and_then(|n| extra.get_mut(n)?.take());
            let kind = match partner {
                Some(b) => different(&a, &b),
                None => Kind::DocumentMissing { id: bytes::id_text(&a), a: bytes::shorten(&a, 200) },
            };
            report.push(namespace.to_owned(), kind);
        }
        for b in extra.into_iter().flatten() {
            let kind = Kind::DocumentExtra { id: bytes::id_text(&b), b: bytes::shorten(&b, 200) };
            report.push(namespace.to_owned(), kind);
        }
    }
}

fn different(a: &RawDocument, b: &RawDocument) -> Kind {
    Kind::DocumentDifferent {
        id: bytes::id_text(a),
        a: bytes::shorten(a, 200),
        b: bytes::shorten(b, 200),
        at: bytes::first_difference(a, b),
        only_field_order: bytes::same_but_for_order(a, b),
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;

    use super::*;

    fn run(left: Vec<RawDocumentBuf>, right: Vec<RawDocumentBuf>) -> Vec<&'static str> {
        let mut report = Report::new(100);
        let mut join = Join::new(true);
        for n in 0..left.len().max(right.len()) {
            join.step(left.get(n).cloned(), right.get(n).cloned(), "d.c", &mut report);
        }
        join.finish("d.c", &mut report);
        report.finish().0.iter().map(|difference| difference.kind.name()).collect()
    }

    #[test]
    fn one_missing_document_does_not_disturb_the_rest() {
        let all: Vec<_> = (0..100).map(|n| rawdoc! { "_id": n }).collect();
        let mut fewer = all.clone();
        fewer.remove(3);
        assert_eq!(run(all.clone(), all.clone()), [""; 0]);
        assert_eq!(run(all.clone(), fewer.clone()), ["document missing"]);
        assert_eq!(run(fewer, all), ["document extra"]);
    }

    #[test]
    fn equal_numbers_of_other_type_are_one_different_document() {
        let a = vec![rawdoc! { "_id": 1, "x": 1 }];
        let b = vec![rawdoc! { "_id": 1.0, "x": 1 }];
        assert_eq!(run(a, b), ["document different"]);
    }

    #[test]
    fn memory_is_free_again_when_partners_met() {
        let mut report = Report::new(10);
        let mut join = Join::new(true);
        join.step(Some(rawdoc! { "_id": 1 }), Some(rawdoc! { "_id": 2 }), "d.c", &mut report);
        assert!(join.waiting_bytes > 0);
        join.step(Some(rawdoc! { "_id": 2 }), Some(rawdoc! { "_id": 1 }), "d.c", &mut report);
        assert_eq!((join.waiting_bytes, join.waiting()), (0, 0));
    }
}
