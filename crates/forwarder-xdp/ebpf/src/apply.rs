//! Changes of flows that the daemon asks for: made here, field by field and in place, so that no packet's change is lost.

use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::packet::{Frame, Reader};
use phalanx_flow::{FlowEntry, FlowFlags, FlowKey};

use crate::abi::{Change, MAX_CHANGES, change};
use crate::flows;
use crate::frame::XdpFrame;
use crate::maps::HALF_OPEN;
use crate::stages::counters;

/// Run by `BPF_PROG_TEST_RUN` over up to [`MAX_CHANGES`] [`Change`]s. Each one's `what` becomes 1 if it was made, else 0.
#[xdp]
pub fn phalanx_apply(ctx: XdpContext) -> u32 {
    let mut frame = XdpFrame { ctx: &ctx };
    let mut at = 0usize;
    for _ in 0..MAX_CHANGES {
        let Some(bytes) = frame.read::<{ size_of::<Change>() }>(at) else { break };
        // SAFETY: any bytes are a `Change`.
        let change: Change = unsafe { core::mem::transmute(bytes) };
        let made = u32::from(apply(&change));
        if !frame.write(at.wrapping_add(40), made.to_ne_bytes()) {
            break;
        }
        at = at.wrapping_add(size_of::<Change>());
    }
    0
}

const _: () = assert!(core::mem::offset_of!(Change, what) == 40);

#[inline(always)]
fn apply(change: &Change) -> bool {
    let (entry, established) = match flows::find_in_map(&change.key) {
        Some(entry) => (entry, true),
        None => match HALF_OPEN.get_ptr_mut(&change.key) {
            Some(entry) => (entry, false),
            None => return false,
        },
    };
    // SAFETY: the verifier knows where it points; other CPUs write fields of their own.
    let entry: &mut FlowEntry = unsafe { &mut *entry };
    match change.what {
        change::STAMP => {
            let unstamped = entry.birth == 0;
            if unstamped {
                entry.birth = change.birth;
            }
            unstamped
        }
        change::PROTECT => {
            let same = entry.birth == change.birth && entry.update == change.update;
            if same {
                entry.flags = entry.flags.with(FlowFlags::PROTECTED, true);
            }
            same
        }
        change::TOUCH => {
            if entry.last_seen_ms < change.seen_ms {
                entry.last_seen_ms = change.seen_ms;
            }
            true
        }
        change::REMOVE => {
            let over =
                (change.birth == 0 || entry.birth == change.birth) && entry.last_seen_ms <= change.seen_ms;
            over && remove(&change.key, established)
        }
        _ => false,
    }
}

#[inline(always)]
fn remove(key: &FlowKey, established: bool) -> bool {
    if established {
        return flows::remove(key);
    }
    let removed = HALF_OPEN.remove(key).is_ok();
    if removed && let Some(counters) = counters() {
        counters.half_open_out = counters.half_open_out.wrapping_add(1);
    }
    removed
}
