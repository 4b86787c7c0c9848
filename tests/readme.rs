//! The README's quick start, done: its role, its certificates, its configuration, its commands, on two real replica sets
//! and two real agents. Only addresses differ.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bson::{Bson, Document, doc};
use farshore_testkit::mongo::{Options, ReplicaSet, User, farshore_role};
use farshore_testkit::ports::Port;
use farshore_testkit::process::Process;
use farshore_testkit::scratch::Scratch;
use farshore_testkit::wait;

const README: &str = include_str!("../README.md");
const PATIENCE: Duration = Duration::from_secs(60);
const PASSWORD: &str = "of-the-readme";

/// Code blocks of that language, in order.
fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let bodies = README.split(fence.as_str()).skip(1);
    bodies.map(|rest| rest.split_once("```").expect("a block ends").0).collect()
}

/// The one block with that text.
fn block(language: &str, text: &str) -> &'static str {
    let found: Vec<_> = blocks(language).into_iter().filter(|block| block.contains(text)).collect();
    assert_eq!(found.len(), 1, "{language} blocks with {text}");
    found[0]
}

/// The document that a block hands to `runCommand`.
fn command(text: &str) -> Document {
    let block = block("js", text);
    let (_, rest) = block.split_once("runCommand(").expect("a command");
    let json = rest.trim_end().strip_suffix(')').expect("it ends there");
    let json = json.replace("passwordPrompt()", &format!("{PASSWORD:?}"));
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON is JavaScript too");
    match Bson::try_from(value).expect("extended JSON") {
        Bson::Document(document) => document,
        other => panic!("{other} is no command"),
    }
}

#[test]
fn the_role_is_the_one_that_the_tests_run_with() {
    assert_eq!(command("createRole"), farshore_role());
}

/// One site of the quick start.
struct Site {
    name: &'static str,
    mongo: ReplicaSet,
    link: Port,
    admin: Port,
    agent: Option<Process>,
}

impl Site {
    async fn new(name: &'static str) -> Result<Self> {
        // Users are made by what the README says, in place of those of the test kit.
        let mongo = ReplicaSet::start(Options::default()).await?;
        let admin = mongo.client(User::Root)?.database("admin");
        admin.run_command(doc! { "dropUser": "farshore" }).await?;
        admin.run_command(doc! { "dropRole": "farshore" }).await?;
        admin.run_command(command("createRole")).await.context("the README's role")?;
        admin.run_command(command("createUser")).await.context("the README's user")?;
        Ok(Self { name, mongo, link: Port::take()?, admin: Port::take()?, agent: None })
    }

    fn folder(&self, home: &Path) -> PathBuf {
        home.join(self.name)
    }
}

/// What the README says, at these sites.
fn placed(text: &str, sites: &[&Site], own: Option<&Site>) -> String {
    let mut text = text.to_owned();
    for site in sites {
        let uri = format!("mongodb://mongodb.{}.example:27017/?replicaSet=rs0", site.name);
        text = text.replace(&uri, &site.mongo.uri());
        text = text.replace(&format!("agent.{}.example:7443", site.name), &site.link.to_string());
    }
    if let Some(own) = own {
        text = text.replace("0.0.0.0:7443", &own.link.to_string());
        text = text.replace("127.0.0.1:8080", &own.admin.to_string());
    }
    assert!(!text.contains(".example"), "an address is left: {text}");
    text
}

/// Runs a script as a reader would: bash, `farshore` on the path.
fn bash(home: &Path, script: &str) -> Result<Output> {
    let binary = Path::new(env!("CARGO_BIN_EXE_farshore")).parent().context("its folder")?;
    let path = format!("{}:{}", binary.display(), std::env::var("PATH")?);
    let output = Command::new("bash").args(["-e", "-c", script]).current_dir(home).env("PATH", path).output()?;
    let said = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{} of\n{script}\n{said}", output.status);
    Ok(output)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quick_start_replicates() -> Result<()> {
    let scratch = Scratch::new("readme")?;
    let home = scratch.path();
    let (mut north, mut south) = tokio::try_join!(Site::new("north"), Site::new("south"))?;
    bash(home, block("sh", "certificate site north"))?;
    for (site, text) in [(&north, "name = \"north\""), (&south, "name = \"south\"")] {
        let folder = site.folder(home);
        fs::write(folder.join("secrets/mongodb-password"), format!("{PASSWORD}\n"))?;
        fs::set_permissions(
            folder.join("secrets/mongodb-password"),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )?;
        fs::write(folder.join("farshore.toml"), placed(block("toml", text), &[&north, &south], Some(site)))?;
    }
    let run = block("sh", "farshore agent");
    for site in [&mut north, &mut south] {
        let run = run.replace("north/", &format!("{}/", site.name));
        let (check, start) = run.trim().split_once('\n').context("check, then start")?;
        let checked = bash(home, check)?;
        ensure!(String::from_utf8_lossy(&checked.stdout).contains("valid"), "{checked:?}");
        let words: Vec<&str> = start.split(' ').skip(1).collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
        let log = site.folder(home).join("agent.log");
        site.agent = Some(Process::spawn(site.name, command.args(words).current_dir(home), &log)?);
    }
    let operator = placed(block("sh", "farshore status"), &[&north, &south], None);
    wait::until("the stream", PATIENCE, || async {
        let status = bash(home, &operator)?;
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        ensure!(status.contains("streaming"), "{status}");
        anyhow::Ok(())
    })
    .await
    .with_context(|| fs::read_to_string(south.folder(home).join("agent.log")).unwrap_or_default())?;
    north
        .mongo
        .client(User::App)?
        .database("shop")
        .collection("items")
        .insert_one(doc! { "_id": 1, "name": "Banana" })
        .await?;
    let items = south.mongo.client(User::App)?.database("shop").collection::<Document>("items");
    let item = wait::until("the item at south", PATIENCE, || async {
        items.find_one(doc! { "_id": 1 }).await?.context("it is not there yet")
    })
    .await?;
    assert_eq!(item, doc! { "_id": 1, "name": "Banana" });
    Ok(())
}
