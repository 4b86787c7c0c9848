//! The demo in its shortest form, end to end: both agents are killed and brought back, and the sites are equal.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};

fn demo(arguments: &[&str], temp: &Path) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farshore-demo"));
    command.args(arguments).env("TMPDIR", temp).env_remove("FARSHORE_KEEP").output().context("run the demo")
}

#[test]
fn the_shortest_demo_ends_equal_and_leaves_nothing() -> Result<()> {
    let temp = tempfile::tempdir()?;
    let output = demo(&["--seconds", "8"], temp.path())?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    for text in
        ["the agent of south. ", "the agent of north. ", "equal: nothing lost", "0 of them", "Nothing is left running"]
    {
        ensure!(said.contains(text), "no {text:?} in\n{said}");
    }
    ensure!(said.matches("Caught up").count() == 2, "both agents come back:\n{said}");
    ensure!(!said.contains('\u{1b}'), "colour without a terminal:\n{said}");
    println!("{said}");
    Ok(())
}

#[test]
fn a_wrong_argument_is_a_usage_error() -> Result<()> {
    let temp = tempfile::tempdir()?;
    let output = demo(&["--seconds", "0"], temp.path())?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    Ok(())
}
