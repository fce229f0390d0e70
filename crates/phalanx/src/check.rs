//! `phalanx check`: every error with its line, then what is allowed but unwise.

use std::net::UdpSocket;
use std::path::Path;
use std::process::ExitCode;

use phalanx_netlink::Netlink;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};

use crate::cli::refuse;
use crate::config::{Config, ForwarderKind, ScoringKind};
use crate::path_mtu;

/// MTU between members that carries a client's 1,500 bytes and the hand-off's headers (design §4), in bytes.
const HANDOFF_MTU: u32 = 1600;

/// Checks a file: status 0 if it can be used, 2 if not.
pub fn check(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(errors) => {
            let status = refuse(&errors);
            let plural = if errors.len() == 1 { "" } else { "s" };
            eprintln!("{}: {} error{plural}", file.display(), errors.len());
            return status;
        }
    };
    for warning in warnings(&config).into_iter().chain(machine_warnings(&config)) {
        println!("{}: warning: {warning}.", file.display());
    }
    println!(
        "{}: OK: member {} of cluster {}, {} service{}",
        file.display(),
        config.member.id,
        config.cluster.name,
        config.services.len(),
        if config.services.len() == 1 { "" } else { "s" },
    );
    ExitCode::SUCCESS
}

/// What is allowed but unwise in the configuration itself: one sentence each, without the full stop.
pub fn warnings(config: &Config) -> Vec<String> {
    let mut out = Vec::new();
    if config.member.seeds.iter().all(|seed| seed.address.ip() == config.member.address) {
        out.push(
            "member.seeds: names no other member, so this one is alone until another one calls".to_owned(),
        );
    }
    if !config.cluster.replication {
        out.push(
            "cluster.replication: is off, so connections break when a member dies: set it to true".to_owned(),
        );
    }
    if config.cluster.scoring != ScoringKind::Rendezvous {
        out.push(
            "cluster.scoring: the shares of crc8 are uneven (of three members one can get half): prefer \
             \"rendezvous\""
                .to_owned(),
        );
    }
    if !config.admin.listen.ip().is_loopback() {
        out.push("admin.listen: everyone who reaches this address can read the admin API".to_owned());
    }
    if config.cluster.backup_site == crate::config::BackupSite::Other && config.member.site.is_empty() {
        out.push("member.site: is empty though cluster.backup_site = \"other\": name the site".to_owned());
    }
    for service in &config.services {
        if service.backends.iter().all(|backend| backend.effective_weight() == 0) {
            out.push(format!("service {}: every backend is drained, so it takes no new flows", service.name));
        }
        if service.linger > service.idle_timeout {
            out.push(format!(
                "service {}: linger is longer than idle_timeout, which ends flows first",
                service.name
            ));
        }
        if let Some(health) = &service.health
            && health.timeout > health.interval
        {
            out.push(format!(
                "service {}: health.timeout is longer than health.interval, so checks are rarer than asked for",
                service.name
            ));
        }
    }
    out
}

/// What the machine lacks to run the configuration.
fn machine_warnings(config: &Config) -> Vec<String> {
    let mut out = Vec::new();
    if let Err(sentence) = permission(config) {
        out.push(format!("forwarder.kind: {sentence}"));
    }
    for name in &config.forwarder.interfaces {
        let link = Netlink::open().and_then(|mut netlink| netlink.link(name));
        if let Ok(link) = link
            && let Some(warning) = mtu_warning(name, link.mtu, config.cluster.handoff_fragment)
        {
            out.push(warning);
        }
    }
    for seed in &config.member.seeds {
        let (from, to) = (config.member.address, seed.address.ip());
        if to != from
            && let Ok(mtu) = path_mtu::probe(from, to, HANDOFF_MTU as u16)
            && mtu < HANDOFF_MTU
            && !config.cluster.handoff_fragment
        {
            out.push(format!(
                "member.seeds: the path to {to} takes packets of {mtu} bytes: set the MTU between members to \
                 {HANDOFF_MTU} or more, or cluster.handoff_fragment = true on every member"
            ));
        }
    }
    if UdpSocket::bind((config.member.address, 0)).is_err() {
        out.push(format!(
            "member.address: {} is not an address of this machine: add it to an interface or correct the field",
            config.member.address
        ));
    }
    out
}

/// What a small MTU between members costs; none if `mtu`, in bytes, is enough.
fn mtu_warning(name: &str, mtu: u32, fragments: bool) -> Option<String> {
    let cost = if fragments {
        "hand-offs of full-size packets are fragmented"
    } else {
        "clients are told a smaller MTU when a full-size packet is handed off"
    };
    (mtu < HANDOFF_MTU).then(|| {
        format!(
            "forwarder.interfaces: the MTU of {name} is {mtu}, so {cost}: set it to {HANDOFF_MTU} or more on all \
             members and between them"
        )
    })
}

/// Whether this process may do what its forwarder needs; if not, one sentence that says what to do.
pub(crate) fn permission(config: &Config) -> Result<(), String> {
    if config.forwarder.kind == ForwarderKind::Xdp {
        xdp_permission()?;
    }
    raw_socket_permission()
}

/// Numbers of capabilities (`include/uapi/linux/capability.h`). CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

fn xdp_permission() -> Result<(), String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    // Without /proc nobody knows, and the kernel will say.
    let Some(effective) = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()) else {
        return Ok(());
    };
    let has = |capability: u32| effective & (1 << capability) != 0;
    let bpf = has(CAP_SYS_ADMIN) || has(CAP_BPF) && has(CAP_PERFMON);
    if bpf && has(CAP_NET_ADMIN) {
        return Ok(());
    }
    Err("no permission for XDP: run as root, or give the process CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and \
         CAP_NET_RAW; or choose kind = \"rawsock\""
        .to_owned())
}

/// Whether this process may open raw sockets; if not, one sentence that says what to do.
pub(crate) fn raw_socket_permission() -> Result<(), String> {
    // A packet socket without a protocol receives nothing; it is closed at once.
    match socket(AddressFamily::PACKET, SocketType::RAW, None) {
        Ok(_) => Ok(()),
        Err(Errno::PERM | Errno::ACCESS) => Err("no permission for raw sockets: run as root, or give the \
             process CAP_NET_RAW and CAP_NET_ADMIN"
            .to_owned()),
        Err(error) => Err(format!("raw sockets cannot be opened ({error}): is AF_PACKET in the kernel?")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::Machine;

    const EXAMPLE: &str = include_str!("../../../docs/operating/phalanx.toml");

    fn warnings_with(from: &str, to: &str) -> Vec<String> {
        assert!(EXAMPLE.contains(from), "{from} is not in the example");
        let text = EXAMPLE.replacen(from, to, 1);
        let config = Config::parse("cluster.toml".as_ref(), &text, &Machine);
        warnings(&config.unwrap_or_else(|errors| panic!("{errors:?}")))
    }

    #[test]
    fn the_example_gives_no_warning() {
        assert_eq!(warnings_with("[member]", "[member]"), [""; 0]);
    }

    #[test]
    fn what_is_unwise_is_said_in_one_sentence_that_names_the_field() {
        for (from, to, words) in [
            ("replication = true", "replication = false", "cluster.replication"),
            ("\"rendezvous\"", "\"crc8-lowest\"", "cluster.scoring"),
            (
                "seeds = [\"10.0.1.11\", \"10.0.1.12:7946\", \"3@10.0.1.13\"]",
                "seeds = [\"10.0.1.11\"]",
                "member.seeds",
            ),
            ("timeout = \"1s\"", "timeout = \"2s\"", "health.timeout"),
            ("linger = \"60s\"", "linger = \"20m\"", "linger"),
            (
                "address = \"10.0.2.31\"",
                "address = \"10.0.2.31\"\ndrain = true",
                "service dns: every backend is drained",
            ),
        ] {
            let found = warnings_with(from, to);
            assert_eq!(found.len(), 1, "{from}: {found:?}");
            assert!(found[0].contains(words) && !found[0].ends_with('.'), "{found:?}");
        }
    }

    #[test]
    fn an_mtu_below_1600_is_a_warning_and_1600_is_none() {
        assert!(mtu_warning("eth0", 1500, false).is_some_and(|text| text.contains("smaller MTU")));
        assert!(mtu_warning("eth0", 1599, true).is_some_and(|text| text.contains("fragmented")));
        assert_eq!(mtu_warning("eth0", 1600, false), None);
    }
}
