//! `cargo xtask membership`: the long runs of `crates/membership/examples/trials.rs`, two at a time.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::{cargo, execute};

/// What fits into six minutes of CI: mode, members, profile. The program itself compares with the targets of the LAN profile:
/// suspected by all within 0.8 s and confirmed within 3 s (99th percentile of 100 trials, 1 % loss), no false confirmation in an hour
/// at 5 % loss, nobody confirmed down who stood still for half of the suspicion time.
const SHORT: &[[&str; 3]] =
    &[["kill", "100", "lan"], ["quiet", "10", "lan"], ["kill", "10", "lan"], ["stall", "10", "lan"]];

/// What `--long` adds.
const LONG: &[[&str; 3]] = &[
    ["quiet", "100", "lan"],
    ["kill", "100", "wan"],
    ["quiet", "10", "wan"],
    ["kill", "10", "wan"],
    ["stall", "10", "wan"],
    ["kill", "3", "lan"],
    ["kill", "2", "lan"],
];

/// The machines that run this have two cores.
const AT_A_TIME: usize = 2;

pub(crate) fn run(root: &Path, long: bool) -> Result<()> {
    execute(&mut cargo(root, &["build", "--quiet", "-p", "phalanx-membership", "--example", "trials"]))?;
    let runs = SHORT.iter().chain(if long { LONG } else { &[] });
    let queue = Mutex::new(runs.copied().collect::<VecDeque<_>>());
    let missed = Mutex::new(Vec::new());
    let started = Instant::now();
    let work = || -> Result<()> {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(run) = next else { return Ok(()) };
            let words = ["run", "--quiet", "-p", "phalanx-membership", "--example", "trials", "--"];
            let good = trial(cargo(root, &words).args(run), &run.join(" "))?;
            if !good {
                missed.lock().unwrap_or_else(PoisonError::into_inner).push(run.join(" "));
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => bail!("a worker of the trials panicked"),
        })
    })?;
    let missed = missed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !missed.is_empty() {
        bail!("membership: targets missed or no figures: {}", missed.join(", "));
    }
    println!("membership: all targets met, in {} s", started.elapsed().as_secs());
    Ok(())
}

/// Runs one, prints what it printed in one piece, and says whether it met its targets.
fn trial(command: &mut Command, name: &str) -> Result<bool> {
    let started = Instant::now();
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start the trials ({name})"))?;
    println!(
        "\n{name}, {} s:\n{}",
        started.elapsed().as_secs(),
        String::from_utf8_lossy(&output.stdout).trim()
    );
    Ok(output.status.success())
}
