//! Every section of the file: its keys, their defaults and bounds, and what sections must agree on.
//!
//! A function per section returns `None` when something in it could not be read; whatever else is wrong is noted and the
//! reading goes on, so that one run names all problems.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

use super::reader::{Fault, Field, FileKind, Section};
use super::uri::{self, Beside};
use super::{
    Admin, Apply, ByteSize, Config, Data, Group, Lease, Link, Log, LogFormat, Login, Memory, MongoDb, Peer, Site, Tls,
};
use crate::model::SiteName;

const HOUR: Duration = Duration::from_secs(3600);
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Reads the whole document.
pub(super) fn read(mut root: Section<'_>) -> Option<Config> {
    let site = site(root.section("site", Some("name = \"NAME\"")));
    let group = group(root.section("group", Some("name and primary")));
    let mongodb = mongodb(root.section("mongodb", Some("uri = \"mongodb://HOST:27017/?replicaSet=NAME\"")));
    let data = data(root.section("data", Some("directory = \"PATH\"")));
    let tls = tls(root.section("tls", Some("certificate_file, key_file and ca_file")));
    let link = link(root.section("link", Some("listen = \"ADDRESS:7443\"")));
    let peers = root.sections("peers").into_iter().map(peer).collect::<Vec<_>>();
    let apply = apply(root.section("apply", None));
    let admin = admin(root.section("admin", None));
    let memory = memory(root.section("memory", None));
    let log = log(root.section("log", None));
    let lease = lease(root.section("lease", None));

    fleet(&root, site.as_ref(), group.as_ref(), &peers);
    budgets(&root, link.as_ref(), admin.as_ref(), memory.as_ref());
    root.finish();
    Some(Config {
        site: site?,
        group: group?,
        mongodb: mongodb?,
        data: data?,
        tls: tls?,
        link: link?,
        peers: peers.into_iter().collect::<Option<_>>()?,
        apply: apply?,
        admin: admin?,
        memory: memory?,
        log: log?,
        lease: lease?,
        warnings: Vec::new(),
    })
}

fn site(mut section: Section<'_>) -> Option<Site> {
    let name = section.required("name");
    let domain = section.or("domain", "farshore".to_owned());
    if let Some(domain) = &domain
        && !domain.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b))
    {
        section.error(
            "domain",
            "is not a trust domain",
            "use lower-case letters, digits, dots, hyphens and underscores, as in the certificates",
        );
    }
    section.finish();
    Some(Site { name: name?, domain: domain? })
}

fn group(mut section: Section<'_>) -> Option<Group> {
    let name = section.required::<String>("name");
    let primary = section.required("primary");
    if let Some(name) = &name
        && SiteName::try_from(name.as_str()).is_err()
    {
        section.error("name", "cannot name a group", "use 1 to 63 lower-case letters, digits and inner hyphens");
    }
    section.finish();
    Some(Group { name: name?, primary: primary? })
}

fn mongodb(mut section: Section<'_>) -> Option<MongoDb> {
    let uri = section.required::<String>("uri");
    let tls_ca_file = section.file("tls_ca_file", FileKind::Certificates);
    let tls_certificate_key_file = section.file("tls_certificate_key_file", FileKind::PrivateKey);
    if let Some(uri) = &uri {
        for (what, mend) in uri::check(uri, Beside { tls_ca_file: section.has("tls_ca_file") }) {
            section.error("uri", what, mend);
        }
    }
    if section.has("tls_certificate_key_file") && !section.has("tls_ca_file") {
        section.error("tls_certificate_key_file", "is set without tls_ca_file, which turns TLS on", "add tls_ca_file");
    }
    let login = login(&mut section);
    section.finish();
    Some(MongoDb {
        uri: uri?,
        login: login?,
        tls_ca_file: tls_ca_file?,
        tls_certificate_key_file: tls_certificate_key_file?,
    })
}

fn login(section: &mut Section<'_>) -> Option<Option<Login>> {
    let username = section.optional::<String>("username");
    let password_file = section.file("password_file", FileKind::Password);
    let auth_source = section.or("auth_source", "admin".to_owned());
    let (named, keyed) = (section.has("username"), section.has("password_file"));
    if named && !keyed {
        section.error(
            "password_file",
            "is missing while username is set",
            "write the password into a file (chmod 600) and name it here",
        );
    } else if keyed && !named {
        section.error("username", "is missing while password_file is set", "name the MongoDB user");
    } else if !named && section.present() && !section.has("tls_certificate_key_file") {
        section.warn(
            "username",
            "is not set: the agent will not log in to MongoDB",
            "set username and password_file unless the servers run without authentication",
        );
    }
    let (username, password_file, auth_source) = (username?, password_file?, auth_source?);
    match (username, password_file) {
        (Some(username), Some(password_file)) => Some(Some(Login { username, password_file, auth_source })),
        (None, None) => Some(None),
        _ => None,
    }
}

fn data(mut section: Section<'_>) -> Option<Data> {
    let directory = section.required_directory("directory");
    let outbox_limit = section.within("outbox_limit", ByteSize::gib(10), ByteSize::mib(64)..=ByteSize::gib(1 << 20));
    // What is kept on purpose must leave the log room to grow, else it stops with nothing to remove.
    let retention_default = ByteSize(ByteSize::gib(10).0.min(outbox_limit.map_or(u64::MAX, |limit| limit.0 / 2)));
    let retention = section.or("retention", retention_default);
    if let (Some(limit), Some(kept)) = (outbox_limit, retention)
        && kept.0 > limit.0 / 10 * 8
    {
        let mend = "keep at most 80 % of outbox_limit, or raise outbox_limit: what is retained is never given up, so the log would stop";
        section.error("retention", format!("is {kept} of an outbox_limit of {limit}"), mend);
    }
    let retention_time = section.within("retention_time", 24 * HOUR, Duration::ZERO..=365 * 24 * HOUR);
    let encryption_key_file = section.file("encryption_key_file", FileKind::EncryptionKey);
    section.finish();
    Some(Data {
        directory: directory?,
        outbox_limit: outbox_limit?,
        retention: retention?,
        retention_time: retention_time?,
        encryption_key_file: encryption_key_file?,
    })
}

fn tls(mut section: Section<'_>) -> Option<Tls> {
    let certificate_file: Option<PathBuf> = section.required_file("certificate_file", FileKind::Certificates);
    let key_file = section.required_file("key_file", FileKind::PrivateKey);
    let ca_file = section.required_file("ca_file", FileKind::Certificates);
    section.finish();
    Some(Tls { certificate_file: certificate_file?, key_file: key_file?, ca_file: ca_file? })
}

fn link(mut section: Section<'_>) -> Option<Link> {
    let listen = section.required::<SocketAddr>("listen");
    let credit = section.within("credit", ByteSize::mib(16), ByteSize::mib(1)..=ByteSize::gib(4));
    let heartbeat =
        section.within("heartbeat", Duration::from_millis(500), Duration::from_millis(50)..=Duration::from_secs(10));
    section.finish();
    Some(Link { listen: listen?, credit: credit?, heartbeat: heartbeat? })
}

fn peer(mut section: Section<'_>) -> Option<Peer> {
    let site = section.required("site");
    let addresses = section.or("addresses", Vec::<String>::new());
    let dial = section.optional::<bool>("dial");
    for address in addresses.iter().flatten().filter(|address| !is_host_and_port(address)) {
        section.error(
            "addresses",
            format!("'{}' is not host:port", address.escape_debug()),
            "for example \"south.example:7443\"",
        );
    }
    let empty = addresses.as_ref().is_some_and(Vec::is_empty);
    if empty && dial == Some(Some(true)) {
        section.error(
            "dial",
            "is true without addresses",
            "add the peer's addresses, or leave dial out and let the peer dial",
        );
    }
    section.finish();
    Some(Peer { site: site?, addresses: addresses?, dial: dial?.unwrap_or(!empty) })
}

fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let host =
        host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).map_or(
            !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)),
            |six| six.parse::<std::net::Ipv6Addr>().is_ok(),
        );
    host && port.parse::<u16>().is_ok_and(|port| port != 0)
}

fn apply(mut section: Section<'_>) -> Option<Apply> {
    let workers = section.within("workers", 4u64, 1..=64);
    let start_at = section.optional("start_at");
    section.finish();
    Some(Apply { workers: usize::try_from(workers?).expect("at most 64"), start_at: start_at? })
}

fn admin(mut section: Section<'_>) -> Option<Admin> {
    let listen = section.or("listen", SocketAddr::from(([127, 0, 0, 1], 8080)));
    if let Some(listen) = listen
        && !listen.ip().is_loopback()
    {
        section.warn(
            "listen",
            "opens health and metrics to the network without authentication",
            "bind to 127.0.0.1, or let only probes and Prometheus through",
        );
    }
    section.finish();
    Some(Admin { listen: listen? })
}

fn memory(mut section: Section<'_>) -> Option<Memory> {
    let limit = section.within("limit", ByteSize::mib(256), ByteSize::mib(256)..=ByteSize::gib(1 << 10));
    section.finish();
    Some(Memory { limit: limit? })
}

impl Field for LogFormat {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        match value.as_str() {
            Some("json") => Ok(Self::Json),
            Some("text") => Ok(Self::Text),
            _ => Err(Fault::invalid("write \"json\" or \"text\"")),
        }
    }
}

fn log(mut section: Section<'_>) -> Option<Log> {
    let format = section.or("format", LogFormat::Json);
    let level = section.or("level", "info".to_owned());
    if let Some(level) = &level
        && !level.split(',').all(is_directive)
    {
        section.error(
            "level",
            "is not a level",
            "write error, warn, info, debug or trace, or for parts: \"info,farshore::link=debug\"",
        );
    }
    section.finish();
    Some(Log { format: format?, level: level? })
}

fn is_directive(text: &str) -> bool {
    let (target, level) = text.rsplit_once('=').unwrap_or(("", text));
    LEVELS.contains(&level.trim()) && target.trim().bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b))
}

fn lease(mut section: Section<'_>) -> Option<Lease> {
    let ttl = section.within("ttl", Duration::from_secs(10), Duration::from_secs(1)..=Duration::from_secs(300));
    section.finish();
    Some(Lease { ttl: ttl? })
}

/// What the names of sites must agree on.
fn fleet(root: &Section<'_>, site: Option<&Site>, group: Option<&Group>, peers: &[Option<Peer>]) {
    let named: Vec<&SiteName> = peers.iter().flatten().map(|peer| &peer.site).collect();
    for (index, peer) in peers.iter().enumerate() {
        let Some(peer) = peer else { continue };
        let key = format!("peers[{index}].site");
        if site.is_some_and(|site| site.name == peer.site) {
            root.error(&key, format!("is '{}', this site itself", peer.site), "list the other sites only");
        }
        if peers.iter().take(index).flatten().any(|earlier| earlier.site == peer.site) {
            root.error(
                &key,
                format!("'{}' is listed twice", peer.site),
                "one [[peers]] per site; addresses takes several",
            );
        }
    }
    if peers.is_empty() && !root.has("peers") {
        root.warn(
            "peers",
            "there is none: changes are captured and go nowhere",
            "add [[peers]] with site and addresses",
        );
    }
    // With an unreadable peer nobody can say whether the primary is one.
    if let (Some(site), Some(group), true) = (site, group, peers.iter().all(Option::is_some))
        && group.primary != site.name
        && !named.contains(&&group.primary)
    {
        let what = format!("is '{}', which is neither this site nor a peer", group.primary);
        root.error("group.primary", what, "name this site or one of [[peers]]");
    }
}

/// What ports and memory must agree on.
fn budgets(root: &Section<'_>, link: Option<&Link>, admin: Option<&Admin>, memory: Option<&Memory>) {
    if let (Some(link), Some(admin)) = (link, admin)
        && link.listen == admin.listen
        && link.listen.port() != 0
    {
        root.error("admin.listen", format!("is {}, the same as link.listen", admin.listen), "choose another port");
    }
    if let (Some(link), Some(memory)) = (link, memory)
        && link.credit.0 > memory.limit.0 / 2
    {
        let what = format!("is {}, more than half of memory.limit ({})", link.credit, memory.limit);
        root.error("link.credit", what, "lower link.credit or raise memory.limit: bytes in flight are held in memory");
    }
}
