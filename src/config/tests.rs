//! What a configuration's problems look like, and that none of them hides another.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use farshore_testkit::pki::{Pki, Role};
use proptest::prelude::*;

use super::*;

const MINIMAL: &str = r#"
[site]
name = "north"
[group]
name = "bank"
primary = "north"
[mongodb]
uri = "mongodb://127.0.0.1:27501/?replicaSet=rs0"
username = "farshore"
password_file = "secrets/mongodb-password"
[data]
directory = "data"
[tls]
certificate_file = "tls/north.pem"
key_file = "tls/north.key"
ca_file = "tls/ca.pem"
[link]
listen = "127.0.0.1:7443"
[[peers]]
site = "south"
addresses = ["127.0.0.1:7444"]
"#;

fn parse(text: &str) -> Result<Config, Problems> {
    Config::parse(text, Path::new("/etc/farshore"))
}

fn problems(text: &str) -> String {
    parse(text).expect_err("must be refused").to_string()
}

/// The minimal text with `old` replaced.
fn with(old: &str, new: &str) -> String {
    assert!(MINIMAL.contains(old), "{old}");
    MINIMAL.replace(old, new)
}

#[test]
fn defaults_are_as_documented() {
    let config = parse(MINIMAL).expect("valid");
    assert_eq!(config.warnings, []);
    assert_eq!((config.site.domain.as_str(), config.apply.workers), ("farshore", 4));
    assert_eq!((config.data.outbox_limit, config.data.retention), (ByteSize::gib(10), ByteSize::gib(5)));
    assert_eq!(config.data.retention_time, Duration::from_secs(86_400));
    assert_eq!((config.link.credit, config.link.heartbeat), (ByteSize::mib(16), Duration::from_millis(500)));
    assert_eq!((config.memory.limit, config.lease.ttl), (ByteSize::mib(256), Duration::from_secs(10)));
    assert_eq!((config.log.format, config.log.level.as_str()), (LogFormat::Json, "info"));
    assert_eq!(config.admin.listen, SocketAddr::from(([127, 0, 0, 1], 8080)));
    assert_eq!(config.data.directory, Path::new("/etc/farshore/data"));
    let login = config.mongodb.login.expect("login");
    assert_eq!(login.password_file, Path::new("/etc/farshore/secrets/mongodb-password"));
    assert_eq!(login.auth_source, "admin");
    assert!(config.peers[0].dial);
}

#[test]
fn every_key_can_be_set() {
    let text = format!(
        "{}\ndial = false\n[apply]\nworkers = 64\nstart_at = \"1763669100:1\"\n[admin]\nlisten = \"127.0.0.1:0\"\n[memory]\nlimit = \"1GiB\"\n\
         [log]\nformat = \"text\"\nlevel = \"info,farshore::link=debug\"\n[lease]\nttl = \"3s\"\n",
        with(
            "directory = \"data\"",
            "directory = \"/var/lib/f\"\noutbox_limit = \"64MiB\"\nretention = \"1MiB\"\nretention_time = \"1h\"\nencryption_key_file = \"k\""
        )
        .replace("uri =", "auth_source = \"x\"\ntls_ca_file = \"a\"\ntls_certificate_key_file = \"b\"\nuri =")
    );
    let config = parse(&text).expect("valid");
    assert_eq!(config.apply.start_at, Some(ClusterTime::new(1_763_669_100, 1)));
    assert_eq!(config.data.directory, Path::new("/var/lib/f"));
    assert_eq!((config.peers[0].dial, config.log.format, config.warnings.len()), (false, LogFormat::Text, 0));
}

#[test]
fn all_problems_are_told_at_once() {
    let text = r#"
[site]
nmae = "north"
domain = "Far Shore"
[group]
name = "bank"
primary = "west"
[mongodb]
uri = "mongodb://admin:hunter2@db-1:27017/"
usrname = "farshore"
password_file = "secrets/mongodb-password"
[data]
directory = 7
outbox_limit = "1MiB"
retention_time = "1 day"
[link]
listen = "localhost:7443"
credit = 32
heartbeat = "1ms"
[[peers]]
site = "south"
addresses = ["127.0.0.1"]
[[peers]]
site = "south"
dial = true
[apply]
workers = 65
start_at = "yesterday"
[admn]
listen = "127.0.0.1:8080"
[memory]
limit = "64MiB"
[log]
format = "xml"
level = "loud"
"#;
    let found = problems(text);
    assert!(!found.contains("hunter2"));
    insta::assert_snapshot!(found);
}

#[test]
fn sections_must_agree() {
    let text = with("primary = \"north\"", "primary = \"west\"")
        .replace("site = \"south\"", "site = \"north\"")
        .replace(
            "[link]\nlisten = \"127.0.0.1:7443\"",
            "[admin]\nlisten = \"0.0.0.0:7443\"\n[link]\ncredit = \"200MiB\"\nlisten = \"0.0.0.0:7443\"",
        )
        .replace("[data]", "[data]\nretention = \"9GiB\"");
    insta::assert_snapshot!(problems(&text));
}

#[test]
fn an_empty_file_names_every_section_once() {
    insta::assert_snapshot!(problems(""));
}

#[test]
fn damaged_toml_is_told_with_its_lines() {
    insta::assert_snapshot!(problems("[site\nname = \"north\"\n[group]\nname = bank\n"));
}

#[test]
fn a_section_of_the_wrong_kind_is_told() {
    insta::assert_snapshot!(problems("site = \"north\"\n[peers]\nsite = \"south\"\n"));
}

#[test]
fn doubts_are_warnings() {
    let text = with("username = \"farshore\"\npassword_file = \"secrets/mongodb-password\"\n", "").replace(
        "[[peers]]\nsite = \"south\"\naddresses = [\"127.0.0.1:7444\"]\n",
        "[admin]\nlisten = \"0.0.0.0:8080\"\n",
    );
    let keys: Vec<_> = parse(&text).expect("accepted").warnings.into_iter().map(|p| p.key).collect();
    assert_eq!(keys, ["mongodb.username", "admin.listen", "peers"]);
}

#[test]
fn bounds_are_inclusive() {
    for (key, good, bad) in
        [("[lease]\nttl", ["1s", "5m"], ["999ms", "301s"]), ("[memory]\nlimit", ["256MiB", "1TiB"], ["255MiB", "0B"])]
    {
        for value in good {
            assert!(parse(&format!("{MINIMAL}{key} = \"{value}\"")).is_ok(), "{key} {value}");
        }
        for value in bad {
            let text = problems(&format!("{MINIMAL}{key} = \"{value}\""));
            assert!(text.contains("outside of"), "{text}");
        }
    }
    for workers in ["1", "0x40"] {
        assert!(parse(&format!("{MINIMAL}[apply]\nworkers = {workers}")).is_ok(), "{workers}");
    }
    for workers in ["0", "65", "-1", "4.0", "\"4\""] {
        assert!(problems(&format!("{MINIMAL}[apply]\nworkers = {workers}")).contains("apply.workers"), "{workers}");
    }
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
    fs::write(path, text).expect("write");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn the_named_files_are_looked_at() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    write(&at("f.toml"), &with("[data]", "[data]\nencryption_key_file = \"secrets/key\""), 0o644);
    write(&at("secrets/mongodb-password"), "s3cr3t\n", 0o600);
    write(&at("secrets/key"), &"ab".repeat(32), 0o600);
    let pki = Pki::new("farshore").expect("a fleet");
    let certify = |identity: farshore_testkit::pki::Identity| {
        fs::create_dir_all(at("tls")).expect("mkdir");
        fs::copy(&identity.certificate_file, at("tls/north.pem")).expect("copy");
        fs::copy(&identity.ca_file, at("tls/ca.pem")).expect("copy");
        fs::copy(&identity.key_file, at("tls/north.key")).expect("copy");
        fs::set_permissions(at("tls/north.key"), fs::Permissions::from_mode(0o600)).expect("chmod");
    };
    let found = || Config::load(&at("f.toml")).expect_err("must be refused").to_string();
    certify(pki.identity(Role::Site, "south").expect("issued"));
    assert!(found().contains("tls.certificate_file: is for site/south, this agent is site/north"), "{}", found());
    certify(pki.anonymous().expect("issued"));
    assert!(found().contains("tls.certificate_file: "), "{}", found());
    let other = pki.identity(Role::Site, "north").expect("issued");
    certify(pki.identity(Role::Site, "north").expect("issued"));
    fs::copy(&other.key_file, at("tls/north.key")).expect("copy");
    assert!(found().contains("cannot be used"), "{}", found());
    certify(other);
    let config = Config::load(&at("f.toml")).expect("valid");
    assert_eq!(config.data.encryption_key_file, Some(at("secrets/key")));

    write(&at("secrets/mongodb-password"), "\n", 0o644);
    write(&at("secrets/key"), "zz", 0o600);
    write(&at("tls/north.key"), "-----BEGIN PRIVATE KEY-----", 0o640);
    write(&at("tls/north.pem"), "no pem", 0o644);
    write(&at("data"), "a file", 0o644);
    fs::remove_file(at("tls/ca.pem")).expect("remove");
    insta::assert_snapshot!(found().replace(&dir.path().display().to_string(), "DIR"));
}

#[test]
fn an_unreadable_file_is_one_problem() {
    let found = Config::load(Path::new("/nonexistent/f.toml")).expect_err("refused").to_string();
    assert!(found.contains("cannot read the file") && found.contains("--config"), "{found}");
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "(?s).{0,300}") {
        drop(parse(&text));
    }

    /// Text that is nearly right gets further than noise does.
    #[test]
    fn damaged_configurations_never_panic(at in 0..MINIMAL.len(), insert in "[\\PC\\n]{0,8}", remove in 0usize..20) {
        let mut text: Vec<char> = MINIMAL.chars().collect();
        let end = (at + remove).min(text.len());
        text.splice(at..end, insert.chars());
        drop(parse(&text.into_iter().collect::<String>()).map_err(|problems| problems.to_string()));
    }

    #[test]
    fn arbitrary_values_never_panic(
        key in prop::sample::select(vec!["site", "group", "mongodb", "data", "tls", "link", "peers", "apply", "memory", "log", "lease", "x"]),
        value in prop::sample::select(vec!["1", "-1", "1.5", "nan", "true", "\"\"", "[]", "[[]]", "[{}]", "{}", "{a.b=1}", "1979-05-27", "0xffffffffffffffffff"]),
    ) {
        drop(parse(&format!("{key} = {value}\n")).map_err(|problems| problems.to_string()));
        for name in ["name", "uri", "directory", "listen", "site", "addresses", "workers", "limit", "level", "ttl"] {
            drop(parse(&format!("[{key}]\n{name} = {value}\n")));
            drop(parse(&format!("[[{key}]]\n{name} = {value}\n")));
        }
    }
}
