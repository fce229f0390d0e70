//! The MAC addresses of our interfaces, as the program compares them with a frame's destination.

use phalanx_netlink::Netlink;

use crate::abi::{MAX_MACS, NO_MAC};
use crate::error::StartError;

/// What the kernel said of them last.
#[derive(Debug)]
pub(crate) struct OwnMacs {
    /// Of the network namespace in which the forwarder was started, whichever thread asks.
    netlink: Netlink,
    interfaces: Vec<String>,
    macs: Vec<[u8; 6]>,
}

impl OwnMacs {
    /// Of `interfaces`, in the calling thread's network namespace.
    pub(crate) fn read(interfaces: &[String]) -> Result<Self, StartError> {
        let failed = |error| StartError::system("read MAC addresses", std::io::Error::other(error));
        let mut netlink = Netlink::open().map_err(failed)?;
        let mut macs = Vec::with_capacity(interfaces.len());
        for name in interfaces {
            let link = netlink.link(name).map_err(|error| {
                if error.is_not_found() { StartError::NoInterface(name.clone()) } else { failed(error) }
            })?;
            macs.extend(link.mac.map(|mac| mac.0));
        }
        Ok(Self { netlink, interfaces: interfaces.to_vec(), macs })
    }

    /// Asks again; whether they have changed. While an interface is away they stay what they were.
    pub(crate) fn refresh(&mut self) -> bool {
        let asked: phalanx_netlink::Result<Vec<_>> =
            self.interfaces.iter().map(|name| Ok(self.netlink.link(name)?.mac)).collect();
        match asked.map(|macs| macs.into_iter().flatten().map(|mac| mac.0).collect::<Vec<_>>()) {
            Ok(macs) if macs != self.macs => {
                self.macs = macs;
                true
            }
            Ok(_) => false,
            Err(error) => {
                tracing::debug!(%error, "the interfaces' MAC addresses cannot be read");
                false
            }
        }
    }

    /// As the program reads them.
    pub(crate) fn current(&self) -> [u64; MAX_MACS] {
        let mut words = [NO_MAC; MAX_MACS];
        for (word, [a, b, c, d, e, f]) in words.iter_mut().zip(&self.macs) {
            *word = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, 0, 0]);
        }
        words
    }

    /// One of them, for a frame that is to be taken for ours.
    pub(crate) fn any(&self) -> [u8; 6] {
        self.macs.first().copied().unwrap_or_default()
    }
}
