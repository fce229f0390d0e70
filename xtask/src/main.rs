//! Checks, benchmarks and long runs that cargo cannot say.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};

mod ebpf;
mod membership;
mod picture;
mod sim;
mod tidy;

/// `cargo xtask`: what the project needs beside cargo.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check what cargo cannot say: dependency arrows, links, claims, ignored tests, documented reasons, feature combinations.
    Tidy {
        /// Leave out the feature combinations, which compile.
        #[arg(long)]
        no_features: bool,
    },
    /// Check that every combination of features compiles.
    Features,
    /// Measure in virtual time how fast deaths are noticed and how seldom lives are doubted, and compare with the targets.
    Membership {
        /// Also an hour of a hundred members, and the WAN profile: some 40 minutes.
        #[arg(long)]
        long: bool,
    },
    /// Run a whole site in virtual time, from seeds, and look at it with checkers; `cargo xtask sim -- --help` says more.
    Sim {
        /// Passed on to it: --seeds, --from, --members, --trace, ...
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build, check or show the program that the kernel runs.
    Ebpf {
        /// What to do.
        #[command(subcommand)]
        task: ebpf::Task,
    },
    /// Run a benchmark.
    Bench {
        /// Which.
        #[arg(value_enum)]
        which: Bench,
        /// Passed on to it.
        #[arg(trailing_var_arg = true)]
        arguments: Vec<String>,
    },
    /// Draw docs/images/lab.svg from two reports of `phalanx lab --json`; without files, run the lab twice first.
    Picture {
        /// The report of a run with replication.
        #[arg(long, requires = "twin")]
        run: Option<PathBuf>,
        /// The report of the same run with --no-replication.
        #[arg(long, requires = "run")]
        twin: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Bench {
    /// Packets per second of the raw-socket forwarder against one that decides nothing. Needs root.
    Rawsock,
    /// What the kernel's program costs a packet, beside a reflector and a minimal program. Needs root. `-- --json` for machines.
    Xdp,
    /// One change among 1,000 members or backends, beside the full rebuild.
    Ranking,
    /// A million flows to a joiner between real daemons, beside a plain QUIC stream, and packets forwarded meanwhile. Needs root.
    Transfer,
}

fn main() -> ExitCode {
    match run(&Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<()> {
    let root = root()?;
    match task {
        Task::Tidy { no_features } => {
            tidy::run(&root)?;
            if *no_features { Ok(()) } else { features(&root) }
        }
        Task::Features => features(&root),
        Task::Ebpf { task } => ebpf::run(*task, &root),
        Task::Membership { long } => membership::run(&root, *long),
        Task::Sim { arguments } => sim::run(&root, arguments),
        Task::Bench { which, arguments } => bench(&root, *which, arguments),
        Task::Picture { run, twin } => picture::run(&root, run.as_deref().zip(twin.as_deref())),
    }
}

/// The workspace's directory: the parent of this package's.
fn root() -> Result<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(package.parent().context("xtask is not in a workspace")?.to_owned())
}

/// Cargo, in the workspace, with these arguments.
fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args(arguments);
    command
}

/// Says what runs, runs it, and fails if it fails.
fn execute(command: &mut Command) -> Result<()> {
    let words: Vec<_> = std::iter::once(command.get_program())
        .map(|program| Path::new(program).file_name().unwrap_or(program))
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let line = words.join(" ");
    println!("$ {line}");
    let status = command.status().with_context(|| format!("cannot start {line}"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// Every combination of features that the crates have.
fn features(root: &Path) -> Result<()> {
    const COMBINATIONS: &[&[&str]] = &[
        &["-p", "phalanx-flow", "--no-default-features"],
        &["-p", "phalanx-flow", "--no-default-features", "--features", "alloc"],
        &["-p", "phalanx", "--no-default-features"],
        &["-p", "phalanx", "--no-default-features", "--features", "rawsock"],
        &["-p", "phalanx", "--all-features"],
    ];
    for combination in COMBINATIONS {
        execute(cargo(root, &["check", "--quiet"]).args(*combination))?;
    }
    println!("features: {} combinations compile", COMBINATIONS.len());
    Ok(())
}

fn bench(root: &Path, which: Bench, arguments: &[String]) -> Result<()> {
    match which {
        Bench::Ranking => {
            execute(cargo(root, &["bench", "-p", "phalanx-flow", "--bench", "ranking", "--"]).args(arguments))
        }
        Bench::Xdp => {
            let run = ["run", "--release", "-p", "phalanx-forwarder-xdp", "--example", "xdp", "--"];
            execute(cargo(root, &run).args(arguments))
        }
        Bench::Transfer => {
            execute(&mut cargo(
                root,
                &["build", "--release", "-p", "phalanx", "--bin", "phalanx", "--example", "transfer"],
            ))?;
            let target =
                std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
            let release = target.join("release");
            execute(
                Command::new(release.join("examples/transfer")).arg(release.join("phalanx")).args(arguments),
            )
        }
        Bench::Rawsock => {
            let run = ["run", "--release", "-p", "phalanx-forwarder-rawsock", "--example", "rawsock", "--"];
            execute(cargo(root, &run).args(arguments))
        }
    }
}
