//! A small decapsulator for backends and test hosts whose kernel lacks `ipip` or `fou`.
//!
//! Takes IP in IP (RFC 2003, RFC 2473, RFC 4213) and IP in UDP (GUE version 1: draft-ietf-intarea-gue-09 §3.2, no header of its own)
//! and hands the inner packets to the kernel by a TUN device.
//! The host needs the service's address on loopback, and `rp_filter` off: replies leave by another way than requests come.
//!
//! What it does not do: copy the ECN field of the outer header (RFC 6040), reassemble what the kernel does not reassemble.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, Result};
use phalanx_netlink::Netlink;
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
    /// Name of the TUN device to make; it goes when this process ends.
    #[arg(long, value_name = "NAME", default_value = "phx-decap")]
    pub tun: String,
    /// UDP port for packets sent with method "gue".
    #[arg(long, value_name = "PORT", default_value_t = 6080)]
    pub gue_port: u16,
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
        }
        socket
            .bind(&address.into())
            .with_context(|| format!("cannot take UDP port {}: is a kernel fou on it?", args.gue_port))?;
        sources.push(Source::new(socket, Header::None)?);
    }
    let mut tun = open_tun(&args.tun)?;
    let mut netlink = Netlink::open()?;
    let link = netlink.link(&args.tun)?;
    netlink.set_up(link.index)?;
    pump(&mut sources, &mut tun)
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

fn pump(sources: &mut [Source], tun: &mut File) -> Result<()> {
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
                    let _ = tun.write(inner);
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
