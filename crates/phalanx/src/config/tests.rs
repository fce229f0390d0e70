//! One test per promise: what a good file means, and what each mistake is called.

use std::path::Path;

use phalanx_membership::{Digest, Shared};

use super::*;
use crate::keys::KeyFileError;

/// A machine with `eth0` and a key file called `cluster.key` that may be read.
pub(crate) struct Machine;

impl Environment for Machine {
    fn interface_exists(&self, name: &str) -> bool {
        name == "eth0"
    }

    fn read_keys(&self, path: &Path) -> Result<Vec<ClusterKey>, KeyFileError> {
        match path.to_str() {
            Some("/etc/phalanx/cluster.key" | "cluster.key") => Ok(vec![ClusterKey([7; 32])]),
            Some("/etc/phalanx/open.key") => Err(KeyFileError::TooOpen(0o644)),
            _ => Err(KeyFileError::Io(std::io::ErrorKind::NotFound.into())),
        }
    }
}

const EXAMPLE: &str = include_str!("../../../../docs/operating/phalanx.toml");
const MANUAL: &str = include_str!("../../../../docs/operating/configuration.md");

const SMALL: &str = r#"[member]
id = 1
address = "10.0.1.11"
[cluster]
name = "lab"
key_file = "cluster.key"
hash_seed = "00112233445566778899aabbccddeeff"
[forwarder]
interfaces = ["eth0"]
[[service]]
name = "web"
address = "192.0.2.1"
port = 80
method = "ipip"
[[service.backend]]
address = "10.0.2.21"
"#;

fn parse(text: &str) -> Result<Config, Vec<ConfigError>> {
    Config::parse(Path::new("/etc/phalanx/phalanx.toml"), text, &Machine)
}

fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|errors| panic!("{errors:#?}"))
}

/// The small file with more lines in the forwarder's section.
pub(crate) fn small(forwarder_lines: &str) -> Config {
    good(&SMALL.replacen("[forwarder]", &format!("[forwarder]\n{forwarder_lines}"), 1))
}

/// The only mistake in the small file once `from` is replaced by `to`, as the operator sees it.
fn mistake(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from), "{from} is not in the small file");
    let errors = parse(&SMALL.replacen(from, to, 1)).expect_err("a mistake was accepted");
    assert_eq!(errors.len(), 1, "{errors:#?}");
    errors[0].to_string()
}

#[track_caller]
fn says(message: &str, line: usize, words: &[&str]) {
    let head = format!("/etc/phalanx/phalanx.toml:{line}: ");
    assert!(message.starts_with(&head), "{message} does not name line {line}");
    for word in words {
        assert!(message.contains(word), "{message} does not say {word}");
    }
    assert!(message.ends_with('.') && !message.contains('\n'), "{message} is not one sentence");
}

#[test]
fn the_small_file_gets_the_documented_defaults() {
    let config = good(SMALL);
    assert_eq!(config.member.weight, 100);
    assert_eq!(config.member.cache, CacheMode::Off);
    assert_eq!(config.gossip_address(), "10.0.1.11:7946".parse().unwrap());
    assert_eq!(config.transfer_address(), "10.0.1.11:7947".parse().unwrap());
    assert_eq!(config.cluster.hash_seed, FlowSeed([0x0011_2233_4455_6677, 0x8899_aabb_ccdd_eeff]));
    assert_eq!(config.cluster.keys, [ClusterKey([7; 32])]);
    assert!(config.cluster.replication && config.cluster.flush_on_leave);
    assert_eq!(config.cluster.bootstrap_wait, Duration::from_secs(2));
    assert_eq!(config.admin.listen, "127.0.0.1:7980".parse().unwrap());
    let service = &config.services[0];
    assert_eq!(service.idle_timeout, Duration::from_secs(900));
    assert_eq!(service.linger, Duration::from_secs(60));
    assert_eq!(service.health, None);
    assert_eq!(service.backends[0].effective_weight(), 100);
}

#[test]
fn the_example_has_every_field_and_parses() {
    let path = Path::new("/etc/phalanx/phalanx.toml");
    let (config, errors, known) = build::build_with_known(path, EXAMPLE, &Machine);
    assert_eq!(errors, []);
    assert_eq!(config.services[1].idle_timeout, Duration::from_secs(60), "the default of UDP");
    assert_eq!(config.member.seeds[2].id, Some(MemberId(3)));
    assert_eq!(config.member.seeds[2].address, "10.0.1.13:7946".parse().unwrap());
    for field in known {
        let name = field.rsplit('.').next().unwrap();
        let shown = EXAMPLE.contains(&format!("\n{name} = ")) || EXAMPLE.contains(&format!("{name}]"));
        assert!(shown, "the example lacks {field}");
        assert!(
            MANUAL.contains(&format!("`{name}`")) || MANUAL.contains(&format!("{name}]")),
            "the manual lacks {field}"
        );
    }
}

#[test]
fn the_defaults_in_the_example_are_the_defaults() {
    let (example, small) = (good(EXAMPLE), good(SMALL));
    let ours = ClusterConfig { name: small.cluster.name.clone(), ..example.cluster };
    assert_eq!(ours, small.cluster);
    let ours = ForwarderConfig { bpf_object: None, pin_dir: PinDir::Usual, ..example.forwarder };
    assert_eq!(ours, small.forwarder);
    assert_eq!(example.admin, small.admin);
    assert_eq!(example.log, small.log);
}

#[test]
fn a_weight_below_zero_is_named() {
    says(
        &mistake("id = 1", "id = 1\nweight = -1"),
        3,
        &["member.weight", "-1 is below 0", "from 0 to 65535"],
    );
    says(
        &mistake("\"10.0.2.21\"", "\"10.0.2.21\"\nweight = -5"),
        17,
        &["service.backend.weight", "-5 is below 0"],
    );
    good(&SMALL.replace("id = 1", "id = 1\nweight = 0"));
}

#[test]
fn an_unknown_field_is_named_with_what_was_meant() {
    says(
        &mistake("id = 1", "id = 1\nwieght = 1"),
        3,
        &["member.wieght", "unknown field", "write weight if that is meant"],
    );
    says(&mistake("port = 80", "port = 80\nzzz = 1"), 14, &["service.zzz", "unknown field", "idle_timeout"]);
    says(&mistake("[member]", "[membre]\nx = 1\n[member]"), 1, &["membre", "write member if that is meant"]);
}

#[test]
fn a_service_without_backends_is_named() {
    let text = SMALL.split("[[service.backend]]").next().unwrap();
    let errors = parse(text).unwrap_err();
    assert_eq!(errors.len(), 1);
    says(
        &errors[0].to_string(),
        10,
        &["service.backend", "service web has no backends", "[[service.backend]]"],
    );
    let errors = parse(SMALL.split("[[service]]").next().unwrap()).unwrap_err();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].to_string().contains("add at least one [[service]]"));
}

#[test]
fn an_id_may_be_an_ipv4_address() {
    let config = good(&SMALL.replace("id = 1", "id = \"10.0.1.11\""));
    assert_eq!(config.member.id, MemberId(u32::from_be_bytes([10, 0, 1, 11])));
    assert_ne!(config.member.id, good(SMALL).member.id, "an index and an address are different names");
    mistake("id = 1", "id = \"10.0.1\"");
}

#[test]
fn two_equal_ids_are_named() {
    let twice = mistake("id = 1", "id = 1\nseeds = [\"1@10.0.1.12\"]");
    says(&twice, 3, &["member.seeds", "id 1 stands for 10.0.1.11 and for 10.0.1.12", "unique"]);
    let others = mistake("id = 1", "id = 1\nseeds = [\"2@10.0.1.12\",\n\"2@10.0.1.13\"]");
    says(&others, 4, &["id 2 stands for 10.0.1.12 and for 10.0.1.13"]);
    good(&SMALL.replace("id = 1", "id = 1\nseeds = [\"1@10.0.1.11\", \"2@10.0.1.12\"]"));
}

#[test]
fn equal_services_backends_and_names_are_named() {
    let again = &SMALL[SMALL.find("[[service]]").unwrap()..];
    let errors = parse(&format!("{SMALL}{again}")).unwrap_err();
    assert_eq!(errors.len(), 2, "{errors:#?}");
    says(&errors[0].to_string(), 17, &["two services are named web", "line 10"]);
    says(&errors[1].to_string(), 17, &["192.0.2.1 port 80 over tcp is already service web (line 10)"]);
    good(&format!("{SMALL}{}", again.replace("\"web\"", "\"tls\"").replace("80", "443")));
    good(
        &format!(
            "{SMALL}{}protocol = \"tcp\"\n",
            again.replace("\"web\"", "\"udp\"").replace("80", "80\nprotocol = \"udp\"")
        )
        .replace("protocol = \"tcp\"\n", ""),
    );

    let twice = mistake(
        "address = \"10.0.2.21\"\n",
        "address = \"10.0.2.21\"\n[[service.backend]]\naddress = \"10.0.2.21\"\n",
    );
    says(&twice, 18, &["service.backend.address", "backend 10.0.2.21 twice", "line 16"]);
}

#[test]
fn families_that_do_not_fit_the_method_are_named() {
    let text = SMALL.replace("10.0.2.21", "2001:db8:2::21");
    good(&text);
    good(&text.replace("ipip", "gue"));
    let errors = parse(&text.replace("ipip", "l2")).unwrap_err();
    says(&errors[0].to_string(), 16, &["service.backend.address", "same family", "\"ipip\""]);
    let seed = mistake("id = 1", "id = 1\nseeds = [\"2001:db8::1\"]");
    says(&seed, 3, &["member.seeds", "different families"]);
}

#[test]
fn what_the_machine_lacks_is_named() {
    says(&mistake("eth0", "eth7"), 9, &["forwarder.interfaces", "no interface eth7", "ip link"]);
    says(
        &mistake("cluster.key", "other.key"),
        6,
        &["cluster.key_file", "/etc/phalanx/other.key", "phalanx keygen"],
    );
    says(&mistake("cluster.key", "open.key"), 6, &["cluster.key_file", "mode 644", "chmod 600"]);
    says(
        &mistake("interfaces", "kind = \"dpdk\"\ninterfaces"),
        9,
        &["forwarder.kind", "\"rawsock\" or \"xdp\"", "dpdk"],
    );
}

#[test]
fn wrong_values_are_named_with_what_is_expected() {
    says(&mistake("id = 1", "id = \"one\""), 2, &["member.id", "IPv4 address in quotes", "\"one\""]);
    says(&mistake("10.0.1.11", "10.0.1.300"), 3, &["member.address", "IP address like"]);
    says(&mistake("10.0.1.11", "224.0.0.1"), 3, &["member.address", "unicast"]);
    says(&mistake("00112233", "xx112233"), 7, &["cluster.hash_seed", "32 hexadecimal digits"]);
    says(&mistake("port = 80", "port = 0"), 13, &["service.port", "0 is below 1"]);
    says(&mistake("port = 80", "port = \"80\""), 13, &["service.port", "without quotes"]);
    says(&mistake("\"ipip\"", "\"nat\""), 14, &["service.method", "\"l2\" or \"ipip\" or \"gue\""]);
    says(&mistake("port = 80", "port = 80\nlinger = 60"), 14, &["service.linger", "with its unit"]);
    says(&mistake("port = 80", "port = 80\nlinger = \"2h\""), 14, &["service.linger", "above 1h"]);
    says(&mistake("port = 80", "port = 80\ngue_port = 1"), 14, &["service.gue_port", "only with method"]);
    says(&mistake("name = \"lab\"", "name = \"l b\""), 5, &["cluster.name", "letters, digits"]);
    says(
        &mistake("[forwarder]", "transfer_port = 7946\n[forwarder]"),
        8,
        &["cluster.transfer_port", "cluster.gossip_port"],
    );
    says(
        &mistake("[forwarder]", "[admin]\nlisten = \"0.0.0.0:7980\"\n[forwarder]"),
        9,
        &["admin.listen", "allow_remote"],
    );
    says(&mistake("[forwarder]", "[log]\nlevel = \"a=b=c\"\n[forwarder]"), 9, &["log.level", "\"info\""]);
    says(&mistake("10.0.2.21", "192.0.2.1"), 16, &["the service's own address"]);
    good(
        &SMALL.replace("[forwarder]", "[admin]\nlisten = \"0.0.0.0:7980\"\nallow_remote = true\n[forwarder]"),
    );
    assert_eq!(good(&SMALL.replace("id = 1", "id = \"10.0.0.9\"")).member.id, MemberId(0x0a00_0009));
}

#[test]
fn health_checks_fit_their_service() {
    let with = |health: &str, protocol: &str| {
        parse(&SMALL.replace(
            "[[service.backend]]",
            &format!("protocol = \"{protocol}\"\n[service.health]\n{health}\n[[service.backend]]"),
        ))
    };
    let health = with("kind = \"http\"\npath = \"/up\"\ninterval = \"500ms\"", "tcp").unwrap().services[0]
        .health
        .clone();
    let health = health.unwrap();
    assert_eq!(health.timeout, Duration::from_millis(500), "the interval bounds the default");
    assert_eq!(health.kind, HealthKind::Http { path: "/up".into(), host: None, expect_status: 200 });
    says(
        &with("kind = \"tcp\"\npath = \"/up\"", "tcp").unwrap_err()[0].to_string(),
        18,
        &["service.health.path", "only with kind"],
    );
    says(&with("kind = \"tcp\"", "udp").unwrap_err()[0].to_string(), 17, &["service.health.kind", "UDP"]);
    assert_eq!(health.on_failure, OnFailure::Keep);
    let reset = with("kind = \"tcp\"\non_failure = \"reset\"", "tcp").unwrap().services[0].health.clone();
    assert_eq!(reset.unwrap().on_failure, OnFailure::Reset);
    says(
        &with("kind = \"tcp\"\non_failure = \"drop\"", "tcp").unwrap_err()[0].to_string(),
        18,
        &["service.health.on_failure", "keep", "reset"],
    );
    says(&with("rise = 0", "tcp").unwrap_err()[0].to_string(), 16, &["service.health.kind", "lacks"]);
}

#[test]
fn every_mistake_is_said_at_once_in_the_order_of_the_lines() {
    let text = SMALL
        .replace("id = 1", "id = -1")
        .replace("eth0", "eth7")
        .replace("port = 80", "prot = 80")
        .replace("address = \"10.0.2.21\"", "weight = 70000");
    let errors = parse(&text).unwrap_err();
    let fields: Vec<(usize, &str)> = errors.iter().map(|error| (error.line, error.field.as_str())).collect();
    assert!(errors[2].message.contains("this [[service]] lacks"), "{}", errors[2]);
    assert_eq!(
        fields,
        [
            (2, "member.id"),
            (9, "forwarder.interfaces"),
            (10, "service.port"),
            (13, "service.prot"),
            (15, "service.backend.address"),
            (16, "service.backend.weight"),
        ]
    );
}

#[test]
fn a_file_that_is_not_toml_gets_the_line_and_no_echoes() {
    let errors = parse(&SMALL.replace("port = 80", "port = = 80")).unwrap_err();
    assert_eq!(errors.len(), 1, "{errors:#?}");
    says(&errors[0].to_string(), 13, &["not TOML"]);
    // Two broken lines are two mistakes, and other mistakes are still found.
    let text =
        SMALL.replace("port = 80", "port = = 80").replace("id = 1", "id = = 1").replace("eth0", "eth7");
    let lines: Vec<usize> = parse(&text).unwrap_err().iter().map(|error| error.line).collect();
    assert_eq!(lines, [2, 9, 13]);
}

#[test]
fn missing_sections_are_said_once_each() {
    let errors = parse("").unwrap_err();
    let fields: Vec<&str> = errors.iter().map(|error| error.field.as_str()).collect();
    assert_eq!(fields, ["member", "cluster", "forwarder", "service"]);
}

#[test]
fn a_file_that_is_not_there_is_one_sentence() {
    let errors = Config::load(Path::new("/nonexistent/phalanx.toml")).unwrap_err();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].to_string().contains("check the path"), "{}", errors[0]);
}

#[test]
fn digests_name_the_field_that_differs_and_nothing_else() {
    let ours = good(EXAMPLE).cluster_digests();
    let other = |from: &str, to: &str| {
        assert!(EXAMPLE.contains(from));
        good(&EXAMPLE.replacen(from, to, 1)).cluster_digests()
    };
    assert_eq!(ours.differences(&other("00112233", "10112233")), ["cluster.hash_seed"]);
    assert_eq!(ours.differences(&other("\"rendezvous\"", "\"crc8-highest\"")), ["cluster.scoring", "rows"]);
    assert_eq!(ours.differences(&other("backups = 1", "backups = 2")), ["cluster.backups"]);
    assert_eq!(ours.differences(&other("port = 80", "port = 81")), ["service"]);
    assert_eq!(ours.differences(&other("port = 53", "port = 54")), ["service"]);
    let (shared, sites) = (ours.shared(), other("backup_site = \"any\"", "backup_site = \"other\"").shared());
    assert_ne!(shared.backup_site, sites.backup_site);
    assert_eq!(Shared { backup_site: shared.backup_site, ..sites }, shared);
    assert_ne!(shared.services, other("port = 80", "port = 81").shared().services);
    assert!(
        ![shared.hash_seed, shared.scoring, shared.rows, shared.handoff_port].contains(&Digest::default())
    );
    // What may differ.
    for (from, to) in [("id = 1 ", "id = 2 "), ("eth0", "eth0"), ("15m", "16m"), ("7947", "7948")] {
        assert_eq!(ours, other(from, to), "{from}");
    }
    let backends = other("10.0.2.21", "10.0.2.29");
    assert_eq!(ours.differences(&backends), [""; 0]);
    assert_ne!(ours.backends, backends.backends);
    assert_ne!(ours.backends, other("drain = false", "drain = true").backends);
}

#[test]
fn the_order_of_services_does_not_count_in_digests() {
    let service = |name: &str, port: u16| {
        SMALL[SMALL.find("[[service]]").unwrap()..].replace("web", name).replace("80", &port.to_string())
    };
    let head = &SMALL[..SMALL.find("[[service]]").unwrap()];
    let one = good(&format!("{head}{}{}", service("a", 80), service("b", 81))).cluster_digests();
    let two = good(&format!("{head}{}{}", service("b", 81), service("a", 80))).cluster_digests();
    assert_eq!(one, two);
}

#[test]
fn a_reload_changes_services_and_weight_only() {
    let old = good(SMALL);
    let new = |from: &str, to: &str| good(&SMALL.replacen(from, to, 1));
    assert_eq!(old.needs_restart(&new("10.0.2.21", "10.0.2.22")), [""; 0]);
    assert_eq!(old.needs_restart(&new("id = 1", "id = 1\nweight = 50")), [""; 0]);
    assert_eq!(old.needs_restart(&new("id = 1", "id = 2")), ["[member]"]);
    assert_eq!(old.needs_restart(&new("[forwarder]", "[forwarder]\nthreads = 2")), ["[forwarder]"]);
}
