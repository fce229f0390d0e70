//! Offloads of an interface that would spoil what we receive.

use std::os::fd::AsRawFd;

/// `ETHTOOL_GFLAGS` and `ETH_FLAG_LRO`, include/uapi/linux/ethtool.h.
const GET_FLAGS: u32 = 0x25;
const LARGE_RECEIVE: u32 = 1 << 15;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether the card merges packets without saying how they were cut (LRO); false where it cannot be asked.
///
/// GRO tells, so that its frames can be cut again.
pub(crate) fn has_large_receive(interface: &str) -> bool {
    let Ok(socket) = std::net::UdpSocket::bind("127.0.0.1:0") else { return false };
    let mut value = Value { command: GET_FLAGS, data: 0 };
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero: the kernel wants the name terminated.
    let room = request.ifr_name.len() - 1;
    for (place, byte) in request.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request names a structure of the size that this command writes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    result == 0 && value.data & LARGE_RECEIVE != 0
}
