//! What the path to another host takes, as far as the kernel can learn it (RFC 1191, RFC 8201).

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

/// Where probes go: the discard port (RFC 863), where nobody is disturbed by them.
const DISCARD: u16 = 9;

/// How long a router's "too big" may take to come back.
const WAIT: Duration = Duration::from_millis(300);

/// The path MTU from `source` to `destination` in bytes, probed with a packet of `size` bytes that no router may fragment.
///
/// A router that drops what is too big without a word is not found out; the running daemon finds it by QUIC's own probes (RFC 8899).
pub fn probe(source: IpAddr, destination: IpAddr, size: u16) -> io::Result<u32> {
    let socket = UdpSocket::bind((source, 0))?;
    let (level, discover, mtu, headers) = if destination.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU, 28)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU, 48)
    };
    set_option(&socket, level, discover, libc::IP_PMTUDISC_DO)?;
    socket.connect((destination, DISCARD))?;
    let payload = vec![0; usize::from(size.saturating_sub(headers))];
    // Refused at once where our own interface is too narrow; and by a router's answer, a little later.
    let _ = socket.send(&payload);
    std::thread::sleep(WAIT);
    let _ = socket.send(&payload);
    let path = option(&socket, level, mtu)?;
    Ok(u32::try_from(path).unwrap_or(0))
}

fn set_option(socket: &UdpSocket, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and the kernel reads exactly the four bytes of `value`.
    let status = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size_of::<i32>() as u32)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn option(socket: &UdpSocket, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut length = size_of::<i32>() as u32;
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and the kernel writes at most `length` bytes to `value`.
    let status = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if status == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_takes_more_than_any_hand_off_and_another_family_is_refused() {
        let v4 = IpAddr::from([127, 0, 0, 1]);
        assert!(probe(v4, v4, 1600).unwrap() >= 1600);
        assert!(probe(v4, IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), 1600).is_err());
    }
}
