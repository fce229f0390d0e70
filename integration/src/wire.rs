//! One real interface for a forwarder, in network namespaces, with a packet socket at the other end of its cable.
//!
//! ```text
//!  host: eth0, 10.0.0.1, OUR_MAC ═════ veth ═════ eth0: the world, all of it behind one packet socket
//!   forwarder's frames ─► ROUTER_MAC      kernel's packets to clients ─► CLIENTS_MAC      what the kernel forwards ─► KERNEL_MAC
//! ```
//!
//! The host forwards (`ip_forward = 1`) and has a route to the services, so that a packet which the kernel handles beside the
//! forwarder comes out a second time, and is counted.

use std::io::{self, ErrorKind, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use phalanx::lab::netns::Netns;
use phalanx_forwarder::Counters;
use phalanx_forwarder::conformance::Emitted;
use phalanx_forwarder::conformance::frames::{OUR_MAC, ROUTER_MAC};
use phalanx_netlink::{Address, Mac, NextHop, Route, Veth};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Where the host's routes to the clients lead.
pub const CLIENTS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
/// Where the host's routes to everything else lead, the services' addresses included.
pub const KERNEL_MAC: [u8; 6] = [2, 0, 0, 0, 0, 4];
/// The interface at both ends.
pub const INTERFACE: &str = "eth0";

/// The largest frame that a packet socket is handed: a merged one.
const FRAME_BYTES: usize = 66 << 10;
/// How long an exchange waits for what it expects. Far more than it takes on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it waits for frames to be counted that the forwarder may never see, because its filter leaves them to the kernel.
const UNSEEN: Duration = Duration::from_millis(150);
/// How long the interface must be silent before an exchange ends: a second copy of a frame comes with the first.
const SILENCE: Duration = Duration::from_millis(5);

/// The cable and its two ends.
#[derive(Debug)]
pub struct Wire {
    host: Netns,
    _far: Netns,
    index: u32,
    socket: Socket,
    by_kernel: AtomicU64,
}

impl Wire {
    /// A host and its cable. Needs root.
    ///
    /// # Panics
    /// If they cannot be made: it is part of a test.
    pub fn new() -> Self {
        let host = Netns::new("host").expect("these tests need root");
        let far = Netns::new("far").expect("a namespace");
        for netns in [&host, &far] {
            netns
                .sysctl(&[
                    ("net/ipv6/conf/default/accept_dad", "0"),
                    ("net/ipv6/conf/default/accept_ra", "0"),
                    ("net/ipv4/conf/all/rp_filter", "0"),
                    ("net/ipv4/conf/default/rp_filter", "0"),
                    ("net/ipv4/conf/all/send_redirects", "0"),
                    ("net/ipv4/conf/default/send_redirects", "0"),
                    ("net/ipv4/conf/all/forwarding", "1"),
                    ("net/ipv4/conf/default/forwarding", "1"),
                    ("net/ipv6/conf/all/forwarding", "1"),
                ])
                .expect("sysctl");
        }
        let mut netlink = host.netlink().expect("netlink");
        let veth = Veth {
            name: INTERFACE,
            peer: INTERFACE,
            peer_netns: Some(far.as_fd()),
            mtu: Some(9000),
            mac: Some(Mac(OUR_MAC)),
            peer_mac: Some(Mac(ROUTER_MAC)),
        };
        netlink.create_veth(&veth).expect("veth");
        let index = netlink.link(INTERFACE).expect("eth0").index;
        let mut far_netlink = far.netlink().expect("netlink");
        let far_index = far_netlink.link(INTERFACE).expect("eth0").index;
        netlink.set_up(index).expect("up");
        far_netlink.set_up(far_index).expect("up");
        for (address, prefix) in [("10.0.0.1", 24), ("fd00::1", 64)] {
            netlink.add_address(&Address { index, address: ip(address), prefix }).expect("address");
        }
        for (gateway, mac) in [
            ("10.0.0.253", CLIENTS_MAC),
            ("fd00::fd", CLIENTS_MAC),
            ("10.0.0.254", KERNEL_MAC),
            ("fd00::fe", KERNEL_MAC),
        ] {
            netlink.set_neighbour(index, ip(gateway), Mac(mac)).expect("neighbour");
        }
        for (destination, prefix, gateway) in [
            ("10.9.0.0", 16, "10.0.0.253"),
            ("2001:db8:9::", 48, "fd00::fd"),
            ("0.0.0.0", 0, "10.0.0.254"),
            ("::", 0, "fd00::fe"),
        ] {
            let hop = NextHop::via(index, ip(gateway));
            netlink.add_route(&Route::new(ip(destination), prefix, vec![hop])).expect("route");
        }
        let socket = far.enter(|| packet_socket(far_index)).expect("enter").expect("a packet socket");
        Self { host, _far: far, index, socket, by_kernel: AtomicU64::new(0) }
    }

    /// The forwarder's side.
    pub fn host(&self) -> &Netns {
        &self.host
    }

    /// The number of the forwarder's interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Frames that the kernel forwarded beside the forwarder, so far.
    pub fn by_kernel(&self) -> u64 {
        self.by_kernel.load(Ordering::Relaxed)
    }

    /// Puts a frame on the cable.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn send(&self, frame: &[u8]) {
        let sent =
            (&self.socket).write(frame).unwrap_or_else(|error| panic!("{} bytes: {error}", frame.len()));
        assert_eq!(sent, frame.len());
    }

    /// Sends frames to the forwarder and collects what comes out: waits for `expected` frames, and for `count` to have grown by as
    /// many as were sent; what the forwarder does not see it cannot count, so that is not waited for as long.
    pub fn exchange(&self, frames: &[Vec<u8>], expected: usize, count: &dyn Fn() -> u64) -> Vec<Emitted> {
        let before = count();
        for frame in frames {
            self.send(frame);
        }
        let start = Instant::now();
        let mut emitted = Vec::new();
        while start.elapsed() < PATIENCE {
            self.receive(&mut emitted);
            let counted = count() - before >= frames.len() as u64;
            if emitted.len() >= expected && (counted || start.elapsed() >= UNSEEN) {
                break;
            }
        }
        while self.receive(&mut emitted) {}
        emitted
    }

    /// Takes frames from the cable until it is silent; whether there were any.
    fn receive(&self, emitted: &mut Vec<Emitted>) -> bool {
        let mut buffer = vec![0; FRAME_BYTES];
        let mut any = false;
        loop {
            let frame = match receive_one(&self.socket, &mut buffer) {
                Ok(frame) => frame,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return any;
                }
                Err(error) => panic!("the packet socket: {error}"),
            };
            any = true;
            match frame.first_chunk() {
                Some(&ROUTER_MAC) => emitted.push(Emitted::Frame(frame)),
                Some(&CLIENTS_MAC) => emitted.push(Emitted::ToClient(frame[14..].to_vec())),
                Some(&KERNEL_MAC) => {
                    self.by_kernel.fetch_add(1, Ordering::Relaxed);
                }
                // The host's own: neighbour discovery and the like.
                _ => {}
            }
        }
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self::new()
    }
}

/// How many packets a forwarder has seen.
pub fn seen(counters: &Counters) -> u64 {
    counters.outcomes.iter().sum()
}

/// An address.
///
/// # Panics
/// If it is none.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A packet socket on one interface of the calling thread's namespace.
fn packet_socket(interface: u32) -> io::Result<Socket> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(protocol))))?;
    // SAFETY: a `sockaddr_ll` is written whole where there is room for any address, and its length is said.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = interface.cast_signed();
            storage.cast::<libc::sockaddr_ll>().write(address);
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    socket.bind(&address)?;
    let on: libc::c_int = 1;
    // SAFETY: the pointer and length are those of `on`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_AUXDATA,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    socket.set_recv_buffer_size(8 << 20)?;
    socket.set_read_timeout(Some(SILENCE))?;
    Ok(socket)
}

/// Receives one frame, with the VLAN tag that the kernel takes off and tells apart (packet(7), `PACKET_AUXDATA`)
/// to sockets that have this option.
///
/// # Errors
/// What `recvmsg` says; `WouldBlock` if nothing comes within the socket's timeout.
pub fn receive_one(socket: &Socket, buffer: &mut [u8]) -> io::Result<Vec<u8>> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // Aligned as control messages must be.
    let mut control = [0_u64; 16];
    // SAFETY: all-zero is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message points to the buffer and to the control bytes, with their lengths.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let Ok(length) = usize::try_from(length) else { return Err(io::Error::last_os_error()) };
    let mut frame = buffer[..length].to_vec();
    // SAFETY: the kernel has filled the control bytes and said how many.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: not null, so it is a header within the control bytes.
    if !first.is_null() && unsafe { (*first).cmsg_type } == libc::PACKET_AUXDATA {
        // SAFETY: a message of this type carries this record.
        let told = unsafe { libc::CMSG_DATA(first).cast::<libc::tpacket_auxdata>().read_unaligned() };
        if told.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
            let tag = [told.tp_vlan_tpid.to_be_bytes(), told.tp_vlan_tci.to_be_bytes()].concat();
            frame.splice(12..12, tag);
        }
    }
    Ok(frame)
}
