//! Makes a [`Config`] out of a document, field by field, and checks what fields say about each other.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use phalanx_flow::{FlowSeed, MemberId, Method};
use toml::de::{DeTable, DeValue};

use super::environment::Environment;
use super::error::{ConfigError, ConfigErrorKind as Kind};
use super::reader::{self, At, Section, Source};
use super::{
    ADMIN_PORT, AdminConfig, BackendConfig, BackupSite, CacheMode, ClusterConfig, Config, DEFAULT_WEIGHT,
    ForwarderConfig, ForwarderKind, GOSSIP_PORT, GUE_PORT, HANDOFF_PORT, HealthConfig, HealthKind, LogConfig,
    LogFormat, MAX_SEEDS, MAX_WEIGHT, MemberConfig, OnFailure, PinDir, Profile, Protocol, Replicate,
    ScoringKind, Seed, ServiceConfig, TRANSFER_PORT, id_of, method_name,
};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// Stands where an address could not be read; the configuration is refused anyway.
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

pub(super) fn build(
    file: &Path,
    text: &str,
    environment: &dyn Environment,
) -> Result<Config, Vec<ConfigError>> {
    let (config, errors, _) = build_with_known(file, text, environment);
    if errors.is_empty() { Ok(config) } else { Err(errors) }
}

/// The configuration, the mistakes in it, and the names of all fields that exist.
pub(super) fn build_with_known(
    file: &Path,
    text: &str,
    environment: &dyn Environment,
) -> (Config, Vec<ConfigError>, BTreeSet<String>) {
    let source = Source::new(file, text);
    let (document, syntax) = DeTable::parse_recoverable(text);
    for error in &syntax {
        let line = error.span().map_or(1, |span| source.line(span.start));
        let message = format!("this is not TOML ({})", error.message().trim_end_matches('.'));
        source.fail(line, "", Kind::Syntax, message);
    }
    let mut root = Section::root(&source, document.get_ref());
    let member = section(&mut root, "member", member);
    let cluster = section(&mut root, "cluster", |section| cluster(section, file, environment));
    let forwarder = section(&mut root, "forwarder", |section| forwarder(section, environment));
    let mut admin_section = root.section_or_empty("admin");
    let admin = admin(&mut admin_section);
    admin_section.finish();
    let mut log_section = root.section_or_empty("log");
    let log = log(&mut log_section);
    log_section.finish();
    let services = services(&mut root);
    root.finish();

    let mut config = Config { file: file.to_owned(), member, cluster, forwarder, admin, log, services };
    for seed in &mut config.member.seeds {
        if seed.address.port() == 0 {
            seed.address.set_port(config.cluster.gossip_port);
        }
    }
    let (mut errors, known) = source.finish();
    let broken: BTreeSet<usize> =
        errors.iter().filter(|error| error.kind == Kind::Syntax).map(|error| error.line).collect();
    if !broken.is_empty() {
        // What stands in a broken line, or is missing or unknown after one, may only be its echo.
        errors.retain(|error| {
            error.kind == Kind::Syntax
                || !(broken.contains(&error.line) || matches!(error.kind, Kind::Missing | Kind::Unknown))
        });
        errors.dedup_by(|next, first| next.kind == Kind::Syntax && next.line == first.line);
    }
    (config, errors, known)
}

/// A section that must be there.
fn section<T>(
    root: &mut Section<'_, '_>,
    key: &'static str,
    read: impl FnOnce(&mut Section<'_, '_>) -> T,
) -> T {
    let mut section = root.section_or_empty(key);
    if section.is_missing() {
        root.fail(1, key, Kind::Missing, format!("the section is missing: add [{key}] and its fields"));
    }
    let value = read(&mut section);
    section.finish();
    value
}

fn member(section: &mut Section<'_, '_>) -> MemberConfig {
    let id = section.require("id", "1", member_id);
    let address = section.require("address", "\"10.0.1.11\"", unicast);
    let weight = section.integer("weight", 0..=MAX_WEIGHT, DEFAULT_WEIGHT);
    let site = section.take("site", |value| {
        if value.as_str() == Some("") { Ok(String::new()) } else { reader::name(value) }
    });
    let cache = section.choice("cache", &[("off", CacheMode::Off), ("all", CacheMode::All)]);
    let seeds = section.list("seeds", seed).unwrap_or_default();
    if seeds.len() > MAX_SEEDS {
        let message =
            format!("{} seeds are too many: name at most {MAX_SEEDS} members to join through", seeds.len());
        section.fail(section.line(), "seeds", Kind::Range, message);
    }
    let state_dir = section.take("state_dir", |value| reader::string(value).map(PathBuf::from));

    let mut ids: HashMap<MemberId, IpAddr> = HashMap::new();
    if let (Some(id), Some(address)) = (&id, &address) {
        ids.insert(id.value, address.value);
    }
    for At { value: seed, line } in &seeds {
        if let Some(address) = &address
            && seed.address.is_ipv4() != address.value.is_ipv4()
        {
            let message = format!(
                "seed {} and member.address {} are of different families: give both as IPv4 or both as IPv6",
                seed.address.ip(),
                address.value
            );
            section.fail(*line, "seeds", Kind::Conflict, message);
        }
        if let Some(id) = seed.id {
            let first = *ids.entry(id).or_insert(seed.address.ip());
            if first != seed.address.ip() {
                let message = format!(
                    "id {id} stands for {first} and for {}: ids are unique in the cluster, change one of the two",
                    seed.address.ip()
                );
                section.fail(*line, "seeds", Kind::Duplicate, message);
            }
        }
    }
    MemberConfig {
        id: id.map_or(MemberId(0), |at| at.value),
        address: address.map_or(NOWHERE, |at| at.value),
        weight,
        site: site.map(|at| at.value).unwrap_or_default(),
        cache,
        seeds: seeds.into_iter().map(|at| at.value).collect(),
        state_dir: state_dir.map(|at| at.value),
    }
}

fn cluster(section: &mut Section<'_, '_>, file: &Path, environment: &dyn Environment) -> ClusterConfig {
    let name = section.require("name", "\"site-a\"", reader::name);
    let key_file = section.require("key_file", "\"cluster.key\"", |value| {
        let written = reader::string(value)?;
        let path = file.parent().unwrap_or(Path::new("")).join(written);
        match environment.read_keys(&path) {
            Ok(keys) => Ok((path, keys)),
            Err(error) => Err((Kind::Environment, format!("{} {error}", path.display()))),
        }
    });
    let hash_seed = section.require("hash_seed", "\"<32 hexadecimal digits>\"", |value| {
        let text = reader::string(value)?;
        let plain = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = plain.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        number
            .map(|number| FlowSeed([(number >> 64) as u64, number as u64]))
            .ok_or_else(|| reader::wrong("32 hexadecimal digits, the same on all members".to_owned(), value))
    });
    let gossip = section.port("gossip_port", GOSSIP_PORT);
    let transfer = section.port("transfer_port", TRANSFER_PORT);
    let handoff = section.port("handoff_port", HANDOFF_PORT);
    for (later, earlier, at) in [
        ("transfer_port", "gossip_port", (&transfer, &gossip)),
        ("handoff_port", "gossip_port", (&handoff, &gossip)),
        ("handoff_port", "transfer_port", (&handoff, &transfer)),
    ] {
        if at.0.value == at.1.value {
            let message = format!("port {} is also cluster.{earlier}: give each its own", at.0.value);
            section.fail(at.0.line, later, Kind::Duplicate, message);
        }
    }
    let (key_file, keys) = key_file.map(|at| at.value).unwrap_or_default();
    ClusterConfig {
        name: name.map(|at| at.value).unwrap_or_default(),
        key_file,
        keys,
        hash_seed: hash_seed.map_or(FlowSeed([0; 2]), |at| at.value),
        scoring: section.choice(
            "scoring",
            &[
                ("rendezvous", ScoringKind::Rendezvous),
                ("crc8-highest", ScoringKind::Crc8Highest),
                ("crc8-lowest", ScoringKind::Crc8Lowest),
            ],
        ),
        profile: section.choice("profile", &[("lan", Profile::Lan), ("wan", Profile::Wan)]),
        gossip_port: gossip.value,
        transfer_port: transfer.value,
        handoff_port: handoff.value,
        handoff_fragment: section.boolean("handoff_fragment", false),
        backup_site: section.choice("backup_site", &[("any", BackupSite::Any), ("other", BackupSite::Other)]),
        backups: section.integer("backups", 1..=2, 1),
        bootstrap_wait: section.duration("bootstrap_wait", 100 * MS..=10 * MINUTE, 2 * SECOND).value,
        replication: section.boolean("replication", true),
        replicate: section
            .choice("replicate", &[("established", Replicate::Established), ("syn", Replicate::Syn)]),
        transfer_rate: section.integer("transfer_rate", 100..=100_000_000, 100_000),
        flush_on_leave: section.boolean("flush_on_leave", true),
    }
}

fn forwarder(section: &mut Section<'_, '_>, environment: &dyn Environment) -> ForwarderConfig {
    let kinds = [("rawsock", ForwarderKind::Rawsock), ("xdp", ForwarderKind::Xdp)];
    let kind = section.take("kind", |value| match reader::choice(value, &kinds)? {
        ForwarderKind::Rawsock if cfg!(feature = "rawsock") => Ok(ForwarderKind::Rawsock),
        ForwarderKind::Xdp if cfg!(feature = "xdp") => Ok(ForwarderKind::Xdp),
        _ => Err((
            Kind::Environment,
            format!(
                "this program was built without the forwarder {}: build it with that Cargo feature, or choose \
                 another kind",
                reader::show(value)
            ),
        )),
    });
    let mut interfaces: Vec<String> = Vec::new();
    match section.require_list("interfaces", "[\"eth0\"]", |text| Ok(text.to_owned())) {
        None => {}
        Some(list) if list.is_empty() => section.fail(
            section.line(),
            "interfaces",
            Kind::Range,
            "the list is empty: name at least one interface to take packets from",
        ),
        Some(list) => {
            for At { value: name, line } in list {
                if interfaces.contains(&name) {
                    let message = format!("interface {name} stands here twice: remove one");
                    section.fail(line, "interfaces", Kind::Duplicate, message);
                } else if !environment.interface_exists(&name) {
                    let message = format!(
                        "there is no interface {name} on this machine (in this network namespace): `ip link` \
                         shows those there are"
                    );
                    section.fail(line, "interfaces", Kind::Environment, message);
                }
                interfaces.push(name);
            }
        }
    }
    ForwarderConfig {
        kind: kind.map(|at| at.value).unwrap_or_default(),
        interfaces,
        threads: section.integer("threads", 1..=64, 1) as u16,
        max_flows: section.integer("max_flows", 1024..=67_108_864, 1_000_000),
        max_half_open: section.integer("max_half_open", 1024..=16_777_216, 65_536),
        pin_dir: match path(section, "pin_dir") {
            None => PinDir::Usual,
            Some(text) if text.as_os_str().is_empty() => PinDir::Off,
            Some(directory) => PinDir::At(directory),
        },
        bpf_object: path(section, "bpf_object"),
    }
}

fn path(section: &mut Section<'_, '_>, field: &'static str) -> Option<PathBuf> {
    section.take(field, |value| reader::string(value).map(PathBuf::from)).map(|at| at.value)
}

fn admin(section: &mut Section<'_, '_>) -> AdminConfig {
    let default = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT);
    let listen = section.take("listen", reader::socket).unwrap_or(At { value: default, line: 1 });
    let allow_remote = section.boolean("allow_remote", false);
    if !listen.value.ip().is_loopback() && !allow_remote {
        let message = format!(
            "{} is not a loopback address, and the admin API lets anyone in: listen on 127.0.0.1, or set \
             allow_remote = true behind a firewall",
            listen.value.ip()
        );
        section.fail(listen.line, "listen", Kind::Conflict, message);
    }
    AdminConfig { listen: listen.value, allow_remote }
}

fn log(section: &mut Section<'_, '_>) -> LogConfig {
    let format = section.choice("format", &[("text", LogFormat::Text), ("json", LogFormat::Json)]);
    let level = section.take("level", |value| {
        let text = reader::string(value)?;
        match tracing_subscriber::EnvFilter::builder().parse(text) {
            Ok(_) if !text.trim().is_empty() => Ok(text.to_owned()),
            _ => Err(reader::wrong(
                "\"error\", \"warn\", \"info\", \"debug\" or \"trace\", or a filter like \
                 \"info,phalanx=debug\""
                    .to_owned(),
                value,
            )),
        }
    });
    LogConfig { format, level: level.map_or_else(|| "info".to_owned(), |at| at.value) }
}

fn services(root: &mut Section<'_, '_>) -> Vec<ServiceConfig> {
    let sections = root.sections("service");
    if sections.is_empty() {
        root.fail(1, "service", Kind::Missing, "there is no service: add at least one [[service]]");
    }
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut sockets: HashMap<(IpAddr, u16, Protocol), (String, usize)> = HashMap::new();
    let mut out = Vec::new();
    for mut section in sections {
        let service = service(&mut section);
        let line = section.line();
        if let Some(first) = names.get(&service.name).filter(|_| !service.name.is_empty()) {
            let message =
                format!("two services are named {} (the other in line {first}): rename one", service.name);
            section.fail(line, "name", Kind::Duplicate, message);
        }
        names.entry(service.name.clone()).or_insert(line);
        if service.address != NOWHERE && service.port != 0 {
            let key = (service.address, service.port, service.protocol);
            if let Some((other, first)) = sockets.get(&key) {
                let message = format!(
                    "{} port {} over {} is already service {other} (line {first}): merge their backends or \
                     change one",
                    service.address,
                    service.port,
                    service.protocol.as_str()
                );
                section.fail(line, "address", Kind::Duplicate, message);
            }
            sockets.entry(key).or_insert((service.name.clone(), line));
        }
        section.finish();
        out.push(service);
    }
    out
}

fn service(section: &mut Section<'_, '_>) -> ServiceConfig {
    let name = section.require("name", "\"web\"", reader::name).map(|at| at.value).unwrap_or_default();
    let address = section.require("address", "\"192.0.2.1\"", unicast).map_or(NOWHERE, |at| at.value);
    let port = section.require("port", "80", reader::port).map_or(0, |at| at.value);
    let protocol = section.choice("protocol", &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp)]);
    let method = section
        .require("method", "\"ipip\"", |value| {
            reader::choice(value, &[("l2", Method::L2), ("ipip", Method::IpIp), ("gue", Method::Gue)])
        })
        .map(|at| at.value);
    let gue_port = section.take("gue_port", reader::port);
    if let (Some(at), Some(method)) = (&gue_port, method)
        && method != Method::Gue
    {
        let message =
            format!("counts only with method = \"gue\", not \"{}\": remove it", method_name(method));
        section.fail(at.line, "gue_port", Kind::Conflict, message);
    }
    let idle = match protocol {
        Protocol::Tcp => 15 * MINUTE,
        Protocol::Udp => MINUTE,
    };
    let idle = section.duration("idle_timeout", SECOND..=7 * 24 * HOUR, idle);
    let linger = section.duration("linger", SECOND..=HOUR, MINUTE);
    let reset_linger = section.duration("reset_linger", 100 * MS..=10 * MINUTE, 5 * SECOND);
    let half_open = section.duration("half_open_timeout", SECOND..=5 * MINUTE, 10 * SECOND);
    let fragment = section.boolean("fragment", false);
    let health = section.section("health").map(|mut inner| {
        let health = health(&mut inner, protocol);
        inner.finish();
        health
    });
    let backends = backends(section, &name, address, method);
    ServiceConfig {
        name,
        address,
        port,
        protocol,
        method: method.unwrap_or(Method::IpIp),
        gue_port: gue_port.map_or(GUE_PORT, |at| at.value),
        idle_timeout: idle.value,
        linger: linger.value,
        reset_linger: reset_linger.value,
        half_open_timeout: half_open.value,
        fragment,
        health,
        backends,
    }
}

fn backends(
    section: &mut Section<'_, '_>,
    name: &str,
    service: IpAddr,
    method: Option<Method>,
) -> Vec<BackendConfig> {
    let sections = section.sections("backend");
    if sections.is_empty() {
        let message = format!("service {name} has no backends: add at least one [[service.backend]]");
        section.fail(section.line(), "backend", Kind::Missing, message);
    }
    let mut lines: HashMap<IpAddr, usize> = HashMap::new();
    let mut out = Vec::new();
    for mut section in sections {
        let address = section.require("address", "\"10.0.2.21\"", unicast);
        if let Some(At { value: address, line }) = address {
            if let Some(first) = lines.get(&address) {
                let message = format!(
                    "service {name} has backend {address} twice (the other in line {first}): remove one and \
                     add up the weights"
                );
                section.fail(line, "address", Kind::Duplicate, message);
            }
            lines.entry(address).or_insert(line);
            if address == service {
                let message = format!(
                    "this is the service's own address: give the address by which {name}'s server is reached"
                );
                section.fail(line, "address", Kind::Conflict, message);
            }
            let families_differ = service != NOWHERE && address.is_ipv4() != service.is_ipv4();
            if method == Some(Method::L2) && families_differ {
                let message = format!(
                    "method \"l2\" needs service {service} and backend {address} in the same family: use an \
                     address of the other family, or method \"ipip\" or \"gue\""
                );
                section.fail(line, "address", Kind::Conflict, message);
            }
        }
        let weight = section.integer("weight", 0..=MAX_WEIGHT, DEFAULT_WEIGHT);
        let drain = section.boolean("drain", false);
        section.finish();
        out.push(BackendConfig { address: address.map_or(NOWHERE, |at| at.value), weight, drain });
    }
    if !out.is_empty() && out.iter().all(|backend| backend.weight == 0 && !backend.drain) {
        let message = format!("every backend of service {name} has weight 0: give one of them a weight");
        section.fail(section.line(), "backend", Kind::Conflict, message);
    }
    out
}

fn health(section: &mut Section<'_, '_>, protocol: Protocol) -> HealthConfig {
    let kind =
        section.require("kind", "\"tcp\"", |value| reader::choice(value, &[("tcp", false), ("http", true)]));
    let http = kind.as_ref().is_some_and(|at| at.value);
    if let Some(at) = &kind
        && protocol == Protocol::Udp
    {
        let message = "checks are made over TCP, and this service is UDP: remove [service.health]";
        section.fail(at.line, "kind", Kind::Conflict, message);
    }
    let path = section.take("path", |value| {
        let text = reader::string(value)?;
        let plain = text.starts_with('/') && text.bytes().all(|byte| (0x21..0x7f).contains(&byte));
        if plain {
            Ok(text.to_owned())
        } else {
            Err(reader::wrong("a path that starts with '/'".to_owned(), value))
        }
    });
    let host = section.take("host", |value| {
        let text = reader::string(value)?;
        let plain = !text.is_empty() && text.bytes().all(|byte| (0x21..0x7f).contains(&byte));
        if plain { Ok(text.to_owned()) } else { Err(reader::wrong("a host name".to_owned(), value)) }
    });
    let expect_status = section.take("expect_status", |value| reader::integer(value, 100..=599));
    if kind.is_some() && !http {
        for (key, line) in [
            ("path", path.as_ref().map(|at| at.line)),
            ("host", host.as_ref().map(|at| at.line)),
            ("expect_status", expect_status.as_ref().map(|at| at.line)),
        ] {
            if let Some(line) = line {
                let message = "counts only with kind = \"http\": remove it or change the kind";
                section.fail(line, key, Kind::Conflict, message);
            }
        }
    }
    let interval = section.duration("interval", 100 * MS..=10 * MINUTE, SECOND);
    let timeout = section.duration("timeout", 10 * MS..=MINUTE, interval.value.min(SECOND));
    HealthConfig {
        kind: if http {
            HealthKind::Http {
                path: path.map_or_else(|| "/".to_owned(), |at| at.value),
                host: host.map(|at| at.value),
                expect_status: expect_status.map_or(200, |at| at.value as u16),
            }
        } else {
            HealthKind::Tcp
        },
        interval: interval.value,
        timeout: timeout.value,
        rise: section.integer("rise", 1..=100, 2),
        fall: section.integer("fall", 1..=100, 3),
        on_failure: section
            .take("on_failure", |value| {
                reader::choice(value, &[("keep", OnFailure::Keep), ("reset", OnFailure::Reset)])
            })
            .map_or(OnFailure::Keep, |at| at.value),
    }
}

fn member_id(value: &DeValue<'_>) -> Result<MemberId, (Kind, String)> {
    if let Some(text) = value.as_str() {
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(id_of(address));
        }
        return Err(reader::wrong(
            "a whole number without quotes, or an IPv4 address in quotes".to_owned(),
            value,
        ));
    }
    reader::integer(value, 1..=u32::MAX - 1).map(MemberId)
}

/// An address packets can be sent to.
fn unicast(value: &DeValue<'_>) -> Result<IpAddr, (Kind, String)> {
    let address = reader::address(value)?;
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    if address.is_unspecified() || address.is_multicast() || broadcast || mapped {
        let message = format!("{address} is not the address of one host: give a unicast address");
        return Err((Kind::Range, message));
    }
    Ok(address)
}

/// `[id@]address[:port]`; port 0 stands for the cluster's own gossip port, filled in once that is known.
fn seed(text: &str) -> Result<Seed, String> {
    let expected =
        || format!("give seeds as \"address\", \"address:port\" or \"id@address\", not \"{text}\"");
    let (id, rest) = match text.split_once('@') {
        Some((id, rest)) => {
            let id = match id.parse::<Ipv4Addr>() {
                Ok(address) => id_of(address),
                Err(_) => MemberId(id.parse().map_err(|_| expected())?),
            };
            (Some(id), rest)
        }
        None => (None, text),
    };
    let address = match (rest.parse::<SocketAddr>(), rest.parse::<IpAddr>()) {
        (Ok(socket), _) if socket.port() != 0 => socket,
        (_, Ok(address)) => SocketAddr::new(address, 0),
        _ => return Err(expected()),
    };
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        return Err(format!("seed {} is not the address of one host: give a unicast address", address.ip()));
    }
    Ok(Seed { id, address })
}
