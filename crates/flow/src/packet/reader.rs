//! How this crate touches bytes: by value, with one bounds compare per header, so that the kernel's verifier can follow.

/// Bytes to spare in front of a frame: enough for Ethernet (14), IPv6 (40), UDP (8) and a hand-off's Geneve header (40), and for
/// two VLAN tags more.
pub const HEADROOM: usize = 128;

/// Reads bytes of a frame.
pub trait Reader {
    /// The frame's length in bytes.
    fn len(&self) -> usize;

    /// `N` bytes from `offset` on; `None` if the frame ends before.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Whether the frame has no bytes.
    #[inline(always)]
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Reader for [u8] {
    #[inline(always)]
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk::<N>().copied()
    }
}

impl<R: Reader + ?Sized> Reader for &R {
    #[inline(always)]
    fn len(&self) -> usize {
        R::len(self)
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        R::read::<N>(self, offset)
    }
}

/// A frame that can be rewritten in place. Every change of length moves the offsets of a [`Packet`](super::Packet) parsed before.
pub trait Frame: Reader {
    /// Writes `bytes` at `offset`; false, and nothing written, if the frame ends before.
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool;

    /// Moves the frame's start by `delta` bytes, as `bpf_xdp_adjust_head` does: a negative one gives room in front (whose bytes are
    /// whatever was there), a positive one cuts. False, and nothing moved, if there is no such room.
    fn move_head(&mut self, delta: isize) -> bool;

    /// Cuts the frame's end so that `length` bytes stay; false, and nothing cut, if it is shorter.
    fn truncate(&mut self, length: usize) -> bool;
}

/// A frame in a buffer of the host's, with room in front.
#[derive(Debug)]
pub struct FrameBuf<'a> {
    storage: &'a mut [u8],
    start: usize,
    end: usize,
}

impl<'a> FrameBuf<'a> {
    /// The `length` bytes of `storage` that start at `start`, with everything before as headroom; `None` if they are not all there.
    pub fn new(storage: &'a mut [u8], start: usize, length: usize) -> Option<Self> {
        let end = start.checked_add(length)?;
        if end > storage.len() {
            return None;
        }
        Some(Self { storage, start, end })
    }

    /// The frame's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.storage.get(self.start..self.end).unwrap_or_default()
    }

    /// The frame's bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..self.end).unwrap_or_default()
    }

    /// Where in the storage the frame starts.
    pub const fn start(&self) -> usize {
        self.start
    }

    /// Where in the storage the frame ends (the first byte that is not its own).
    pub const fn end(&self) -> usize {
        self.end
    }
}

impl Reader for FrameBuf<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes().read::<N>(offset)
    }
}

impl Frame for FrameBuf<'_> {
    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        match self.bytes_mut().get_mut(offset..).and_then(|rest| rest.first_chunk_mut::<N>()) {
            Some(place) => {
                *place = bytes;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn move_head(&mut self, delta: isize) -> bool {
        match self.start.checked_add_signed(delta) {
            Some(start) if start <= self.end => {
                self.start = start;
                true
            }
            _ => false,
        }
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        if length > self.len() {
            return false;
        }
        self.end = self.start.wrapping_add(length);
        true
    }
}
