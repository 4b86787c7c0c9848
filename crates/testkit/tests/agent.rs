//! An agent as a process, played by a shell script: configuration, signals, restarts, log.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use farshore_testkit::agent::{AgentConfig, AgentProcess};
use farshore_testkit::mongo::{ReplicaSet, User, Warm};
use farshore_testkit::pki::Pki;
use farshore_testkit::scratch::Scratch;
use farshore_testkit::wait;

const SOON: Duration = Duration::from_secs(10);

fn script(scratch: &Scratch, text: &str) -> Result<PathBuf> {
    let path = scratch.path().join("farshore");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

async fn logged(agent: &AgentProcess, text: &str) -> Result<()> {
    wait::until("the log", SOON, || async {
        let log = agent.log()?;
        ensure!(log.contains(text), "{log}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_configuration_holds_everything_but_secrets() -> Result<()> {
    let (mongo, pki, scratch) = (ReplicaSet::warm(Warm::One).await?, Pki::new("farshore")?, Scratch::new("stub")?);
    let mut config = AgentConfig::new("south", "north", &mongo, &pki)?;
    let peer = config.link_address();
    config = config.peer("north", &[peer]);
    config.set("apply", "workers", "8");
    config.append("[log]\nlevel = \"debug\"");
    let agent = AgentProcess::start_binary(script(&scratch, r#"cat "$3"; echo end; exec sleep 600"#)?, config)?;
    logged(&agent, "end\n").await?;
    let log = agent.log()?;
    for line in [
        "[site]\ndomain = \"farshore\"\nname = \"south\"\n".to_owned(),
        "[group]\nname = \"bank\"\nprimary = \"north\"\n".to_owned(),
        format!("uri = \"{}\"\nusername = \"farshore\"\n", mongo.uri()),
        format!("[[peers]]\nsite = \"north\"\naddresses = [\"{peer}\"]\n"),
        "[apply]\nworkers = 8\n".to_owned(),
        "[log]\nlevel = \"debug\"\n".to_owned(),
    ] {
        ensure!(log.contains(&line), "no {line} in {log}");
    }
    let password = mongo.password(User::Farshore).unwrap_or_default();
    ensure!(!password.is_empty() && !log.contains(&password));
    let file = std::fs::read_to_string(agent.folder().join("secrets/mongodb-password"))?;
    ensure!(file == format!("{password}\n"));
    Ok(())
}

#[tokio::test]
async fn is_ended_and_started_again_and_its_errors_are_found() -> Result<()> {
    let (mongo, pki, scratch) = (ReplicaSet::warm(Warm::One).await?, Pki::new("farshore")?, Scratch::new("stub")?);
    let binary = script(&scratch, "trap 'echo staged; exit 7' TERM\necho up\nwhile :; do sleep 0.02; done")?;
    let mut agent = AgentProcess::start_binary(binary, AgentConfig::new("north", "north", &mongo, &pki)?)?;
    logged(&agent, "up\n").await?;
    ensure!(agent.wait_ready(Duration::from_millis(100)).await.is_err(), "a script that serves nothing is ready");
    ensure!(agent.term().await?.code() == Some(7));
    agent.check_log(&[])?;

    script(&scratch, r#"echo '{"level":"ERROR","message":"disk full"}'; exit 3"#)?;
    agent.restart()?;
    let ended = agent.wait_ready(SOON).await.expect_err("the script ends");
    ensure!(ended.to_string().contains("disk full"), "{ended}");
    ensure!(agent.log()?.starts_with("up\nstaged\n"), "the log starts anew");
    ensure!(agent.check_log(&[]).is_err());
    agent.check_log(&["disk full"])
}
