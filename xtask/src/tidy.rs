//! `cargo xtask tidy`: the rules of the house that cargo and clippy cannot check.
//!
//! Each check takes text and gives problems, one sentence each, so that a test can show it a twin that breaks the rule.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use toml::Table;

mod claims;
mod links;

/// A problem: where, and what to do.
type Problems = Vec<String>;

/// Directories that hold nothing of ours.
const SKIPPED: &[&str] = &["target", ".git", "corpus", "artifacts"];

/// The crates of the workspace and which others each may name among its dependencies. Arrows point down only (docs/architecture.md).
const ARROWS: &[(&str, &[&str])] = &[
    ("phalanx-flow", &[]),
    ("phalanx-membership", &["phalanx-flow"]),
    ("phalanx-rebalancer", &["phalanx-flow"]),
    ("phalanx-netlink", &[]),
    ("phalanx-admin", &[]),
    ("phalanx-forwarder", &["phalanx-flow"]),
    ("phalanx-forwarder-rawsock", &["phalanx-flow", "phalanx-forwarder", "phalanx-netlink"]),
    ("phalanx-forwarder-xdp", &["phalanx-flow", "phalanx-forwarder", "phalanx-netlink"]),
    ("phalanx-control", &["phalanx-flow", "phalanx-membership", "phalanx-rebalancer", "phalanx-forwarder"]),
    (
        "phalanx-sim",
        &["phalanx-flow", "phalanx-membership", "phalanx-rebalancer", "phalanx-forwarder", "phalanx-control"],
    ),
    (
        "phalanx",
        &[
            "phalanx-flow",
            "phalanx-membership",
            "phalanx-rebalancer",
            "phalanx-control",
            "phalanx-netlink",
            "phalanx-admin",
            "phalanx-forwarder",
            "phalanx-forwarder-rawsock",
            "phalanx-forwarder-xdp",
        ],
    ),
    // Above everything.
    ("phalanx-integration", EVERYTHING),
    ("xtask", EVERYTHING),
];
const EVERYTHING: &[&str] = &["*"];

/// The crates that do no input or output; time and randomness are their arguments.
const CORES: &[&str] = &["phalanx-flow", "phalanx-membership", "phalanx-rebalancer", "phalanx-control"];

/// What cores never name, not even for their tests.
const NOT_IN_CORES: &[&str] = &["tokio", "quinn", "libc", "aya", "rustix", "socket2", "mio", "axum", "hyper"];

/// What only these crates name: the runtime and QUIC live in the program.
const ONLY_IN_PROGRAM: &[&str] = &["tokio", "quinn"];
const PROGRAM: &str = "phalanx";

/// What the `clippy.toml` of a core bans.
const BANNED_IN_CORES: &[&str] =
    &["std::time::Instant::now", "std::time::SystemTime::now", "std::thread::sleep"];

/// A file and its text.
struct Source {
    /// Relative to the workspace.
    path: PathBuf,
    text: String,
}

impl Source {
    fn has_extension(&self, extension: &str) -> bool {
        self.path.extension().is_some_and(|own| own == extension)
    }
}

pub(crate) fn run(root: &Path) -> Result<()> {
    let mut sources = Vec::new();
    read_all(root, Path::new(""), &mut sources)?;
    let manifests = manifests(&sources)?;
    let paths: BTreeSet<PathBuf> = all_paths(root, Path::new(""))?;
    let find = |path: &str| sources.iter().find(|source| source.path == Path::new(path));
    let text_of = |path: &str| {
        find(path).map(|source| source.text.as_str()).with_context(|| format!("{path} is missing"))
    };

    let claims = text_of("docs/claims.md")?;
    let counters = text_of("docs/operating/counters.md")?;
    let checks = [
        ("dependencies point down, and cores stay pure", dependencies(&manifests)),
        ("cores ban clocks, and every crate has the workspace's lints", lints(&manifests, &sources)),
        ("no test is ignored", ignored(&sources)),
        ("links between documents resolve", links::check(&sources, &paths)),
        ("every claim is shown by tests that exist", claims::check(claims, &sources)),
        ("design notes are numbered", numbering(&sources)),
        ("every drop reason and verdict is documented", documented(counters)),
    ];
    let mut count = 0;
    for (rule, problems) in &checks {
        println!("{} {rule}", if problems.is_empty() { "ok  " } else { "FAIL" });
        for problem in problems {
            eprintln!("     {problem}");
        }
        count += problems.len();
    }
    if count > 0 {
        bail!("tidy found {count} problems");
    }
    Ok(())
}

/// Every text file of interest below `directory`.
fn read_all(root: &Path, directory: &Path, sources: &mut Vec<Source>) -> Result<()> {
    for path in all_paths(root, directory)? {
        if path.extension().is_some_and(|extension| ["rs", "md", "toml"].iter().any(|own| extension == *own))
        {
            let text = std::fs::read_to_string(root.join(&path))
                .with_context(|| format!("cannot read {}", path.display()))?;
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

fn all_paths(root: &Path, directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    let full = root.join(directory);
    for entry in std::fs::read_dir(&full).with_context(|| format!("cannot list {}", full.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if SKIPPED.iter().any(|skipped| name == *skipped) {
            continue;
        }
        let path = directory.join(&name);
        if entry.file_type()?.is_dir() {
            paths.extend(all_paths(root, &path)?);
        }
        paths.insert(path);
    }
    Ok(paths)
}

/// Package name to its directory and manifest, for the packages of the workspace.
type Manifests = BTreeMap<String, (PathBuf, Table)>;

fn manifests(sources: &[Source]) -> Result<Manifests> {
    let mut manifests = Manifests::new();
    for source in
        sources.iter().filter(|source| source.path.file_name().is_some_and(|name| name == "Cargo.toml"))
    {
        let table: Table =
            source.text.parse().with_context(|| format!("{} is not TOML", source.path.display()))?;
        let name =
            table.get("package").and_then(|package| package.get("name")).and_then(|name| name.as_str());
        // A workspace of its own (fuzz, the kernel program) has rules of its own.
        if let Some(name) = name
            && !table.contains_key("workspace")
        {
            let directory = source.path.parent().unwrap_or(Path::new("")).to_owned();
            manifests.insert(name.to_owned(), (directory, table));
        }
    }
    Ok(manifests)
}

/// The names in these tables of a manifest, those for single targets included.
fn names<'a>(manifest: &'a Table, kinds: &[&str]) -> BTreeSet<&'a str> {
    let targets = manifest.get("target").and_then(|targets| targets.as_table());
    let tables = std::iter::once(manifest).chain(
        targets.into_iter().flat_map(|targets| targets.values()).filter_map(|target| target.as_table()),
    );
    tables
        .flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)?.as_table()))
        .flat_map(|dependencies| dependencies.keys())
        .map(String::as_str)
        .collect()
}

fn dependencies(manifests: &Manifests) -> Problems {
    let mut problems = Problems::new();
    for (name, (directory, manifest)) in manifests {
        let mut problem =
            |text: String| problems.push(format!("{}: {text}", directory.join("Cargo.toml").display()));
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| known == name) else {
            problem(format!("{name} is new: say in ARROWS of xtask/src/tidy.rs which crates it may name"));
            continue;
        };
        let normal = names(manifest, &["dependencies", "build-dependencies"]);
        let every = names(manifest, &["dependencies", "build-dependencies", "dev-dependencies"]);
        if *allowed == EVERYTHING {
            continue;
        }
        for dependency in &normal {
            if manifests.contains_key(*dependency) && !allowed.contains(dependency) {
                problem(format!(
                    "{name} names {dependency}, but that arrow does not point down (docs/architecture.md)"
                ));
            }
            if ONLY_IN_PROGRAM.contains(dependency) && name != PROGRAM {
                problem(format!("{name} names {dependency}, which lives in {PROGRAM} only"));
            }
            if name == "phalanx-flow" {
                problem(format!("{name} names {dependency}, but it has no dependencies"));
            }
        }
        if CORES.contains(&name.as_str()) {
            for dependency in every.iter().filter(|dependency| NOT_IN_CORES.contains(dependency)) {
                problem(format!(
                    "{name} is a core and names {dependency}: put the input and output into a driver"
                ));
            }
        }
    }
    problems
}

fn lints(manifests: &Manifests, sources: &[Source]) -> Problems {
    let mut problems = Problems::new();
    let find = |path: PathBuf| sources.iter().find(|source| source.path == path);
    for (name, (directory, manifest)) in manifests {
        let library = find(directory.join("src/lib.rs")).map_or("", |source| source.text.as_str());
        let lints = manifest.get("lints");
        let inherits =
            lints.and_then(|lints| lints.get("workspace")).and_then(|workspace| workspace.as_bool())
                == Some(true);
        // `flow` has stricter lints of its own, and a manifest cannot both inherit and add.
        if !inherits && !library.contains("#![forbid(unsafe_code)]") {
            problems.push(format!(
                "{}: write [lints] workspace = true, or lints of its own and #![forbid(unsafe_code)]",
                directory.join("Cargo.toml").display()
            ));
        }
        if !CORES.contains(&name.as_str()) || library.contains("#![no_std]") || library.contains("no_std)]") {
            continue;
        }
        let clippy = directory.join("clippy.toml");
        let text = find(clippy.clone()).map_or("", |source| source.text.as_str());
        let banned: BTreeSet<_> = text
            .parse::<Table>()
            .ok()
            .and_then(|table| table.get("disallowed-methods").and_then(|methods| methods.as_array()).cloned())
            .into_iter()
            .flatten()
            .filter_map(|method| method.get("path").and_then(|path| path.as_str()).map(str::to_owned))
            .collect();
        for method in BANNED_IN_CORES.iter().filter(|method| !banned.contains(**method)) {
            problems.push(format!("{}: ban {method}, since {name} is a core", clippy.display()));
        }
    }
    problems
}

fn ignored(sources: &[Source]) -> Problems {
    let mut problems = Problems::new();
    for source in sources.iter().filter(|source| source.has_extension("rs")) {
        for (number, line) in source.text.lines().enumerate() {
            let line = line.trim_start();
            if line.starts_with("#[ignore") || (line.starts_with("#[cfg_attr(") && line.contains(", ignore"))
            {
                problems.push(format!(
                    "{}:{}: an ignored test proves nothing: run it or delete it",
                    source.path.display(),
                    number + 1
                ));
            }
        }
    }
    problems
}

/// `docs/design/NNNN-title.md` without gaps, each with its number in the heading.
fn numbering(sources: &[Source]) -> Problems {
    let mut problems = Problems::new();
    let notes = sources.iter().filter(|source| source.path.parent() == Some(Path::new("docs/design")));
    for (expected, note) in (1..).zip(notes) {
        let name = note.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let number = name.split_once('-').map(|(number, _)| number).unwrap_or_default();
        if number != format!("{expected:04}") {
            problems.push(format!("{}: its number should be {expected:04}", note.path.display()));
        }
        if !note.text.starts_with(&format!("# {number}: ")) {
            problems.push(format!("{}: begin with \"# {number}: \" and the title", note.path.display()));
        }
    }
    problems
}

/// Every name that `phalanx_drops_total` and `phalanx_packets_total` can have stands in the operator's page.
fn documented(page: &str) -> Problems {
    let drops = phalanx_forwarder::Drop::ALL.iter().map(|drop| drop.name());
    drops
        .chain(phalanx_forwarder::counters::OUTCOME_NAMES)
        .filter(|name| !page.contains(&format!("| `{name}` |")))
        .map(|name| format!("docs/operating/counters.md: a line for `{name}` is missing"))
        .collect()
}

/// `path` without `.` and `..`; `None` if it leaves the workspace.
fn normalize(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                if !normal.pop() {
                    return None;
                }
            }
            other => normal.push(other),
        }
    }
    Some(normal)
}

#[cfg(test)]
mod tests;
