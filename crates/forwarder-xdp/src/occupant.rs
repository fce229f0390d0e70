//! Which XDP program an interface has already.

use std::io;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use aya::programs::loaded_programs;
use socket2::{Domain, Protocol, Socket, Type};

use crate::abi::ENTRY;

/// A link that was let go of just now ends when the kernel gets to it.
const GRACE: Duration = Duration::from_millis(500);

/// `IFLA_XDP` and what stands in it (`include/uapi/linux/if_link.h`).
const IFLA_XDP: u16 = 43;
const PROGRAM_IDS: std::ops::RangeInclusive<u16> = 4..=7;
/// `struct nlmsghdr`, `struct ifinfomsg`, `struct rtattr` in bytes.
const HEADER: usize = 16;
const LINK: usize = 16;
const ATTRIBUTE: usize = 4;

/// The program that is attached to an interface of the calling thread's namespace, in words; `None`: there is none.
pub(crate) fn of(index: u32) -> Option<String> {
    let start = Instant::now();
    loop {
        let id = program_id(index).ok().flatten()?;
        let name = name(id);
        if name.as_deref() != Some(ENTRY) || start.elapsed() > GRACE {
            let name = name.unwrap_or_else(|| "without a name".to_owned());
            return Some(format!("program {name}, id {id}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn name(id: u32) -> Option<String> {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id)?;
    program.name_as_str().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// The kernel's number of the XDP program that is attached to an interface of the calling thread's namespace, whoever attached it;
/// `None`: there is none.
pub fn program_id(index: u32) -> io::Result<Option<u32>> {
    let socket =
        Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    // Asks rtnetlink.
    let mut request = Vec::with_capacity(HEADER + LINK);
    request.extend_from_slice(&((HEADER + LINK) as u32).to_ne_bytes());
    request.extend_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request.extend_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // `struct ifinfomsg`: family and type do not count, then the index.
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&index.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    socket.send(&request)?;
    let mut answer = vec![0_u8; 32 << 10];
    // SAFETY: the buffer lives through the call, with its true length.
    let length = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    answer.truncate(length.unsigned_abs());
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    if kind != Some(libc::RTM_NEWLINK) {
        return Ok(None);
    }
    let link = attributes(answer.get(HEADER + LINK..).unwrap_or_default());
    let xdp = link.into_iter().find(|(kind, _)| *kind == IFLA_XDP);
    let ids = xdp.map(|(_, value)| attributes(value)).unwrap_or_default();
    let id = ids.into_iter().filter(|(kind, _)| PROGRAM_IDS.contains(kind)).find_map(|(_, value)| {
        let id = u32::from_ne_bytes(value.get(..4)?.try_into().ok()?);
        (id != 0).then_some(id)
    });
    Ok(id)
}

/// A list of `struct rtattr`s: their types, without flags, and their values.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let Some((head, _)) = bytes.split_first_chunk::<ATTRIBUTE>() {
        let [l0, l1, k0, k1] = *head;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = bytes.get(ATTRIBUTE..length) else { break };
        found.push((u16::from_ne_bytes([k0, k1]) & 0x3fff, value));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_in_turn_and_a_lying_length_ends_the_list() {
        let bytes = [5_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat();
        let bytes = [bytes, vec![7, 0, 0, 0], [9_u16.to_ne_bytes(), 2_u16.to_ne_bytes()].concat()].concat();
        assert_eq!(attributes(&bytes), [(1, &[7][..])]);
        assert_eq!(attributes(&[0, 0, 0, 0]), []);
    }
}
