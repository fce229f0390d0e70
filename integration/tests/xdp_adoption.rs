//! Members with XDP programs whose daemons die and come back: the kernel goes on, and the new daemon goes on with what is there.
//!
//! Needs root itself, not only a user namespace. In every run at least a third of the connections sit where the consistent table would
//! not put them, and the twin that pins nothing breaks connections.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use phalanx::config::ForwarderKind;
use phalanx::lab::report::EventReport;
use phalanx::lab::{Action, Event, Lab, LabOptions, Report};
use phalanx_integration::{
    assert_every_member_was_upgraded, at, deviating, lossless_with_a_third_deviating, lossy, open_directory,
    poll_until, program, site, twin,
};

const CONNECTIONS: u32 = 300;
/// What a daemon says that goes on with pinned tables.
const ADOPTED: &str = "going on with the pinned tables of an earlier start";

fn xdp(events: &[Event], keep: &Path) -> LabOptions {
    LabOptions {
        forwarder: ForwarderKind::Xdp,
        keep: Some(keep.to_owned()),
        // So that a test allocates no hundreds of megabytes.
        forwarder_lines: "max_flows = 65536".to_owned(),
        ..site(CONNECTIONS, events)
    }
}

/// The twin: the programs end with the process.
fn without_pins(options: LabOptions) -> LabOptions {
    LabOptions { forwarder_lines: format!("{}\npin_dir = \"\"", options.forwarder_lines), ..options }
}

/// One member that everything goes through, the router never gives it up, and its daemon is dead for three seconds.
fn alone_and_dead_for_three_seconds(keep: &Path) -> LabOptions {
    let events = deviating(&[at(2.0, Action::Kill(1)), at(5.0, Action::Join(Some(1)))]);
    LabOptions {
        members: 1,
        router_detect: Duration::from_secs(3600),
        // A connect of this time waits for the daemon, because nobody may own; that is said by the other tests.
        short_rate: 0,
        ..xdp(&events, keep)
    }
}

fn window<'a>(report: &'a Report, what: &str) -> &'a EventReport {
    report.events.iter().find(|event| event.what == what).expect("the event")
}

fn log(keep: &Path, member: u32) -> String {
    std::fs::read_to_string(keep.join(format!("member{member}.log"))).expect("the member's log")
}

#[test]
fn while_no_daemon_runs_the_kernel_forwards_known_flows_and_the_next_daemon_adopts_them() {
    let keep = open_directory();
    let report = lossless_with_a_third_deviating(alone_and_dead_for_three_seconds(keep.path()));
    // Requests are 0.4 s apart: whoever had waited for the daemon had waited for most of three seconds.
    // A stall counts where it ends, and a wait for the daemon would end once it is back.
    for event in ["kill 1", "join 1"] {
        let longest = window(&report, event).stall_p99_ms.expect("connections were live");
        assert!(longest < 1_000.0, "packets did not go on while no daemon ran: {longest} ms, {event}");
    }
    assert!(log(keep.path(), 1).contains(ADOPTED));
}

#[test]
fn without_pins_nothing_is_forwarded_while_no_daemon_runs_and_connections_break() {
    let keep = open_directory();
    let report = lossy(without_pins(alone_and_dead_for_three_seconds(keep.path())));
    // A stall counts where it ends: once the daemon is back.
    let longest = window(&report, "join 1").stall_p99_ms.expect("connections were live");
    assert!(longest > 1_000.0, "only {longest} ms");
    assert!(!log(keep.path(), 1).contains(ADOPTED));
}

fn one_of_three_restarted(keep: &Path) -> LabOptions {
    LabOptions {
        cluster_lines: "bootstrap_wait = \"5s\"".to_owned(),
        ..xdp(&deviating(&[at(2.0, Action::Restart(2))]), keep)
    }
}

#[test]
fn a_restarted_daemon_is_the_same_member_with_its_flows() {
    let keep = open_directory();
    lossless_with_a_third_deviating(one_of_three_restarted(keep.path()));
    let log = log(keep.path(), 2);
    assert!(log.contains(ADOPTED), "{log}");
    // It was a member from its first word on, and never a newcomer that the others send what they have.
    assert!(!log.contains("their flows are forgotten"), "{log}");
}

#[test]
fn a_restarted_daemon_without_pins_and_replication_breaks_connections() {
    let keep = open_directory();
    lossy(without_pins(twin(one_of_three_restarted(keep.path()))));
}

fn upgrade(keep: &Path) -> LabOptions {
    LabOptions {
        cluster_lines: "bootstrap_wait = \"5s\"".to_owned(),
        ..xdp(&deviating(&[at(2.0, Action::Upgrade)]), keep)
    }
}

#[test]
fn a_rolling_upgrade_of_every_member_breaks_nothing_and_each_goes_on_with_its_flows() {
    let keep = open_directory();
    let report = lossless_with_a_third_deviating(upgrade(keep.path()));
    assert_every_member_was_upgraded(&report);
    for id in 1..=report.members {
        assert!(log(keep.path(), id).contains(ADOPTED), "member {id}");
    }
}

#[test]
fn a_rolling_upgrade_without_pins_and_replication_breaks_connections() {
    let keep = open_directory();
    lossy(without_pins(twin(upgrade(keep.path()))));
}

#[test]
fn a_daemon_that_was_dead_for_longer_than_the_others_wait_comes_back_without_breaking_anything() {
    let keep = open_directory();
    let events = deviating(&[at(2.0, Action::Kill(2)), at(7.0, Action::Join(Some(2)))]);
    lossless_with_a_third_deviating(xdp(&events, keep.path()));
    assert!(log(keep.path(), 2).contains(ADOPTED));
}

#[test]
fn an_upgrade_to_another_object_replaces_the_program_under_load_and_breaks_nothing() {
    let keep = open_directory();
    let object = keep.path().join("phalanx-xdp.o");
    std::fs::write(&object, phalanx_forwarder_xdp::object::OBJECT).expect("write");
    let options = LabOptions {
        forwarder_lines: format!("max_flows = 65536\nbpf_object = \"{}\"", object.display()),
        ..one_of_three_restarted(keep.path())
    };
    let upgrade = std::thread::spawn({
        let (object, keep) = (object, keep.path().to_owned());
        move || {
            // All members have loaded the old one when the first of them says that it is active.
            let started = || {
                (1..=3).all(|id| {
                    std::fs::read_to_string(keep.join(format!("member{id}.log")))
                        .is_ok_and(|log| log.contains("state=Active"))
                })
            };
            while !started() {
                std::thread::sleep(Duration::from_millis(20));
            }
            // The same program in another file: what a linker may append, and nobody reads.
            let new = [phalanx_forwarder_xdp::object::OBJECT, b"another build"].concat();
            let draft = object.with_extension("new");
            std::fs::write(&draft, new).and_then(|()| std::fs::rename(&draft, &object)).expect("replace");
        }
    });
    lossless_with_a_third_deviating(options);
    upgrade.join().expect("the object was replaced");
    let log = log(keep.path(), 2);
    assert!(log.contains(ADOPTED) && log.contains("in the place of the one before"), "{log}");
}

/// Runs `phalanx detach` where member 1 runs, for its configuration or its directory of pins.
fn detach(lab: &Lab, option: &str, path: &Path) -> Output {
    let mut command = Command::new(program());
    command.args(["detach", option]).arg(path);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = lab.world().members[0].netns.spawn(&mut command).expect("spawn");
    child.wait_with_output().expect("wait")
}

#[test]
fn detach_is_refused_while_the_daemon_lives_and_leaves_nothing_of_a_dead_one() {
    let keep = open_directory();
    let mut lab = Lab::new(LabOptions {
        members: 1,
        traffic: false,
        router_detect: Duration::from_secs(3600),
        ..xdp(&[], keep.path())
    })
    .expect("a lab");
    lab.start_members().expect("start");
    let pins: PathBuf = keep.path().join("bpf/member1");
    let is_pinned = |name: &str| pins.join(name).exists();
    assert!(is_pinned("link-eth0") && is_pinned("stages"), "{pins:?}");

    let configuration = keep.path().join("member1.toml");
    let refused = detach(&lab, "--config", &configuration);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("its daemon runs") && said.lines().count() == 1, "{said}");
    assert!(is_pinned("link-eth0"));

    lab.carry_out(Action::Kill(1)).expect("kill");
    assert!(is_pinned("link-eth0"), "a dead daemon leaves its programs");
    let done = detach(&lab, "--pin-dir", &pins);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(String::from_utf8_lossy(&done.stdout).contains("detached"));
    assert!(!pins.exists());
    let again = detach(&lab, "--config", &configuration);
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing to detach"), "{again:?}");

    // The interface is free: another program can be attached, which the kernel refuses while one is.
    let netns = &lab.world().members[0].netns;
    let interface = netns.netlink().expect("netlink").link("eth0").expect("eth0").index;
    let mut attached = Err(std::io::Error::other("not tried"));
    poll_until(&mut lab, Duration::from_secs(2), "the interface is free", |lab| {
        let netns = &lab.world().members[0].netns;
        attached = netns.enter(|| phalanx_forwarder_xdp::attach_pass(interface)).expect("enter");
        attached.is_ok()
    });
}
