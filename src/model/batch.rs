//! A batch: the ordered unit of storing and shipping, and its record format.
//!
//! A record is written once, by capture, and then stored, shipped and stored again byte for byte. Layout, integers
//! little-endian unless said otherwise:
//!
//! ```text
//! offset size
//!      0    4  magic "FSHB"
//!      4    1  format version (1)
//!      5    1  flags: bit 0 = body is zstd-compressed
//!      6    2  header length (a reader skips header bytes it does not know)
//!      8    4  body length as stored
//!     12    4  body length after decompression
//!     16    4  CRC-32 (IEEE, crc32fast) of the whole record with this field left out
//!     20   16  incarnation
//!     36    8  epoch
//!     44   12  previous: end of what precedes the batch (position, big-endian)
//!     56   12  end: what the log reaches with this batch (position, big-endian)
//!     68    4  number of changes
//!     72    8  stream hash at `previous`
//!     80    8  stream hash at `end`
//!     88    …  body: per change its position (12 bytes, big-endian) and its BSON document
//! ```
//!
//! `end` is the last change's position, or a position of ordinal 0 past it, which also says that the last unit is complete.
//! Decoders accept arbitrary bytes without panicking and never allocate more than [`MAX_RAW`].

use bson::raw::RawDocument;
use bytes::{BufMut, Bytes, BytesMut};

use super::{Change, Epoch, Incarnation, Position, StreamHash, change::ParseError};

/// Newest record format this version reads and the one it writes.
pub const FORMAT: u8 = 1;
/// Bytes of a version 1 header.
pub const HEADER_LEN: usize = 88;
/// Largest body after decompression: one change may be 16 MiB and a little, and a batch is cut right after it.
pub const MAX_RAW: usize = 40 << 20;
const MAGIC: [u8; 4] = *b"FSHB";
const ZSTD: u8 = 1;
const CRC_AT: usize = 16;
/// Below this size compression does not pay.
const COMPRESS_FROM: usize = 256;

/// Why bytes are not a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Shorter than it says, or not a record at all.
    #[error("record is truncated or not a record ({0} bytes)")]
    Truncated(usize),
    /// Written by a newer version.
    #[error("record has format version {found}, this version reads up to {FORMAT}; upgrade this agent first")]
    Newer { found: u8 },
    /// The checksum does not match.
    #[error("record crc mismatch: stored {stored:08x}, computed {computed:08x}")]
    Crc { stored: u32, computed: u32 },
    /// The checksum matches but the contents contradict each other.
    #[error("record is inconsistent: {0}")]
    Inconsistent(&'static str),
}

/// What a record's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The history the positions belong to.
    pub incarnation: Incarnation,
    /// Epoch under which the changes were made.
    pub epoch: Epoch,
    /// End of what precedes the batch.
    pub previous: Position,
    /// What the log reaches with this batch.
    pub end: Position,
    /// Number of changes.
    pub count: u32,
    /// Body bytes after decompression.
    pub raw_len: u32,
    /// Stream hash at `previous`.
    pub hash_before: StreamHash,
    /// Stream hash at `end`.
    pub hash: StreamHash,
}

/// A checked record. Cloning shares the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    header: Header,
    record: Bytes,
    header_len: usize,
    compressed: bool,
}

impl Batch {
    /// Checks a record and reads its header; the body stays compressed.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn decode(record: Bytes) -> Result<Self, RecordError> {
        let truncated = RecordError::Truncated(record.len());
        if record.len() < HEADER_LEN || record[..4] != MAGIC {
            return Err(truncated);
        }
        if record[4] != FORMAT {
            return Err(RecordError::Newer { found: record[4] });
        }
        let u32_at = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
        let position_at = |at: usize| Position::from_bytes(record[at..at + 12].try_into().expect("12 bytes"));
        let header_len = usize::from(u16::from_le_bytes([record[6], record[7]]));
        let body_len = u32_at(8) as usize;
        if header_len < HEADER_LEN || record.len() != header_len + body_len {
            return Err(truncated);
        }
        let (stored, computed) = (u32_at(CRC_AT), crc(&record));
        if stored != computed {
            return Err(RecordError::Crc { stored, computed });
        }
        let header = Header {
            incarnation: Incarnation(record[20..36].try_into().expect("16 bytes")),
            epoch: Epoch(u64_at(36)),
            previous: position_at(44),
            end: position_at(56),
            count: u32_at(68),
            raw_len: u32_at(12),
            hash_before: StreamHash(u64_at(72)),
            hash: StreamHash(u64_at(80)),
        };
        if header.raw_len as usize > MAX_RAW {
            return Err(RecordError::Inconsistent("body larger than any batch"));
        }
        if header.end <= header.previous {
            return Err(RecordError::Inconsistent("end is not past previous"));
        }
        let compressed = record[5] & ZSTD != 0;
        Ok(Self { header, header_len, compressed, record })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The record as stored and shipped.
    pub fn record(&self) -> &Bytes {
        &self.record
    }

    /// The changes; decompresses once.
    ///
    /// # Errors
    /// The body cannot be decompressed or does not hold what the header says.
    pub fn changes(&self) -> Result<Changes, RecordError> {
        let stored = self.record.slice(self.header_len..);
        let raw_len = self.header.raw_len as usize;
        let body = if self.compressed {
            let raw = zstd::bulk::decompress(&stored, raw_len)
                .map_err(|_| RecordError::Inconsistent("body cannot be decompressed"))?;
            Bytes::from(raw)
        } else {
            stored
        };
        if body.len() != raw_len {
            return Err(RecordError::Inconsistent("body length differs from the header"));
        }
        let changes = Changes { body, header: self.header.clone() };
        changes.check()?;
        Ok(changes)
    }
}

fn crc(record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..CRC_AT]);
    hasher.update(&record[CRC_AT + 4..]);
    hasher.finalize()
}

/// The decompressed changes of a batch, checked to be in order and within its range.
#[derive(Clone, Debug)]
pub struct Changes {
    body: Bytes,
    header: Header,
}

impl Changes {
    fn check(&self) -> Result<(), RecordError> {
        let mut last = self.header.previous;
        let mut count = 0;
        let mut hash = self.header.hash_before;
        for entry in self.entries() {
            let (position, document) = entry?;
            if position <= last || position > self.header.end {
                return Err(RecordError::Inconsistent("changes out of order or out of range"));
            }
            hash = hash.roll(position, document.as_bytes());
            last = position;
            count += 1;
        }
        if count != self.header.count {
            return Err(RecordError::Inconsistent("number of changes differs from the header"));
        }
        if hash != self.header.hash {
            return Err(RecordError::Inconsistent("stream hash differs from the header"));
        }
        Ok(())
    }

    /// Positions and documents in order.
    pub fn entries(&self) -> impl Iterator<Item = Result<(Position, &RawDocument), RecordError>> {
        let mut rest: &[u8] = &self.body;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let entry = split_entry(rest);
            match entry {
                Ok((position, document, tail)) => {
                    rest = tail;
                    Some(Ok((position, document)))
                }
                Err(error) => {
                    rest = &[];
                    Some(Err(error))
                }
            }
        })
    }

    /// The changes as views; positions were checked on decoding.
    pub fn iter(&self) -> impl Iterator<Item = Result<Change<'_>, ParseError>> {
        self.entries().map(|entry| {
            let (position, document) = entry.expect("checked on decoding");
            Change::parse(position, document)
        })
    }

    /// Each change's position with the bytes of its document, sharing the batch's memory.
    pub fn shared(&self) -> impl Iterator<Item = (Position, Bytes)> {
        self.entries().map(|entry| {
            let (position, document) = entry.expect("checked on decoding");
            (position, self.body.slice_ref(document.as_bytes()))
        })
    }

    /// The header of the batch they came from.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

fn split_entry(rest: &[u8]) -> Result<(Position, &RawDocument, &[u8]), RecordError> {
    const BAD: RecordError = RecordError::Inconsistent("a change is cut short");
    let (position, rest) = rest.split_first_chunk::<{ Position::LEN }>().ok_or(BAD)?;
    let length = rest.first_chunk::<4>().map(|b| i32::from_le_bytes(*b)).ok_or(BAD)?;
    let length = usize::try_from(length).map_err(|_| BAD)?;
    if length < 5 || rest.len() < length {
        return Err(BAD);
    }
    let (document, tail) = rest.split_at(length);
    let document = RawDocument::from_bytes(document).map_err(|_| BAD)?;
    Ok((Position::from_bytes(*position), document, tail))
}

/// Collects changes into one batch.
#[derive(Debug)]
pub struct BatchBuilder {
    incarnation: Incarnation,
    epoch: Epoch,
    previous: Position,
    last: Position,
    hash_before: StreamHash,
    hash: StreamHash,
    count: u32,
    body: BytesMut,
}

impl BatchBuilder {
    /// Starts a batch after `previous`.
    pub fn new(incarnation: Incarnation, epoch: Epoch, previous: Position, hash: StreamHash) -> Self {
        let body = BytesMut::new();
        Self { incarnation, epoch, previous, last: previous, hash_before: hash, hash, count: 0, body }
    }

    /// Adds a change; `parts` together are its BSON document.
    ///
    /// # Panics
    /// The position is not past the last one: positions are ours, and going back would lose data at the target.
    pub fn push(&mut self, position: Position, parts: &[&[u8]]) {
        assert!(position > self.last, "change at {position} is not past {}", self.last);
        self.body.put_slice(&position.to_bytes());
        let start = self.body.len();
        for part in parts {
            self.body.put_slice(part);
        }
        self.hash = self.hash.roll(position, &self.body[start..]);
        self.last = position;
        self.count += 1;
    }

    /// Bytes collected so far.
    pub fn len(&self) -> usize {
        self.body.len()
    }

    /// Whether no change was added.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Position of the last change, or `previous`.
    pub fn last(&self) -> Position {
        self.last
    }

    /// Stream hash after the last change.
    pub fn hash(&self) -> StreamHash {
        self.hash
    }

    /// Finishes the batch at `end`, which is the last change's position or a later one of ordinal 0.
    ///
    /// # Panics
    /// `end` is neither, or not past `previous`.
    pub fn finish(self, end: Position) -> Batch {
        assert!(
            end > self.previous && (end == self.last || (end > self.last && end.ordinal == 0)),
            "end {end} of a batch"
        );
        let raw_len = self.body.len();
        assert!(raw_len <= MAX_RAW, "batch of {raw_len} bytes");
        let packed = (raw_len >= COMPRESS_FROM)
            .then(|| zstd::bulk::compress(&self.body, 1).expect("compressing memory does not fail"))
            .filter(|packed| packed.len() < raw_len);
        let body: &[u8] = packed.as_deref().unwrap_or(&self.body);
        let mut record = BytesMut::with_capacity(HEADER_LEN + body.len());
        record.put_slice(&MAGIC);
        record.put_u8(FORMAT);
        record.put_u8(if packed.is_some() { ZSTD } else { 0 });
        record.put_u16_le(HEADER_LEN as u16);
        record.put_u32_le(body.len() as u32);
        record.put_u32_le(raw_len as u32);
        record.put_u32_le(0);
        record.put_slice(&self.incarnation.0);
        record.put_u64_le(self.epoch.0);
        record.put_slice(&self.previous.to_bytes());
        record.put_slice(&end.to_bytes());
        record.put_u32_le(self.count);
        record.put_u64_le(self.hash_before.0);
        record.put_u64_le(self.hash.0);
        assert_eq!(record.len(), HEADER_LEN);
        record.put_slice(body);
        let crc = crc(&record);
        record[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        let header = Header {
            incarnation: self.incarnation,
            epoch: self.epoch,
            previous: self.previous,
            end,
            count: self.count,
            raw_len: raw_len as u32,
            hash_before: self.hash_before,
            hash: self.hash,
        };
        Batch { header, header_len: HEADER_LEN, compressed: packed.is_some(), record: record.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;
    use proptest::prelude::*;

    use super::*;
    use crate::model::ClusterTime;

    fn batch(sizes: &[usize], close: bool) -> Batch {
        let previous = Position::new(ClusterTime::new(100, 1), 1);
        let mut builder = BatchBuilder::new(Incarnation([5; 16]), Epoch(3), previous, StreamHash(77));
        for (i, size) in sizes.iter().enumerate() {
            let document = rawdoc! {"n": i as i32, "pad": "x".repeat(*size)};
            let position = Position::new(ClusterTime::new(101, 1), i as u32 + 1);
            builder.push(position, &[&document.as_bytes()[..4], &document.as_bytes()[4..]]);
        }
        let last = builder.last();
        builder.finish(if close { Position::through(last.time) } else { last })
    }

    proptest! {
        #[test]
        fn records_round_trip(sizes in proptest::collection::vec(0usize..2000, 1..20), close in any::<bool>()) {
            let batch = batch(&sizes, close);
            let read = Batch::decode(batch.record().clone()).expect("decode");
            prop_assert_eq!(&read, &batch);
            let changes = read.changes().expect("changes");
            let lengths: Vec<_> = changes.entries()
                .map(|e| e.expect("entry").1.get_str("pad").expect("pad").len()).collect();
            prop_assert_eq!(lengths, sizes);
        }

        #[test]
        fn a_flipped_bit_is_always_found(at in any::<proptest::sample::Index>(), bit in 0u8..8) {
            let mut bad = batch(&[10, 700, 3], true).record().to_vec();
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
            prop_assert!(Batch::decode(bad.into()).is_err(), "byte {}", at);
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), fix in any::<bool>()) {
            if fix && bytes.len() >= HEADER_LEN {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4] = FORMAT;
                bytes[6..8].copy_from_slice(&(HEADER_LEN as u16).to_le_bytes());
                let body = (bytes.len() - HEADER_LEN) as u32;
                bytes[8..12].copy_from_slice(&body.to_le_bytes());
                let crc = crc(&bytes);
                bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
            }
            if let Ok(batch) = Batch::decode(bytes.into()) {
                drop(batch.changes());
            }
        }
    }

    #[test]
    fn a_newer_format_is_refused_with_a_hint() {
        let mut record = batch(&[1], false).record().to_vec();
        record[4] = FORMAT + 1;
        let error = Batch::decode(record.into()).expect_err("newer");
        assert!(error.to_string().contains("upgrade this agent first"), "{error}");
    }

    #[test]
    fn an_empty_batch_only_moves_the_end() {
        let previous = Position::new(ClusterTime::new(9, 9), 2);
        let builder = BatchBuilder::new(Incarnation([1; 16]), Epoch(1), previous, StreamHash(4));
        let batch = builder.finish(Position::through(previous.time));
        let header = Batch::decode(batch.record().clone()).expect("decode").header().clone();
        assert_eq!((header.count, header.hash), (0, StreamHash(4)));
    }

    #[test]
    #[should_panic(expected = "is not past")]
    fn a_position_never_goes_back() {
        let mut builder = BatchBuilder::new(Incarnation([1; 16]), Epoch(1), Position::ZERO, StreamHash::default());
        let document = rawdoc! {};
        let position = Position::new(ClusterTime(5), 1);
        builder.push(position, &[document.as_bytes()]);
        builder.push(position, &[document.as_bytes()]);
    }
}
