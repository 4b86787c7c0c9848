//! Names and numbers that identify sites, streams, histories and agents.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A site's name: lower-case letters, digits and inner hyphens, at most 63 bytes (a DNS label, so that it can stand in
/// certificates, metrics and host names alike). Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SiteName(Arc<str>);

/// A text that cannot name a site.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' cannot name a site; use 1 to 63 lower-case letters, digits and inner hyphens")]
pub struct InvalidSiteName(String);

impl SiteName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SiteName {
    type Error = InvalidSiteName;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let hyphen = |end: Option<&u8>| end == Some(&b'-');
        let bytes = text.as_bytes();
        let valid = (1..=63).contains(&bytes.len())
            && bytes.iter().all(inner)
            && !hyphen(bytes.first())
            && !hyphen(bytes.last());
        if valid { Ok(Self(text.into())) } else { Err(InvalidSiteName(text)) }
    }
}

impl TryFrom<&str> for SiteName {
    type Error = InvalidSiteName;

    fn try_from(text: &str) -> Result<Self, Self::Error> {
        Self::try_from(text.to_owned())
    }
}

impl From<SiteName> for String {
    fn from(name: SiteName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for SiteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SiteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Changes of one site on their way to another, within one group.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    /// Site whose changes these are.
    pub source: SiteName,
    /// Site they are applied at.
    pub target: SiteName,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.source, self.target)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// From exactly 16 bytes.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// A fresh random one.
            pub fn random() -> Self {
                Self(*uuid::Uuid::new_v4().as_bytes())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id16! {
    /// Identity of one source history; new only when that history was rewound. Positions of different incarnations are
    /// never compared.
    Incarnation
}
id16! {
    /// Identity of one agent installation (its data directory), stable over restarts.
    AgentId
}
id16! {
    /// A collection's UUID, at the source unless said otherwise.
    CollectionUuid
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

counter! {
    /// Counts who may originate writes; the fencing token between sites.
    Epoch
}
counter! {
    /// Counts agent processes that held a site's lease; the fencing token within a site.
    Term
}

/// One of the 64 virtual lanes of a stream.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(u8);

impl LaneId {
    /// How many lanes every stream has; stored positions depend on it, so it never changes.
    pub const COUNT: usize = 64;

    /// The lane of a canonical hash.
    pub fn of(hash: u64) -> Self {
        Self((hash % Self::COUNT as u64) as u8)
    }

    /// All lanes in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u8).map(Self)
    }

    /// 0..64.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}", self.0)
    }
}

impl fmt::Debug for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn site_names_are_dns_labels() {
        for good in ["a", "north", "dc-2", "0"] {
            assert_eq!(SiteName::try_from(good).expect("valid").as_str(), good);
        }
        for bad in ["", "North", "-a", "a-", "a/b", "ä", &"x".repeat(64)] {
            assert!(SiteName::try_from(bad).is_err(), "{bad}");
        }
    }
}
