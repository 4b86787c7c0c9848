//! The main job: everything that is written at one site is at the other, byte for byte.

use anyhow::Result;
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{PairOptions, Side};
use farshore_testkit::workload::{Profile, Until, Workload};

use crate::support::{client, equal, pair};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_of_write_arrives() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let source = client(&mut pair, Side::North)?;
    let workload = Workload::new(7, Profile::default(), "app");
    let counts = workload.run(&source, Until::Operations(3_000)).await?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    println!("seed 7: {counts}\n{comparison}");
    let missing = counts.missing(Profile::default().kinds());
    assert!(missing.is_empty(), "kinds of writes that never took effect: {missing:?}");
    pair.check_logs(&[])
}
