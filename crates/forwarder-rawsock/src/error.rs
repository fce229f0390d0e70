//! Why a forwarder could not start.

use std::io;
use std::net::IpAddr;

/// Why [`RawsockForwarder::start`](crate::RawsockForwarder::start) failed. Nothing was changed that the next start does not put right.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The process may not open packet sockets. Run it as root, or with both capabilities.
    #[error(
        "no permission for raw sockets: the process needs CAP_NET_RAW and CAP_NET_ADMIN (run it as root or grant both)"
    )]
    Permission,
    /// No interface was named, so that nothing could be received.
    #[error("interfaces: name at least one")]
    NoInterfaces,
    /// There is no interface of that name. Check the spelling, and that it exists before the program starts.
    #[error("interfaces: there is no interface {0}")]
    NoInterface(String),
    /// The interface's frames have no Ethernet header (a TUN device, or a tunnel).
    #[error("interfaces: {0} is not an Ethernet interface")]
    NotEthernet(String),
    /// The interface cannot carry IPv6's least MTU, and with it no tunnel either.
    #[error("interfaces: the MTU of {name} is {mtu}; it must be at least 1280")]
    Mtu {
        /// The interface.
        name: String,
        /// Its MTU in bytes.
        mtu: u32,
    },
    /// The interface merges packets so that they cannot be taken apart again. Turn it off.
    #[error("interfaces: {0} has large-receive-offload on; turn it off: ethtool -K {0} lro off")]
    LargeReceive(String),
    /// The local member's address in the plan is not the data address.
    #[error("the data address {0} is not the one that the plan gives the local member")]
    OtherAddress(IpAddr),
    /// The data address is not this host's, or the port is taken.
    #[error("cannot receive hand-offs on {address} port {port}: {source}")]
    DataAddress {
        /// The data address.
        address: IpAddr,
        /// The hand-off port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// More services than one filter takes.
    #[error(
        "services: {instructions} filter instructions are needed and the kernel takes 4096; use fewer addresses"
    )]
    TooManyServices {
        /// How many instructions.
        instructions: usize,
    },
    /// The plan is wrong.
    #[error(transparent)]
    Plan(#[from] phalanx_forwarder::InstallError),
    /// The kernel refused something else.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused the filter on tc ingress.
    #[error("the drop on tc ingress of {name}: {source}")]
    Ingress {
        /// The interface.
        name: String,
        /// What the kernel said.
        source: phalanx_netlink::Error,
    },
}

impl StartError {
    /// Names the missing permission where that is the reason.
    pub(crate) fn system(operation: impl Into<String>, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            Self::Permission
        } else {
            Self::System { operation: operation.into(), source }
        }
    }
}
