//! `phalanx check`: every error with its line, then what is allowed but unwise.

use std::net::UdpSocket;
use std::path::Path;
use std::process::ExitCode;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};

use crate::cli::refuse;
use crate::config::{Config, ScoringKind};

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
    if let Err(sentence) = raw_socket_permission() {
        out.push(format!("forwarder.kind: {sentence}"));
    }
    if UdpSocket::bind((config.member.address, 0)).is_err() {
        out.push(format!(
            "member.address: {} is not an address of this machine: add it to an interface or correct the field",
            config.member.address
        ));
    }
    out
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
