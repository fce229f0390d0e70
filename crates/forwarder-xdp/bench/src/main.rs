//! What the XDP program is compared with, and what drives it (`cargo xtask bench xdp`).
//!
//! ```text
//!  BPF_PROG_TEST_RUN ─► harness, harness_in ─► TARGETS: finish, reflect, minimal, or the program itself
//!  live frames       ─► generate ─► veth ─► one of them ─► veth ─► sink
//! ```
//! A test run hands the same frame to the program again and again, changed as the last run left it: the harness undoes that.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use core::arch::asm;
use core::mem::offset_of;

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_redirect, bpf_xdp_adjust_head};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, ProgramArray};
use aya_ebpf::programs::XdpContext;

#[path = "../abi.rs"]
mod abi;

use abi::{Config, DIRECT, HANDED_OFF, Key, Sunk, Value};

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

/// What the harness does next.
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
/// What is measured.
#[map]
static TARGETS: ProgramArray = ProgramArray::with_max_entries(16, 0);
/// Flows of [`minimal`].
#[map]
static FLOWS: HashMap<Key, Value> = HashMap::with_max_entries(1 << 20, 0);
/// What reached the sink.
#[map]
static SUNK: PerCpuArray<Sunk> = PerCpuArray::with_max_entries(1, 0);

/// Where the frame starts and ends: in assembly, because the compiler computes with halves of what is a pointer to the verifier.
#[inline(always)]
fn bounds(ctx: &XdpContext) -> (usize, usize) {
    let (data, end): (usize, usize);
    // SAFETY: reads `xdp_md::data` and `xdp_md::data_end`.
    unsafe {
        asm!(
            "{0} = *(u32 *)({2} + 0)",
            "{1} = *(u32 *)({2} + 4)",
            out(reg) data, out(reg) end, in(reg) ctx.ctx,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    (data, end)
}

#[inline(always)]
fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let (data, end) = bounds(ctx);
    let place = data + offset;
    if place + size_of::<T>() > end { None } else { Some(place as *mut T) }
}

/// Makes the frame what it was at first, but for a pseudo-random source out of `mask + 1`. The headers have `8 * W + 2` bytes.
#[inline(always)]
fn restore<const W: usize>(ctx: &XdpContext, config: &mut Config, address_at: usize) -> bool {
    let (data, end) = bounds(ctx);
    let grown = (end - data) as i32 - config.length as i32;
    // SAFETY: the context is the kernel's.
    if grown != 0 && unsafe { bpf_xdp_adjust_head(ctx.ctx, grown) } != 0 {
        return false;
    }
    let Some(words) = at::<[u64; W]>(ctx, 0) else { return false };
    let (Some(rest), Some(address), Some(port)) =
        (at::<u16>(ctx, 8 * W), at::<[u16; 2]>(ctx, address_at), at::<u16>(ctx, address_at + 8))
    else {
        return false;
    };
    // Xorshift (Marsaglia 2003): what matters is that neither caches nor prefetchers foresee it.
    let mut state = config.state;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    config.state = state;
    let flow = (state >> 16) as u32 & config.mask;
    let source = (config.source + (flow >> 8)).to_be();
    // SAFETY: compared with the frame's end.
    unsafe {
        let mut word = 0;
        while word < W {
            (&raw mut (*words)[word]).write_unaligned(config.head[word]);
            word += 1;
        }
        rest.write_unaligned(config.head[W] as u16);
        (&raw mut (*address)[0]).write_unaligned(source as u16);
        (&raw mut (*address)[1]).write_unaligned((source >> 16) as u16);
        port.write_unaligned((0x4000 + (flow & 0xff) as u16).to_be());
    }
    true
}

#[inline(always)]
fn config() -> Option<&'static mut Config> {
    // SAFETY: one benchmark runs at a time, on one CPU.
    CONFIG.get_ptr_mut(0).map(|config| unsafe { &mut *config })
}

/// Where the first source address is in a plain frame, and in one that is handed off.
const ADDRESS: usize = 26;
const ADDRESS_INSIDE: usize = 94;

/// Restores the frame, then does the rest.
#[inline(always)]
fn restored<const W: usize>(
    ctx: &XdpContext,
    address_at: usize,
    rest: impl FnOnce(&XdpContext, &Config) -> u32,
) -> u32 {
    let Some(config) = config() else { return XDP_ABORTED };
    if restore::<W>(ctx, config, address_at) { rest(ctx, config) } else { XDP_ABORTED }
}

#[inline(always)]
fn run(ctx: &XdpContext, config: &Config) -> u32 {
    // SAFETY: the context is the kernel's.
    unsafe { TARGETS.tail_call(ctx, config.target) };
    XDP_ABORTED
}

#[inline(always)]
fn send(_: &XdpContext, config: &Config) -> u32 {
    // SAFETY: plain numbers.
    let _ = unsafe { bpf_redirect(config.interface, 0) };
    XDP_REDIRECT
}

/// Undoes what the run before did to a plain frame, and runs what is measured.
#[xdp]
pub fn harness(ctx: XdpContext) -> u32 {
    restored::<{ DIRECT / 8 }>(&ctx, ADDRESS, run)
}

/// The same for a frame that is handed off.
#[xdp]
pub fn harness_in(ctx: XdpContext) -> u32 {
    restored::<{ HANDED_OFF / 8 }>(&ctx, ADDRESS_INSIDE, run)
}

/// Sends plain frames out of an interface.
#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    restored::<{ DIRECT / 8 }>(&ctx, ADDRESS, send)
}

/// Sends handed-off frames out of an interface.
#[xdp]
pub fn generate_in(ctx: XdpContext) -> u32 {
    restored::<{ HANDED_OFF / 8 }>(&ctx, ADDRESS_INSIDE, send)
}

/// Counts and drops, and looks at the clock now and then.
#[xdp]
pub fn sink(_: XdpContext) -> u32 {
    if let Some(sunk) = SUNK.get_ptr_mut(0) {
        // SAFETY: each CPU has its own.
        let sunk = unsafe { &mut *sunk };
        if sunk.count & 0xff == 0 {
            // SAFETY: no arguments.
            sunk.last_ns = unsafe { bpf_ktime_get_ns() };
            sunk.last_count = sunk.count;
            if sunk.count == 0 {
                sunk.first_ns = sunk.last_ns;
            }
        }
        sunk.count += 1;
    }
    XDP_DROP
}

/// Nothing: what the harness alone costs.
#[xdp]
pub fn finish(_: XdpContext) -> u32 {
    XDP_TX
}

/// The reference for live frames: swaps the MACs and sends the frame back.
#[xdp]
pub fn reflect(ctx: XdpContext) -> u32 {
    let Some(macs) = at::<[u16; 6]>(&ctx, 0) else { return XDP_ABORTED };
    // SAFETY: compared with the frame's end.
    unsafe {
        let [a, b, c, d, e, f] = *macs;
        *macs = [d, e, f, a, b, c];
    }
    XDP_TX
}

/// The reference for what a decision costs: parse, one hash lookup, IP in IP, send.
#[xdp]
pub fn minimal(ctx: XdpContext) -> u32 {
    const ETHERNET: usize = 14;
    let Some(ethertype) = at::<u16>(&ctx, 12) else { return XDP_PASS };
    let Some(ip) = at::<[u16; 10]>(&ctx, ETHERNET) else { return XDP_PASS };
    let Some(ports) = at::<[u16; 2]>(&ctx, ETHERNET + 20) else { return XDP_PASS };
    // SAFETY: compared with the frame's end.
    let (ethertype, ip, ports) = unsafe { (*ethertype, &*ip, *ports) };
    let protocol = (ip[4] >> 8) as u8;
    if ethertype != 0x0800_u16.to_be()
        || ip[0] as u8 != 0x45
        || ip[3] & 0x3fff_u16.to_be() != 0
        || protocol != 6 && protocol != 17
    {
        return XDP_PASS;
    }
    let total = u16::from_be(ip[1]);
    let key = Key {
        source: u32::from(ip[6]) | u32::from(ip[7]) << 16,
        destination: u32::from(ip[8]) | u32::from(ip[9]) << 16,
        ports,
        protocol: u32::from(protocol),
    };
    // SAFETY: nobody changes entries while the benchmark runs.
    let Some(value) = (unsafe { FLOWS.get(&key) }) else { return XDP_PASS };
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -20) } != 0 {
        return XDP_DROP;
    }
    let Some(head) = at::<[u16; 17]>(&ctx, 0) else { return XDP_DROP };
    let total = total.wrapping_add(20).to_be();
    let [s0, s1] = value.source;
    let [d0, d1] = value.destination;
    let (first, fragment, ttl) = (0x0045_u16, 0x0040_u16, 0x0440_u16);
    let mut sum = 0_u32;
    for word in [first, total, fragment, ttl, s0, s1, d0, d1] {
        sum += u32::from(word);
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    let [m0, m1, m2, m3, m4, m5] = value.macs;
    // SAFETY: compared with the frame's end.
    unsafe {
        *head =
            [m0, m1, m2, m3, m4, m5, 0x0008, first, total, 0, fragment, ttl, !(sum as u16), s0, s1, d0, d1];
    }
    XDP_TX
}

const _: () = assert!(offset_of!(Config, head) == 0 && DIRECT % 8 == 2 && HANDED_OFF % 8 == 2);
