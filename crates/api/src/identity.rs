//! Who holds a certificate.
//!
//! A fleet member is named by one URI in its certificate's subject alternative names,
//! `spiffe://<domain>/<role>/<name>`, and by nothing else: host names and common names are never looked at. A certificate
//! with no such URI, with several, or of another trust domain names nobody.

use std::fmt;
use std::str::FromStr;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What the holder of a certificate is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// An agent of a site.
    Site,
    /// A person or tool that may change things.
    Operator,
    /// A person or tool that may look.
    Viewer,
    /// A router that asks for the state of the groups.
    Router,
}

impl Role {
    /// As it stands in a certificate.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Site => "site",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
            Self::Router => "router",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let all = [Self::Site, Self::Operator, Self::Viewer, Self::Router];
        all.into_iter().find(|role| role.as_str() == text).ok_or(())
    }
}

/// A member of the fleet, as its certificate names it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// Its name among those of its role.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a certificate names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not an X.509 certificate.
    #[error("certificate cannot be parsed: {0}")]
    Unreadable(String),
    /// No SPIFFE URI at all.
    #[error("certificate has no URI SAN spiffe://{domain}/<role>/<name>; issue it with one")]
    None { domain: String },
    /// More than one SPIFFE URI.
    #[error("certificate has {count} spiffe:// URI SANs, exactly one is allowed")]
    Several { count: usize },
    /// A URI of another fleet.
    #[error("certificate is of trust domain '{found}', this fleet is '{expected}'")]
    Domain { found: String, expected: String },
    /// Not `<role>/<name>`.
    #[error("'{uri}' does not name a member; write spiffe://<domain>/{{site,operator,viewer,router}}/<name>")]
    Malformed { uri: String },
}

impl Identity {
    /// A site's identity.
    pub fn site(name: impl Into<String>) -> Self {
        Self { role: Role::Site, name: name.into() }
    }

    /// The identity a DER certificate carries in `domain`.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn from_certificate(der: &[u8], domain: &str) -> Result<Self, IdentityError> {
        let certificate = parse(der)?;
        let unreadable = |e: x509_parser::error::X509Error| IdentityError::Unreadable(e.to_string());
        let names = certificate.subject_alternative_name().map_err(unreadable)?;
        let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let uris: Vec<&str> = names.iter().filter_map(spiffe_uri).collect();
        match uris.as_slice() {
            [] => Err(IdentityError::None { domain: domain.to_owned() }),
            [uri] => Self::from_uri(uri, domain),
            several => Err(IdentityError::Several { count: several.len() }),
        }
    }

    /// The identity `spiffe://<domain>/<role>/<name>` stands for.
    ///
    /// # Errors
    /// Another domain, or not of that form.
    pub fn from_uri(uri: &str, domain: &str) -> Result<Self, IdentityError> {
        let malformed = || IdentityError::Malformed { uri: uri.chars().take(200).collect() };
        let rest = uri.strip_prefix("spiffe://").ok_or_else(malformed)?;
        let (found, path) = rest.split_once('/').ok_or_else(malformed)?;
        if found != domain {
            return Err(IdentityError::Domain {
                found: found.chars().take(100).collect(),
                expected: domain.to_owned(),
            });
        }
        let (role, name) = path.split_once('/').ok_or_else(malformed)?;
        let role = role.parse().map_err(|()| malformed())?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if name.is_empty() || name.len() > 63 || !name.bytes().all(plain) {
            return Err(malformed());
        }
        Ok(Self { role, name: name.to_owned() })
    }
}

fn spiffe_uri<'a>(name: &GeneralName<'a>) -> Option<&'a str> {
    match name {
        GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some(uri),
        _ => None,
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(error) => Err(IdentityError::Unreadable(error.to_string())),
    }
}

/// When a DER certificate expires, seconds since the Unix epoch.
///
/// # Errors
/// It cannot be parsed.
pub fn expiry(der: &[u8]) -> Result<i64, IdentityError> {
    Ok(parse(der)?.validity().not_after.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_a_member_of_its_domain_only() {
        let of = |uri| Identity::from_uri(uri, "farshore");
        assert_eq!(of("spiffe://farshore/site/north"), Ok(Identity::site("north")));
        let viewer = Identity { role: Role::Viewer, name: "jo.x".into() };
        assert_eq!(of("spiffe://farshore/viewer/jo.x"), Ok(viewer));
        let other = of("spiffe://elsewhere/site/north").expect_err("domain").to_string();
        assert!(other.contains("'elsewhere'") && other.contains("'farshore'"), "{other}");
        for bad in [
            "spiffe://farshore",
            "spiffe://farshore/site",
            "spiffe://farshore/king/a",
            "spiffe://farshore/site/",
            "spiffe://farshore/site/a/b",
            "http://farshore/site/a",
            "spiffe://farshore/site/a b",
        ] {
            assert!(matches!(of(bad), Err(IdentityError::Malformed { .. })), "{bad}");
        }
    }

    #[test]
    fn arbitrary_bytes_name_nobody() {
        assert!(matches!(Identity::from_certificate(b"nonsense", "farshore"), Err(IdentityError::Unreadable(_))));
    }
}
