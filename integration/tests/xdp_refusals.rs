//! What an XDP member says where it cannot start: one sentence that names what is in the way, and exit status 2. Needs root.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use phalanx::lab::netns::Netns;
use phalanx_integration::{open_directory, program};
use phalanx_netlink::Veth;

/// Numbers of capabilities (`include/uapi/linux/capability.h`).
const CAP_SYS_ADMIN: i32 = 21;
const CAP_BPF: i32 = 39;
/// What timeout(1) says of a daemon that ran until it was stopped. It had started, then.
const RAN: Option<i32> = Some(124);

fn configuration(interfaces: &str, more: &str) -> String {
    format!(
        "[member]\nid = 1\naddress = \"127.0.0.1\"\n\n[cluster]\nname = \"refusals\"\nkey_file = \"cluster.key\"\n\
         hash_seed = \"00112233445566778899aabbccddeeff\"\nbootstrap_wait = \"100ms\"\n\n[forwarder]\nkind = \"xdp\"\n\
         interfaces = {interfaces}\nmax_flows = 1024\n{more}\n\n[[service]]\nname = \"web\"\naddress = \"192.0.2.1\"\n\
         port = 80\nmethod = \"ipip\"\n\n[[service.backend]]\naddress = \"127.0.0.3\"\n"
    )
}

/// A host with a pair of veths, eth0 and its peer, both of this MTU.
fn host(mtu: u32) -> Netns {
    let netns = Netns::new("host").expect("a namespace");
    let mut netlink = netns.netlink().expect("netlink");
    let veth =
        Veth { name: "eth0", peer: "peer0", peer_netns: None, mtu: Some(mtu), mac: None, peer_mac: None };
    netlink.create_veth(&veth).expect("a veth");
    for name in ["eth0", "peer0"] {
        let index = netlink.link(name).expect("link").index;
        netlink.set_up(index).expect("up");
    }
    netns
}

fn index(netns: &Netns, name: &str) -> u32 {
    netns.netlink().expect("netlink").link(name).expect("link").index
}

/// Starts the daemon in the namespace, without some of root's capabilities.
fn start(netns: &Netns, text: &str, without: &'static [i32]) -> Output {
    start_with(netns, text, without, &[])
}

fn start_with(netns: &Netns, text: &str, without: &'static [i32], arguments: &[&str]) -> Output {
    let directory = open_directory();
    let file = directory.path().join("phalanx.toml");
    std::fs::write(&file, text).expect("write");
    phalanx::keys::generate(&directory.path().join("cluster.key")).expect("a key");
    let mut command = Command::new("timeout");
    // Loading the programs takes a second, or some on a busy machine.
    command.arg("10s").arg(program()).args(["run", "--config"]).arg(&file).args(arguments);
    command.env("NO_COLOR", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: system calls only.
    unsafe {
        command.pre_exec(move || {
            for capability in without {
                if libc::prctl(libc::PR_CAPBSET_DROP, *capability, 0, 0, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    netns.spawn(&mut command).expect("spawn").wait_with_output().expect("wait")
}

/// The one sentence of a daemon that refused to start.
fn refusal(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{said}");
    assert_eq!(output.status.code(), Some(2), "{said}");
    let errors: Vec<&str> =
        said.lines().filter(|line| line.contains("ERROR") || line.contains("forwarder.kind")).collect();
    assert_eq!(errors.len(), 1, "one sentence: {said}");
    errors[0].to_owned()
}

fn says(sentence: &str, words: &[&str]) {
    for word in words {
        assert!(sentence.contains(word), "{sentence:?} does not say {word:?}");
    }
}

#[test]
fn without_cap_bpf_it_names_the_capabilities() {
    let text = configuration("[\"eth0\"]", "pin_dir = \"\"");
    let sentence = refusal(&start(&host(1500), &text, &[CAP_SYS_ADMIN, CAP_BPF]));
    says(&sentence, &["forwarder.kind", "no permission for XDP", "CAP_BPF", "rawsock"]);
    // The twin: as root the same file runs.
    assert_eq!(start(&host(1500), &text, &[]).status.code(), RAN);
}

#[test]
fn another_program_is_named_and_never_replaced() {
    let netns = host(1500);
    let eth0 = index(&netns, "eth0");
    let other: OwnedFd =
        netns.enter(|| phalanx_forwarder_xdp::attach_pass(eth0)).expect("enter").expect("attach");
    let text = configuration("[\"eth0\"]", "pin_dir = \"\"");
    let sentence = refusal(&start(&netns, &text, &[]));
    says(&sentence, &["interfaces", "eth0", "another XDP program already", "id "]);
    let still = netns.enter(|| phalanx_forwarder_xdp::attach_pass(eth0)).expect("enter");
    assert!(still.is_err(), "the other program is still there");
    // The twin: once it is gone the same file runs.
    drop(other);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(start(&netns, &text, &[]).status.code(), RAN);
}

#[test]
fn an_interface_whose_mtu_is_too_large_for_native_xdp_is_named() {
    let text = configuration("[\"eth0\"]", "pin_dir = \"\"");
    let sentence = refusal(&start(&host(9000), &text, &[]));
    says(&sentence, &["interfaces", "eth0", "takes no XDP program", "MTU"]);
}

#[test]
fn a_directory_that_is_no_bpf_file_system_is_named() {
    let directory: &Path = Path::new("/tmp/phalanx-no-bpf-file-system");
    let text = configuration("[\"eth0\"]", &format!("pin_dir = \"{}\"", directory.display()));
    let sentence = refusal(&start(&host(1500), &text, &[]));
    says(&sentence, &["pin_dir", "/tmp/phalanx-no-bpf-file-system", "mount -t bpf"]);
    assert!(!directory.exists(), "nothing is left behind");
}

#[test]
fn an_object_that_is_none_is_named() {
    let text = configuration("[\"eth0\"]", "pin_dir = \"\"\nbpf_object = \"/etc/hostname\"");
    let sentence = refusal(&start(&host(1500), &text, &[]));
    says(&sentence, &["XDP object", "/etc/hostname"]);
    // What the command line says counts before what the file says.
    let sentence = refusal(&start_with(&host(1500), &text, &[], &["--bpf-object", "/etc/os-release"]));
    says(&sentence, &["XDP object", "/etc/os-release"]);
}

#[test]
fn where_the_driver_has_no_native_mode_it_runs_in_generic_mode_and_warns() {
    let netns = host(1500);
    netns.netlink().expect("netlink").create_bridge("br0").expect("a bridge");
    let output = start(&netns, &configuration("[\"br0\"]", "pin_dir = \"\""), &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), RAN, "{said}");
    says(&said, &["WARN", "br0", "generic mode"]);
    // The twin: a veth has native mode, and is not warned about.
    let output = start(&netns, &configuration("[\"eth0\"]", "pin_dir = \"\""), &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), RAN, "{said}");
    assert!(!said.contains("generic mode"), "{said}");
}

#[test]
fn it_runs_on_several_interfaces() {
    let netns = host(1500);
    let output = start(&netns, &configuration("[\"eth0\", \"peer0\"]", "pin_dir = \"\""), &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), RAN, "{said}");
}
