//! Being told that something changed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::{Error, Result};

/// Multicast groups, include/uapi/linux/rtnetlink.h: links, neighbours, addresses and routes of both families.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
/// Message types, same file: `RTM_NEWLINK` to `RTM_SETLINK`, and so on in groups of four.
const LINK_MESSAGES: std::ops::RangeInclusive<u16> = 16..=19;
const ADDRESS_MESSAGES: std::ops::RangeInclusive<u16> = 20..=22;
const ROUTE_MESSAGES: std::ops::RangeInclusive<u16> = 24..=26;
const NEIGHBOUR_MESSAGES: std::ops::RangeInclusive<u16> = 28..=30;

/// What changed since last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Interfaces came, went, or changed state, name, MTU or hardware address.
    pub links: bool,
    /// Addresses.
    pub addresses: bool,
    /// Routes.
    pub routes: bool,
    /// Neighbours.
    pub neighbours: bool,
}

impl Changes {
    /// Whether anything changed.
    pub const fn any(self) -> bool {
        self.links || self.addresses || self.routes || self.neighbours
    }

    const fn all() -> Self {
        Self { links: true, addresses: true, routes: true, neighbours: true }
    }
}

/// Listens for changes in the network namespace in which it was opened. Needs no privilege.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
}

impl Monitor {
    /// Starts to listen for changes of links, addresses, routes and neighbours.
    pub fn open() -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            for group in [
                RTNLGRP_LINK,
                RTNLGRP_NEIGH,
                RTNLGRP_IPV4_IFADDR,
                RTNLGRP_IPV4_ROUTE,
                RTNLGRP_IPV6_IFADDR,
                RTNLGRP_IPV6_ROUTE,
            ] {
                socket.add_membership(group)?;
            }
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        open()
            .map(|socket| Self { socket })
            .map_err(|source| Error::Socket { operation: "listen for changes".to_owned(), source })
    }

    /// Waits until something changes, at most `timeout`, and says what; nothing if the time ran out.
    ///
    /// Where messages were lost (there were too many), everything counts as changed.
    pub fn wait(&mut self, timeout: Duration) -> Result<Changes> {
        let error = |source| Error::Socket { operation: "listen for changes".to_owned(), source };
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: `poll` is one live pollfd, and its descriptor is open as long as `self` lives.
        let ready = unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
        if ready < 0 {
            let source = io::Error::last_os_error();
            // A signal is no change: the caller looks at its own flags and comes back.
            return if source.kind() == io::ErrorKind::Interrupted {
                Ok(Changes::default())
            } else {
                Err(error(source))
            };
        }
        self.drain().map_err(error)
    }

    /// What changed since last asked, without waiting.
    pub fn poll(&mut self) -> Result<Changes> {
        self.drain().map_err(|source| Error::Socket { operation: "listen for changes".to_owned(), source })
    }

    fn drain(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::default();
        let mut buffer = [0; 32 * 1024];
        loop {
            match self.socket.recv(&mut &mut buffer[..], 0) {
                Ok(length) => note(&buffer[..length.min(buffer.len())], &mut changes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changes = Changes::all(),
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `socket`, which lives as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

/// Reads the types of the messages in a datagram.
fn note(mut datagram: &[u8], changes: &mut Changes) {
    while let [a, b, c, d, e, f, ..] = *datagram {
        match u16::from_ne_bytes([e, f]) {
            kind if LINK_MESSAGES.contains(&kind) => changes.links = true,
            kind if ADDRESS_MESSAGES.contains(&kind) => changes.addresses = true,
            kind if ROUTE_MESSAGES.contains(&kind) => changes.routes = true,
            kind if NEIGHBOUR_MESSAGES.contains(&kind) => changes.neighbours = true,
            _ => {}
        }
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        // A length of less than a header would never end.
        let next = if length < 16 { usize::MAX } else { length.saturating_add(3) & !3 };
        datagram = datagram.get(next..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, length: u32) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.resize(16, 0);
        bytes
    }

    #[test]
    fn every_message_of_a_datagram_is_noted() {
        let mut changes = Changes::default();
        note(&[message(24, 16), message(28, 16)].concat(), &mut changes);
        assert_eq!(changes, Changes { routes: true, neighbours: true, ..Changes::default() });
    }

    #[test]
    fn a_lying_length_ends_the_datagram() {
        for length in [0, 3, 15, 17, u32::MAX - 3] {
            let mut changes = Changes::default();
            note(&[message(16, length), message(28, 16)].concat(), &mut changes);
            assert!(changes.links, "{length}");
            assert!(!changes.neighbours, "{length}");
        }
        let mut changes = Changes::default();
        note(&[1, 2, 3], &mut changes);
        assert!(!changes.any());
    }
}
