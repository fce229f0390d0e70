//! Asking the kernel, and waiting for its answer.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NlaBuffer, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::{Error, Result};

/// Room for one answer; the kernel's dumps come in pieces of at most 32 kB.
const RECEIVE_BYTES: usize = 64 * 1024;
/// How often a dump that changed under our hands is asked for again.
const DUMP_ATTEMPTS: usize = 8;
/// The kernel answers at once; without this a lost answer (full buffer) would hang the caller.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Size of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `NLMSGERR_ATTR_MSG`, include/uapi/linux/netlink.h: the kernel's sentence in an extended acknowledgement.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A conversation with the kernel about the network namespace in which it was opened.
///
/// One request at a time; every method waits for the kernel's answer, which comes at once.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a conversation in the calling thread's present network namespace.
    pub fn open() -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // The kernel's sentences are a help and not needed: an old kernel without them will do.
            let _ = socket.set_ext_ack(true);
            let _ = socket.set_cap_ack(true);
            set_receive_timeout(&socket, ANSWER_TIMEOUT)?;
            Ok(socket)
        };
        let socket =
            open().map_err(|source| Error::Socket { operation: "open rtnetlink".to_owned(), source })?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// Sends a request and waits for its acknowledgement; returns what came before it.
    pub(crate) fn request(
        &mut self,
        operation: &dyn Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        self.exchange(operation, message, NLM_F_REQUEST | NLM_F_ACK | flags)
            .map(|(messages, _interrupted)| messages)
    }

    /// Asks for all objects of a kind.
    pub(crate) fn dump(
        &mut self,
        operation: &dyn Fn() -> String,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            let (messages, interrupted) =
                self.exchange(operation, message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if !interrupted {
                return Ok(messages);
            }
        }
        Err(Error::Answer {
            operation: operation(),
            reason: format!("the list changed during {DUMP_ATTEMPTS} attempts to read it"),
        })
    }

    fn exchange(
        &mut self,
        operation: &dyn Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(Vec<RouteNetlinkMessage>, bool)> {
        let socket_error = |source| Error::Socket { operation: operation(), source };
        let answer_error = |reason: String| Error::Answer { operation: operation(), reason };

        self.sequence = self.sequence.wrapping_add(1);
        let out = serialize(message, flags, self.sequence);
        self.socket.send(&out, 0).map_err(socket_error)?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            let received = self.socket.recv(&mut &mut self.buffer[..], 0).map_err(socket_error)?;
            let mut rest = &self.buffer[..received.min(self.buffer.len())];
            while rest.len() >= HEADER_BYTES {
                let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if length < HEADER_BYTES || length > rest.len() {
                    return Err(answer_error(format!("a message of {length} bytes in {}", rest.len())));
                }
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]);
                // Messages are aligned to four bytes; the last one may lack its padding.
                rest = &rest[(length.saturating_add(3) & !3).min(rest.len())..];
                let message = message.map_err(|error| answer_error(error.to_string()))?;
                if message.header.sequence_number != self.sequence {
                    // The late answer to a request that was given up.
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_none() => {
                        return Ok((answers, interrupted));
                    }
                    NetlinkPayload::Error(error) => {
                        return Err(Error::Kernel {
                            operation: operation(),
                            source: error.to_io(),
                            hint: extended_hint(&error.header),
                        });
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(Error::Kernel {
                            operation: operation(),
                            source: io::Error::from_raw_os_error(done.code.saturating_neg()),
                            hint: None,
                        });
                    }
                    NetlinkPayload::Done(_) => return Ok((answers, interrupted)),
                    NetlinkPayload::Overrun(_) => return Err(answer_error("overrun".to_owned())),
                    _ => {}
                }
            }
        }
    }
}

/// The bytes of a request.
pub(crate) fn serialize(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut out = vec![0; message.buffer_len()];
    message.serialize(&mut out);
    out
}

/// The kernel's sentence about an error: attributes after the echoed header (`NETLINK_CAP_ACK` leaves the body out).
fn extended_hint(payload: &[u8]) -> Option<String> {
    let attributes = payload.get(HEADER_BYTES..)?;
    NlasIterator::new(attributes)
        .filter_map(|attribute| attribute.ok())
        .find(|attribute: &NlaBuffer<&[u8]>| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned())
}

fn set_receive_timeout(socket: &Socket, timeout: Duration) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let value = libc::timeval {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_usec: timeout.subsec_micros() as libc::suseconds_t,
    };
    // SAFETY: the descriptor is open as long as `socket` is borrowed; `value` is a live timeval of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_sentence_is_read_from_an_extended_acknowledgement() {
        let mut payload = vec![0; HEADER_BYTES];
        payload.extend_from_slice(&12u16.to_ne_bytes());
        payload.extend_from_slice(&NLMSGERR_ATTR_MSG.to_ne_bytes());
        payload.extend_from_slice(b"No good\0");
        assert_eq!(extended_hint(&payload).as_deref(), Some("No good"));
        // Twins: no attribute, another attribute, a lying length.
        assert_eq!(extended_hint(&payload[..HEADER_BYTES]), None);
        payload[HEADER_BYTES + 2] = 2;
        assert_eq!(extended_hint(&payload), None);
        payload[HEADER_BYTES] = 200;
        assert_eq!(extended_hint(&payload), None);
    }
}
