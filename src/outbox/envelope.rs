//! How every value is stored: versioned, checksummed, and encrypted when there is a key.
//!
//! ```text
//! offset size   integers little-endian
//!      0    4  magic "FSHV"
//!      4    1  format version (1)
//!      5    1  flags: bit 0 = payload is sealed with AES-256-GCM
//!      6    2  header length (a reader skips header bytes it does not know)
//!      8    4  CRC-32 of the whole value with this field left out
//!     12    8  key id (zero when not sealed)
//!     20   12  nonce (zero when not sealed)
//!     32    …  payload; sealed: ciphertext and a 16-byte tag
//! ```
//!
//! The store's key bytes are the associated data, so a sealed value moved to another key does not open. Nonces are
//! random; at 2^32 values per key a repeated one becomes thinkable (2^-33), which one agent reaches after months of
//! full load: change the key (with an empty directory) every year.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{digest, rand};
use bytes::Bytes;

/// Newest version this one reads, and the one it writes.
pub(super) const VERSION: u8 = 1;
/// Bytes of a version 1 header.
pub(super) const HEADER_LEN: usize = 32;
const MAGIC: [u8; 4] = *b"FSHV";
const SEALED: u8 = 1;
const CRC_AT: usize = 8;
const TAG_LEN: usize = 16;

/// Identity of a key: the start of a hash of it.
pub(super) type KeyId = [u8; 8];

/// A 256-bit key for encryption at rest.
#[derive(Clone)]
pub struct EncryptionKey {
    bytes: [u8; 32],
    id: KeyId,
}

/// A text that is not a key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an encryption key is 32 bytes or 64 hex digits; make one with: openssl rand -hex 32")]
pub struct InvalidKey;

impl EncryptionKey {
    /// From 32 bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        let mut named = b"farshore key id".to_vec();
        named.extend_from_slice(&bytes);
        let hash = digest::digest(&digest::SHA256, &named);
        let id = hash.as_ref()[..8].try_into().expect("8 bytes");
        Self { bytes, id }
    }

    /// From the contents of a key file: 32 raw bytes, or 64 hex digits and white space.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(contents: &[u8]) -> Result<Self, InvalidKey> {
        if let Ok(bytes) = contents.try_into() {
            return Ok(Self::new(bytes));
        }
        let text = contents.trim_ascii();
        if text.len() != 64 {
            return Err(InvalidKey);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).ok_or(InvalidKey);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(Self::new(bytes))
    }

    pub(super) fn id(&self) -> KeyId {
        self.id
    }
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EncryptionKey({})", hex(&self.id))
    }
}

/// Lower-case hex digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, b| {
        write!(out, "{b:02x}").expect("writing to a string");
        out
    })
}

/// Why a value does not open.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum EnvelopeError {
    #[error("value is truncated or not ours ({0} bytes)")]
    Truncated(usize),
    #[error("value has format version {found}, this version reads up to {VERSION}; upgrade this agent first")]
    Newer { found: u8 },
    #[error("value crc mismatch: stored {stored:08x}, computed {computed:08x}")]
    Crc { stored: u32, computed: u32 },
    #[error("value is sealed with key {id}, which this agent does not have")]
    Key { id: String },
    #[error("value does not decrypt: it was altered or moved")]
    Sealed,
}

/// Wraps and unwraps values.
pub(super) struct Sealer {
    key: Option<(KeyId, LessSafeKey)>,
}

impl Sealer {
    /// With a key every value is sealed; without one none is, and sealed ones do not open.
    pub(super) fn new(key: Option<&EncryptionKey>) -> Self {
        let key = key.map(|key| {
            let unbound = UnboundKey::new(&AES_256_GCM, &key.bytes).expect("32 bytes are a key");
            (key.id, LessSafeKey::new(unbound))
        });
        Self { key }
    }

    /// The stored form of the payload that `parts` make up, under the store's `key`.
    pub(super) fn seal(&self, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        let payload: usize = parts.iter().map(|part| part.len()).sum();
        let mut value = Vec::with_capacity(HEADER_LEN + payload + TAG_LEN);
        value.extend_from_slice(&MAGIC);
        value.extend_from_slice(&[VERSION, 0]);
        value.extend_from_slice(&(HEADER_LEN as u16).to_le_bytes());
        value.resize(HEADER_LEN, 0);
        for part in parts {
            value.extend_from_slice(part);
        }
        if let Some((id, cipher)) = &self.key {
            let mut nonce = [0; NONCE_LEN];
            rand::fill(&mut nonce).expect("the system gives random bytes");
            value[5] = SEALED;
            value[12..20].copy_from_slice(id);
            value[20..32].copy_from_slice(&nonce);
            let tag = cipher
                .seal_in_place_separate_tag(
                    Nonce::assume_unique_for_key(nonce),
                    Aad::from(key),
                    &mut value[HEADER_LEN..],
                )
                .expect("payloads are far below the cipher's limit");
            value.extend_from_slice(tag.as_ref());
        }
        let crc = crc(&value);
        value[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        value
    }

    /// The payload of a stored value. Accepts arbitrary bytes.
    pub(super) fn open(&self, key: &[u8], mut value: Vec<u8>) -> Result<Bytes, EnvelopeError> {
        let truncated = EnvelopeError::Truncated(value.len());
        if value.len() < HEADER_LEN || value[..4] != MAGIC {
            return Err(truncated);
        }
        if value[4] != VERSION {
            return Err(EnvelopeError::Newer { found: value[4] });
        }
        let header_len = usize::from(u16::from_le_bytes([value[6], value[7]]));
        if header_len < HEADER_LEN || value.len() < header_len {
            return Err(truncated);
        }
        let stored = u32::from_le_bytes(value[CRC_AT..CRC_AT + 4].try_into().expect("4 bytes"));
        let computed = crc(&value);
        if stored != computed {
            return Err(EnvelopeError::Crc { stored, computed });
        }
        if value[5] & SEALED == 0 {
            return Ok(Bytes::from(value).slice(header_len..));
        }
        let id: KeyId = value[12..20].try_into().expect("8 bytes");
        let nonce: [u8; NONCE_LEN] = value[20..32].try_into().expect("12 bytes");
        let (_, cipher) =
            self.key.as_ref().filter(|(own, _)| *own == id).ok_or_else(|| EnvelopeError::Key { id: hex(&id) })?;
        let payload = cipher
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(key), &mut value[header_len..])
            .map_err(|_| EnvelopeError::Sealed)?
            .len();
        Ok(Bytes::from(value).slice(header_len..header_len + payload))
    }
}

fn crc(value: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&value[..CRC_AT]);
    hasher.update(&value[CRC_AT + 4..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealers() -> [Sealer; 2] {
        [Sealer::new(None), Sealer::new(Some(&EncryptionKey::new([7; 32])))]
    }

    proptest! {
        #[test]
        fn values_round_trip_and_bind_to_their_key(
            payload in proptest::collection::vec(any::<u8>(), 0..300), split in any::<proptest::sample::Index>(),
        ) {
            let at = split.index(payload.len() + 1);
            for sealer in sealers() {
                let value = sealer.seal(b"key", &[&payload[..at], &payload[at..]]);
                prop_assert_eq!(sealer.open(b"key", value.clone()).expect("open"), payload.clone());
                if sealer.key.is_some() {
                    prop_assert_eq!(sealer.open(b"other", value.clone()), Err(EnvelopeError::Sealed));
                    prop_assert!(!value.windows(8).any(|w| payload.len() >= 8 && w == &payload[..8]));
                    let refused = matches!(Sealer::new(None).open(b"key", value), Err(EnvelopeError::Key { .. }));
                    prop_assert!(refused);
                }
            }
        }

        #[test]
        fn a_flipped_bit_is_always_found(at in any::<proptest::sample::Index>(), bit in 0u8..8) {
            for sealer in sealers() {
                let mut value = sealer.seal(b"key", &[b"some payload"]);
                let at = at.index(value.len());
                value[at] ^= 1 << bit;
                prop_assert!(sealer.open(b"key", value).is_err(), "byte {}", at);
            }
        }
    }

    #[test]
    fn golden() {
        let value = Sealer::new(None).seal(b"k", &[b"payload"]);
        assert_eq!(hex(&value), "46534856010020004cb6406400000000000000000000000000000000000000007061796c6f6164");
    }

    #[test]
    fn a_sealed_value_of_version_1_still_opens() {
        let golden = "4653485601012000e572ad16e73e1abfff063996379d9ccf97af358ad59a0201ae7c0a4d1b8e13bb\
            d05d0ee579cc46659e8e59de7895a5";
        let bytes: Vec<u8> = golden
            .as_bytes()
            .chunks_exact(2)
            .map(|p| u8::from_str_radix(std::str::from_utf8(p).expect("ascii"), 16).expect("hex"))
            .collect();
        let sealer = Sealer::new(Some(&EncryptionKey::new([7; 32])));
        assert_eq!(sealer.open(b"k", bytes).expect("open"), &b"payload"[..]);
    }

    #[test]
    fn a_newer_version_is_refused_with_a_hint() {
        let mut value = Sealer::new(None).seal(b"k", &[b"x"]);
        value[4] = VERSION + 1;
        let error = Sealer::new(None).open(b"k", value).expect_err("newer");
        assert!(error.to_string().contains("upgrade this agent first"), "{error}");
    }

    #[test]
    fn keys_are_read_from_files_and_never_shown() {
        let key = EncryptionKey::parse(format!("{}\n", "0f".repeat(32)).as_bytes()).expect("hex");
        assert_eq!(key.id(), EncryptionKey::parse(&[0x0f; 32]).expect("raw").id());
        assert!(!format!("{key:?}").contains("0f0f"), "{key:?}");
        for bad in [&b"short"[..], &[b'x'; 64]] {
            assert_eq!(EncryptionKey::parse(bad).expect_err("invalid"), InvalidKey);
        }
    }
}
