//! Health checks against the kernel: marked sockets, the TUN device, replies straight from the service's address.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use phalanx::config::{ClusterKey, Config, Environment};
use phalanx::health::{HealthChange, HealthDriver, ProbeSender};
use phalanx::keys::KeyFileError;
use phalanx::lab::netns::Netns;
use phalanx_flow::BackendId;
use phalanx_netlink::{Address, Lookup, Netlink, NextHop, Route, Veth};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// The mark of checks, as `health/path.rs` has it.
const MARK: u32 = 0x5058_0001;

struct Anything;

impl Environment for Anything {
    fn interface_exists(&self, _: &str) -> bool {
        true
    }

    fn read_keys(&self, _: &Path) -> Result<Vec<ClusterKey>, KeyFileError> {
        Ok(vec![ClusterKey([0; 32])])
    }
}

/// A forwarder with one backend: it routes what is for that one, and drops what is for others, though the route exists.
struct Router {
    backend: IpAddr,
    socket: Socket,
}

impl ProbeSender for Router {
    fn send_probe(&self, backend: BackendId, ip_packet: &[u8]) {
        if backend.ip() == self.backend {
            let to = SocketAddr::from((<[u8; 4]>::try_from(&ip_packet[16..20]).expect("4 bytes"), 0));
            let _ = self.socket.send_to(ip_packet, &to.into());
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn config(backends: &[&str], kind: &str) -> Config {
    let mut text = format!(
        r#"
        [member]
        id = 1
        address = "10.0.0.1"
        [cluster]
        name = "test"
        key_file = "x"
        hash_seed = "00112233445566778899aabbccddeeff"
        [forwarder]
        interfaces = ["eth0"]
        [[service]]
        name = "web"
        address = "192.0.2.1"
        port = 80
        method = "l2"
        [service.health]
        {kind}
        interval = "100ms"
        timeout = "100ms"
        rise = 2
        fall = 3
        "#
    );
    for backend in backends {
        text.push_str(&format!("[[service.backend]]\naddress = \"{backend}\"\n"));
    }
    Config::parse(Path::new("test.toml"), &text, &Anything).unwrap_or_else(|errors| panic!("{errors:?}"))
}

/// A member's namespace and a backend's, joined by a veth pair. The backend has 192.0.2.1.
fn pair() -> (Netns, Netns) {
    let member = Netns::new("member").expect("a namespace: these tests need root");
    let backend = Netns::new("backend").expect("a namespace");
    member
        .enter(|| {
            use std::os::fd::AsFd as _;
            let mut netlink = Netlink::open().expect("open");
            let veth = Veth {
                name: "eth0",
                peer: "eth0",
                peer_netns: Some(backend.as_fd()),
                mtu: None,
                mac: None,
                peer_mac: None,
            };
            netlink.create_veth(&veth).expect("veth");
            let index = netlink.link("eth0").expect("eth0").index;
            netlink.add_address(&Address { index, address: ip("10.0.0.1"), prefix: 24 }).expect("address");
            netlink.set_up(index).expect("up");
            netlink
                .add_route(&Route::new(ip("192.0.2.1"), 32, vec![NextHop::via(index, ip("10.0.0.2"))]))
                .expect("route");
        })
        .expect("enter");
    backend
        .enter(|| {
            let mut netlink = Netlink::open().expect("open");
            let index = netlink.link("eth0").expect("eth0").index;
            let loopback = netlink.link("lo").expect("lo").index;
            netlink.add_address(&Address { index, address: ip("10.0.0.2"), prefix: 24 }).expect("address");
            let vip = Address { index: loopback, address: ip("192.0.2.1"), prefix: 32 };
            netlink.add_address(&vip).expect("service address");
            netlink.set_up(loopback).expect("up");
            netlink.set_up(index).expect("up");
        })
        .expect("enter");
    (member, backend)
}

/// Serves HTTP on the service's address until the test ends; status 200 while `good`, else 503.
fn serve(backend: &Netns, good: Arc<AtomicBool>) {
    let listener: TcpListener =
        backend.enter(|| TcpListener::bind("192.0.2.1:80").expect("bind")).expect("enter");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
            let _ = stream.read(&mut [0; 1024]);
            let line = if good.load(Ordering::Relaxed) { "200 OK" } else { "503 Busy" };
            let _ = stream.write_all(format!("HTTP/1.1 {line}\r\ncontent-length: 0\r\n\r\n").as_bytes());
        }
    });
}

fn in_runtime<T: Send>(member: &Netns, body: impl AsyncFnOnce() -> T + Send) -> T {
    let run = || {
        // One thread: the others would be in another namespace.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(body())
    };
    member.enter(run).expect("enter")
}

fn router(backend: &str) -> Arc<Router> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).expect("raw");
    Arc::new(Router { backend: ip(backend), socket })
}

async fn next(changes: &mut mpsc::UnboundedReceiver<HealthChange>) -> HealthChange {
    timeout(Duration::from_secs(5), changes.recv()).await.expect("a change in time").expect("a change")
}

#[test]
fn a_check_goes_through_the_forwarder_to_its_own_backend_and_no_other() {
    let (member, backend) = pair();
    let good = Arc::new(AtomicBool::new(true));
    serve(&backend, Arc::clone(&good));
    in_runtime(&member, async || {
        let http = "kind = \"http\"\npath = \"/up\"";
        let (sender, mut changes) = mpsc::unbounded_channel();
        let mut driver =
            HealthDriver::start(&config(&["10.0.0.2", "10.0.0.3"], http), router("10.0.0.2"), sender)
                .expect("start");

        // 10.0.0.3 gets no packet, and falls; the other one is served, so nothing is said of it.
        let change = next(&mut changes).await;
        assert_eq!((change.backend.ip(), change.healthy), (ip("10.0.0.3"), false), "{change:?}");
        assert!(change.reason.contains("no answer"), "{change:?}");
        let statuses = driver.statuses();
        assert!(statuses[0].healthy && statuses[0].good > 0 && statuses[0].bad == 0, "{statuses:?}");
        assert!(!statuses[1].healthy && statuses[1].good == 0, "{statuses:?}");

        // The right server with the wrong answer is not healthy, and is again once it answers right.
        good.store(false, Ordering::Relaxed);
        let change = next(&mut changes).await;
        assert_eq!((change.backend.ip(), change.healthy), (ip("10.0.0.2"), false), "{change:?}");
        assert_eq!(change.reason, "status 503 instead of 200");
        good.store(true, Ordering::Relaxed);
        let change = next(&mut changes).await;
        assert_eq!((change.backend.ip(), change.healthy), (ip("10.0.0.2"), true), "{change:?}");

        // A reload with other checks keeps what is known, and forgets who is gone.
        driver.reload(&config(&["10.0.0.2"], "kind = \"tcp\"")).expect("reload");
        let statuses = driver.statuses();
        assert_eq!(statuses.len(), 1);
        assert!(statuses[0].healthy);
        timeout(Duration::from_millis(500), changes.recv()).await.expect_err("tcp goes on being good");
        assert!(driver.statuses()[0].good > 2, "{:?}", driver.statuses());
    });
}

/// The interface that marked packets to the service leave by.
fn way() -> u32 {
    let marked = Lookup { mark: MARK, ..Lookup::to(ip("192.0.2.1")) };
    Netlink::open().expect("open").lookup(&marked).expect("lookup").index
}

#[test]
fn what_was_made_in_the_kernel_goes_with_the_driver_and_is_no_trouble_after_a_crash() {
    let (member, _backend) = pair();
    let eth0 =
        member.enter(|| Netlink::open().expect("open").link("eth0").expect("eth0").index).expect("enter");
    let config = config(&["10.0.0.2"], "kind = \"tcp\"");
    let start = || HealthDriver::start(&config, router("10.0.0.2"), mpsc::unbounded_channel().0);
    in_runtime(&member, async || {
        assert_eq!(way(), eth0);
        let driver = start().expect("start");
        assert_ne!(way(), eth0);
        let second = start().expect_err("another member in this namespace");
        assert!(second.to_string().contains("stop another member"), "{second}");
        // As after SIGKILL: the device goes with the runtime, the rules stay.
        std::mem::forget(driver);
    });
    in_runtime(&member, async || {
        let driver = start().expect("start again");
        assert_ne!(way(), eth0);
        drop(driver);
        assert_eq!(way(), eth0);
    });
    in_runtime(&member, async || {
        drop(start().expect("and again"));
    });
}
