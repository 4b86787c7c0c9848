//! Generates the protocol from `proto/` without `protoc`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let files = ["farshore/replication/v1/replication.proto", "farshore/control/v1/control.proto"];
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(files, [&root])?;
    tonic_prost_build::configure().bytes(".").btree_map(".").build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
