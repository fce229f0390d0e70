//! Runs a program once, by `BPF_PROG_TEST_RUN`.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::map::bpf;

/// `BPF_PROG_TEST_RUN`.
const TEST_RUN: libc::c_int = 10;
/// Room for what a program puts in front of a frame.
const ROOM: usize = 512;

/// The member `test` of `union bpf_attr` (`include/uapi/linux/bpf.h`), as long as Linux 5.18 knows it.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    program: u32,
    result: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// What the program returns for `bytes`, and what it made of them. Without a `context` (`struct xdp_md`) they came in by the loopback.
pub(crate) fn run(
    program: BorrowedFd<'_>,
    bytes: &[u8],
    context: Option<&[u8]>,
) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0; bytes.len() + ROOM];
    let mut attribute = TestAttr {
        program: program.as_raw_fd().cast_unsigned(),
        size_in: bytes.len() as u32,
        size_out: out.len() as u32,
        data_in: bytes.as_ptr() as usize as u64,
        data_out: out.as_mut_ptr() as usize as u64,
        context_size_in: context.map_or(0, |context| context.len() as u32),
        context_in: context.map_or(0, |context| context.as_ptr() as usize as u64),
        ..TestAttr::default()
    };
    bpf(TEST_RUN, &mut attribute)?;
    out.truncate(attribute.size_out as usize);
    Ok((attribute.result, out))
}
