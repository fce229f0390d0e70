//! `phalanx lab`: a whole site in network namespaces, with real members and real connections, and things done to it.
//!
//! ```text
//!   run ─► Lab ─┬─► World      namespaces, links, addresses           (world, netns)
//!               ├─► Member     processes `phalanx run`                (member)
//!               ├─► Router     multipath route, "BFD"                 (router)
//!               ├─► Scraper    admin API, on a thread of its own      (metrics)
//!               ├─► Traffic    clients and servers, a thread each     (traffic)
//!               └─► Report                                            (report)
//! ```
//! Nothing has a name outside of the process: namespaces are descriptors, children die with the thread that started them, files are
//! in one temporary directory. So everything goes when the lab ends, however it ends.

pub mod changes;
pub mod chaos;
pub mod chart;
pub mod member;
pub mod metrics;
pub mod netns;
pub mod pins;
pub mod privilege;
pub mod report;
pub mod router;
pub mod scenario;
pub mod share;
mod site;
pub mod svg;
pub mod traffic;
pub mod weather;
pub mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, Result};
use phalanx_flow::Method;

pub use report::Report;
pub use scenario::{Action, Event};
pub use site::Lab;
pub use world::Topology;

use crate::config::ForwarderKind;

use scenario::ScenarioArgs;
use world::{CLIENT_MTU, INNER_MTU};

/// The hand-off of a full-size packet needs this MTU between members, in bytes (design §4).
const HANDOFF_MTU: u32 = 1600;

/// Members in chaos, unless told otherwise: one may be down and another drained, and three still own flows.
const CHAOS_MEMBERS: u32 = 4;

/// The lab's servers answer checks on the service's port.
const HEALTH_CHECKS: &str =
    "\n[service.health]\nkind = \"http\"\npath = \"/\"\ninterval = \"1s\"\ntimeout = \"3s\"\n";

/// Longer than a busy machine may keep the others from answering: a member that starts a cluster of its own while the others run has
/// nobody to ask, and what deviates is lost.
const PATIENT_BOOTSTRAP: &str = "bootstrap_wait = \"5s\"";

/// What the lab is to do. `LabOptions::default()` is the README's run without events.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// How the site is laid out.
    pub topology: Topology,
    /// Which forwarder members have.
    pub forwarder: ForwarderKind,
    /// How members reach backends; `None`: `l2` on one segment, `ipip` when routed.
    pub method: Option<Method>,
    /// Members at the start, 1 to 99.
    pub members: u32,
    /// Backends at the start, 1 to 99.
    pub backends: u32,
    /// Long-lived connections.
    pub connections: u32,
    /// Long-lived connections beside those that upload full-size segments.
    pub uploads: u32,
    /// Connections beside those that say something only now and then.
    pub idle: u32,
    /// Connections at a time, beside those, whose client has ended its side and still receives.
    pub half_closed: u32,
    /// Short connections per second.
    pub short_rate: u32,
    /// Mean time between an answer and the next request of a connection.
    pub interval: Duration,
    /// Long-lived connections opened per second at the start.
    pub ramp: u32,
    /// Length of the run after they are all open; `None`: 10 s after the last event.
    pub duration: Option<Duration>,
    /// How long the router uses a dead next hop.
    pub router_detect: Duration,
    /// MTU between members and backends, in bytes.
    pub mtu: u32,
    /// The service has an IPv6 address.
    pub ipv6: bool,
    /// Whether owners tell backups of their flows.
    pub replication: bool,
    /// Whether the client's interface keeps the kernel's default offloads.
    pub client_offloads: bool,
    /// ICMP does not reach the client.
    pub filter_icmp: bool,
    /// The largest segment the servers announce, in bytes.
    pub server_mss: Option<u32>,
    /// "rendezvous", "crc8-highest" or "crc8-lowest".
    pub scoring: String,
    /// Whether members keep caches of each other's flows.
    pub cache: bool,
    /// Lines to add to the service's section of every member's configuration.
    pub service_lines: String,
    /// Lines to add to the cluster's section of every member's configuration.
    pub cluster_lines: String,
    /// Lines to add to the forwarder's section of every member's configuration.
    pub forwarder_lines: String,
    /// The service is for datagrams; the caller brings its own servers and clients, so `traffic` must be off.
    pub udp: bool,
    /// Log level of the members.
    pub log_level: String,
    /// What is done, in order of time.
    pub events: Vec<Event>,
    /// Changes as this seed decides, in place of events.
    pub chaos: Option<u64>,
    /// Members check the backends' health.
    pub health_checks: bool,
    /// The router spreads packets over the backends themselves, and no member is started: shows the instrument alone.
    pub direct: bool,
    /// The lab's own servers and clients run; without them the caller brings its own.
    pub traffic: bool,
    /// The program to start members and decapsulators with; `None`: this one.
    pub program: Option<PathBuf>,
    /// Show progress on standard error.
    pub progress: bool,
    /// Leave configurations and logs behind in this directory.
    pub keep: Option<PathBuf>,
    /// Turns true when the run is to end early.
    pub interrupt: Arc<AtomicBool>,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            topology: Topology::Lan,
            forwarder: ForwarderKind::Rawsock,
            method: None,
            members: 3,
            backends: 3,
            connections: 2000,
            uploads: 0,
            idle: 0,
            half_closed: 0,
            short_rate: 50,
            interval: Duration::from_millis(400),
            ramp: 1000,
            duration: None,
            router_detect: Duration::from_millis(300),
            mtu: INNER_MTU,
            ipv6: false,
            replication: true,
            client_offloads: true,
            filter_icmp: false,
            server_mss: None,
            scoring: "rendezvous".to_owned(),
            cache: false,
            service_lines: String::new(),
            cluster_lines: String::new(),
            forwarder_lines: String::new(),
            udp: false,
            log_level: "info".to_owned(),
            events: Vec::new(),
            chaos: None,
            health_checks: false,
            direct: false,
            traffic: true,
            program: None,
            progress: false,
            keep: None,
            interrupt: Arc::default(),
        }
    }
}

impl LabOptions {
    /// How members reach backends.
    pub fn method(&self) -> Method {
        self.method.unwrap_or(match self.topology {
            Topology::Lan => Method::L2,
            Topology::Routed => Method::IpIp,
        })
    }

    /// Connections that are opened at the start and live to the end.
    pub fn long_lived(&self) -> u64 {
        u64::from(self.connections) + u64::from(self.uploads) + u64::from(self.idle)
    }

    /// Lines to add to the service's section, with the health checks.
    pub fn service_lines(&self) -> String {
        let health = if self.health_checks { HEALTH_CHECKS } else { "" };
        format!("{}{health}", self.service_lines)
    }

    /// The site in chaos: members and backends to spare, every kind of connection, health checks.
    pub fn with_chaos(self, seed: u64) -> Self {
        Self {
            chaos: Some(seed),
            idle: self.connections / 4,
            half_closed: self.connections / 10,
            health_checks: true,
            cluster_lines: format!("{}\n{PATIENT_BOOTSTRAP}", self.cluster_lines),
            ..self
        }
    }

    /// Whether hand-offs must be fragmented between members.
    pub const fn handoff_fragment(&self) -> bool {
        self.mtu < HANDOFF_MTU
    }

    /// Length of the run after all long-lived connections are open.
    pub fn duration(&self) -> Duration {
        /// Long enough to see what an event did: three times the confirmation time on a LAN, and some.
        const AFTER_LAST: Duration = Duration::from_secs(10);
        const CHAOS: Duration = Duration::from_secs(60);
        let last = self.events.iter().map(|event| event.at).max().unwrap_or_default();
        self.duration.unwrap_or(if self.chaos.is_some() { CHAOS } else { last + AFTER_LAST })
    }
}

/// Builds the site, runs the scenario and reports.
///
/// Needs root, or [`privilege::become_root`] before. Member processes die with the calling thread.
pub fn run(options: LabOptions) -> Result<Report> {
    Lab::new(options)?.run()
}

/// How `phalanx lab` is called.
#[derive(Clone, Debug, clap::Args)]
pub struct LabArgs {
    /// How the site is laid out.
    #[arg(long, value_enum, default_value_t)]
    topology: Topology,
    /// Which forwarder members have; xdp needs root.
    #[arg(long, default_value = "rawsock", value_parser = parse_forwarder, value_name = "rawsock|xdp")]
    forwarder: ForwarderKind,
    /// How members reach backends; default: l2 for lan, ipip for routed.
    #[arg(long, value_parser = parse_method, value_name = "l2|ipip|gue")]
    method: Option<Method>,
    /// Members at the start; default: 3, with --chaos 4.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=99))]
    members: Option<u32>,
    /// Backends at the start.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    backends: u32,
    /// Long-lived connections.
    #[arg(long, default_value_t = 2000)]
    connections: u32,
    /// Connections beside those that upload full-size segments.
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    upload: u32,
    /// Short connections per second.
    #[arg(long, default_value_t = 50)]
    short_rate: u32,
    /// Mean time between an answer and the next request of a connection.
    #[arg(long, default_value = "400ms", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Long-lived connections opened per second at the start.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    ramp: u32,
    /// Length of the run after they are all open; default: 10 s after the last event.
    #[arg(long, value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// How long the router uses a dead next hop.
    #[arg(long, default_value = "300ms", value_parser = humantime::parse_duration)]
    router_detect: Duration,
    /// MTU between members and backends; 1500 leaves no room for encapsulation, so hand-offs are fragmented then.
    #[arg(long, default_value_t = INNER_MTU, value_parser = clap::value_parser!(u32).range(i64::from(CLIENT_MTU)..=9000))]
    mtu: u32,
    /// Give the service an IPv6 address.
    #[arg(long)]
    ipv6: bool,
    /// Switch replication off: connections break when members die. Shows that the lab can tell.
    #[arg(long)]
    no_replication: bool,
    /// Switch the client's segmentation and checksum offloads off.
    #[arg(long)]
    no_client_offloads: bool,
    /// Keep ICMP errors from the client; packets too large for the way to a backend are then fragmented, unless --server-mss is given.
    #[arg(long)]
    filter_icmp: bool,
    /// The largest segment the servers announce, in bytes.
    #[arg(long)]
    server_mss: Option<u32>,
    /// How members share the flows.
    #[arg(long, default_value = "rendezvous", value_parser = ["rendezvous", "crc8-highest", "crc8-lowest"])]
    scoring: String,
    /// Have every member cache all flows.
    #[arg(long)]
    cache: bool,
    /// Read the events from a file.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kill", "crash", "pause", "join", "leave", "restart", "upgrade", "add_backend", "drain_backend", "crash_backend", "reload",
        "enter", "partition", "split", "loss", "drain", "undrain", "fail_backend", "mend_backend",
    ])]
    scenario: Option<PathBuf>,
    #[command(flatten)]
    events: ScenarioArgs,
    /// Change the site at random, as this number decides, one or two changes at a time and never more than the promise covers.
    #[arg(long, value_name = "SEED", conflicts_with_all = [
        "scenario", "no_events", "direct", "kill", "crash", "pause", "join", "leave", "restart", "upgrade", "add_backend",
        "drain_backend", "crash_backend", "reload", "enter", "partition", "split", "loss", "drain", "undrain", "fail_backend", "mend_backend",
    ])]
    chaos: Option<u64>,
    /// Draw connections and stalls over time into this file, as SVG; with --chaos only.
    #[arg(long, value_name = "FILE", requires = "chaos")]
    picture: Option<PathBuf>,
    /// Connections beside those that say something only now and then.
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    idle: u32,
    /// Connections at a time whose client has ended its side and still receives.
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    half_closed: u32,
    /// Have members check the health of backends.
    #[arg(long)]
    health_checks: bool,
    /// Do nothing to the site. Without this, without an event and without --duration, a backend is added after 2 s,
    /// backend 1 drained after 5 s, and member 2 killed after 9 s.
    #[arg(long)]
    no_events: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Show no progress.
    #[arg(long, short)]
    quiet: bool,
    /// Leave configurations and logs behind in this directory.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Log level of the members.
    #[arg(long, default_value = "info")]
    log_level: String,
    /// Let the router spread packets over the backends themselves, without any member: shows the instrument alone.
    #[arg(long, hide = true)]
    direct: bool,
}

fn parse_forwarder(text: &str) -> Result<ForwarderKind, String> {
    match text {
        "rawsock" if cfg!(feature = "rawsock") => Ok(ForwarderKind::Rawsock),
        "xdp" if cfg!(feature = "xdp") => Ok(ForwarderKind::Xdp),
        "rawsock" | "xdp" => Err("this program was built without that forwarder".to_owned()),
        _ => Err("a forwarder is rawsock or xdp".to_owned()),
    }
}

fn parse_method(text: &str) -> Result<Method, String> {
    match text {
        "l2" => Ok(Method::L2),
        "ipip" => Ok(Method::IpIp),
        "gue" => Ok(Method::Gue),
        _ => Err("a method is l2, ipip or gue".to_owned()),
    }
}

impl LabArgs {
    /// What the command line asks for.
    pub fn options(&self) -> Result<LabOptions> {
        let members = self.members.unwrap_or(if self.chaos.is_some() { CHAOS_MEMBERS } else { 3 });
        let events = match &self.scenario {
            Some(file) => scenario::read(file)?,
            None => match self.events.events()? {
                none if none.is_empty()
                    && self.duration.is_none()
                    && !self.no_events
                    && !self.direct
                    && self.chaos.is_none() =>
                {
                    scenario::story(members, self.backends)
                }
                events => events,
            },
        };
        let fragment = self.filter_icmp && self.server_mss.is_none();
        let fails = |event: &Event| matches!(event.action, Action::FailBackend(_));
        let options = LabOptions {
            topology: self.topology,
            forwarder: self.forwarder,
            method: self.method,
            members,
            backends: self.backends,
            connections: self.connections,
            uploads: self.upload,
            idle: self.idle,
            half_closed: self.half_closed,
            short_rate: self.short_rate,
            interval: self.interval,
            ramp: self.ramp,
            duration: self.duration,
            router_detect: self.router_detect,
            mtu: self.mtu,
            ipv6: self.ipv6,
            replication: !self.no_replication,
            client_offloads: !self.no_client_offloads,
            filter_icmp: self.filter_icmp,
            server_mss: self.server_mss,
            scoring: self.scoring.clone(),
            cache: self.cache,
            service_lines: if fragment { "fragment = true".to_owned() } else { String::new() },
            cluster_lines: String::new(),
            forwarder_lines: String::new(),
            udp: false,
            log_level: self.log_level.clone(),
            chaos: None,
            health_checks: self.health_checks || events.iter().any(fails),
            events,
            direct: self.direct,
            traffic: true,
            program: None,
            progress: !self.quiet,
            keep: self.keep.clone(),
            interrupt: Arc::default(),
        };
        Ok(match self.chaos {
            Some(seed) => options.with_chaos(seed),
            None => options,
        })
    }
}

/// Runs the lab from the command line. The exit status is 0 if no connection broke, 1 if some did or the lab failed.
///
/// Call it while the process has one thread: it may start the program again in a user namespace.
pub fn command(args: &LabArgs) -> ExitCode {
    let outcome = prepare(args).and_then(run);
    match outcome {
        Ok(report) => {
            if let Some((file, svg)) = args.picture.as_ref().zip(chart::draw(&report))
                && let Err(error) = std::fs::write(file, svg)
            {
                eprintln!("phalanx lab: cannot write {}: {error}", file.display());
            }
            if args.json {
                match serde_json::to_string_pretty(&report) {
                    Ok(text) => println!("{text}"),
                    Err(error) => eprintln!("phalanx lab: the report cannot be written as JSON: {error}"),
                }
            } else {
                println!("{report}");
            }
            let good = report.broken == 0 && report.problems.is_empty() && !report.interrupted;
            if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("phalanx lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(args: &LabArgs) -> Result<LabOptions> {
    let options = args.options()?;
    // SAFETY: no preconditions.
    if options.forwarder == ForwarderKind::Xdp && unsafe { libc::geteuid() } != 0 {
        anyhow::bail!(
            "XDP programs cannot be loaded from a user namespace: run the lab as root, or without --forwarder xdp"
        );
    }
    privilege::become_root()?;
    // The first signal ends the run in good order, the second one at once.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        let twice = options.interrupt.clone();
        signal_hook::flag::register_conditional_shutdown(signal, 1, twice).context("cannot catch signals")?;
        signal_hook::flag::register(signal, options.interrupt.clone()).context("cannot catch signals")?;
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        lab: LabArgs,
    }

    fn options(words: &[&str]) -> Result<LabOptions, String> {
        let line = Line::try_parse_from(["lab"].iter().chain(words)).map_err(|error| error.to_string())?;
        line.lab.options().map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_defaults_of_the_command_line_are_those_of_the_library() {
        let (line, library) = (options(&["--no-events"]).unwrap(), LabOptions::default());
        assert_eq!(
            format!("{:?}", LabOptions { progress: false, ..line }),
            format!("{library:?}"),
            "but for progress"
        );
    }

    #[test]
    fn told_nothing_the_lab_changes_the_backends_and_then_kills_a_member() {
        let actions = |words: &[&str]| {
            let events = options(words).unwrap().events;
            events.iter().map(|event| event.action).collect::<Vec<_>>()
        };
        let story = [Action::AddBackend(None), Action::DrainBackend(1), Action::Kill(2)];
        assert_eq!(actions(&[]), story);
        assert_eq!(actions(&["--no-replication"]), story, "the twin goes through the same");
        assert_eq!(actions(&["--members", "1"]), story[..2], "the only member is not killed");
        for quiet in [&["--no-events"][..], &["--duration", "5s"], &["--direct"]] {
            assert!(actions(quiet).is_empty(), "{quiet:?}");
        }
        assert_eq!(actions(&["--kill", "1@1s"]), [Action::Kill(1)]);
    }

    #[test]
    fn the_run_ends_ten_seconds_after_the_last_event() {
        let options = options(&["--kill", "2@5s", "--add-backend", "1s"]).unwrap();
        assert_eq!(options.duration(), Duration::from_secs(15));
        assert_eq!(options.events.len(), 2);
        assert_eq!(options.events[1].action, Action::Kill(2));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            &["--kill", "5s"][..],
            &["--members", "0"],
            &["--mtu", "1400"],
            &["--method", "nat"],
            &["--scenario", "x", "--kill", "1@1s"],
        ] {
            assert!(options(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn filtered_icmp_means_fragments_unless_the_servers_announce_small_segments() {
        assert!(options(&["--filter-icmp"]).unwrap().service_lines.contains("fragment"));
        assert!(options(&["--filter-icmp", "--server-mss", "1400"]).unwrap().service_lines.is_empty());
    }
}
