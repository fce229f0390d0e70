//! Why a forwarder could not start.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// Why [`XdpForwarder::start`](crate::XdpForwarder::start) failed. What was pinned before stays as it was, and goes on forwarding.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The process may not use `bpf(2)`. Run it as root, or with both capabilities.
    #[error(
        "no permission for XDP: the process needs CAP_BPF and CAP_NET_ADMIN (run it as root or grant both): {0}"
    )]
    Permission(String),
    /// No interface was named.
    #[error("interfaces: name at least one")]
    NoInterfaces,
    /// More interfaces than the program compares addresses of.
    #[error("interfaces: {0} are too many, XDP takes {max} at most", max = crate::abi::MAX_MACS)]
    TooManyInterfaces(usize),
    /// There is no interface of that name.
    #[error("interfaces: there is no interface {0}")]
    NoInterface(String),
    /// Another XDP program is attached; it is never replaced unasked. Detach it (`ip link set NAME xdp off`, or
    /// `phalanx detach` if a dead daemon of another configuration left it), or choose rawsock.
    #[error(
        "interfaces: {name} has another XDP program already: {other}; detach it or use another interface"
    )]
    Occupied {
        /// The interface.
        name: String,
        /// Which program, by id and name where they are known.
        other: String,
    },
    /// The interface takes no XDP program, not even in generic mode.
    #[error("interfaces: {name} takes no XDP program: {source}")]
    Attach {
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The plan given is not for this forwarder's data address. A fault of the caller.
    #[error("{0} is not the address of the local member in the plan")]
    OtherAddress(IpAddr),
    /// The object cannot be read or lacks something: another version's, or damaged.
    #[error("the XDP object {path}: {message}")]
    Object {
        /// Where it came from.
        path: String,
        /// What is wrong.
        message: String,
    },
    /// The kernel's verifier refused a program: a kernel older than 5.18, or a fault of ours.
    #[error("the kernel refused the program {program} (Linux 5.18 or newer is needed): {message}")]
    Refused {
        /// Which one.
        program: &'static str,
        /// The verifier's last words.
        message: String,
    },
    /// The kernel lacks something that the program needs.
    #[error("this kernel is too old for XDP: it lacks {feature}, which Linux {since} and newer have")]
    Kernel {
        /// What is missing.
        feature: &'static str,
        /// The first version that has it.
        since: &'static str,
    },
    /// Another daemon runs with these pins. One directory a member.
    #[error("pin_dir: a running daemon uses {0}; stop it first, or give this member a directory of its own")]
    PinsInUse(PathBuf),
    /// Nothing can be pinned there: it is no BPF file system.
    #[error("pin_dir: nothing can be pinned in {path}: {source}; mount one: mount -t bpf bpf /sys/fs/bpf")]
    Pin {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The first plan could not be carried out.
    #[error(transparent)]
    Install(#[from] phalanx_forwarder::InstallError),
    /// A call failed that should not.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl StartError {
    pub(crate) fn system(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { operation: operation.into(), source: source.into() }
    }
}
