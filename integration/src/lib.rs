//! Clusters in network namespaces: real processes, real clients and servers.
//!
//! The tests need root, the program (`cargo build --bin phalanx`), and one thread (`-- --test-threads=1`): they measure how long
//! connections stall, and two sites at a time would measure each other. A test that fails shows how the members' logs end;
//! `PHALANX_KEEP=DIR` leaves all of them and the configurations behind, a directory a test.

pub mod wire;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use phalanx::config::ForwarderKind;
use phalanx::lab::world::Host;
use phalanx::lab::{self, Action, Event, Lab, LabOptions, Report};

/// The program whose members the tests run: `PHALANX_PROGRAM`, or what `cargo build --bin phalanx` made.
///
/// # Panics
/// If it is not there, with what to do.
pub fn program() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let program =
        std::env::var_os("PHALANX_PROGRAM").map_or_else(|| target.join("debug/phalanx"), PathBuf::from);
    program.canonicalize().unwrap_or_else(|error| {
        panic!(
            "the members' program {} is not there ({error}): run `cargo build --bin phalanx` first, or name another in \
             PHALANX_PROGRAM",
            program.display()
        )
    })
}

/// The site that most tests begin with: three members, three backends, `connections` long-lived connections and some short ones.
/// Runs for `after` beyond the last event.
pub fn site(connections: u32, events: &[Event]) -> LabOptions {
    /// Enough to suspect (0.8 s), confirm (2 s), and move what is to be moved on a busy machine.
    const AFTER_LAST: Duration = Duration::from_secs(4);
    let last = events.iter().map(|event| event.at).max().unwrap_or_default();
    let keep = std::env::var_os("PHALANX_KEEP").map(|directory| {
        let test = std::thread::current().name().unwrap_or("main").replace("::", "-");
        PathBuf::from(directory).join(test)
    });
    LabOptions {
        connections,
        duration: Some(last + AFTER_LAST),
        events: events.to_vec(),
        program: Some(program()),
        keep,
        ..LabOptions::default()
    }
}

/// A site of one member with an XDP program and one backend, where a server listens. `keep`: where the member's files stay, if not where
/// [`site`] says. `prepare` sees the member's host before the member starts.
///
/// # Panics
/// If the site cannot be built.
pub fn xdp_site(keep: Option<&Path>, prepare: impl Fn(&Host)) -> (Lab, TcpListener) {
    let options = site(0, &[]);
    let mut lab = Lab::new(LabOptions {
        forwarder: ForwarderKind::Xdp,
        forwarder_lines: "max_flows = 65536".to_owned(),
        members: 1,
        backends: 1,
        traffic: false,
        keep: keep.map(Path::to_owned).or(options.keep),
        ..options
    })
    .expect("a lab");
    prepare(&lab.world().members[0]);
    let server = lab.world().backends[0].netns.listen(lab.world().target(), 128).expect("a server");
    lab.start_members().expect("start");
    (lab, server)
}

/// A site with replication switched off: what it breaks shows that the test could fail.
pub fn twin(options: LabOptions) -> LabOptions {
    LabOptions { replication: false, ..options }
}

/// An event `seconds` after the connections are open.
pub fn at(seconds: f64, action: Action) -> Event {
    Event { at: Duration::from_secs_f64(seconds), action }
}

/// Two backends come and one goes within the first second: of the connections open until then about two thirds are no longer where
/// the consistent table would put them, and only state keeps them alive.
pub fn deviating(then: &[Event]) -> Vec<Event> {
    let mut events = vec![
        at(0.3, Action::AddBackend(None)),
        at(0.5, Action::AddBackend(None)),
        at(0.8, Action::DrainBackend(1)),
    ];
    events.extend_from_slice(then);
    events
}

/// Runs the site and prints the report, which the test's output shows when it fails.
///
/// # Panics
/// If the site cannot be built or run.
pub fn run(options: LabOptions) -> Report {
    checked(options, |_| ())
}

/// Runs the site, prints the report, and gives it to `check`. If the one or the other fails, prints how the members' logs end, too.
fn checked(mut options: LabOptions, check: impl FnOnce(&Report)) -> Report {
    let temporary = tempfile::Builder::new().prefix("phalanx-integration-").tempdir().expect("a directory");
    let keep = options.keep.get_or_insert_with(|| temporary.path().to_owned());
    let _logs = LogsOfAFailure(keep.clone());
    let report = lab::run(options).unwrap_or_else(|error| panic!("the lab failed: {error:#}"));
    println!("{report}\n");
    check(&report);
    report
}

/// Prints, dropped in a panic, the end of each log in a directory.
struct LogsOfAFailure(PathBuf);

impl Drop for LogsOfAFailure {
    fn drop(&mut self) {
        const LINES: usize = 60;
        if !std::thread::panicking() {
            return;
        }
        let mut logs: Vec<PathBuf> =
            std::fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        for log in logs {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            println!("--- the end of {}:", log.file_name().unwrap_or_default().display());
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                println!("{line}");
            }
        }
    }
}

/// Runs the site and insists that no connection broke.
///
/// # Panics
/// If one did, if one was not opened or did not end in good order, or if anything else went wrong.
pub fn lossless(options: LabOptions) -> Report {
    let wanted = u64::from(options.connections + options.uploads);
    checked(options, |report| {
        assert_eq!(report.broken, 0, "broken connections: {:?}", report.broken_causes);
        assert_eq!(report.problems, [""; 0], "problems beside connections");
        assert!(!report.interrupted);
        assert!(report.opened >= wanted, "{} connections opened, {wanted} wanted", report.opened);
        assert_eq!((report.opened, report.completed), (report.attempted, report.attempted));
    })
}

/// As [`lossless`], and insists that at least a third of the live connections deviated when the first member came or went:
/// without that a load balancer without any state would break nothing either (design §10).
///
/// # Panics
/// If it is not so.
pub fn lossless_with_a_third_deviating(options: LabOptions) -> Report {
    let report = lossless(options);
    let share = report.deviating_share.expect("a share");
    assert!(share >= 1.0 / 3.0, "only {share} of the live connections deviate: this run proves nothing");
    report
}

/// Runs the site and insists that connections broke, and that nothing else went wrong.
///
/// # Panics
/// If none did, or if something did go wrong.
pub fn lossy(options: LabOptions) -> Report {
    checked(options, |report| {
        assert!(report.broken > 0, "nothing broke: the test that has this twin proves nothing");
        assert_eq!(report.problems, [""; 0], "problems beside connections");
    })
}

/// Insists that [`Action::Upgrade`] came to each member, and that a third of the live connections deviated each time.
///
/// # Panics
/// If it is not so.
pub fn assert_every_member_was_upgraded(report: &Report) {
    for id in 1..=report.members {
        let what = format!("upgrade {id}");
        let window = report.events.iter().find(|event| event.what == what);
        let share = window.unwrap_or_else(|| panic!("no {what}")).deviating_share.expect("a share");
        assert!(share >= 1.0 / 3.0, "only {share} of the live connections deviate at {what}");
    }
}

/// Replaces `from` by `to` in the configuration of member `id` that the lab has left in `directory`.
///
/// # Panics
/// If the file cannot be read or written, or does not have `from`.
pub fn configuration(directory: &Path, id: u32, from: &str, to: &str) {
    let file = directory.join(format!("member{id}.toml"));
    let text = std::fs::read_to_string(&file).expect("the member's configuration");
    assert!(text.contains(from), "{from} is not in\n{text}");
    std::fs::write(&file, text.replacen(from, to, 1)).expect("write");
}

/// Looks after the lab until `done`.
///
/// # Panics
/// If that takes longer than `within`.
pub fn poll_until(lab: &mut Lab, within: Duration, what: &str, mut done: impl FnMut(&Lab) -> bool) {
    let start = Instant::now();
    loop {
        lab.poll().expect("poll");
        if done(lab) {
            return;
        }
        assert!(start.elapsed() < within, "{what}: not within {within:?}; problems: {:?}", lab.problems());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A user and group without any rights (Debian's nobody and nogroup).
pub const NOBODY: u32 = 65_534;

/// A temporary directory that every user may enter and write to.
///
/// # Panics
/// If it cannot be made.
pub fn open_directory() -> tempfile::TempDir {
    let directory = tempfile::Builder::new()
        .prefix("phalanx-integration-")
        .permissions(PermissionsExt::from_mode(0o777))
        .tempdir_in("/tmp")
        .expect("a directory");
    // The mask may have taken something away.
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).expect("chmod");
    directory
}
