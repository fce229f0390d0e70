//! The XDP program: glue around `phalanx-flow`, which decides.
//!
//! ```text
//!  wire ─► phalanx: parse ─┬────────────────► decide ─┬──────────┬─► forward  ─► XDP_TX, redirect
//!                          └─► open a hand-off ─┘     └─► record ┼─► hand_off ─► XDP_TX, redirect
//!                                  └─► reply (echo)              ├─► reply (ping)
//!                                                                └─► punt: too big, TTL, a fragment before its first
//! ```
//! Each stage is a program of its own, reached by a tail call, because the stack has 512 bytes; what a stage tells the next
//! stands in [`Work`], one for each CPU: XDP runs to its end on the CPU where it began.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(internal_features, reason = "offsets that are constants need no mask: see `frame.rs`")]

#[path = "../../src/abi.rs"]
mod abi;
mod apply;
mod flows;
mod frame;
mod half_open;
mod maps;
#[path = "../../src/sets.rs"]
mod sets;
mod stages;
mod tables;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a loop without an end: so a panic path never gets into the kernel.
    loop {}
}

/// The ring buffer and `bpf_ktime_get_coarse_ns` are for programs under the GPL alone in some kernels.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
