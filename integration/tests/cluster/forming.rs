//! How a cluster comes to be, and who is not let in.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread::sleep;
use std::time::{Duration, Instant};

use phalanx::lab::{Action, Lab, LabOptions, Topology, metrics};
use phalanx_integration::{at, configuration, poll_until, site};
use serde_json::Value;

/// A cluster without traffic: `members` are started at the same moment, and there is a host for one more.
fn start(members: u32, topology: Topology) -> (Lab, tempfile::TempDir) {
    let keep = tempfile::tempdir().expect("a directory");
    let options = LabOptions {
        members,
        topology,
        traffic: false,
        connections: 0,
        keep: Some(keep.path().to_owned()),
        // Never carried out: it makes a host for one more member.
        ..site(0, &[at(3600.0, Action::Join(None))])
    };
    let mut lab = Lab::new(options).expect("a site");
    lab.start_members().expect("a cluster");
    poll_until(&mut lab, Duration::from_secs(5), "one view", |lab| agree(lab, members as usize));
    (lab, keep)
}

/// What member `number` (from 1) says of the members.
fn said_by(lab: &Lab, number: usize) -> Option<Value> {
    let netns = &lab.world().members[number - 1].netns;
    let (status, body) = metrics::get(netns, "/v1/members").ok()?;
    (status == 200).then(|| serde_json::from_str(&body).expect("JSON"))
}

fn sample(lab: &Lab, number: usize, name: &str) -> f64 {
    let (_, text) = metrics::get(&lab.world().members[number - 1].netns, "/metrics").expect("metrics");
    metrics::samples(&text).filter(|(sample, _)| sample.starts_with(name)).map(|(_, value)| value).sum()
}

/// Every member says the same: `count` active members, one view.
fn agree(lab: &Lab, count: usize) -> bool {
    let mut views = BTreeSet::new();
    for number in 1..=count {
        let Some(said) = said_by(lab, number) else { return false };
        let listed = said["members"].as_array().expect("members");
        let active =
            listed.iter().filter(|member| member["state"] == "active" && member["liveness"] == "alive");
        if active.count() != count {
            return false;
        }
        views.insert(said["view_digest"].as_str().expect("a digest").to_owned());
    }
    views.len() == 1
}

#[test]
fn three_members_started_at_the_same_moment_form_one_cluster() {
    for round in 0..3 {
        let begin = Instant::now();
        let (mut lab, _keep) = start(3, if round == 0 { Topology::Routed } else { Topology::Lan });
        println!("round {round}: one cluster after {:?}", begin.elapsed());
        // It stays one.
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            lab.poll().expect("poll");
            sleep(Duration::from_millis(100));
            assert!(agree(&lab, 3), "{:?}", said_by(&lab, 1));
        }
        assert_eq!(lab.problems(), [""; 0]);
    }
}

/// Starts a fourth member whose configuration is changed in one place, and returns what it said when it was refused.
fn refused(from: &str, to: &str) -> String {
    let (mut lab, keep) = start(3, Topology::Lan);
    configuration(keep.path(), 4, from, to);
    lab.carry_out(Action::Join(Some(4))).expect("start");
    poll_until(&mut lab, Duration::from_secs(10), "a refusal", |lab| !lab.problems().is_empty());
    let said = lab.problems()[0].clone();
    println!("{said}");
    assert!(said.contains("member 4 ended with exit status 2"), "{said}");
    assert!(agree(&lab, 3), "the others go on");
    said
}

#[test]
fn a_joiner_whose_seed_differs_is_refused_by_name() {
    let said = refused("00112233445566778899aabbccddeeff", "10112233445566778899aabbccddeeff");
    assert!(said.contains("cluster.hash_seed") && said.contains("the same on every member"), "{said}");
}

#[test]
fn a_joiner_whose_services_differ_is_refused_by_name() {
    let said = refused("port = 80", "port = 8080");
    assert!(said.contains("service") && said.contains("the same on every member"), "{said}");
}

#[test]
fn a_joiner_whose_scoring_differs_is_refused_by_name() {
    let said = refused("\"rendezvous\"", "\"crc8-lowest\"");
    assert!(said.contains("cluster.scoring") && said.contains("the same on every member"), "{said}");
}

#[test]
fn a_joiner_whose_id_is_in_use_is_refused() {
    let said = refused("id = 4", "id = 2");
    assert!(said.contains("member.id") && said.contains("in use"), "{said}");
}

/// The twin of the refusals: the same member with the right configuration is let in, also when its backends differ, which is
/// said as a warning.
#[test]
fn a_joiner_with_other_backends_is_let_in_with_a_warning() {
    let (mut lab, keep) = start(3, Topology::Lan);
    configuration(keep.path(), 4, "10.0.1.103", "10.0.1.104");
    lab.carry_out(Action::Join(Some(4))).expect("start");
    poll_until(&mut lab, Duration::from_secs(10), "four members", |lab| agree(lab, 4));
    let warns = |lab: &Lab| {
        let said = said_by(lab, 1).expect("an answer");
        said["warnings"]
            .as_array()
            .expect("warnings")
            .iter()
            .any(|warning| warning.to_string().contains("backend"))
    };
    poll_until(&mut lab, Duration::from_secs(15), "a warning", warns);
}

#[test]
fn a_member_with_another_key_is_not_let_in_and_its_datagrams_are_counted() {
    let (mut lab, keep) = start(3, Topology::Lan);
    let before = sample(&lab, 1, "phalanx_gossip_dropped_total{reason=\"foreign\"}");
    let key = keep.path().join("other.key");
    phalanx::keys::generate(&key).expect("a key");
    configuration(keep.path(), 4, "cluster.key", "other.key");
    lab.carry_out(Action::Join(Some(4))).expect("start");
    poll_until(&mut lab, Duration::from_secs(10), "foreign datagrams", |lab| {
        sample(lab, 1, "phalanx_gossip_dropped_total{reason=\"foreign\"}") > before
    });
    sleep(Duration::from_secs(1));
    assert!(agree(&lab, 3), "{:?}", said_by(&lab, 1));
}

#[test]
fn what_is_not_ours_is_dropped_and_counted_and_harms_nobody() {
    let (mut lab, _keep) = start(3, Topology::Lan);
    let target = lab.world().members[0].v4;
    let dropped = |lab: &Lab| sample(lab, 1, "phalanx_gossip_dropped_total");
    let before = dropped(&lab);
    let handoffs = |lab: &Lab| sample(lab, 1, "phalanx_drops_total");
    let handoffs_before = handoffs(&lab);
    lab.world()
        .client
        .enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            // Bytes that follow from their number: short and long, with the hand-off's first bytes and without.
            for number in 0..200u32 {
                let mut bytes: Vec<u8> =
                    (0..number * 7 % 1400).map(|place| (place * 31 + number * 17) as u8).collect();
                if number % 2 == 0 && bytes.len() > 8 {
                    // Geneve with one option of 16 bytes, and Ethernet or IPv4 inside (RFC 8926 §3.4).
                    bytes[..4].copy_from_slice(&[0x05, 0, 0x08, 0x00]);
                }
                for port in [7946, 7947, 6081] {
                    // The kernel may answer that a port is closed; that is well too.
                    let _ = socket.send_to(&bytes, SocketAddr::new(target, port));
                }
            }
            // A stream that says nothing good to the admin port is refused: it listens on loopback only.
            let admin = SocketAddr::new(target, 7980);
            TcpStream::connect_timeout(&admin, Duration::from_secs(1)).expect_err("the admin API is local");
        })
        .expect("enter");
    poll_until(&mut lab, Duration::from_secs(5), "counted datagrams", |lab| {
        dropped(lab) > before + 100.0 && handoffs(lab) > handoffs_before + 50.0
    });
    assert!(agree(&lab, 3), "{:?}", said_by(&lab, 1));
    assert_eq!(lab.problems(), [""; 0]);
}

#[test]
fn a_configuration_that_went_bad_is_refused_on_reload_and_the_old_one_stays() {
    let (mut lab, keep) = start(3, Topology::Lan);
    let reloads =
        |lab: &Lab, result: &str| sample(lab, 1, &format!("phalanx_reloads_total{{result=\"{result}\"}}"));
    configuration(keep.path(), 1, "weight = 100", "weight = -1");
    lab.carry_out(Action::Reload(Some(1))).expect("SIGHUP");
    poll_until(&mut lab, Duration::from_secs(5), "a refused reload", |lab| reloads(lab, "refused") > 0.5);
    assert!(reloads(&lab, "done") < 0.5);
    assert!(agree(&lab, 3));
    configuration(keep.path(), 1, "weight = -1", "weight = 50");
    lab.carry_out(Action::Reload(Some(1))).expect("SIGHUP");
    poll_until(&mut lab, Duration::from_secs(10), "a reload", |lab| reloads(lab, "done") > 0.5);
    poll_until(&mut lab, Duration::from_secs(10), "half the weight everywhere", |lab| {
        (1..=3).all(|number| {
            said_by(lab, number).is_some_and(|said| said["members"][0]["weight"] == 50) && agree(lab, 3)
        })
    });
}
