//! A small decapsulator for backends and test hosts whose kernel lacks `ipip` or `fou`.
//!
//! Takes IP in IP (RFC 2003, RFC 2473, RFC 4213) and IP in UDP (GUE version 1: draft-ietf-intarea-gue-09 §3.2, no header of its own)
//! and hands the inner packets to the kernel by a TUN device, or, where TUN may not be used (a user namespace), by one end of a veth pair.
//! The host needs the service's address on loopback, and `rp_filter` off: replies leave by another way than requests come.
//!
//! What it does not do: copy the ECN field of the outer header (RFC 6040), reassemble what the kernel does not reassemble.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, Result};
use phalanx_netlink::{Netlink, Veth};
use socket2::{Domain, Protocol, Socket, Type};

/// IP protocol numbers: IPv4 and IPv6 as payload.
const IPPROTO_IPIP: i32 = 4;
const IPPROTO_IPV6: i32 = 41;
/// Largest packet an IP header can announce, and some.
const PACKET_BYTES: usize = 66 * 1024;
/// Packets taken from one socket before the next is looked at, so that none starves.
const BURST: usize = 64;
/// Room for a burst of thousands of connections that all send at once.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// How `phalanx decap` is called.
#[derive(Clone, Debug, clap::Args)]
pub struct DecapArgs {
    /// Name of the device to make, by which the inner packets come in; at most 14 bytes.
    #[arg(long, value_name = "NAME", default_value = "phx-decap")]
    pub device: String,
    /// What device to make: tun goes when this process ends; veth does not, and needs no /dev/net/tun.
    #[arg(long, value_enum, default_value_t)]
    pub kind: DeviceKind,
    /// UDP port for packets sent with method "gue".
    #[arg(long, value_name = "PORT", default_value_t = 6080)]
    pub gue_port: u16,
}

/// How inner packets come to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceKind {
    /// A TUN device, or else a veth pair.
    #[default]
    Auto,
    /// A TUN device.
    Tun,
    /// A veth pair.
    Veth,
}

/// Decapsulates until the process is ended.
pub fn run(args: &DecapArgs) -> Result<()> {
    let mut sources = Vec::new();
    for protocol in [IPPROTO_IPIP, IPPROTO_IPV6] {
        for (domain, header) in [(Domain::IPV4, Header::V4), (Domain::IPV6, Header::None)] {
            let socket =
                Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).with_context(|| {
                    format!(
                        "cannot open a raw socket for IP protocol {protocol}: run as root or with CAP_NET_RAW"
                    )
                })?;
            sources.push(Source::new(socket, header)?);
        }
    }
    let any = [
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, args.gue_port)),
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, args.gue_port)),
    ];
    for address in any {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            take_without_checksum(&socket).context("cannot take UDP over IPv6 without checksums")?;
        }
        socket
            .bind(&address.into())
            .with_context(|| format!("cannot take UDP port {}: is a kernel fou on it?", args.gue_port))?;
        sources.push(Source::new(socket, Header::None)?);
    }
    let mut sink = Sink::open(args)?;
    pump(&mut sources, &mut sink)
}

/// Lets an IPv6 UDP socket receive datagrams without a checksum, as tunnels send them (RFC 6935 §5): the packet inside has its own.
fn take_without_checksum(socket: &Socket) -> io::Result<()> {
    /// include/uapi/linux/udp.h
    const UDP_NO_CHECK6_RX: libc::c_int = 102;
    let on: libc::c_int = 1;
    // SAFETY: the pointer and length are those of `on`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            UDP_NO_CHECK6_RX,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What stands before the inner packet in what a socket gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Header {
    /// The outer IPv4 header (raw(7)).
    V4,
    /// Nothing: raw IPv6 and UDP sockets take it off.
    None,
}

struct Source {
    socket: Socket,
    header: Header,
}

impl Source {
    fn new(socket: Socket, header: Header) -> Result<Self> {
        socket.set_nonblocking(true)?;
        // More than the system allows is cut to what it allows.
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        Ok(Self { socket, header })
    }
}

fn pump(sources: &mut [Source], sink: &mut Sink) -> Result<()> {
    let mut polls: Vec<libc::pollfd> = sources
        .iter()
        .map(|source| libc::pollfd { fd: source.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 })
        .collect();
    let mut packet = vec![0; PACKET_BYTES];
    loop {
        wait(&mut polls)?;
        for (source, poll) in sources.iter_mut().zip(&polls) {
            if poll.revents == 0 {
                continue;
            }
            for _ in 0..BURST {
                let length = match source.socket.read(&mut packet) {
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // A raw or UDP socket also reports ICMP errors about packets sent; none are.
                    Err(_) => continue,
                };
                if let Some(inner) = inner(source.header, &packet[..length]) {
                    // A packet the kernel refuses (its own checks, a device going down) is a packet lost, as on any link.
                    let _ = sink.deliver(inner);
                }
            }
        }
    }
}

fn wait(polls: &mut [libc::pollfd]) -> Result<()> {
    loop {
        // SAFETY: the pointer and the count are those of one live slice.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) };
        if ready >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error).context("cannot wait for packets");
        }
    }
}

/// The inner packet, if there is one whose first byte says IPv4 or IPv6 and whose length fits.
fn inner(header: Header, packet: &[u8]) -> Option<&[u8]> {
    let inner = match header {
        Header::None => packet,
        Header::V4 => {
            let words = usize::from(packet.first()? & 0x0f);
            packet.get(words.checked_mul(4).filter(|length| *length >= 20)?..)?
        }
    };
    let minimum = match inner.first()? >> 4 {
        4 => 20,
        6 => 40,
        _ => return None,
    };
    (inner.len() >= minimum).then_some(inner)
}

/// Where inner packets go.
enum Sink {
    Tun(File),
    /// Sends to one end of a veth pair what shall come in by the other.
    Veth {
        socket: Socket,
        address: libc::sockaddr_ll,
    },
}

impl Sink {
    fn open(args: &DecapArgs) -> Result<Self> {
        let mut netlink = Netlink::open()?;
        let sink = match args.kind {
            DeviceKind::Tun => Self::Tun(open_tun(&args.device)?),
            DeviceKind::Veth => Self::open_veth(&mut netlink, &args.device)?,
            DeviceKind::Auto => match open_tun(&args.device) {
                Ok(tun) => Self::Tun(tun),
                Err(reason) => Self::open_veth(&mut netlink, &args.device)
                    .with_context(|| format!("neither TUN ({reason:#}) nor veth can be used"))?,
            },
        };
        let link = netlink.link(&args.device)?;
        netlink.set_up(link.index)?;
        Ok(sink)
    }

    fn open_veth(netlink: &mut Netlink, name: &str) -> Result<Self> {
        let feeder = format!("{name}0");
        // One left behind by an earlier start is as good as a new one.
        match netlink.create_veth(&Veth {
            name,
            peer: &feeder,
            peer_netns: None,
            mtu: Some(VETH_MTU),
            mac: None,
            peer_mac: None,
        }) {
            Err(error) if !error.is_exists() => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        let mac = netlink.link(name)?.mac.context("the veth has no hardware address")?;
        let feeder = netlink.link(&feeder)?;
        netlink.set_up(feeder.index)?;
        // Protocol 0: it only sends, and receives nothing.
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        // SAFETY: sockaddr_ll is plain old data, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = feeder.index.cast_signed();
        address.sll_halen = 6;
        address.sll_addr[..6].copy_from_slice(&mac.0);
        Ok(Self::Veth { socket, address })
    }

    fn deliver(&mut self, inner: &[u8]) -> io::Result<()> {
        match self {
            Self::Tun(tun) => tun.write(inner).map(drop),
            Self::Veth { socket, address } => {
                let version = inner.first().map_or(0, |first| first >> 4);
                let protocol = if version == 6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP };
                address.sll_protocol = (protocol as u16).to_be();
                // SAFETY: packet and address are live, and their lengths are those given.
                let sent = unsafe {
                    libc::sendto(
                        socket.as_raw_fd(),
                        inner.as_ptr().cast(),
                        inner.len(),
                        libc::MSG_DONTWAIT,
                        std::ptr::from_ref(address).cast(),
                        size_of::<libc::sockaddr_ll>() as libc::socklen_t,
                    )
                };
                if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            }
        }
    }
}

/// The largest MTU of a veth, in bytes: whatever came through the tunnel must pass.
const VETH_MTU: u32 = 65_535;

/// `TUNSETIFF` and its flags, include/uapi/linux/if_tun.h.
const TUNSETIFF: u64 = 0x4004_54ca;
const IFF_TUN: i16 = 0x0001;
const IFF_NO_PI: i16 = 0x1000;

fn open_tun(name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun: the kernel lacks TUN, or you may not use it")?;
    // SAFETY: ifreq is plain old data, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
    tun_ioctl(file.as_raw_fd(), &mut request)
        .with_context(|| format!("cannot make the TUN device {name}"))?;
    Ok(file)
}

fn tun_ioctl(fd: RawFd, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes one ifreq, which is live and borrowed for the call.
    if unsafe { libc::ioctl(fd, TUNSETIFF as _, std::ptr::from_mut(request)) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_header_is_taken_off_whatever_its_length() {
        for words in [5u8, 6, 15] {
            let mut packet = vec![0x40 | words];
            packet.resize(usize::from(words) * 4, 0);
            packet.push(0x45);
            packet.resize(packet.len() + 19, 7);
            let inner = inner(Header::V4, &packet).unwrap();
            assert_eq!((inner.len(), inner[0], inner[19]), (20, 0x45, 7));
        }
    }

    #[test]
    fn what_is_no_packet_is_dropped() {
        let mut v6 = vec![0x60];
        v6.resize(40, 0);
        assert!(inner(Header::None, &v6).is_some());
        // Twins: one byte short, another version, nothing, an outer header that lies.
        assert!(inner(Header::None, &v6[..39]).is_none());
        v6[0] = 0x50;
        assert!(inner(Header::None, &v6).is_none());
        assert!(inner(Header::None, &[]).is_none());
        assert!(inner(Header::V4, &[]).is_none());
        assert!(inner(Header::V4, &[0x44; 40]).is_none());
        assert!(inner(Header::V4, &[0x4f; 59]).is_none());
    }
}
