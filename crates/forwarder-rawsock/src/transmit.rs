//! Batched sends: two packet sockets per egress interface, frames by `sendmmsg` from where they lie.
//!
//! Merged frames and unfinished checksums need a virtio header, and every frame of a socket with such headers has one. The kernel copies
//! and reads it by itself, which costs a small frame 70 ns, so that plain frames have a socket of their own.
//! Frames leave in the order they came, whichever they are.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::packet::{Frame, FrameBuf};
use phalanx_forwarder::Drop as Reason;
use phalanx_forwarder::counters::SharedCounters;
use phalanx_forwarder::engine::Engine;
use phalanx_forwarder::rewrite::Offload;

use crate::ring::{self, VNET_HEADER, vnet_header};

/// Frames sent by one call at the most; more gain nothing, and hold up the first ones.
const BATCH: usize = 64;

/// Room for frames that were built and do not lie in a ring: a merged frame of 64 kB in segments, each with its headers.
const ARENA_BYTES: usize = 192 << 10;

/// What a socket may have queued in its interface; beyond, sending waits.
const SEND_BUFFER_BYTES: i32 = 4 << 20;

/// How long sending waits for a full interface before it drops. Well below what would look like a stalled member.
const SEND_TIMEOUT: Duration = Duration::from_millis(20);

/// An interface that could not be opened is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// The egress interfaces of one thread.
pub(crate) struct Transmit {
    engine: Arc<Engine>,
    egresses: Vec<Egress>,
}

enum Egress {
    Open(Box<Queue>),
    Failed { interface: u32, until: Instant },
}

/// Frames that wait to be sent on one interface.
struct Queue {
    interface: u32,
    /// Takes plain frames.
    plain: OwnedFd,
    /// Takes frames with a virtio header.
    headed: OwnedFd,
    /// Whether what waits has virtio headers.
    has_headers: bool,
    /// Where each frame lies, its virtio header included.
    vectors: Box<[libc::iovec; BATCH]>,
    messages: Box<[libc::mmsghdr; BATCH]>,
    waiting: usize,
    arena: Box<[u8]>,
    arena_used: usize,
}

// SAFETY: the raw pointers are only read by `flush`, and the frames they point to are kept until then by whoever pushed them.
unsafe impl Send for Queue {}

impl Transmit {
    pub(crate) fn new(engine: Arc<Engine>) -> Self {
        Self { engine, egresses: Vec::new() }
    }

    /// Sends a frame from where it lies.
    ///
    /// # Safety
    /// The frame's storage stays where it is, unchanged, until [`Self::flush`].
    #[inline]
    pub(crate) unsafe fn push(&mut self, interface: u32, frame: &mut FrameBuf<'_>, offload: Offload) {
        let has_header = offload != Offload::NONE;
        if has_header && !(frame.move_head(-(VNET_HEADER as isize)) && frame.write(0, vnet_header(offload))) {
            return self.engine.counters.count_drop(Reason::Malformed);
        }
        let bytes = frame.bytes();
        let (start, length) = (bytes.as_ptr(), bytes.len());
        let engine = &self.engine;
        match queue(&mut self.egresses, interface) {
            // SAFETY: promised by the caller.
            Some(queue) => unsafe { queue.push(&engine.counters, has_header, start, length) },
            None => engine.counters.count_drop(Reason::Transmit),
        }
    }

    /// Sends a copy of a frame.
    pub(crate) fn push_copy(&mut self, interface: u32, frame: &[u8]) {
        let engine = &self.engine;
        match queue(&mut self.egresses, interface) {
            Some(queue) => queue.push_copy(&engine.counters, frame),
            None => engine.counters.count_drop(Reason::Transmit),
        }
    }

    /// Sends all that waits.
    pub(crate) fn flush(&mut self) {
        for egress in &mut self.egresses {
            if let Egress::Open(queue) = egress {
                queue.flush(&self.engine.counters);
            }
        }
    }
}

#[inline]
fn queue(egresses: &mut Vec<Egress>, interface: u32) -> Option<&mut Queue> {
    let found = egresses.iter().position(|egress| match egress {
        Egress::Open(queue) => queue.interface == interface,
        Egress::Failed { interface: failed, .. } => *failed == interface,
    });
    let at = match found {
        Some(at) => at,
        None => {
            egresses.push(open(interface));
            egresses.len() - 1
        }
    };
    if let Egress::Failed { until, .. } = egresses[at]
        && Instant::now() >= until
    {
        egresses[at] = open(interface);
    }
    match &mut egresses[at] {
        Egress::Open(queue) => Some(queue),
        Egress::Failed { .. } => None,
    }
}

#[cold]
fn open(interface: u32) -> Egress {
    match Queue::open(interface) {
        Ok(queue) => Egress::Open(Box::new(queue)),
        Err(error) => {
            tracing::warn!(interface, %error, "cannot send on the interface");
            Egress::Failed { interface, until: Instant::now() + RETRY }
        }
    }
}

/// Opens a packet socket that only sends, on one interface, frames with a virtio header or without.
fn sender(interface: u32, has_headers: bool) -> io::Result<OwnedFd> {
    let socket = ring::packet_socket()?;
    ring::set_option(&socket, libc::PACKET_VNET_HDR, &i32::from(has_headers))?;
    // Beyond the system's limit only with CAP_NET_ADMIN in the first user namespace; without, the limit must do.
    if ring::set_option_at(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER_BYTES).is_err() {
        ring::set_option_at(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &SEND_BUFFER_BYTES)?;
    }
    let timeout = libc::timeval { tv_sec: 0, tv_usec: libc::suseconds_t::from(SEND_TIMEOUT.subsec_micros()) };
    ring::set_option_at(&socket, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &timeout)?;
    ring::bind(&socket, interface, 0)?;
    Ok(socket)
}

impl Queue {
    fn open(interface: u32) -> io::Result<Self> {
        let (plain, headed) = (sender(interface, false)?, sender(interface, true)?);
        // SAFETY: all-zero is a valid `iovec`: of length 0.
        let mut vectors: Box<[libc::iovec; BATCH]> = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: all-zero is a valid `mmsghdr`: without address, data and control.
        let mut messages: Box<[libc::mmsghdr; BATCH]> = Box::new(unsafe { std::mem::zeroed() });
        for (message, vector) in messages.iter_mut().zip(vectors.iter_mut()) {
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        let arena = vec![0; ARENA_BYTES].into_boxed_slice();
        Ok(Self {
            interface,
            plain,
            headed,
            has_headers: false,
            vectors,
            messages,
            waiting: 0,
            arena,
            arena_used: 0,
        })
    }

    /// # Safety
    /// The `length` bytes at `start` stay there, unchanged, until [`Self::flush`].
    #[inline]
    unsafe fn push(&mut self, counters: &SharedCounters, has_header: bool, start: *const u8, length: usize) {
        if self.waiting == BATCH || self.has_headers != has_header {
            // The arena is not wound back: the frame itself may lie there.
            self.send(counters);
            self.has_headers = has_header;
        }
        self.vectors[self.waiting] = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: length };
        self.waiting += 1;
    }

    fn push_copy(&mut self, counters: &SharedCounters, frame: &[u8]) {
        if self.arena_used + frame.len() > ARENA_BYTES {
            self.flush(counters);
        }
        let Some(place) = self.arena.get_mut(self.arena_used..self.arena_used + frame.len()) else {
            return counters.count_drop(Reason::Transmit);
        };
        place.copy_from_slice(frame);
        let start = place.as_ptr();
        self.arena_used += frame.len();
        // SAFETY: the arena stays where it is, and is written again only after a flush.
        unsafe { self.push(counters, false, start, frame.len()) };
    }

    fn flush(&mut self, counters: &SharedCounters) {
        self.send(counters);
        self.arena_used = 0;
    }

    fn send(&mut self, counters: &SharedCounters) {
        let socket = if self.has_headers { &self.headed } else { &self.plain };
        let mut sent = 0;
        while sent < self.waiting {
            let left = &mut self.messages[sent..self.waiting];
            // SAFETY: every message points to its vector, and every vector to bytes that are kept until now.
            let result =
                unsafe { libc::sendmmsg(socket.as_raw_fd(), left.as_mut_ptr(), left.len() as u32, 0) };
            match usize::try_from(result) {
                Ok(0) => break,
                Ok(done) => sent += done,
                Err(_) => {
                    if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    // The first of those left was refused: too long for the interface, no room, interface down.
                    counters.count_drop(Reason::Transmit);
                    sent += 1;
                }
            }
        }
        self.waiting = 0;
    }
}
