//! What the daemon wants kept with the pinned tables, for as long as they live: bytes whose meaning is its own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::map::{self, Map, Plain};

/// Longest note, in bytes: a cluster of [`crate::abi::MAX_MEMBERS`] members takes about half.
pub(crate) const NOTE_BYTES: usize = 65_528;

/// Its name beside the maps of the program.
pub(crate) const NAME: &str = "NOTE";

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Value {
    length: u64,
    bytes: [u8; NOTE_BYTES],
}

// SAFETY: `#[repr(C)]` of a number and bytes without padding, and every bit pattern is a value.
unsafe impl Plain for Value {}

/// A note in a map of its own, which no program reads.
#[derive(Debug)]
pub(crate) struct Note(Map<u32, Value>);

impl Note {
    /// Opens the note that is pinned in `directory`, or pins an empty one.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join(NAME);
        let c_path = CString::new(path.as_os_str().as_bytes())?;
        let fd: OwnedFd = match map::open_pin(&c_path) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let fd = map::create_array(size_of::<u32>() as u32, size_of::<Value>() as u32, 1)?;
                map::pin(&fd, &c_path)?;
                fd
            }
            Err(error) => return Err(error),
        };
        tracing::trace!(fd = fd.as_raw_fd(), "note");
        Ok(Self(Map::from_fd(fd)))
    }

    /// What was written last.
    pub(crate) fn read(&self) -> io::Result<Vec<u8>> {
        let value = self.0.get_boxed(&0)?.ok_or(io::ErrorKind::NotFound)?;
        let length = usize::try_from(value.length).unwrap_or(NOTE_BYTES).min(NOTE_BYTES);
        Ok(value.bytes[..length].to_vec())
    }

    /// Writes another; the kernel copies it whole, so that a process that dies leaves the one or the other.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > NOTE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the note is too long"));
        }
        let mut value = Box::new(Value { length: bytes.len() as u64, bytes: [0; NOTE_BYTES] });
        value.bytes[..bytes.len()].copy_from_slice(bytes);
        self.0.put(&0, &value)
    }
}
