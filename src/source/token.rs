//! Reads the position out of a change stream's resume token.
//!
//! A token's `_data` is the hexadecimal form of a KeyString: timestamp, token version, token type, operation index, and
//! more that does not concern us. Layout and type bytes: MongoDB source, `src/mongo/db/pipeline/resume_token.h` and
//! `src/mongo/db/storage/key_string.cpp` (versions 6.0 to 8.0). Only the prefix up to the operation index is read.

use bson::raw::RawDocument;

use crate::model::{ClusterTime, Position};

/// What a token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Everything before this time has been seen.
    HighWater(ClusterTime),
    /// The change at this position.
    Change(Position),
}

impl Token {
    /// The token's cluster time.
    pub fn time(self) -> ClusterTime {
        match self {
            Self::HighWater(time) => time,
            Self::Change(position) => position.time,
        }
    }
}

/// Why a token cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// No `_data` text, or not hexadecimal, or too short.
    #[error("resume token is malformed")]
    Malformed,
    /// A version this program does not know; positions cannot be assigned safely.
    #[error("resume token has version {0}, known are 1 and 2; this MongoDB version is not supported yet")]
    Version(u64),
}

const TIMESTAMP: u8 = 130;
const ZERO: u8 = 41;
const POSITIVE_1_BYTE: u8 = 43;
const POSITIVE_8_BYTES: u8 = 50;
const EVENT_TOKEN: u64 = 128;
/// Hex digits that can hold everything up to the operation index; the document key behind it may be megabytes.
const PREFIX_DIGITS: usize = 2 * (1 + 8 + 9 + 9 + 9);

/// Decodes a resume token document.
///
/// # Errors
/// See [`TokenError`].
pub fn decode(token: &RawDocument) -> Result<Token, TokenError> {
    let text = token.get_str("_data").map_err(|_| TokenError::Malformed)?.as_bytes();
    let digits = &text[..text.len().min(PREFIX_DIGITS)];
    let mut buffer = [0u8; PREFIX_DIGITS / 2];
    let mut length = 0;
    for pair in digits.chunks_exact(2) {
        buffer[length] = (nibble(pair[0])? << 4) | nibble(pair[1])?;
        length += 1;
    }
    let mut rest = &buffer[..length];
    let time = timestamp(&mut rest)?;
    let version = number(&mut rest)?;
    if !(1..=2).contains(&version) {
        return Err(TokenError::Version(version));
    }
    if number(&mut rest)? != EVENT_TOKEN {
        return Ok(Token::HighWater(time));
    }
    let index = u32::try_from(number(&mut rest)?).map_err(|_| TokenError::Malformed)?;
    Ok(Token::Change(Position::new(time, index.checked_add(1).ok_or(TokenError::Malformed)?)))
}

fn nibble(digit: u8) -> Result<u8, TokenError> {
    (digit as char).to_digit(16).map(|d| d as u8).ok_or(TokenError::Malformed)
}

fn timestamp(rest: &mut &[u8]) -> Result<ClusterTime, TokenError> {
    let (kind, tail) = rest.split_first().ok_or(TokenError::Malformed)?;
    let (time, tail) = tail.split_first_chunk::<8>().ok_or(TokenError::Malformed)?;
    if *kind != TIMESTAMP {
        return Err(TokenError::Malformed);
    }
    *rest = tail;
    Ok(ClusterTime(u64::from_be_bytes(*time)))
}

/// A non-negative integer: the type byte gives the length, the lowest bit says whether a fraction follows.
fn number(rest: &mut &[u8]) -> Result<u64, TokenError> {
    let (kind, tail) = rest.split_first().ok_or(TokenError::Malformed)?;
    let length = match *kind {
        ZERO => {
            *rest = tail;
            return Ok(0);
        }
        POSITIVE_1_BYTE..=POSITIVE_8_BYTES => usize::from(kind - POSITIVE_1_BYTE) + 1,
        _ => return Err(TokenError::Malformed),
    };
    if tail.len() < length {
        return Err(TokenError::Malformed);
    }
    let (bytes, tail) = tail.split_at(length);
    let value = bytes.iter().fold(0u64, |value, byte| (value << 8) | u64::from(*byte));
    if value & 1 == 1 {
        return Err(TokenError::Malformed);
    }
    *rest = tail;
    Ok(value >> 1)
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;
    use proptest::prelude::*;

    use super::*;

    fn read(data: &str) -> Result<Token, TokenError> {
        decode(&rawdoc! {"_data": data})
    }

    /// Tokens as mongod 6.0.5 emitted them: a single insert and the third operation of a transaction.
    #[test]
    fn tokens_of_a_real_server_are_read() {
        let single = "826B00B86B000000022B022C0100296E5A1004AA0974BD0E33488483159709266";
        let time = ClusterTime::new(0x6B00_B86B, 2);
        assert_eq!(read(single), Ok(Token::Change(Position::new(time, 1))));
        let third = "826B00B86F000000052B022C01002B046E5A10040D8D19DA749647";
        let time = ClusterTime::new(0x6B00_B86F, 5);
        assert_eq!(read(third), Ok(Token::Change(Position::new(time, 3))));
        let mark = "826B00B871000000032B0229296E04";
        assert_eq!(read(mark), Ok(Token::HighWater(ClusterTime::new(0x6B00_B871, 3))));
    }

    #[test]
    fn an_operation_index_over_one_byte_is_read() {
        // 15,019 << 1 = 0x7556 in two bytes.
        let token = "826B00B86F000000052B022C01002C75566E5A1004";
        assert_eq!(read(token), Ok(Token::Change(Position::new(ClusterTime::new(0x6B00_B86F, 5), 15_020))));
    }

    #[test]
    fn an_unknown_version_is_named() {
        assert_eq!(read("826B00B871000000032B0629296E04"), Err(TokenError::Version(3)));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[0-9A-Fa-fxyz]{0,90}") {
            drop(read(&text));
        }
    }
}
