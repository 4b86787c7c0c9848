//! Style as a test: who may import what, how long a file may be, what must not be left behind, and that documents name
//! only paths that exist.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// A longer file has more than one job.
const LONGEST_FILE: usize = 700;

/// Below `src/` and `crates/api/`, a crate may be imported in these files and folders only.
const BORDERS: &[(&str, &[&str])] = &[
    (
        "mongodb",
        &[
            "src/mongo.rs",
            "src/lease.rs",
            "src/agent.rs",
            "src/agent/",
            "src/source/",
            "src/apply/mongo.rs",
            "src/apply/ddl.rs",
            "src/apply/holders.rs",
            "src/apply/patch.rs",
            "src/apply/store.rs",
        ],
    ),
    ("rocksdb", &["src/outbox/rocks.rs", "src/outbox/rocks/"]),
    ("tonic", &["src/link/", "src/admin/", "src/agent.rs", "src/cli/", "crates/api/"]),
    ("axum", &["src/admin/"]),
    ("clap", &["src/cli/", "src/main.rs"]),
];
/// The vocabulary has no I/O and no clock.
const NOT_IN_MODEL: &[&str] = &["tokio::", "std::fs", "std::net", "std::time::SystemTime", "Instant::now"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below these folders, relative to the root, that end so.
fn files(folders: &[&str], ending: &str) -> Vec<String> {
    let mut found = BTreeSet::new();
    let mut left: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).filter(|f| f.is_dir()).collect();
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                left.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.insert(path.strip_prefix(root()).expect("below the root").display().to_string());
            }
        }
    }
    found.into_iter().collect()
}

fn code() -> Vec<String> {
    files(&["src", "crates", "tests", "benches", "fuzz"], ".rs")
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Whether a line of code (no comment) names a path of that crate.
fn imports(line: &str, name: &str) -> bool {
    let code = line.trim_start();
    let path = format!("{name}::");
    !code.starts_with("//")
        && code.match_indices(&path).any(|(at, _)| {
            let before = code.as_bytes()[..at].last();
            before.is_none_or(|byte| !byte.is_ascii_alphanumeric() && !b"_:".contains(byte))
        })
}

fn nothing(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn crates_are_imported_where_they_belong() {
    let mut problems = Vec::new();
    for file in code().iter().filter(|file| file.starts_with("src/") || file.starts_with("crates/api/")) {
        let text = read(file);
        for (name, allowed) in BORDERS {
            let inside = allowed.iter().any(|place| file == place || place.ends_with('/') && file.starts_with(place));
            let lines = text.lines().enumerate().filter(|(_, line)| !inside && imports(line, name));
            problems.extend(lines.map(|(at, _)| format!("{file}:{}: {name} is not for this file", at + 1)));
        }
        for word in NOT_IN_MODEL.iter().filter(|_| file.starts_with("src/model/")) {
            let lines = text.lines().enumerate().filter(|(_, line)| line.contains(word));
            problems.extend(lines.map(|(at, _)| format!("{file}:{}: {word} is not for the model", at + 1)));
        }
    }
    nothing(problems);
}

#[test]
fn files_are_short() {
    let mut problems = Vec::new();
    for file in code() {
        let lines = read(&file).lines().count();
        if lines > LONGEST_FILE {
            problems.push(format!("{file}: {lines} lines, {LONGEST_FILE} are allowed: split it by responsibility"));
        }
    }
    nothing(problems);
}

#[test]
fn nothing_is_left_behind() {
    // In pieces, for this file is read too.
    let words = ["TO\u{44}O", "FIX\u{4d}E", "X\u{58}X:", "HA\u{43}K", "dbg\u{21}(", "<<<<<\u{3c}<", ">>>>>\u{3e}>"];
    let mut problems = Vec::new();
    let scripts = ["dev", ".ci", "docs", "proto"].iter().flat_map(|folder| files(&[folder], ""));
    let roots = ["README.md", "CHANGELOG.md", "Cargo.toml"].map(str::to_owned);
    for file in code().into_iter().chain(scripts).chain(roots) {
        let Ok(text) = fs::read_to_string(root().join(&file)) else { continue };
        for (at, line) in text.lines().enumerate() {
            let left = words.iter().filter(|word| line.contains(*word));
            problems.extend(left.map(|word| format!("{file}:{}: {word} is left behind", at + 1)));
        }
    }
    nothing(problems);
}

#[test]
fn every_module_says_what_it_is() {
    let silent = |file: &String| !read(file).lines().any(|line| line.starts_with("//!"));
    let problems = code().into_iter().filter(silent).map(|file| format!("{file}: no //! lines")).collect();
    nothing(problems);
}

/// Words of a document that look like a path of this repository.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    const TOPS: &[&str] =
        &["src/", "crates/", "tests/", "benches/", "docs/", "dev/", "proto/", "charts/", "fuzz/", ".ci/"];
    let words = text.split(|c: char| c.is_whitespace() || "`()[]<>|,;\"'*".contains(c));
    words
        .map(|word| word.strip_prefix("./").unwrap_or(word).trim_end_matches(['.', ':', '!', '?']))
        .filter(|word| TOPS.iter().any(|top| word.starts_with(top)) && !word.contains(['{', '$', '=', '\u{2026}']))
}

#[test]
fn documents_name_paths_that_exist() {
    let mut problems = Vec::new();
    // Decisions are dated and not edited afterwards.
    let documents = files(&["docs"], ".md").into_iter().filter(|file| !file.starts_with("docs/adr/"));
    let roots = ["README.md", "CHANGELOG.md"].map(str::to_owned);
    for file in documents.chain(roots) {
        let text = read(&file);
        let generated = |path: &str| path.starts_with("docs/soak/");
        let stale = paths(&text).filter(|path| !generated(path) && !root().join(path).exists());
        problems.extend(stale.map(|path| format!("{file}: {path} does not exist")));
    }
    nothing(problems);
}

#[test]
fn scripts_can_be_run() {
    for script in ["dev/setup", "dev/demo", "dev/test", "dev/soak", "dev/bench", "dev/lint", ".ci/run"] {
        let mode = fs::metadata(root().join(script)).unwrap_or_else(|error| panic!("{script}: {error}")).permissions();
        assert!(mode.mode() & 0o111 != 0, "{script} is not executable");
        let sound = std::process::Command::new("bash").arg("-n").arg(root().join(script)).status();
        assert!(sound.expect("bash runs").success(), "{script} does not parse");
    }
}

#[test]
fn the_checks_see_what_they_look_for() {
    assert!(imports("use mongodb::Client;", "mongodb"));
    assert!(imports("    fn f(c: &mongodb::Client) {}", "mongodb"));
    assert!(!imports("use crate::config::mongodb::Uri;", "mongodb"));
    assert!(!imports("/// See mongodb::Client.", "mongodb"));
    assert!(!imports("use my_mongodb::Client;", "mongodb"));
    let text = "run `./dev/test` (see docs/ARCHITECTURE.md, src/model/): not srcs/x or $HOME/dev/x";
    assert_eq!(paths(text).collect::<Vec<_>>(), ["dev/test", "docs/ARCHITECTURE.md", "src/model/"]);
}
