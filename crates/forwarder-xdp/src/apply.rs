//! Changes of flows that the kernel makes for the daemon, by `phalanx_apply`.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Ebpf;
use aya::programs::Xdp;

use crate::abi::{APPLY, Change, MAX_CHANGES};
use crate::run::run;

/// The program, loaded.
#[derive(Debug)]
pub(crate) struct Apply(OwnedFd);

impl Apply {
    pub(crate) fn open(ebpf: &Ebpf) -> io::Result<Self> {
        let program = ebpf.program(APPLY).ok_or(io::ErrorKind::NotFound)?;
        let program: &Xdp = program.try_into().map_err(io::Error::other)?;
        Ok(Self(program.fd().map_err(io::Error::other)?.as_fd().try_clone_to_owned()?))
    }

    /// Has the kernel make changes; which of them were made.
    pub(crate) fn make(&self, changes: &[Change]) -> Vec<bool> {
        let mut made = Vec::with_capacity(changes.len());
        for changes in changes.chunks(MAX_CHANGES) {
            let mut bytes = Vec::with_capacity(size_of_val(changes));
            for change in changes {
                bytes.extend_from_slice(&change.to_bytes());
            }
            match run(self.0.as_fd(), &bytes, None) {
                Ok((_, answer)) => {
                    made.extend(answer.chunks_exact(size_of::<Change>()).map(|change| change[40] == 1))
                }
                Err(error) => {
                    tracing::error!(%error, "the kernel makes no changes of flows");
                    made.extend(changes.iter().map(|_| false));
                }
            }
        }
        made
    }
}
