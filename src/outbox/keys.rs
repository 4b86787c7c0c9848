//! Keys of the store: one byte says the kind, integers are big-endian, so byte order is log order.
//!
//! ```text
//! record   'r' | log | generation u64 | end (position, 12 bytes)     column family of the log
//! state    's' | log                                                column family `state`
//! meta     'm' | name                                               column family `state`
//! format   'f'                                                      column family `state`
//! key id   'k'                                                      column family `state`
//! log      0x01 (outbox), or 0x02 | source site | 0x00 (inbox)
//! ```

use super::LogId;
use crate::model::{Position, SiteName};

/// A key of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Record { log: LogId, generation: u64, end: Position },
    State { log: LogId },
    Meta { name: String },
    Format,
    Cipher,
}

impl Key {
    /// The stored form.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(96);
        match self {
            Self::Record { log, generation, end } => {
                out.push(b'r');
                put_log(&mut out, log);
                out.extend_from_slice(&generation.to_be_bytes());
                out.extend_from_slice(&end.to_bytes());
            }
            Self::State { log } => {
                out.push(b's');
                put_log(&mut out, log);
            }
            Self::Meta { name } => {
                out.push(b'm');
                out.extend_from_slice(name.as_bytes());
            }
            Self::Format => out.push(b'f'),
            Self::Cipher => out.push(b'k'),
        }
        out
    }

    /// The inverse of [`Self::to_bytes`]; `None` for anything else.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        match kind {
            b'r' => {
                let (log, rest) = split_log(rest)?;
                let (generation, rest) = rest.split_first_chunk::<8>()?;
                let end = Position::from_bytes(rest.try_into().ok()?);
                Some(Self::Record { log, generation: u64::from_be_bytes(*generation), end })
            }
            b's' => {
                let (log, rest) = split_log(rest)?;
                rest.is_empty().then_some(Self::State { log })
            }
            b'm' => Some(Self::Meta { name: String::from_utf8(rest.to_vec()).ok()? }),
            b'f' => rest.is_empty().then_some(Self::Format),
            b'k' => rest.is_empty().then_some(Self::Cipher),
            _ => None,
        }
    }
}

fn put_log(out: &mut Vec<u8>, log: &LogId) {
    match log {
        LogId::Outbox => out.push(1),
        LogId::Inbox(source) => {
            out.push(2);
            out.extend_from_slice(source.as_str().as_bytes());
            out.push(0);
        }
    }
}

fn split_log(bytes: &[u8]) -> Option<(LogId, &[u8])> {
    let (tag, rest) = bytes.split_first()?;
    match tag {
        1 => Some((LogId::Outbox, rest)),
        2 => {
            let end = rest.iter().position(|b| *b == 0)?;
            let name = std::str::from_utf8(&rest[..end]).ok()?;
            Some((LogId::Inbox(SiteName::try_from(name).ok()?), &rest[end + 1..]))
        }
        _ => None,
    }
}

/// Name of the column family of a log's records.
pub(super) fn family(log: &LogId) -> String {
    match log {
        LogId::Outbox => "log.outbox".to_owned(),
        LogId::Inbox(source) => format!("log.inbox.{source}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::ClusterTime;

    fn logs() -> impl Strategy<Value = LogId> {
        let name = "[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?";
        prop_oneof![Just(LogId::Outbox), name.prop_map(|n| LogId::Inbox(SiteName::try_from(n).expect("valid"))),]
    }

    fn keys() -> impl Strategy<Value = Key> {
        prop_oneof![
            (logs(), any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(log, generation, time, ordinal)| {
                Key::Record { log, generation, end: Position::new(ClusterTime(time), ordinal) }
            }),
            logs().prop_map(|log| Key::State { log }),
            "\\PC{0,20}".prop_map(|name| Key::Meta { name }),
            Just(Key::Format),
            Just(Key::Cipher),
        ]
    }

    proptest! {
        #[test]
        fn keys_round_trip(key in keys()) {
            prop_assert_eq!(Key::parse(&key.to_bytes()), Some(key));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(key) = Key::parse(&bytes) {
                prop_assert_eq!(key.to_bytes(), bytes);
            }
        }

        #[test]
        fn byte_order_is_log_order(log in logs(), a in any::<(u64, u64, u32)>(), b in any::<(u64, u64, u32)>()) {
            let key = |(generation, time, ordinal): (u64, u64, u32)| {
                Key::Record { log: log.clone(), generation, end: Position::new(ClusterTime(time), ordinal) }.to_bytes()
            };
            prop_assert_eq!(a.cmp(&b), key(a).cmp(&key(b)));
        }
    }

    #[test]
    fn golden() {
        let hex = |key: Key| key.to_bytes().iter().map(|b| format!("{b:02x}")).collect::<String>();
        let end = Position::new(ClusterTime::new(0x6650_0000, 7), 3);
        assert_eq!(
            hex(Key::Record { log: LogId::Outbox, generation: 1, end }),
            "72010000000000000001665000000000000700000003"
        );
        let log = LogId::Inbox(SiteName::try_from("north").expect("valid"));
        assert_eq!(hex(Key::State { log }), "73026e6f72746800");
        assert_eq!(hex(Key::Meta { name: "a".to_owned() }), "6d61");
        assert_eq!((hex(Key::Format), hex(Key::Cipher)), ("66".to_owned(), "6b".to_owned()));
    }
}
