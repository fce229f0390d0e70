//! The committed object, and how it gets into the kernel.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, ProgramArray};
use aya::programs::{ProgramError, ProgramType, Xdp};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use phalanx_flow::siphash::siphash;
use phalanx_forwarder::engine::TableLimits;

use crate::abi::{APPLY, ENTRY, SLOTS, STAGES};
use crate::maps::KEPT;
use crate::sets::SET_FLOWS;
use crate::{Config, StartError, pins};

/// The object: a plain blob, little-endian, made by `cargo xtask ebpf build`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!("../phalanx-xdp.o");

/// Digest of the sources that [`OBJECT`] was built from, in hexadecimal.
pub const OBJECT_SOURCES: &str = include_str!("../phalanx-xdp.sources");

/// Digest of the program's sources below the repository's root, in hexadecimal: what [`OBJECT_SOURCES`] was when it was built.
pub fn source_digest(root: &Path) -> io::Result<String> {
    let ours = root.join("crates/forwarder-xdp");
    let mut files = vec![
        ours.join("src/abi.rs"),
        ours.join("src/sets.rs"),
        ours.join("ebpf/Cargo.toml"),
        ours.join("ebpf/Cargo.lock"),
        ours.join("ebpf/.cargo/config.toml"),
    ];
    add_sources(&ours.join("ebpf/src"), &mut files)?;
    add_sources(&root.join("crates/flow/src"), &mut files)?;
    digest(root, files)
}

/// The same of the programs that the benchmark compares with.
pub fn bench_source_digest(root: &Path) -> io::Result<String> {
    let bench = root.join("crates/forwarder-xdp/bench");
    let mut files = ["abi.rs", "Cargo.toml", "Cargo.lock"].map(|name| bench.join(name)).to_vec();
    add_sources(&bench.join("src"), &mut files)?;
    digest(root, files)
}

fn digest(root: &Path, mut files: Vec<PathBuf>) -> io::Result<String> {
    files.sort();
    let mut text = Vec::new();
    for file in files {
        text.extend_from_slice(file.strip_prefix(root).unwrap_or(&file).to_string_lossy().as_bytes());
        text.push(0);
        text.extend(std::fs::read(&file)?);
        text.push(0);
    }
    // Against forgetting, not against malice.
    Ok(format!("{:016x}{:016x}", siphash([1, 2], &text), siphash([3, 4], &text)))
}

fn add_sources(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let test = path.file_stem().is_some_and(|stem| stem == "tests" || stem == "samples");
        if path.is_dir() {
            add_sources(&path, files)?;
        } else if !test && path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Programs and maps in the kernel, not attached yet.
pub(crate) struct Loaded {
    pub(crate) ebpf: Ebpf,
    /// It forgets its programs with its last descriptor or pin.
    pub(crate) stages: ProgramArray<MapData>,
    /// The maps were pinned by an earlier process.
    pub(crate) adopted: bool,
    /// On the directory of pins.
    pub(crate) lock: Option<pins::Lock>,
}

/// What the program needs of the kernel, with the first version that has it. Everything else it uses is older.
const NEEDED: [(&str, BpfHelper, &str); 3] = [
    ("BPF ring buffers", BpfHelper::BPF_FUNC_ringbuf_reserve, "5.8"),
    ("the helper bpf_ktime_get_coarse_ns", BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "5.11"),
    ("the helper bpf_xdp_load_bytes", BpfHelper::BPF_FUNC_xdp_load_bytes, "5.18"),
];

/// Says what a kernel lacks that supports these helpers.
fn check_kernel(supports: impl Fn(BpfHelper) -> Result<bool, ProgramError>) -> Result<(), StartError> {
    for (feature, helper, since) in NEEDED {
        match supports(helper) {
            Ok(true) => {}
            Ok(false) => return Err(StartError::Kernel { feature, since }),
            Err(error) => {
                let message = chain(&error);
                return Err(if is_permission(&message) {
                    StartError::Permission(message)
                } else {
                    StartError::system("ask the kernel what it can do", io::Error::other(message))
                });
            }
        }
    }
    Ok(())
}

fn is_permission(message: &str) -> bool {
    message.contains("Operation not permitted") || message.contains("Permission denied")
}

/// The maps whose size depends on the configuration, each with its `max_entries`.
pub fn map_sizes(limits: &TableLimits, slot_blocks: u32) -> [(&'static str, u32); 5] {
    let limit = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).max(1);
    [
        ("FLOWS4", limit(limits.flows)),
        ("FLOWS6", limit(limits.flows)),
        ("HALF_OPEN", limit(limits.half_open.div_ceil(SET_FLOWS))),
        ("CACHE", limit(limits.cached)),
        ("SLOT_TABLE", slot_blocks * SLOTS),
    ]
}

/// Loads the object with tables of the sizes that the configuration names, or by those that are pinned.
pub(crate) fn load(
    config: &Config,
    slot_blocks: u32,
    lock: Option<pins::Lock>,
) -> Result<Loaded, StartError> {
    check_kernel(|helper| is_helper_supported(ProgramType::Xdp, helper))?;
    let (bytes, path): (Cow<'_, [u8]>, String) = match &config.object {
        None => (Cow::Borrowed(OBJECT), "that is compiled in".to_owned()),
        Some(path) => {
            let bytes = std::fs::read(path).map_err(|error| StartError::Object {
                path: path.display().to_string(),
                message: error.to_string(),
            })?;
            (Cow::Owned(bytes), path.display().to_string())
        }
    };
    let sizes = map_sizes(&config.limits, slot_blocks);
    let directory = config.pins.as_deref().map(pins::tables);
    let adopted = match &directory {
        Some(directory) => pins::prepare(directory, &sizes)?,
        None => false,
    };
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(VerifierLogLevel::STATS);
    for (name, size) in sizes {
        loader.map_max_entries(name, size);
    }
    if let Some(directory) = &directory {
        for name in KEPT {
            loader.map_pin_path(name, directory.join(name));
        }
    }
    if let Some(pins) = &config.pins {
        let path = pins::new_stages(pins);
        let _ = std::fs::remove_file(&path);
        loader.map_pin_path("STAGES", path);
    }
    let mut ebpf = loader.load(&bytes).map_err(|error| {
        let message = chain(&error);
        if is_permission(&message) {
            StartError::Permission(message)
        } else {
            StartError::Object { path: path.clone(), message }
        }
    })?;
    let mut stages = match ebpf.take_map("STAGES").map(ProgramArray::try_from) {
        Some(Ok(stages)) => stages,
        _ => return Err(StartError::Object { path, message: "it has no table of stages".to_owned() }),
    };
    for (index, name) in (0_u32..).zip(STAGES) {
        let program = program(&mut ebpf, name, &path)?;
        load_program(program, name)?;
        let fd = program.fd().map_err(|error| refused(name, &error))?;
        stages
            .set(index, fd, 0)
            .map_err(|error| StartError::Object { path: path.clone(), message: chain(&error) })?;
    }
    for name in [ENTRY, APPLY] {
        load_program(program(&mut ebpf, name, &path)?, name)?;
    }
    Ok(Loaded { ebpf, stages, adopted, lock })
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &'static str, path: &str) -> Result<&'e mut Xdp, StartError> {
    match ebpf.program_mut(name).map(TryInto::try_into) {
        Some(Ok(program)) => Ok(program),
        _ => Err(StartError::Object {
            path: path.to_owned(),
            message: format!("it has no XDP program {name}"),
        }),
    }
}

fn load_program(program: &mut Xdp, name: &'static str) -> Result<(), StartError> {
    program.load().map_err(|error| refused(name, &error))
}

fn refused(program: &'static str, error: &ProgramError) -> StartError {
    let message = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            if io_error.raw_os_error() == Some(libc::EPERM) {
                return StartError::Permission(io_error.to_string());
            }
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().collect();
            format!("{io_error}; {}", lines[lines.len().saturating_sub(6)..].join("; "))
        }
        other => chain(other),
    };
    StartError::Refused { program, message }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_too_old_is_told_by_the_feature_it_lacks_and_who_has_it() {
        let lacks = |missing: BpfHelper| {
            check_kernel(|helper| Ok(helper as u32 != missing as u32)).map_err(|error| error.to_string())
        };
        for (feature, helper, since) in NEEDED {
            let sentence = lacks(helper).unwrap_err();
            assert!(sentence.contains(feature) && sentence.contains(since), "{sentence}");
        }
        assert_eq!(lacks(BpfHelper::BPF_FUNC_trace_printk), Ok(()), "which we do not need");
    }
}
