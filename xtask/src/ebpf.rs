//! `cargo xtask ebpf`: builds, checks and shows the programs that the kernel runs.
//!
//! Its toolchain is one of its own, and stable cargo does without it because the object is committed:
//! a compiler with the target's core library (Debian: `rustc-web`, `libstd-rust-web-dev-bpf`), `bpf-linker` 0.13 (feature `llvm-22`)
//! and `llvm-objcopy` 22.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use phalanx_forwarder_xdp::object::{bench_source_digest, source_digest};

/// The target: little-endian.
const TARGET: &str = "bpfel-unknown-none";
/// Where the crate is, and the objects in it.
const CRATE: &str = "crates/forwarder-xdp";

/// An object: its name, its crate below [`CRATE`], and the digest of its sources.
struct Object {
    name: &'static str,
    workspace: &'static str,
    digest: fn(&Path) -> std::io::Result<String>,
}

/// The program, and those that its benchmark compares it with.
const OBJECTS: [Object; 2] = [
    Object { name: "phalanx-xdp", workspace: "ebpf", digest: source_digest },
    Object { name: "phalanx-xdp-bench", workspace: "bench", digest: bench_source_digest },
];

/// What to do with the program.
#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Task {
    /// Build the objects and put them in their places.
    Build,
    /// Build them, and say whether the committed ones are the same.
    Check,
    /// Show the committed objects' instructions.
    Disasm,
}

/// Does it.
pub(crate) fn run(task: Task, root: &Path) -> Result<()> {
    for object in &OBJECTS {
        run_one(task, root, object)?;
    }
    Ok(())
}

fn run_one(task: Task, root: &Path, object: &Object) -> Result<()> {
    let committed = root.join(CRATE).join(object.name).with_extension("o");
    let sources = committed.with_extension("sources");
    match task {
        Task::Build => {
            fs::write(&committed, build(root, object)?)?;
            fs::write(&sources, (object.digest)(root)?)?;
            println!("{} bytes in {}", fs::metadata(&committed)?.len(), committed.display());
        }
        Task::Check => {
            if fs::read_to_string(&sources)? != (object.digest)(root)? {
                bail!(
                    "the sources of {} have changed since it was built: cargo xtask ebpf build",
                    object.name
                );
            }
            if fs::read(&committed)? != build(root, object)? {
                bail!(
                    "{} is not what its sources build to: another toolchain, or cargo xtask ebpf build",
                    object.name
                );
            }
            println!("{} is what its sources build to", object.name);
        }
        Task::Disasm => {
            let tool = tool("PHALANX_OBJDUMP", "/usr/lib/llvm-22/bin/llvm-objdump", "llvm-objdump");
            let status = Command::new(tool).arg("-d").arg("--no-show-raw-insn").arg(&committed).status()?;
            if !status.success() {
                bail!("llvm-objdump ended with {status}");
            }
        }
    }
    Ok(())
}

/// A tool: what the environment says, else where Debian has it, else wherever it is found.
fn tool(variable: &str, usual: &str, name: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None if Path::new(usual).exists() => usual.into(),
        None => name.into(),
    }
}

fn build(root: &Path, object: &Object) -> Result<Vec<u8>> {
    let directory = root.join("target/ebpf");
    let workspace = root.join(CRATE).join(object.workspace);
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    // No path of this machine goes into the object. The flags of .cargo/config.toml do not count beside these.
    let registry = registry(cargo_home.as_deref().unwrap_or(Path::new("/")))?;
    let flags = [
        "-Ctarget-cpu=v3".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        "-Clinker=bpf-linker".to_owned(),
        format!("--remap-path-prefix={}=.", root.display()),
        format!("--remap-path-prefix={}=registry", registry.display()),
    ];
    let status = Command::new("cargo")
        .args(["build", "--release", "--locked", "--target", TARGET])
        .current_dir(&workspace)
        .env("RUSTC", tool("PHALANX_BPF_RUSTC", "/usr/bin/rustc", "rustc"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS", "fallback")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_TARGET_DIR", &directory)
        .env_remove("CARGO_BUILD_BUILD_DIR")
        .env_remove("RUSTUP_TOOLCHAIN")
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the program was not built ({status}); its toolchain is described in docs/design/0004-xdp.md");
    }
    let built = directory.join(TARGET).join("release").join(object.name);
    let stripped = directory.join(object.name).with_extension("o");
    // DWARF is of no use to the kernel, and line information makes half of what is left.
    let status = Command::new(tool("PHALANX_OBJCOPY", "/usr/lib/llvm-22/bin/llvm-objcopy", "llvm-objcopy"))
        .args(["--strip-debug", "--remove-section=.BTF.ext", "--remove-section=.rel.BTF.ext"])
        .args([&built, &stripped])
        .status()
        .context("cannot run llvm-objcopy")?;
    if !status.success() {
        bail!("llvm-objcopy ended with {status}");
    }
    Ok(fs::read(stripped)?)
}

/// Where cargo unpacks the registry's crates: the directory has a name of its own on every machine.
fn registry(cargo_home: &Path) -> Result<PathBuf> {
    let sources = cargo_home.join("registry/src");
    let mut directories =
        fs::read_dir(&sources).with_context(|| format!("cannot read {}", sources.display()))?;
    let first = directories.next().context("cargo has unpacked no crates yet: run cargo fetch")??;
    Ok(first.path())
}
