//! Bytes of the packet, as the verifier wants them read.

use core::arch::asm;
use core::intrinsics::is_val_statically_known;

use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;
use phalanx_flow::packet::{Frame, Reader};

/// Largest offset into a frame that is read: larger frames come in fragments that we do not read (no `xdp.frags`).
const MAX_OFFSET: usize = 0x3fff;

/// The frame of a context.
pub(crate) struct XdpFrame<'a> {
    pub(crate) ctx: &'a XdpContext,
}

impl XdpFrame<'_> {
    /// Where the frame starts. In assembly, because the compiler widens the context's 32 bits by shifts, which the verifier
    /// forbids on what is a pointer to it.
    #[inline(always)]
    fn data(&self) -> usize {
        let data: usize;
        // SAFETY: reads `xdp_md::data`.
        unsafe {
            asm!("{0} = *(u32 *)({1} + 0)", out(reg) data, in(reg) self.ctx.ctx, options(pure, readonly, nostack, preserves_flags));
        }
        data
    }

    /// Where it ends.
    #[inline(always)]
    fn end(&self) -> usize {
        let end: usize;
        // SAFETY: reads `xdp_md::data_end`.
        unsafe {
            asm!("{0} = *(u32 *)({1} + 4)", out(reg) end, in(reg) self.ctx.ctx, options(pure, readonly, nostack, preserves_flags));
        }
        end
    }

    /// A pointer to `N` bytes at `offset` that the verifier knows to be there.
    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Option<*mut [u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let mut place = offset;
        if is_val_statically_known(offset) {
            // The verifier follows a constant wherever it is added.
            place = place.wrapping_add(self.data());
            return if place.wrapping_add(N) > self.end() { None } else { Some(place as *mut [u8; N]) };
        }
        // SAFETY: plain arithmetic. In assembly, so that the compiler can neither drop the mask, which only the verifier
        // needs, nor compute the address a second time, which the verifier would not know to be the one that was compared.
        unsafe {
            asm!(
                "{place} &= 0x3fff",
                "{place} += {data}",
                place = inout(reg) place,
                data = in(reg) self.data(),
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        if place.wrapping_add(N) > self.end() {
            return None;
        }
        Some(place as *mut [u8; N])
    }
}

/// Reads `N` bytes in words: the compiler knows of no alignment and would read them one by one.
///
/// # Safety
/// They are there, in a packet or a map, and the verifier knows it.
#[inline(always)]
pub(crate) unsafe fn load<const N: usize>(place: *const [u8; N]) -> [u8; N] {
    if N >= 40 {
        // Only the daemon's changes of flows are so long.
        // SAFETY: as the caller promises.
        return unsafe { *place };
    }
    let mut bytes = [0; N];
    macro_rules! word {
        ($type:ty, $read:literal, $at:expr) => {{
            let word: u64;
            // SAFETY: within the `N` bytes, as the caller of `load` promises; aligned or not is one to the processor.
            unsafe {
                asm!($read, out(reg) word, in(reg) place, const $at, options(pure, readonly, nostack, preserves_flags));
                bytes.as_mut_ptr().add($at).cast::<[u8; size_of::<$type>()]>().write((word as $type).to_ne_bytes());
            }
        }};
    }
    if N >= 8 {
        word!(u64, "{0} = *(u64 *)({1} + {2})", 0);
    }
    if N >= 16 {
        word!(u64, "{0} = *(u64 *)({1} + {2})", 8);
    }
    if N >= 24 {
        word!(u64, "{0} = *(u64 *)({1} + {2})", 16);
    }
    if N >= 32 {
        word!(u64, "{0} = *(u64 *)({1} + {2})", 24);
    }
    if N & 4 != 0 {
        word!(u32, "{0} = *(u32 *)({1} + {2})", const { N / 8 * 8 });
    }
    let mut at = N / 4 * 4;
    while at < N {
        // SAFETY: as above.
        unsafe { bytes.as_mut_ptr().add(at).write(*place.cast::<u8>().add(at)) };
        at += 1;
    }
    bytes
}

/// Bytes of a map's value, in words.
#[inline(always)]
pub(crate) fn read<const N: usize>(bytes: &[u8; N]) -> [u8; N] {
    // SAFETY: it is a reference.
    unsafe { load(bytes) }
}

/// Writes `N` bytes in words, as [`load`] reads them.
///
/// # Safety
/// They are in the packet, and the verifier knows it.
#[inline(always)]
unsafe fn store<const N: usize>(place: *mut [u8; N], bytes: [u8; N]) {
    if N >= 64 {
        // SAFETY: as the caller promises.
        unsafe { *place = bytes };
        return;
    }
    macro_rules! word {
        ($type:ty, $write:literal, $at:expr) => {{
            // SAFETY: within the `N` bytes, as the caller of `store` promises.
            unsafe {
                let word = <$type>::from_ne_bytes(bytes.as_ptr().add($at).cast::<[u8; size_of::<$type>()]>().read());
                asm!($write, in(reg) place, const $at, in(reg) u64::from(word), options(nostack, preserves_flags));
            }
        }};
    }
    if N >= 8 {
        word!(u64, "*(u64 *)({0} + {1}) = {2}", 0);
    }
    if N >= 16 {
        word!(u64, "*(u64 *)({0} + {1}) = {2}", 8);
    }
    if N >= 24 {
        word!(u64, "*(u64 *)({0} + {1}) = {2}", 16);
    }
    if N == 34 {
        // Headers of Ethernet and IPv4: cut so that each address is a word, and none is taken apart.
        word!(u16, "*(u16 *)({0} + {1}) = {2}", 24);
        word!(u32, "*(u32 *)({0} + {1}) = {2}", 26);
        word!(u32, "*(u32 *)({0} + {1}) = {2}", 30);
        return;
    }
    if N >= 32 {
        word!(u64, "*(u64 *)({0} + {1}) = {2}", 24);
    }
    if N >= 40 {
        word!(u64, "*(u64 *)({0} + {1}) = {2}", 32);
    }
    if N >= 48 {
        word!(u64, "*(u64 *)({0} + {1}) = {2}", 40);
    }
    if N & 4 != 0 {
        word!(u32, "*(u32 *)({0} + {1}) = {2}", const { N / 8 * 8 });
    }
    if N & 2 != 0 {
        word!(u16, "*(u16 *)({0} + {1}) = {2}", const { N / 4 * 4 });
    }
    let mut at = N / 2 * 2;
    while at < N {
        // SAFETY: as above.
        unsafe { place.cast::<u8>().add(at).write(*bytes.as_ptr().add(at)) };
        at += 1;
    }
}

impl Reader for XdpFrame<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.end().wrapping_sub(self.data())
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let place = self.at::<N>(offset)?;
        // SAFETY: `at` compared it with the end.
        Some(unsafe { load(place) })
    }
}

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        match self.at::<N>(offset) {
            Some(place) => {
                // SAFETY: `at` compared it with the end.
                unsafe { store(place, bytes) };
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn move_head(&mut self, delta: isize) -> bool {
        // SAFETY: the context is the kernel's.
        unsafe { bpf_xdp_adjust_head(self.ctx.ctx, delta as i32) == 0 }
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        let now = self.len();
        if length > now {
            return false;
        }
        // SAFETY: the context is the kernel's.
        length == now
            || unsafe { bpf_xdp_adjust_tail(self.ctx.ctx, (length as i32).wrapping_sub(now as i32)) == 0 }
    }
}
