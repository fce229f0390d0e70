//! A BPF file system of the lab's own, in which members with XDP programs pin them: gone with the lab, and seen by nobody else.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A mounted BPF file system; unmounted when dropped.
#[derive(Debug)]
pub struct Pins {
    path: CString,
    directory: PathBuf,
}

impl Pins {
    /// Mounts one below `directory`, in a mount namespace of the calling thread's own: what it starts later sees it, and nobody else does.
    pub fn mount(directory: &Path) -> Result<Self> {
        let directory = directory.join("bpf");
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let path = CString::new(directory.as_os_str().as_bytes())?;
        let (bpf, root) = (c"bpf".as_ptr(), c"/".as_ptr());
        let none = std::ptr::null;
        // SAFETY: strings that end with a zero, and no data.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none(), root, none(), libc::MS_REC | libc::MS_PRIVATE, none().cast()) == 0
                && libc::mount(bpf, path.as_ptr(), bpf, 0, none().cast()) == 0
        };
        if !mounted {
            return Err(std::io::Error::last_os_error()).context("cannot mount a BPF file system");
        }
        Ok(Self { path, directory })
    }

    /// Where a member pins.
    pub fn of(&self, member: u32) -> PathBuf {
        self.directory.join(format!("member{member}"))
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // SAFETY: a string that ends with a zero. What is still in use goes with its last user.
        unsafe { libc::umount2(self.path.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_dir(&self.directory);
    }
}
