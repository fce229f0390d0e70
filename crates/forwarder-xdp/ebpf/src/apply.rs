//! Changes of flows that the daemon asks for: made here, field by field and in place, so that no packet's change is lost.

use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::packet::{Frame, Reader};
use phalanx_flow::{BackendIndex, FlowEntry, FlowFlags, FlowState};

use crate::abi::{Change, CpuCounters, Header, MAX_CHANGES, change};
use crate::flows;
use crate::frame::XdpFrame;
use crate::half_open::{self, Changed};
use crate::maps::ACTIVE;
use crate::stages::{counters, header};

/// Run by `BPF_PROG_TEST_RUN` over up to [`MAX_CHANGES`] [`Change`]s. Each one's `what` becomes 1 if it was made, else 0.
#[xdp]
pub fn phalanx_apply(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(plan)) = (counters(), ACTIVE.get(0)) else { return 0 };
    let Some(header) = header(*plan & 1) else { return 0 };
    let mut frame = XdpFrame { ctx: &ctx };
    let mut at = 0usize;
    for _ in 0..MAX_CHANGES {
        let Some(bytes) = frame.read::<{ size_of::<Change>() }>(at) else { break };
        // SAFETY: any bytes are a `Change`.
        let change: Change = unsafe { core::mem::transmute(bytes) };
        let made = u32::from(apply(counters, header, &change));
        if !frame.write(at.wrapping_add(40), made.to_ne_bytes()) {
            break;
        }
        at = at.wrapping_add(size_of::<Change>());
    }
    0
}

const _: () = assert!(core::mem::offset_of!(Change, what) == 40);

#[inline(always)]
fn apply(counters: &mut CpuCounters, header: &Header, change: &Change) -> bool {
    if !matches!(change.what, change::PUT | change::TAKE_OUT)
        && let Some(entry) = flows::find_in_map(&change.key)
    {
        // SAFETY: the verifier knows where it points; other CPUs write fields of their own.
        return match apply_to(unsafe { &mut *entry }, change) {
            Changed::Over => flows::remove(&change.key),
            changed => changed == Changed::Yes,
        };
    }
    half_open::change(counters, header, &change.key, |known| match (change.what, known) {
        (change::PUT, _) => Changed::Anew(FlowEntry {
            birth: change.birth,
            last_seen_ms: change.seen_ms,
            last_reported_ms: change.reported_ms,
            update: change.update,
            backend: BackendIndex(change.backend),
            state: FlowState::HalfOpen as u8,
            flags: FlowFlags(change.flags as u8),
            reserved: [0; 6],
        }),
        (_, Some(entry)) => apply_to(entry, change),
        (_, None) => Changed::No,
    })
}

#[inline(always)]
fn apply_to(entry: &mut FlowEntry, change: &Change) -> Changed {
    let changed = match change.what {
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
            if (change.birth == 0 || entry.birth == change.birth) && entry.last_seen_ms <= change.seen_ms {
                return Changed::Over;
            }
            false
        }
        change::TAKE_OUT => return Changed::Over,
        change::FORMER => {
            entry.flags = entry.flags.with(FlowFlags::FORMER, change.update != 0);
            true
        }
        _ => false,
    };
    if changed { Changed::Yes } else { Changed::No }
}
