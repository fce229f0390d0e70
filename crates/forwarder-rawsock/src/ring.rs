//! A packet socket with a `TPACKET_V3` receive ring (packet(7), Documentation/networking/packet_mmap.rst).
//!
//! The kernel fills blocks of frames and hands them over one by one; a block is ours until [`Block`] is dropped.
//! Frames are rewritten where they lie: `PACKET_RESERVE` leaves room in front of each.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_void, socklen_t};
use phalanx_flow::packet::{FrameBuf, HEADROOM};
use phalanx_forwarder::engine::{Ahead, GROUP};
use phalanx_forwarder::rewrite::{Merged, Offload};
use phalanx_netlink::BpfInstruction;

/// Bytes of a block: a merged frame of 64 kB must fit, and several of them should.
const BLOCK_BYTES: usize = 256 << 10;

/// A block that is not full is handed over after so many milliseconds: the latency we add to a lonely packet.
/// Kernels before 6.18 round it up to their timer tick.
const BLOCK_TIMEOUT_MS: u32 = 1;

/// Room in front of a frame: what encapsulation needs, and the virtio header that goes before it when it is sent.
const RESERVE: usize = HEADROOM + 32;

/// `struct virtio_net_hdr` (virtio 1.2 §5.1.6), without `num_buffers`.
pub(crate) const VNET_HEADER: usize = 10;
const NEEDS_CHECKSUM: u8 = 1;

/// Bytes of a VLAN tag (IEEE 802.1Q), which stands behind the two MAC addresses.
const VLAN_TAG: usize = 4;
const MAC_ADDRESSES: usize = 12;

/// The packet header of V3, before the frame's reserve.
const FRAME_HEADER: usize = size_of::<libc::tpacket3_hdr>();

/// A packet socket and its ring.
#[derive(Debug)]
pub(crate) struct Ring {
    socket: Arc<OwnedFd>,
    memory: NonNull<u8>,
    blocks: usize,
    next: usize,
}

// SAFETY: the mapping belongs to the ring alone, and nothing in it is bound to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Opens a socket that takes from the interface what `filter` says, into a ring of at least `bytes`.
    pub(crate) fn open(interface: u32, bytes: usize, filter: &[BpfInstruction]) -> io::Result<Self> {
        let socket = packet_socket()?;
        let blocks = bytes.div_ceil(BLOCK_BYTES).max(4);
        set_option(&socket, libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V3 as c_int))?;
        set_option(&socket, libc::PACKET_VNET_HDR, &1_i32).map_err(|error| {
            io::Error::other(format!(
                "the kernel does not say how frames were merged and which checksums are unfinished (PACKET_VNET_HDR): {error}"
            ))
        })?;
        set_option(&socket, libc::PACKET_RESERVE, &(RESERVE as u32))?;
        set_option(&socket, libc::PACKET_IGNORE_OUTGOING, &1_i32)?;
        attach_filter(&socket, filter)?;
        // V3 ignores the frame size but for its checks.
        let frame_size = 2048;
        let request = libc::tpacket_req3 {
            tp_block_size: BLOCK_BYTES as u32,
            tp_block_nr: blocks as u32,
            tp_frame_size: frame_size,
            tp_frame_nr: (BLOCK_BYTES / frame_size as usize * blocks) as u32,
            tp_retire_blk_tov: BLOCK_TIMEOUT_MS,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        set_option(&socket, libc::PACKET_RX_RING, &request)?;
        // SAFETY: a fresh shared mapping of the ring, placed by the kernel.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BLOCK_BYTES * blocks,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                socket.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let ring = Self { socket: Arc::new(socket), memory, blocks, next: 0 };
        bind(&ring.socket, interface, libc::ETH_P_ALL as u16)?;
        Ok(ring)
    }

    /// The socket, for its filter and statistics.
    pub(crate) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// How many blocks the ring has.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The next block, if the kernel is done with it.
    pub(crate) fn next_block(&mut self) -> Option<Block<'_>> {
        // SAFETY: `next` is below the number of blocks in the mapping.
        let start = unsafe { self.memory.add(self.next * BLOCK_BYTES) };
        let block = Block { start, ring: std::marker::PhantomData };
        if block.status().load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            // Not ours: it must not be given back.
            std::mem::forget(block);
            return None;
        }
        self.next = (self.next + 1) % self.blocks;
        Some(block)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `open`, of the same length; no block outlives its ring.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), BLOCK_BYTES * self.blocks) };
    }
}

/// A block of frames that is ours until it is dropped.
#[derive(Debug)]
pub(crate) struct Block<'r> {
    start: NonNull<u8>,
    ring: std::marker::PhantomData<&'r mut Ring>,
}

/// A frame in a block.
pub(crate) struct Received<'b> {
    pub(crate) frame: FrameBuf<'b>,
    pub(crate) offload: Offload,
}

impl Block<'_> {
    fn header(&self) -> *mut libc::tpacket_hdr_v1 {
        let block = self.start.as_ptr().cast::<libc::tpacket_block_desc>();
        // SAFETY: every block starts with a descriptor, whose union has this one variant.
        unsafe { &raw mut (*block).hdr.bh1 }
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: the status is an aligned 32-bit word of the mapping, which both sides access atomically only.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.header()).block_status) }
    }

    /// How many frames it has.
    pub(crate) fn len(&self) -> usize {
        // SAFETY: the block is ours, so that the kernel does not write to it.
        unsafe { (*self.header()).num_pkts as usize }
    }

    /// Shows every frame, in the order they came; `None` for one that did not fit. `ahead` sees each of them earlier, by one group to two.
    pub(crate) fn for_each(&mut self, ahead: &mut Ahead<'_>, mut show: impl FnMut(Option<Received<'_>>)) {
        // SAFETY: as in `len`.
        let mut offset = unsafe { (*self.header()).offset_to_first_pkt as usize };
        let mut unseen = self.look_at_group(Some(offset), ahead);
        for at in 0..self.len() {
            if at % GROUP == 0 {
                unseen = self.look_at_group(unseen, ahead);
            }
            if offset + FRAME_HEADER > BLOCK_BYTES {
                return;
            }
            // SAFETY: the header lies within the block, which is ours; the kernel aligns it to 16 bytes.
            let header = unsafe { self.start.add(offset).cast::<libc::tpacket3_hdr>().read() };
            let mac = usize::from(header.tp_mac);
            let end = offset + mac + header.tp_snaplen as usize;
            if end > BLOCK_BYTES || mac < FRAME_HEADER + VNET_HEADER {
                return;
            }
            // Everything between the header and the frame is its headroom; the kernel's address record there is not needed.
            // SAFETY: within the block, which is ours; frames do not overlap, and this is the only reference to these bytes.
            let storage = unsafe {
                std::slice::from_raw_parts_mut(
                    self.start.add(offset + FRAME_HEADER).as_ptr(),
                    end - offset - FRAME_HEADER,
                )
            };
            let mut start = mac - FRAME_HEADER;
            let mut offload =
                storage[start - VNET_HEADER..].first_chunk::<VNET_HEADER>().map(read_vnet_header);
            if header.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                put_tag_back(storage, &mut start, &mut offload, &header);
            }
            let whole = header.tp_snaplen == header.tp_len;
            let length = storage.len() - start;
            match (FrameBuf::new(storage, start, length), offload) {
                (Some(frame), Some(offload)) if whole => show(Some(Received { frame, offload })),
                _ => show(None),
            }
            if header.tp_next_offset == 0 {
                return;
            }
            offset += header.tp_next_offset as usize;
        }
    }
}

impl Block<'_> {
    /// Shows a group of frames that starts at `offset` to `ahead`, and says where the next one starts.
    #[inline]
    fn look_at_group(&self, offset: Option<usize>, ahead: &mut Ahead<'_>) -> Option<usize> {
        let mut next = offset;
        for _ in 0..GROUP {
            let Some(offset) = next else { break };
            next = self.look_at(offset, ahead);
        }
        ahead.fetch();
        next
    }

    /// Shows the frame at `offset`, as it is, and says where the next one is.
    #[inline]
    fn look_at(&self, offset: usize, ahead: &mut Ahead<'_>) -> Option<usize> {
        if offset + FRAME_HEADER > BLOCK_BYTES {
            return None;
        }
        // SAFETY: the header lies within the block, which is ours; the kernel aligns it to 16 bytes.
        let header = unsafe { self.start.add(offset).cast::<libc::tpacket3_hdr>().read() };
        let start = offset + usize::from(header.tp_mac);
        let length = header.tp_snaplen as usize;
        if start + length > BLOCK_BYTES {
            return None;
        }
        // SAFETY: within the block, which is ours; nobody else has a reference to this frame's bytes meanwhile.
        ahead.note(unsafe { std::slice::from_raw_parts(self.start.add(start).as_ptr(), length) });
        (header.tp_next_offset != 0).then(|| offset + header.tp_next_offset as usize)
    }
}

impl Drop for Block<'_> {
    fn drop(&mut self) {
        self.status().store(libc::TP_STATUS_KERNEL, Ordering::Release);
    }
}

/// Writes the VLAN tag, which the kernel took off and noted beside the frame, where it was: what answers a frame must have it.
#[cold]
fn put_tag_back(
    storage: &mut [u8],
    start: &mut usize,
    offload: &mut Option<Offload>,
    header: &libc::tpacket3_hdr,
) {
    let Some(head) = start.checked_sub(VLAN_TAG) else { return };
    let Some(addresses) = storage.get_mut(head..*start + MAC_ADDRESSES) else { return };
    addresses.copy_within(VLAN_TAG.., 0);
    let known = header.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
    let tpid = if known { header.hv1.tp_vlan_tpid } else { libc::ETH_P_8021Q as u16 };
    addresses[MAC_ADDRESSES..][..2].copy_from_slice(&tpid.to_be_bytes());
    addresses[MAC_ADDRESSES + 2..].copy_from_slice(&(header.hv1.tp_vlan_tci as u16).to_be_bytes());
    *start = head;
    if let Some(offload) = offload {
        let behind = VLAN_TAG as u16;
        offload.checksum = offload.checksum.map(|(from, field)| (from.saturating_add(behind), field));
        offload.merged = offload
            .merged
            .map(|merged| Merged { header_length: merged.header_length.saturating_add(behind), ..merged });
    }
}

fn read_vnet_header(header: &[u8; VNET_HEADER]) -> Offload {
    let [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1] = *header;
    let size = u16::from_ne_bytes([g0, g1]);
    Offload {
        checksum: (flags & NEEDS_CHECKSUM != 0)
            .then(|| (u16::from_ne_bytes([s0, s1]), u16::from_ne_bytes([o0, o1]))),
        merged: (kind != 0 && size != 0).then(|| Merged {
            kind,
            size,
            header_length: u16::from_ne_bytes([h0, h1]),
        }),
    }
}

/// The virtio header that says `offload` to the kernel.
#[inline]
pub(crate) fn vnet_header(offload: Offload) -> [u8; VNET_HEADER] {
    let mut header = [0; VNET_HEADER];
    if let Some((start, offset)) = offload.checksum {
        header[0] = NEEDS_CHECKSUM;
        header[6..8].copy_from_slice(&start.to_ne_bytes());
        header[8..10].copy_from_slice(&offset.to_ne_bytes());
    }
    if let Some(merged) = offload.merged {
        header[1] = merged.kind;
        header[2..4].copy_from_slice(&merged.header_length.to_ne_bytes());
        header[4..6].copy_from_slice(&merged.size.to_ne_bytes());
    }
    header
}

/// A packet socket that receives nothing yet.
pub(crate) fn packet_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds a packet socket to an interface; with protocol 0 it receives nothing.
pub(crate) fn bind(socket: &OwnedFd, interface: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: all-zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = interface.cast_signed();
    // SAFETY: the pointer and length are those of `address`.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as socklen_t)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets an option of packet sockets.
pub(crate) fn set_option<T>(socket: &OwnedFd, name: c_int, value: &T) -> io::Result<()> {
    set_option_at(socket, libc::SOL_PACKET, name, value)
}

pub(crate) fn set_option_at<T>(
    socket: &impl AsRawFd,
    level: c_int,
    name: c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the pointer and length are those of `value`, a plain structure of the kernel's interface.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads an option of packet sockets.
fn get_option<T: Copy>(socket: &OwnedFd, name: c_int, mut value: T) -> io::Result<T> {
    let mut length = size_of::<T>() as socklen_t;
    // SAFETY: the pointer and length are those of `value`, a plain structure of the kernel's interface.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            name,
            (&raw mut value).cast::<c_void>(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Puts a filter in the place of the one before, without a gap.
pub(crate) fn attach_filter(socket: &OwnedFd, program: &[BpfInstruction]) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> =
        program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    set_option_at(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Joins the rings of one interface into a group that shares the flows, each flow at one of them.
pub(crate) fn fan_out(rings: &[&Ring]) -> io::Result<()> {
    let [first, others @ ..] = rings else { return Ok(()) };
    if others.is_empty() {
        return Ok(());
    }
    let flags = libc::PACKET_FANOUT_HASH | libc::PACKET_FANOUT_FLAG_IGNORE_OUTGOING;
    // The kernel chooses a number that no other group has.
    set_option(&first.socket, libc::PACKET_FANOUT, &((flags | libc::PACKET_FANOUT_FLAG_UNIQUEID) << 16))?;
    let group = get_option(&first.socket, libc::PACKET_FANOUT, 0_u32)? & 0xffff;
    for ring in others {
        set_option(&ring.socket, libc::PACKET_FANOUT, &(flags << 16 | group))?;
    }
    Ok(())
}

/// Frames that found the ring full since this was last asked.
pub(crate) fn take_drops(socket: &OwnedFd) -> u64 {
    // SAFETY: all-zero is a valid `tpacket_stats_v3`.
    let mut statistics: libc::tpacket_stats_v3 = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&statistics) as socklen_t;
    // SAFETY: the pointer and length are those of `statistics`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast::<c_void>(),
            &raw mut length,
        )
    };
    if result < 0 { 0 } else { u64::from(statistics.tp_drops) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unfinished_survives_the_virtio_header() {
        let merged = Merged { kind: 1, size: 1448, header_length: 66 };
        for offload in [
            Offload::NONE,
            Offload { checksum: Some((34, 16)), merged: None },
            Offload { checksum: Some((34, 16)), merged: Some(merged) },
            Offload { checksum: None, merged: Some(merged) },
        ] {
            assert_eq!(read_vnet_header(&vnet_header(offload)), offload);
        }
        // A kind without a size, or the other way round, is a plain frame.
        assert_eq!(read_vnet_header(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]), Offload::NONE);
    }
}
