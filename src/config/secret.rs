//! Values that must not be shown: read from files, kept in a type that does not print them.
//!
//! A secret comes by file path only and is read again when a connection is made, so that it can be replaced while the
//! agent runs. Errors name the file, never its contents.

use std::fmt;
use std::path::{Path, PathBuf};

/// A value whose `Debug` and `Display` hide it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<T>(T);

impl<T> Secret<T> {
    /// Takes a value into hiding.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value itself; call it where it is used, not earlier.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl<T> fmt::Display for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Why a secret could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// The first line holds nothing.
    #[error("the first line of {} is empty", path.display())]
    Empty { path: PathBuf },
    /// Not 64 hex digits.
    #[error("{} does not hold 64 hex digits (32 bytes); make one with: openssl rand -hex 32", path.display())]
    NotAKey { path: PathBuf },
}

/// The first line of a file, without its end.
///
/// # Errors
/// The file cannot be read or its first line is empty.
pub fn read_password(path: &Path) -> Result<Secret<String>, Error> {
    let text = read(path)?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Secret::new(line.to_owned())),
        _ => Err(Error::Empty { path: path.to_owned() }),
    }
}

/// The 32 bytes a file gives as 64 hex digits.
///
/// # Errors
/// The file cannot be read or holds something else.
pub fn read_encryption_key(path: &Path) -> Result<Secret<[u8; 32]>, Error> {
    let text = read(path)?;
    decode_key(text.trim()).map(Secret::new).ok_or_else(|| Error::NotAKey { path: path.to_owned() })
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

fn decode_key(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    let mut key = [0u8; 32];
    if digits.len() != 2 * key.len() {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).expect("two hex digits fit a byte");
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_print() {
        let secret = Secret::new("hunter2".to_owned());
        assert!(!format!("{secret} {secret:?}").contains("hunter2"));
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn a_password_is_the_first_line() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("p");
        std::fs::write(&path, "s3cr3t \r\nnot this").expect("write");
        assert_eq!(read_password(&path).expect("read").expose(), "s3cr3t ");
        std::fs::write(&path, "\n").expect("write");
        assert!(matches!(read_password(&path), Err(Error::Empty { .. })));
    }

    #[test]
    fn a_key_is_64_hex_digits_and_errors_do_not_repeat_it() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("k");
        std::fs::write(&path, format!("{}\n", "0fA1".repeat(16))).expect("write");
        assert_eq!(read_encryption_key(&path).expect("key").expose()[..2], [0x0f, 0xa1]);
        std::fs::write(&path, "0g".repeat(32)).expect("write");
        let error = read_encryption_key(&path).expect_err("not hex").to_string();
        assert!(error.contains("64 hex digits") && !error.contains("0g0g"), "{error}");
    }
}
