//! Interfaces.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};

use crate::{Error, Netlink, Result};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The number other calls name it by; above 0, unique in its namespace.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its hardware address; `None` where it has none of six bytes (a TUN device).
    pub mac: Option<Mac>,
    /// Largest packet without the link header, in bytes.
    pub mtu: u32,
    /// Whether it was set up.
    pub up: bool,
    /// Whether it has a carrier too: for a veth, that the peer is up.
    pub running: bool,
    /// Whether it is a loopback interface.
    pub loopback: bool,
    /// Whether its frames start with an Ethernet header (loopback's do too).
    pub ethernet: bool,
    /// The bridge or bond it belongs to.
    pub master: Option<u32>,
    /// What kind of virtual interface it is ("veth", "bridge", "tun"); `None` for hardware.
    pub kind: Option<String>,
}

/// A pair of virtual Ethernet interfaces to make.
#[derive(Clone, Debug)]
pub struct Veth<'a> {
    /// Name of the end that stays in this namespace.
    pub name: &'a str,
    /// Name of the other end.
    pub peer: &'a str,
    /// Namespace the other end is made in; `None`: this one.
    pub peer_netns: Option<BorrowedFd<'a>>,
    /// MTU of both ends, in bytes; `None`: 1,500.
    pub mtu: Option<u32>,
    /// Hardware address of this end; `None`: random.
    pub mac: Option<Mac>,
    /// Hardware address of the other end; `None`: random.
    pub peer_mac: Option<Mac>,
}

impl Netlink {
    /// All interfaces.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let answers = self.dump(
            &|| "list the interfaces".to_owned(),
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        )?;
        Ok(answers.into_iter().filter_map(link_of).collect())
    }

    /// The interface called `name`.
    pub fn link(&mut self, name: &str) -> Result<Link> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.get_link(name, message)
    }

    /// The interface with number `index`.
    pub fn link_by_index(&mut self, index: u32) -> Result<Link> {
        self.get_link(&format!("number {index}"), link_message(index))
    }

    fn get_link(&mut self, name: &str, message: LinkMessage) -> Result<Link> {
        let answers = self.request(&|| format!("look up {name}"), RouteNetlinkMessage::GetLink(message), 0);
        match answers {
            Ok(answers) => {
                answers.into_iter().find_map(link_of).ok_or_else(|| Error::NoLink(name.to_owned()))
            }
            Err(error) if error.is_not_found() => Err(Error::NoLink(name.to_owned())),
            Err(error) => Err(error),
        }
    }

    /// Makes a pair of virtual Ethernet interfaces, both down.
    pub fn create_veth(&mut self, veth: &Veth<'_>) -> Result<()> {
        self.request(
            &|| format!("create the veth pair {} and {}", veth.name, veth.peer),
            RouteNetlinkMessage::NewLink(veth_message(veth)),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map(drop)
    }

    /// Makes a bridge, down, without spanning tree.
    pub fn create_bridge(&mut self, name: &str) -> Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        self.request(
            &|| format!("create the bridge {name}"),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map(drop)
    }

    /// Deletes an interface; of a veth pair both ends go.
    pub fn delete_link(&mut self, index: u32) -> Result<()> {
        self.request(&|| format!("delete link {index}"), RouteNetlinkMessage::DelLink(link_message(index)), 0)
            .map(drop)
    }

    /// Sets an interface up.
    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.set_flags(index, LinkFlags::Up)
    }

    /// Sets an interface down.
    pub fn set_down(&mut self, index: u32) -> Result<()> {
        self.set_flags(index, LinkFlags::empty())
    }

    fn set_flags(&mut self, index: u32, flags: LinkFlags) -> Result<()> {
        let mut message = link_message(index);
        message.header.flags = flags;
        message.header.change_mask = LinkFlags::Up;
        let state = if flags.contains(LinkFlags::Up) { "up" } else { "down" };
        self.request(&|| format!("set link {index} {state}"), RouteNetlinkMessage::SetLink(message), 0)
            .map(drop)
    }

    /// Sets the MTU, in bytes.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Mtu(mtu), &|| {
            format!("set the MTU of link {index} to {mtu}")
        })
    }

    /// Sets the hardware address.
    pub fn set_mac(&mut self, index: u32, mac: Mac) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Address(mac.0.to_vec()), &|| {
            format!("set the address of link {index} to {mac}")
        })
    }

    /// Makes an interface a port of a bridge, or of nothing.
    pub fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Controller(master.unwrap_or(0)), &|| match master {
            Some(master) => format!("make link {index} a port of link {master}"),
            None => format!("take link {index} out of its bridge"),
        })
    }

    /// Renames an interface (it must be down).
    pub fn set_name(&mut self, index: u32, name: &str) -> Result<()> {
        self.set_attribute(index, LinkAttribute::IfName(name.to_owned()), &|| {
            format!("rename link {index} to {name}")
        })
    }

    /// Moves an interface to another network namespace, where it is down and without addresses.
    pub fn set_netns(&mut self, index: u32, netns: BorrowedFd<'_>) -> Result<()> {
        self.set_attribute(index, LinkAttribute::NetNsFd(netns.as_raw_fd()), &|| {
            format!("move link {index} to another network namespace")
        })
    }

    fn set_attribute(
        &mut self,
        index: u32,
        attribute: LinkAttribute,
        operation: &dyn Fn() -> String,
    ) -> Result<()> {
        let mut message = link_message(index);
        message.attributes.push(attribute);
        self.request(operation, RouteNetlinkMessage::SetLink(message), 0).map(drop)
    }
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn veth_message(veth: &Veth<'_>) -> LinkMessage {
    let end = |name: &str, mac: Option<Mac>| {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.extend(veth.mtu.map(LinkAttribute::Mtu));
        message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        message
    };
    let mut peer = end(veth.peer, veth.peer_mac);
    peer.attributes.extend(veth.peer_netns.map(|netns| LinkAttribute::NetNsFd(netns.as_raw_fd())));
    let mut message = end(veth.name, veth.mac);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    message
}

fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let layer = message.header.link_layer_type;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        running: message.header.flags.contains(LinkFlags::LowerUp),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ethernet: matches!(layer, LinkLayerType::Ether | LinkLayerType::Loopback),
        master: None,
        kind: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Controller(master) => link.master = Some(master),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable;

    use super::*;

    #[test]
    fn a_veth_request_names_both_ends_and_both_addresses() {
        let message = veth_message(&Veth {
            name: "left0",
            peer: "right0",
            peer_netns: None,
            mtu: Some(1700),
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            peer_mac: None,
        });
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        assert!(has(b"left0\0") && has(b"right0\0") && has(b"veth"));
        assert!(has(&1700u32.to_ne_bytes()) && has(&[2, 0, 0, 0, 0, 1]));
        // IFLA_NET_NS_FD (28) only where a namespace was named.
        assert!(!message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::NetNsFd(_))));
        assert!(!has(&[8, 0, 28, 0]));
    }

    #[test]
    fn a_link_message_that_is_not_new_is_no_link() {
        assert_eq!(link_of(RouteNetlinkMessage::DelLink(LinkMessage::default())), None);
        assert!(link_of(RouteNetlinkMessage::NewLink(LinkMessage::default())).is_some());
    }
}
