//! The way a check's packets take out of the kernel: marked sockets, a rule, a TUN device.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use phalanx_flow::BackendId;
use phalanx_netlink::{Family, Netlink, NextHop, Route, Rule};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use super::driver::Ports;

/// Name of the TUN device. It goes with the process.
pub(super) const DEVICE: &str = "phx-check";
/// The mark on the packets of checks: "PX" in the upper half, so that small marks stay free for the operator.
pub(super) const MARK: u32 = 0x5058_0001;
/// The routing table they use, and the priority of the rule that says so (before the main table's 32,766).
const TABLE: u32 = 0x5058;
const PRIORITY: u32 = 1000;
/// MTU of the device, in bytes: the least that IPv6 allows (RFC 8200 §5), so that checks fit into every tunnel.
const MTU: u32 = 1280;

/// Why checks cannot be made at all. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// No TUN device: no permission, no such driver, or another daemon has it.
    #[error(
        "health checks need the TUN device {DEVICE} ({0}): run with CAP_NET_ADMIN and /dev/net/tun, stop another member \
         in this network namespace, or remove [service.health]"
    )]
    Device(io::Error),
    /// No rule or route.
    #[error("health checks need a rule and a route of their own ({0}): run with CAP_NET_ADMIN")]
    Route(#[from] phalanx_netlink::Error),
}

/// Makes the device, its routes and the rules. They are found again, and not made twice, after a crash.
pub(super) fn open() -> Result<File, HealthError> {
    let device = open_device().map_err(HealthError::Device)?;
    let mut netlink = Netlink::open()?;
    let index = netlink.link(DEVICE)?.index;
    netlink.set_mtu(index, MTU)?;
    netlink.set_up(index)?;
    for (family, any) in
        [(Family::V4, IpAddr::V4(Ipv4Addr::UNSPECIFIED)), (Family::V6, IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
    {
        let rule = Rule { family, mark: MARK, table: TABLE, priority: PRIORITY };
        let mut route = Route::new(any, 0, vec![NextHop::direct(index)]);
        route.table = TABLE;
        // Rules outlive a daemon that was killed.
        let _ = netlink.delete_rule(&rule);
        let made = netlink.replace_route(&route).and_then(|()| netlink.add_rule(&rule));
        match (made, family) {
            (Ok(()), _) => {}
            (Err(error), Family::V4) => return Err(error.into()),
            // A kernel without IPv6 has no IPv6 services to check.
            (Err(error), Family::V6) => tracing::debug!(%error, "no health checks over IPv6"),
        }
    }
    Ok(device)
}

/// Removes the rules; the device and its routes go with the file.
pub(super) fn close() {
    if let Ok(mut netlink) = Netlink::open() {
        for family in [Family::V4, Family::V6] {
            let _ = netlink.delete_rule(&Rule { family, mark: MARK, table: TABLE, priority: PRIORITY });
        }
    }
}

fn open_device() -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data; all zeroes is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, and keeps no pointer to it.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// Connects to `service` through `backend`, from `source` where that is of the same family.
pub(super) async fn connect(
    source: IpAddr,
    service: SocketAddr,
    backend: BackendId,
    ports: &Ports,
) -> io::Result<TcpStream> {
    let (socket, any) = match service {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        SocketAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    };
    SockRef::from(&socket).set_mark(MARK)?;
    let source = if source.is_ipv4() == service.is_ipv4() { source } else { any };
    socket.bind(SocketAddr::new(source, 0))?;
    // The port must be known before the first packet leaves.
    ports.assign(socket.local_addr()?.port(), backend);
    socket.connect(service).await
}

/// The source port of a TCP packet in IPv4 or IPv6 without options, as the kernel makes them here.
pub(super) fn source_port(packet: &[u8]) -> Option<u16> {
    let first = *packet.first()?;
    let (protocol, transport) = match first >> 4 {
        4 => (*packet.get(9)?, usize::from(first & 0x0f) * 4),
        6 => (*packet.get(6)?, 40),
        _ => return None,
    };
    if protocol != phalanx_flow::key::TCP {
        return None;
    }
    let port = packet.get(transport..transport.checked_add(2)?)?;
    Some(u16::from_be_bytes([port[0], port[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(ihl: u8, protocol: u8) -> Vec<u8> {
        let mut packet = vec![0; 64];
        packet[0] = 0x40 | ihl;
        packet[9] = protocol;
        packet[usize::from(ihl) * 4..][..2].copy_from_slice(&[0x12, 0x34]);
        packet
    }

    #[test]
    fn the_source_port_is_found_in_both_families() {
        assert_eq!(source_port(&v4(5, 6)), Some(0x1234));
        assert_eq!(source_port(&v4(7, 6)), Some(0x1234));
        let mut v6 = vec![0; 60];
        v6[0] = 0x60;
        v6[6] = 6;
        v6[40..42].copy_from_slice(&[0x56, 0x78]);
        assert_eq!(source_port(&v6), Some(0x5678));
    }

    #[test]
    fn what_is_no_tcp_packet_has_no_port() {
        assert_eq!(source_port(&v4(5, 17)), None, "router solicitations and the like leave a TUN device too");
        assert_eq!(source_port(&v4(5, 6)[..21]), None);
        assert_eq!(source_port(&[]), None);
        assert_eq!(source_port(&[0x00; 64]), None);
        assert_eq!(source_port(&[0x60; 41]), None);
    }
}
