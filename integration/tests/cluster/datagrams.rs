//! A service for datagrams: whoever sends from one address and port always reaches the same server.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use phalanx::lab::{Action, Lab, LabOptions};
use phalanx_integration::{at, site};

const CLIENTS: usize = 300;
/// Time between two datagrams of a client, and how many of them before and after each event.
const PERIOD: Duration = Duration::from_millis(50);
const ROUNDS: usize = 10;
const ROUNDS_AFTER_DEATH: usize = 80;

/// Answers every datagram with the backend's number and what came, until told to stop.
fn serve(lab: &Lab, stop: &Arc<AtomicBool>) -> Vec<thread::JoinHandle<()>> {
    let target = lab.world().target();
    lab.world()
        .backends
        .iter()
        .map(|host| {
            let socket = host.netns.enter(|| UdpSocket::bind(target)).expect("enter").expect("bind");
            socket.set_read_timeout(Some(PERIOD)).expect("a timeout");
            let (number, stop) = (host.number, stop.clone());
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut buffer[4..]) else { continue };
                    buffer[..4].copy_from_slice(&number.to_be_bytes());
                    // The client may have gone.
                    let _ = socket.send_to(&buffer[..4 + length], from);
                }
            })
        })
        .collect()
}

struct Client {
    socket: UdpSocket,
    first: Option<u32>,
    moved: bool,
    /// Number of the last datagram that was answered.
    answered: u32,
}

impl Client {
    fn new(target: SocketAddr) -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.connect(target).expect("connect");
        socket.set_nonblocking(true).expect("nonblocking");
        Self { socket, first: None, moved: false, answered: 0 }
    }

    fn exchange(&mut self, number: u32) {
        let mut buffer = [0; 64];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            assert_eq!(length, 8, "an answer is a backend's number and what was sent");
            let [a, b, c, d, w, x, y, z] = *buffer.first_chunk().expect("8 bytes");
            let backend = u32::from_be_bytes([a, b, c, d]);
            let echoed = u32::from_be_bytes([w, x, y, z]);
            assert!(echoed < number, "an answer to what was never asked");
            self.answered = self.answered.max(echoed);
            self.moved |= *self.first.get_or_insert(backend) != backend;
        }
        // A full queue or an ICMP error is a datagram lost, and those are allowed.
        let _ = self.socket.send(&number.to_be_bytes());
    }
}

struct Outcome {
    moved: usize,
    silent: usize,
    on_drained: usize,
}

fn run(replication: bool) -> Outcome {
    let mut lab = Lab::new(LabOptions {
        udp: true,
        traffic: false,
        replication,
        // Never carried out by the lab: they make two more hosts for backends.
        ..site(0, &[at(3600.0, Action::AddBackend(None)), at(3600.0, Action::AddBackend(None))])
    })
    .expect("a site");
    let stop = Arc::new(AtomicBool::new(false));
    let servers = serve(&lab, &stop);
    lab.start_members().expect("a cluster");
    let target = lab.world().target();
    let mut clients: Vec<Client> =
        lab.world().client.enter(|| (0..CLIENTS).map(|_| Client::new(target)).collect()).expect("enter");
    let mut number = 0;
    let mut rounds = |lab: &mut Lab, clients: &mut [Client], count: usize| {
        for _ in 0..count {
            number += 1;
            clients.iter_mut().for_each(|client| client.exchange(number));
            lab.poll().expect("poll");
            sleep(PERIOD);
        }
        number
    };
    rounds(&mut lab, &mut clients, ROUNDS);
    let on_drained = clients.iter().filter(|client| client.first == Some(1)).count();
    for action in [Action::AddBackend(None), Action::AddBackend(None), Action::DrainBackend(1)] {
        lab.carry_out(action).expect("done");
        rounds(&mut lab, &mut clients, ROUNDS);
    }
    lab.carry_out(Action::Kill(2)).expect("killed");
    let last = rounds(&mut lab, &mut clients, ROUNDS_AFTER_DEATH);
    stop.store(true, Ordering::Relaxed);
    servers.into_iter().for_each(|server| server.join().expect("a server"));
    assert_eq!(lab.problems(), [""; 0]);
    Outcome {
        moved: clients.iter().filter(|client| client.moved).count(),
        silent: clients.iter().filter(|client| client.answered + 20 < last).count(),
        on_drained,
    }
}

#[test]
fn datagrams_stay_with_their_server_when_backends_change_and_a_member_dies() {
    let outcome = run(true);
    assert!(outcome.on_drained * 5 > CLIENTS, "{} clients on the drained backend", outcome.on_drained);
    assert_eq!(outcome.moved, 0, "clients whose server changed");
    assert_eq!(outcome.silent, 0, "clients without an answer in the last second");
}

#[test]
fn datagrams_change_their_server_without_replication() {
    let outcome = run(false);
    assert!(outcome.moved > 0, "no server changed: the other test proves nothing");
    assert_eq!(outcome.silent, 0, "clients without an answer in the last second");
}
