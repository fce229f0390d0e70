//! A program that passes everything, for the other end of a veth pair.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::map::open as bpf;

/// Commands of `bpf(2)`, and what they are told here (`include/uapi/linux/bpf.h`).
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`.
const DRIVER_MODE: u32 = 4;

/// `r0 = XDP_PASS; exit`.
static PASS: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log: [u64; 5],
}

#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program that passes everything to an interface of the calling thread's namespace, for as long as the descriptor is open.
///
/// A veth takes what its peer sends by `XDP_TX` only if it has a program itself (`veth_xdp_flush` in `drivers/net/veth.c`).
pub fn attach_pass(interface: u32) -> io::Result<OwnedFd> {
    let mut program = ProgramAttr {
        kind: PROG_TYPE_XDP,
        instructions: PASS.len() as u32,
        code: PASS.as_ptr() as usize as u64,
        license: c"GPL".as_ptr() as usize as u64,
        ..ProgramAttr::default()
    };
    let program = bpf(PROG_LOAD, &mut program)?;
    let mut link = LinkAttr {
        program: program.as_raw_fd().cast_unsigned(),
        interface,
        attach_type: ATTACH_TYPE_XDP,
        flags: DRIVER_MODE,
    };
    bpf(LINK_CREATE, &mut link)
}
