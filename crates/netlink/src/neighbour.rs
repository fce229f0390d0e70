//! Neighbours: which hardware address an address on a link has.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use crate::{Family, Mac, Netlink, Result};

/// What the kernel knows of an address on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Its hardware address, where one is known.
    pub mac: Option<Mac>,
    /// How sure the kernel is.
    pub state: Reachability,
}

/// How sure the kernel is of a neighbour (`NUD_*`, include/uapi/linux/neighbour.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reachability {
    /// Set by hand, never asked about.
    Permanent,
    /// It answered lately.
    Reachable,
    /// It answered some time ago; the address may be used, and is checked on use.
    Stale,
    /// Being asked for the first time.
    Incomplete,
    /// It did not answer.
    Failed,
    /// The link has no hardware addresses, or nothing is known.
    Other,
}

impl Neighbour {
    /// The hardware address to send to, if the kernel would use it itself.
    pub fn usable_mac(&self) -> Option<Mac> {
        match self.state {
            Reachability::Permanent | Reachability::Reachable | Reachability::Stale => self.mac,
            Reachability::Incomplete | Reachability::Failed | Reachability::Other => None,
        }
    }
}

impl Netlink {
    /// All neighbours of all interfaces, IPv4 and IPv6.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>> {
        let answers = self.dump(
            &|| "list the neighbours".to_owned(),
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        )?;
        Ok(answers.into_iter().filter_map(neighbour_of).collect())
    }

    /// What is known of `address` on link `index`; `None`: nothing.
    pub fn neighbour(&mut self, index: u32, address: IpAddr) -> Result<Option<Neighbour>> {
        let message = neighbour_message(index, address);
        match self.request(
            &|| format!("look up the neighbour {address} on link {index}"),
            RouteNetlinkMessage::GetNeighbour(message),
            0,
        ) {
            Ok(answers) => Ok(answers.into_iter().find_map(neighbour_of)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets a neighbour's hardware address by hand, for good.
    pub fn set_neighbour(&mut self, index: u32, address: IpAddr, mac: Mac) -> Result<()> {
        let mut message = neighbour_message(index, address);
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        self.request(
            &|| format!("set the neighbour {address} on link {index} to {mac}"),
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map(drop)
    }

    /// Forgets a neighbour.
    pub fn delete_neighbour(&mut self, index: u32, address: IpAddr) -> Result<()> {
        self.request(
            &|| format!("delete the neighbour {address} on link {index}"),
            RouteNetlinkMessage::DelNeighbour(neighbour_message(index, address)),
            0,
        )
        .map(drop)
    }

    /// Has the kernel ask for a neighbour's hardware address, or check the one it has; returns at once.
    ///
    /// The answer shows in [`Netlink::neighbour`] and on a [`crate::Monitor`].
    /// This is what a packet sent by the kernel would do (`NTF_USE`), without sending one.
    pub fn resolve_neighbour(&mut self, index: u32, address: IpAddr) -> Result<()> {
        let mut message = neighbour_message(index, address);
        message.header.flags = NeighbourFlags::Use;
        message.header.state = NeighbourState::None;
        self.request(
            &|| format!("ask for the neighbour {address} on link {index}"),
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE,
        )
        .map(drop)
    }
}

fn neighbour_message(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = Family::of(address).to_kernel();
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message
}

fn neighbour_of(message: RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok().map(Mac),
            _ => {}
        }
    }
    let state = match message.header.state {
        NeighbourState::Permanent => Reachability::Permanent,
        NeighbourState::Reachable => Reachability::Reachable,
        // A neighbour being checked again keeps its address meanwhile.
        NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe => Reachability::Stale,
        NeighbourState::Incomplete => Reachability::Incomplete,
        NeighbourState::Failed => Reachability::Failed,
        _ => Reachability::Other,
    };
    Some(Neighbour { index: message.header.ifindex, address: address?, mac, state })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_neighbour_has_no_usable_address() {
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        let mut message = neighbour_message(4, "fd00::9".parse().unwrap());
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        for (state, usable) in [
            (NeighbourState::Permanent, Some(mac)),
            (NeighbourState::Reachable, Some(mac)),
            (NeighbourState::Probe, Some(mac)),
            (NeighbourState::Incomplete, None),
            (NeighbourState::Failed, None),
        ] {
            message.header.state = state;
            let neighbour = neighbour_of(RouteNetlinkMessage::NewNeighbour(message.clone())).unwrap();
            assert_eq!(neighbour.usable_mac(), usable, "{state}");
        }
    }
}
