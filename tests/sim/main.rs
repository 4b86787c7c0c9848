//! Two sites, four agents, one network that loses, delays and splits, and every process mortal: the real capture, logs,
//! link and apply over simulated databases, disks and wires, deterministic by seed.
//!
//! `FARSHORE_SIM_SEED` picks a single seed and shows all of a failure's trace, `FARSHORE_SIM_SEEDS` says how many run; without them the sizes of
//! `farshore_testkit::sizes` count (100 seeds, the soak's 5,000 in rounds). What is promised is checked
//! at every commit and every step: each change is applied once, to exactly the document the source had; source
//! transactions are whole; positions and floors never go back; what is acknowledged is durable. After the network heals,
//! both sites must become equal, byte for byte, within a simulated deadline.

mod agents;
mod applier;
mod commands;
mod net;
mod run;
mod source;
mod target;
mod workload;
mod world;

use farshore_testkit::sizes;
use run::{Outcome, run};

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} must be a number, not '{text}'")))
}

fn must(seed: u64) -> Outcome {
    match run(seed) {
        Ok(outcome) => outcome,
        Err(failure) => {
            let shown = if number("FARSHORE_SIM_SEED").is_some() { usize::MAX } else { 60 };
            let from = failure.trace.len().saturating_sub(shown);
            for line in &failure.trace[from..] {
                eprintln!("{line}");
            }
            panic!(
                "seed {seed}: {}\nrun it again: FARSHORE_SIM_SEED={seed} cargo test --release --test sim -- --nocapture every_seed",
                failure.reason
            );
        }
    }
}

/// Found by longer runs, each a bug that was mended. They follow other ways when the simulation changes.
const ONCE_FAILED: [u64; 3] = [1_589_546_028, 2_349_601_914, 1_910_291_068];

#[test]
fn seeds_that_once_failed_pass() {
    for seed in ONCE_FAILED {
        must(seed);
    }
}

#[test]
fn every_seed_converges_and_breaks_no_promise() {
    let first = sizes::seed();
    let seeds = match number("FARSHORE_SIM_SEED") {
        Some(one) => one..one + 1,
        None => first..first + number("FARSHORE_SIM_SEEDS").unwrap_or_else(sizes::seeds),
    };
    let (started, limit) = (std::time::Instant::now(), sizes::time_limit());
    let (mut total, mut ran) = (Outcome::default(), 0);
    for seed in seeds {
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            break;
        }
        total.add(&must(seed));
        ran += 1;
    }
    println!("{ran} seeds in {:.1} s: {total}", started.elapsed().as_secs_f64());
    sizes::report(
        "sim",
        &serde_json::json!({"done": ran, "failures": 0, "crashes": total.counts.crashes,
        "partitions": total.counts.partitions, "changes": total.done.changes}),
    );
    if ran >= 100 {
        assert!(total.counts.crashes > 0 && total.counts.takeovers > 0 && total.counts.failovers > 0);
        assert!(total.counts.truncations > 0 && total.counts.too_large > 0 && total.counts.forgotten > 0);
        assert!(total.done.rolled_back > 0 && total.counts.fetches > 0 && total.done.transactions > 0);
    }
    if ran >= 300 {
        assert!(total.counts.begun_again > 0);
    }
}

#[test]
fn one_seed_has_one_trace() {
    for seed in [7, 19, 30, 92, 4242] {
        let (first, second) = (must(seed).trace, must(seed).trace);
        let differs = first.iter().zip(&second).position(|(a, b)| a != b);
        if let Some(at) = differs {
            panic!("seed {seed} differs at line {at}:\n{}\n{}", first[at], second[at]);
        }
        assert_eq!(first.len(), second.len(), "seed {seed}: one trace is longer");
    }
}
