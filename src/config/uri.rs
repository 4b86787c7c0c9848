//! What a MongoDB URI in the configuration may say.
//!
//! Only text is looked at here. No message repeats the URI: the one that is refused may hold a password.

/// A reason to refuse or doubt a URI: what, and the mend.
pub(super) type Finding = (String, String);

/// Facts about the rest of the section that a URI may contradict.
#[derive(Clone, Copy, Default)]
pub(super) struct Beside {
    pub(super) tls_ca_file: bool,
}

/// Everything that is wrong with a URI.
pub(super) fn check(uri: &str, beside: Beside) -> Vec<Finding> {
    let (rest, srv) = match (uri.strip_prefix("mongodb://"), uri.strip_prefix("mongodb+srv://")) {
        (Some(rest), _) => (rest, false),
        (None, Some(rest)) => (rest, true),
        (None, None) => {
            return vec![finding("is not a MongoDB URI", "write mongodb://host:port,host:port/?replicaSet=NAME")];
        }
    };
    // An `@` can stand unescaped in no other part, so anywhere in the text it means credentials.
    if rest.contains('@') {
        return vec![finding(
            "holds a user or password",
            "take it out of the URI; use mongodb.username and put the password into a file named by mongodb.password_file",
        )];
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (hosts, database) = place.split_once('/').unwrap_or((place, ""));
    let mut found = Vec::new();
    if hosts.split(',').any(|host| host.is_empty() || host.starts_with(':')) {
        found.push(finding(
            "names no host, or an empty one",
            "write host:port for each member, with commas between them",
        ));
    }
    if !database.is_empty() {
        found.push(finding(
            "names a database",
            "leave it out: the whole cluster is replicated; a user's database is mongodb.auth_source",
        ));
    }
    let options: Vec<(String, &str)> = query
        .split('&')
        .filter(|option| !option.is_empty())
        .map(|option| option.split_once('=').unwrap_or((option, "")))
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .collect();
    options_of(&options, srv, beside, &mut found);
    found
}

fn options_of(options: &[(String, &str)], srv: bool, beside: Beside, found: &mut Vec<Finding>) {
    let get = |name: &str| options.iter().find(|(key, _)| key == name).map(|(_, value)| *value);
    let is = |name: &str, wanted: &str| get(name).is_some_and(|value| value.eq_ignore_ascii_case(wanted));
    if !srv && get("replicaset").is_none_or(str::is_empty) {
        found.push(finding("names no replica set", "add replicaSet=NAME; only replica sets have change streams"));
    }
    if is("directconnection", "true") {
        found.push(finding(
            "asks for a direct connection",
            "take directConnection out: the agent must follow elections",
        ));
    }
    let off = is("tls", "false") || is("ssl", "false");
    let on = is("tls", "true") || is("ssl", "true");
    if off && on {
        found.push(finding("turns TLS on and off", "leave tls and ssl out; mongodb.tls_ca_file turns TLS on"));
    } else if off && beside.tls_ca_file {
        found.push(finding("turns TLS off while mongodb.tls_ca_file turns it on", "take tls=false out of the URI"));
    } else if on && !beside.tls_ca_file && !srv {
        found.push(finding("turns TLS on without a CA", "name the CA of the servers in mongodb.tls_ca_file"));
    }
    for name in ["tlsinsecure", "tlsallowinvalidcertificates", "tlsallowinvalidhostnames", "sslinsecure"] {
        if get(name).is_some_and(|value| !value.eq_ignore_ascii_case("false")) {
            found.push(finding(
                "turns the check of the server's certificate off",
                "take the option out and name the CA in mongodb.tls_ca_file",
            ));
        }
    }
    for (name, key) in [
        ("tlscafile", "mongodb.tls_ca_file"),
        ("tlscertificatekeyfile", "mongodb.tls_certificate_key_file"),
        ("authsource", "mongodb.auth_source"),
    ] {
        if get(name).is_some() {
            found.push(finding(&format!("sets {name}"), &format!("take it out of the URI and use {key}")));
        }
    }
    for name in ["tlscertificatekeyfilepassword", "authmechanismproperties"] {
        if get(name).is_some() {
            found.push(finding(
                &format!("sets {name}, which can hold a secret"),
                "take it out; secrets come by file path only",
            ));
        }
    }
}

fn finding(what: &str, mend: &str) -> Finding {
    (what.to_owned(), mend.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(uri: &str, tls_ca_file: bool) -> Vec<String> {
        check(uri, Beside { tls_ca_file }).into_iter().map(|(what, _)| what).collect()
    }

    #[test]
    fn good_uris_pass() {
        for uri in [
            "mongodb://127.0.0.1:27017/?replicaSet=rs0",
            "mongodb://a,b:27018,[::1]:27019/?w=majority&replicaset=rs0",
            "mongodb://a?replicaSet=rs0",
            "mongodb+srv://cluster.example",
            "mongodb+srv://cluster.example/?tls=true",
        ] {
            assert_eq!(whats(uri, false), Vec::<String>::new(), "{uri}");
        }
        assert!(whats("mongodb://a/?replicaSet=r&tls=true", true).is_empty());
    }

    #[test]
    fn credentials_are_refused_wherever_they_stand_and_never_repeated() {
        for uri in [
            "mongodb://user:hunter2@a/?replicaSet=r",
            "mongodb://user@a/?replicaSet=r",
            "mongodb+srv://user:hunter2@a",
            "mongodb://user:hun?ter2@a/",
            "mongodb://user:hun/ter2@a/",
        ] {
            let found = check(uri, Beside::default());
            assert_eq!(found[0].0, "holds a user or password", "{uri}");
            assert!(!format!("{found:?}").contains("ter2"), "{found:?}");
        }
    }

    #[test]
    fn each_contradiction_is_named() {
        for (uri, ca, what) in [
            ("http://a", false, "is not a MongoDB URI"),
            ("mongodb:///?replicaSet=r", false, "names no host, or an empty one"),
            ("mongodb://a,/?replicaSet=r", false, "names no host, or an empty one"),
            ("mongodb://a/shop?replicaSet=r", false, "names a database"),
            ("mongodb://a/", false, "names no replica set"),
            ("mongodb://a/?replicaSet=r&directConnection=true", false, "asks for a direct connection"),
            ("mongodb://a/?replicaSet=r&tls=true&ssl=false", false, "turns TLS on and off"),
            ("mongodb://a/?replicaSet=r&tls=false", true, "turns TLS off while mongodb.tls_ca_file turns it on"),
            ("mongodb://a/?replicaSet=r&TLS=true", false, "turns TLS on without a CA"),
            ("mongodb://a/?replicaSet=r&tlsInsecure=true", false, "turns the check of the server's certificate off"),
            ("mongodb://a/?replicaSet=r&authSource=x", false, "sets authsource"),
            (
                "mongodb://a/?replicaSet=r&authMechanismProperties=x:y",
                false,
                "sets authmechanismproperties, which can hold a secret",
            ),
        ] {
            assert_eq!(whats(uri, ca), [what], "{uri}");
        }
    }
}
