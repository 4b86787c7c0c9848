//! What must be seen nowhere: passwords, keys, and with encryption at rest the changes on disk.

use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bson::{Binary, doc, spec::BinarySubtype};
use farshore_testkit::agent::{AgentProcess, binary};
use farshore_testkit::compare::Options;
use farshore_testkit::mongo::User;
use farshore_testkit::pair::{Pair, PairOptions, Side};
use farshore_testkit::pki::Role;
use farshore_testkit::wait;
use farshore_testkit::workload::{Profile, Until, Workload};
use rand::RngCore as _;

use crate::support::{caught_up, client, equal, pair, site, streaming};

const DEADLINE: Duration = Duration::from_secs(60);

/// A new 64-digit key, as text.
fn new_key() -> String {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(())
}

/// The texts that must be found nowhere, and everything that was seen.
#[derive(Default)]
struct Evidence {
    planted: Vec<(String, Vec<u8>)>,
    seen: Vec<(String, Vec<u8>)>,
}

impl Evidence {
    fn plant(&mut self, what: &str, text: impl Into<Vec<u8>>) {
        self.planted.push((what.to_owned(), text.into()));
    }

    /// Every line of the base64 body of a key.
    fn plant_pem(&mut self, what: &str, file: &Path) -> Result<()> {
        let text = std::fs::read_to_string(file)?;
        let lines: Vec<_> = text.lines().filter(|line| line.len() >= 16 && !line.starts_with("---")).collect();
        ensure!(!lines.is_empty(), "{} holds no key", file.display());
        lines.into_iter().for_each(|line| self.plant(what, line));
        Ok(())
    }

    fn saw(&mut self, place: &str, bytes: impl Into<Vec<u8>>) {
        self.seen.push((place.to_owned(), bytes.into()));
    }

    /// What the system and the admin port show of an agent.
    async fn look_at(&mut self, agent: &AgentProcess) -> Result<()> {
        let name = agent.config().site().to_owned();
        for file in ["cmdline", "environ"] {
            self.saw(&format!("{name} {file}"), std::fs::read(format!("/proc/{}/{file}", agent.pid()))?);
        }
        for page in ["/metrics", "/readyz", "/livez", "/startupz", "/"] {
            self.saw(&format!("{name} {page}"), agent.get(page).await?.body);
        }
        Ok(())
    }

    /// Runs the program and keeps what it says; returns the text and the exit code.
    fn run(&mut self, arguments: &[&str]) -> Result<(String, i32)> {
        let run = Command::new(binary()?).args(arguments).stdin(Stdio::null()).output()?;
        let said = [run.stdout, run.stderr].concat();
        self.saw(&format!("farshore {arguments:?}"), said.clone());
        Ok((String::from_utf8_lossy(&said).into_owned(), run.status.code().unwrap_or(-1)))
    }

    fn check(&self) -> Result<()> {
        for (what, secret) in &self.planted {
            for (place, bytes) in &self.seen {
                ensure!(!contains(bytes, secret), "{what} is shown by {place}");
            }
        }
        let bytes: usize = self.seen.iter().map(|(_, bytes)| bytes.len()).sum();
        println!("{} secrets, none in {bytes} bytes of {} places", self.planted.len(), self.seen.len());
        Ok(())
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    let (first, rest) = wanted.split_first().expect("something is wanted");
    let starts = bytes.iter().enumerate().filter(|(_, byte)| *byte == first);
    starts.into_iter().any(|(at, _)| bytes[at + 1..].starts_with(rest))
}

/// Asks an agent all there is to ask, as an operator.
fn ask(evidence: &mut Evidence, pair: &Pair, agent: &AgentProcess) -> Result<()> {
    let operator = pair.pki.identity(Role::Operator, "tester")?;
    evidence.plant_pem("the operator's key", &operator.key_file)?;
    let address = agent.link_address().to_string();
    let path = |path: &Path| path.display().to_string();
    let (cert, key, ca) = (path(&operator.certificate_file), path(&operator.key_file), path(&operator.ca_file));
    let remote = ["--address", &address, "--cert", &cert, "--key", &key, "--ca", &ca];
    let log = if agent.config().site() == "north" { "outbox" } else { "inbox" };
    for verb in
        [&["status"][..], &["status", "-o", "json"], &["lag"], &["outbox", "stats"], &["outbox", "peek", "--log", log]]
    {
        let (said, code) = evidence.run(&[verb, &remote].concat())?;
        ensure!(code == 0, "{verb:?} says {said}");
    }
    let (said, code) = evidence.run(&["config", "check", &path(&agent.config_file())])?;
    ensure!(code == 0, "config check says {said}");
    // The key in place of the certificate, which the error should name and not show.
    let swapped = ["--address", &address, "--cert", &key, "--key", &key, "--ca", &ca];
    let (said, code) = evidence.run(&[&["status"][..], &swapped].concat())?;
    ensure!(code != 0 && said.contains("certificate"), "{said}");
    Ok(())
}

/// Configurations with secrets in the wrong places: refused, and not repeated.
fn bad_configurations(evidence: &mut Evidence, agent: &AgentProcess) -> Result<()> {
    let good = std::fs::read_to_string(agent.config_file())?;
    evidence.plant("a password in the configuration", "planted-in-config");
    let uri = good.replace("mongodb://", "mongodb://farshore:planted-in-config@");
    let inline = good.replace("[mongodb]\n", "[mongodb]\npassword = \"planted-in-config\"\n");
    let broken = good.replace("[mongodb]\n", "[mongodb]\npassword = \"planted-in-config\n");
    let number = good.replace("[mongodb]\n", "[mongodb]\npassword_file = { planted-in-config = 1 }\n");
    let identity = agent.config().identity();
    let (certificate, key) = (identity.certificate_file.display().to_string(), identity.key_file.display().to_string());
    let swapped = good.replace(&certificate, &key);
    for (name, text) in [("uri", uri), ("inline", inline), ("broken", broken), ("number", number), ("swapped", swapped)]
    {
        ensure!(text != good, "{name} is as good as before");
        let file = agent.folder().join(format!("{name}.toml"));
        std::fs::write(&file, text)?;
        let file = file.display().to_string();
        for verb in [&["config", "check"][..], &["config", "check", "-o", "json"], &["agent", "--config"]] {
            let (said, code) = evidence.run(&[verb, &[&file]].concat())?;
            ensure!(code != 0 && !said.is_empty(), "{name}: {verb:?} ends with {code}: {said}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_shown_anywhere() -> Result<()> {
    let mut evidence = Evidence::default();
    let (key, folder) = (new_key(), tempfile::tempdir()?);
    let key_file = folder.path().join("data-key");
    write_secret(&key_file, &key)?;
    let bytes: Vec<u8> =
        (0..32).map(|at| u8::from_str_radix(&key[2 * at..2 * at + 2], 16)).collect::<Result<_, _>>()?;
    evidence.plant("the data key", key.clone());
    evidence.plant("the data key's bytes", bytes);
    let settings = vec![
        ("data", "encryption_key_file", format!("{:?}", key_file.display().to_string())),
        ("log", "level", "\"debug,farshore=trace\"".to_owned()),
    ];
    let mut pair = pair(PairOptions { settings, ..PairOptions::default() }).await?;
    for side in [Side::North, Side::South] {
        let set = &site(&pair, side).mongo;
        evidence.plant("a MongoDB password", set.password(User::Farshore).context("sets have passwords")?);
        evidence.plant_pem("a site's key", &site(&pair, side).agents[0].config().identity().key_file)?;
    }
    let source = client(&mut pair, Side::North)?;
    let workload = Workload::new(5, Profile::without_ddl(), "app");
    workload.run(&source, Until::Operations(200)).await?;
    caught_up(&mut pair).await?;
    for side in [Side::North, Side::South] {
        evidence.look_at(&site(&pair, side).agents[0]).await?;
        ask(&mut evidence, &pair, &site(&pair, side).agents[0])?;
        bad_configurations(&mut evidence, &site(&pair, side).agents[0])?;
    }

    // A wrong password, and certificates that do not fit, in running and in new processes.
    let right = site(&pair, Side::South).mongo.password(User::Farshore).context("a password")?;
    evidence.plant("a wrong password", "planted-wrong-password");
    let agent = &mut pair.site(Side::South).agents[0];
    agent.config_mut().set_password("planted-wrong-password");
    agent.restart()?;
    wait::until("the login to fail", DEADLINE, || async {
        ensure!(agent.log()?.contains("mongodb: failing"), "not in the log");
        anyhow::Ok(())
    })
    .await?;
    evidence.look_at(agent).await?;
    let key_file = agent.config().identity().key_file.clone();
    let good = std::fs::read_to_string(&key_file)?;
    write_secret(&key_file, &good.replacen("PRIVATE KEY-----\n", "PRIVATE KEY-----\nplanted+broken+key", 1))?;
    evidence.plant("a broken key", "planted+broken+key");
    wait::until("the key to be refused", DEADLINE, || async {
        ensure!(agent.log()?.contains("new certificates cannot be used"), "not in the log");
        anyhow::Ok(())
    })
    .await?;
    write_secret(&key_file, &good)?;
    agent.config_mut().set_password(&right);
    agent.write_files()?;
    streaming(&pair).await?;
    for side in [Side::North, Side::South] {
        let agent = &mut pair.site(side).agents[0];
        agent.kill9()?;
        agent.restart()?;
    }
    streaming(&pair).await?;
    workload.run(&source, Until::Operations(50)).await?;
    println!("{}", equal(&mut pair, &Options::default()).await?);
    for side in [Side::North, Side::South] {
        let agent = &mut pair.site(side).agents[0];
        evidence.look_at(agent).await?;
        ensure!(agent.term().await?.success(), "it ends with a failure");
        let log = agent.log()?;
        ensure!(log.contains("agent started") && log.contains("DEBUG"), "the log says too little");
        evidence.saw(&format!("{}'s log", side.name()), log);
    }
    evidence.check()?;
    // The check itself: a secret is found where it is.
    evidence.saw("its own file", std::fs::read(folder.path().join("data-key"))?);
    ensure!(evidence.check().is_err(), "this check cannot fail");
    Ok(())
}

/// In how many files below `folder` the marker is.
fn files_with(folder: &Path, marker: &[u8]) -> Result<usize> {
    let mut found = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        found += match path.is_dir() {
            true => files_with(&path, marker)?,
            // One that was taken away meanwhile holds nothing.
            false => usize::from(std::fs::read(&path).is_ok_and(|bytes| contains(&bytes, marker))),
        };
    }
    Ok(found)
}

/// Everything below `folder`, and itself, is its owner's alone.
fn closed(folder: &Path) -> Result<()> {
    let Ok(mode) = std::fs::metadata(folder).map(|meta| meta.mode()) else { return Ok(()) };
    ensure!(mode & 0o077 == 0, "{} has mode {mode:o}", folder.display());
    if folder.is_dir() {
        std::fs::read_dir(folder)?.try_for_each(|entry| closed(&entry?.path()))?;
    }
    Ok(())
}

/// Writes documents with a marker in incompressible surroundings, so that it is stored as it is unless encrypted.
async fn write_marked(source: &mongodb::Client, marker: &[u8]) -> Result<()> {
    for id in 0..20 {
        let mut bytes = vec![0; 16 * 1024];
        rand::rng().fill_bytes(&mut bytes);
        bytes[8_000..8_000 + marker.len()].copy_from_slice(marker);
        let bytes = Binary { subtype: BinarySubtype::Generic, bytes };
        source.database("app").collection("marked").insert_one(doc! {"n": id, "bytes": bytes}).await?;
    }
    Ok(())
}

/// A pair that has replicated marked documents, and how many files hold the marker at each site.
async fn marked(key_file: Option<&Path>, marker: &[u8]) -> Result<(Pair, [usize; 2])> {
    let setting = |file: &Path| ("data", "encryption_key_file", format!("{:?}", file.display().to_string()));
    let settings = key_file.map(setting).into_iter().collect();
    let mut pair = pair(PairOptions { settings, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    write_marked(&source, marker).await?;
    caught_up(&mut pair).await?;
    let mut found = [0; 2];
    for (side, found) in [Side::North, Side::South].into_iter().zip(&mut found) {
        let data = site(&pair, side).agents[0].data();
        *found = files_with(&data, marker)?;
        closed(&data)?;
    }
    Ok((pair, found))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_changes_cannot_be_read_without_the_key() -> Result<()> {
    let marker = new_key().into_bytes();
    let (plain, found) = marked(None, &marker).await?;
    ensure!(
        found.iter().all(|files| *files > 0),
        "without encryption the marker is in {found:?} files: nothing is proved"
    );
    drop(plain);
    let folder = tempfile::tempdir()?;
    let key_file = folder.path().join("data-key");
    let key = new_key();
    write_secret(&key_file, &key)?;
    let (mut pair, encrypted) = marked(Some(&key_file), &marker).await?;
    println!("files with the marker at north and south: {found:?} without encryption, {encrypted:?} with");
    ensure!(encrypted == [0, 0], "the marker is readable in {encrypted:?} files");

    // The wrong key, then none at all: refused, and nothing is lost when the right one comes back.
    let source = client(&mut pair, Side::North)?;
    for side in [Side::North, Side::South] {
        ensure!(pair.site(side).agents[0].term().await?.success(), "it ends with a failure");
    }
    write_marked(&source, &marker).await?;
    write_secret(&key_file, &new_key())?;
    for side in [Side::North, Side::South] {
        let agent = &mut pair.site(side).agents[0];
        agent.restart()?;
        ensure!(!agent.wait_end(DEADLINE).await?.success(), "it runs with the wrong key");
        ensure!(agent.log()?.contains("the configured key is"), "the wrong key is not named as the reason");
        agent.config_mut().unset("data", "encryption_key_file");
        agent.restart()?;
        ensure!(!agent.wait_end(DEADLINE).await?.success(), "it runs without the key");
        let setting = format!("{:?}", key_file.display().to_string());
        agent.config_mut().set("data", "encryption_key_file", &setting);
    }
    write_secret(&key_file, &key)?;
    for side in [Side::North, Side::South] {
        pair.site(side).agents[0].restart()?;
    }
    streaming(&pair).await?;
    println!("{}", equal(&mut pair, &Options::default()).await?);
    let written = source.database("app").collection::<bson::Document>("marked").count_documents(doc! {}).await?;
    ensure!(written == 40, "{written} documents");
    for side in [Side::North, Side::South] {
        let log = site(&pair, side).agents[0].log()?;
        for line in log.lines().filter(|line| line.contains("\"ERROR\"")) {
            println!("{line}");
        }
        ensure!(files_with(&site(&pair, side).agents[0].data(), &marker)? == 0, "the marker is readable by now");
    }
    Ok(())
}
