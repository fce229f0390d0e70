//! What can go wrong.

use std::io;

/// Why an operation failed. Nothing was changed unless the kernel says so by not failing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The netlink socket itself: no permission, no buffers, no such protocol.
    #[error("cannot {operation}: netlink socket: {source}")]
    Socket {
        /// What was being done, as in "add 10.0.0.1/24 to link 3".
        operation: String,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel refused the request. Without privileges over the network namespace this is `EPERM`.
    #[error("cannot {operation}: {source}{}", .hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default())]
    Kernel {
        /// What was being done.
        operation: String,
        /// The error number.
        source: io::Error,
        /// The kernel's own sentence, where it gave one (extended acknowledgement).
        hint: Option<String>,
    },
    /// The answer was not what this crate understands.
    #[error("cannot {operation}: the kernel's answer is not understood: {reason}")]
    Answer {
        /// What was being done.
        operation: String,
        /// What was wrong with it.
        reason: String,
    },
    /// There is no such interface in this network namespace.
    #[error("there is no interface {0} in this network namespace")]
    NoLink(String),
}

impl Error {
    /// The kernel's error number, if it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } | Self::Socket { source, .. } => source.raw_os_error(),
            Self::Answer { .. } | Self::NoLink(_) => None,
        }
    }

    /// Whether what was to be deleted or read is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NoLink(_))
            || matches!(self.errno(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL))
    }

    /// Whether what was to be added is there already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// Whether the caller lacks the privilege (`CAP_NET_ADMIN` in the namespace).
    pub fn is_permission(&self) -> bool {
        matches!(self.errno(), Some(libc::EPERM | libc::EACCES))
    }
}
