//! Addresses of interfaces.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::{Netlink, Result};

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The interface.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its network's prefix, in bits.
    pub prefix: u8,
}

impl Netlink {
    /// All addresses of all interfaces.
    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let answers = self.dump(
            &|| "list the addresses".to_owned(),
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        )?;
        Ok(answers.into_iter().filter_map(address_of).collect())
    }

    /// Gives an interface an address (again is no error). IPv6 addresses are usable at once: no duplicate detection.
    pub fn add_address(&mut self, address: &Address) -> Result<()> {
        self.request(
            &|| format!("add {}/{} to link {}", address.address, address.prefix, address.index),
            RouteNetlinkMessage::NewAddress(address_message(address)),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map(drop)
    }

    /// Takes an address from an interface.
    pub fn delete_address(&mut self, address: &Address) -> Result<()> {
        self.request(
            &|| format!("delete {}/{} from link {}", address.address, address.prefix, address.index),
            RouteNetlinkMessage::DelAddress(address_message(address)),
            0,
        )
        .map(drop)
    }
}

fn address_message(address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = match address.address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.index = address.index;
    message.header.prefix_len = address.prefix;
    message.header.scope =
        if address.address.is_loopback() { AddressScope::Host } else { AddressScope::Universe };
    message.attributes.push(AddressAttribute::Local(address.address));
    message.attributes.push(AddressAttribute::Address(address.address));
    if address.address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn address_of(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    // On a point-to-point link "address" is the other end's and "local" ours; elsewhere they are equal, and IPv6 has only the former.
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) if address.is_none() => address = Some(*other),
            _ => {}
        }
    }
    Some(Address { index: message.header.index, address: address?, prefix: message.header.prefix_len })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_the_way_through_a_message() {
        for text in ["10.0.0.1", "fd00::1"] {
            let address = Address { index: 7, address: text.parse().unwrap(), prefix: 24 };
            assert_eq!(address_of(RouteNetlinkMessage::NewAddress(address_message(&address))), Some(address));
        }
        // Twin: a message without an address is none.
        assert_eq!(address_of(RouteNetlinkMessage::NewAddress(AddressMessage::default())), None);
    }

    #[test]
    fn only_ipv6_skips_duplicate_detection() {
        let flags = |text: &str| {
            address_message(&Address { index: 1, address: text.parse().unwrap(), prefix: 32 }).header.flags
        };
        assert_eq!(flags("fd00::1"), AddressHeaderFlags::Nodad);
        assert_eq!(flags("10.0.0.1"), AddressHeaderFlags::default());
    }
}
