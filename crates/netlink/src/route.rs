//! Routes, and asking which way a packet would take.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::{Error, Netlink, Result};

/// The table that is used where nothing else is said (`RT_TABLE_MAIN`).
pub const MAIN_TABLE: u32 = 254;

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    pub(crate) const fn to_kernel(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }
}

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// Sends it to a next hop.
    #[default]
    Unicast,
    /// Delivers it to this host.
    Local,
    /// Drops it in silence.
    Blackhole,
    /// Drops it and tells the sender.
    Unreachable,
    /// Anything else.
    Other,
}

/// One of the ways a route may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// Interface to send by; 0 leaves it to the kernel to find it by the gateway.
    pub index: u32,
    /// The router; `None` where the destination is on the interface's own network.
    pub gateway: Option<IpAddr>,
    /// Share among the next hops of one route, 1 to 256.
    pub weight: u16,
    /// The gateway is on the interface though no address of ours says so.
    pub onlink: bool,
}

impl NextHop {
    /// By `gateway`, which is on the network of interface `index`.
    pub const fn via(index: u32, gateway: IpAddr) -> Self {
        Self { index, gateway: Some(gateway), weight: 1, onlink: false }
    }

    /// Straight out of interface `index`.
    pub const fn direct(index: u32) -> Self {
        Self { index, gateway: None, weight: 1, onlink: false }
    }
}

/// A route to add, replace or delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination network's address.
    pub destination: IpAddr,
    /// Length of its prefix, in bits; 0 is the default route.
    pub prefix: u8,
    /// What to do.
    pub kind: RouteKind,
    /// The ways it may take: one, or several for equal-cost multipath.
    pub hops: Vec<NextHop>,
    /// The table it stands in.
    pub table: u32,
    /// Address that packets made here carry as their source.
    pub source: Option<IpAddr>,
    /// Path MTU, in bytes.
    pub mtu: Option<u32>,
    /// The maximum segment size that TCP announces over this route, in bytes.
    pub advmss: Option<u32>,
}

impl Route {
    /// A plain route in the main table.
    pub fn new(destination: IpAddr, prefix: u8, hops: Vec<NextHop>) -> Self {
        Self {
            destination,
            prefix,
            kind: RouteKind::Unicast,
            hops,
            table: MAIN_TABLE,
            source: None,
            mtu: None,
            advmss: None,
        }
    }

    /// A default route by one router.
    pub fn default_via(index: u32, gateway: IpAddr) -> Self {
        let destination = match gateway {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self::new(destination, 0, vec![NextHop::via(index, gateway)])
    }
}

/// Which packet to ask the way of.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    /// Where it goes.
    pub destination: IpAddr,
    /// Its source address, if it matters.
    pub source: Option<IpAddr>,
    /// Its firewall mark; 0: none.
    pub mark: u32,
    /// The interface it is bound to; 0: any.
    pub index: u32,
}

impl Lookup {
    /// A packet to `destination`, nothing else known.
    pub const fn to(destination: IpAddr) -> Self {
        Self { destination, source: None, mark: 0, index: 0 }
    }
}

/// The way the kernel would send a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The interface; that of loopback where the packet is for this host.
    pub index: u32,
    /// Whom to ask for the hardware address: the router, or `None` for the destination itself.
    pub gateway: Option<IpAddr>,
    /// The source address a packet made here would carry.
    pub source: Option<IpAddr>,
    /// The route's or the path's MTU where it differs from the interface's, in bytes.
    pub mtu: Option<u32>,
    /// What happens to the packet.
    pub kind: RouteKind,
}

impl Netlink {
    /// Adds a route; fails if there is one to the same network in the same table.
    pub fn add_route(&mut self, route: &Route) -> Result<()> {
        self.change_route(route, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a route in the place of the one to the same network, in one step.
    pub fn replace_route(&mut self, route: &Route) -> Result<()> {
        self.change_route(route, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn change_route(&mut self, route: &Route, flags: u16) -> Result<()> {
        self.request(
            &|| format!("set the route to {}/{}", route.destination, route.prefix),
            RouteNetlinkMessage::NewRoute(route_message(route)),
            flags,
        )
        .map(drop)
    }

    /// Deletes a route (without next hops: whatever its next hops are).
    pub fn delete_route(&mut self, route: &Route) -> Result<()> {
        self.request(
            &|| format!("delete the route to {}/{}", route.destination, route.prefix),
            RouteNetlinkMessage::DelRoute(route_message(route)),
            0,
        )
        .map(drop)
    }

    /// All routes of a family, in all tables, those of the kernel's own making too.
    pub fn routes(&mut self, family: Family) -> Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family.to_kernel();
        let answers = self.dump(&|| "list the routes".to_owned(), RouteNetlinkMessage::GetRoute(message))?;
        Ok(answers.into_iter().filter_map(|answer| route_of(answer, family)).collect())
    }

    /// The way the kernel would send a packet now (`ip route get`).
    pub fn lookup(&mut self, lookup: &Lookup) -> Result<Hop> {
        let mut message = RouteMessage::default();
        message.header.address_family = Family::of(lookup.destination).to_kernel();
        message.header.destination_prefix_length = host_prefix(lookup.destination);
        message.header.flags = RouteFlags::LookupTable;
        message.attributes.push(RouteAttribute::Destination(lookup.destination.into()));
        if let Some(source) = lookup.source {
            message.header.source_prefix_length = host_prefix(source);
            message.attributes.push(RouteAttribute::Source(source.into()));
        }
        if lookup.mark != 0 {
            message.attributes.push(RouteAttribute::Mark(lookup.mark));
        }
        if lookup.index != 0 {
            message.attributes.push(RouteAttribute::Oif(lookup.index));
        }
        let operation = || format!("find the way to {}", lookup.destination);
        let answers = self.request(&operation, RouteNetlinkMessage::GetRoute(message), 0)?;
        answers
            .into_iter()
            .find_map(hop_of)
            .ok_or_else(|| Error::Answer { operation: operation(), reason: "it names no way".to_owned() })
    }
}

const fn host_prefix(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = Family::of(route.destination).to_kernel();
    message.header.destination_prefix_length = route.prefix;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = match route.kind {
        RouteKind::Unicast | RouteKind::Other => RouteType::Unicast,
        RouteKind::Local => RouteType::Local,
        RouteKind::Blackhole => RouteType::BlackHole,
        RouteKind::Unreachable => RouteType::Unreachable,
    };
    // An IPv4 route without a gateway is to a neighbour; IPv6 has no scopes and wants 0.
    let scope_link = route.destination.is_ipv4()
        && route.kind == RouteKind::Unicast
        && !route.hops.is_empty()
        && route.hops.iter().all(|hop| hop.gateway.is_none());
    message.header.scope = match route.kind {
        RouteKind::Local if route.destination.is_ipv4() => RouteScope::Host,
        _ if scope_link => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    // The header has room for tables below 256; the attribute for all.
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RouteAttribute::Table(route.table));
    if route.prefix != 0 {
        message.attributes.push(RouteAttribute::Destination(route.destination.into()));
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    let metrics: Vec<RouteMetric> =
        route.mtu.map(RouteMetric::Mtu).into_iter().chain(route.advmss.map(RouteMetric::Advmss)).collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    match route.hops.as_slice() {
        [] => {}
        [hop] => {
            if let Some(gateway) = hop.gateway {
                message.attributes.push(RouteAttribute::Gateway(gateway.into()));
            }
            if hop.index != 0 {
                message.attributes.push(RouteAttribute::Oif(hop.index));
            }
            if hop.onlink {
                message.header.flags |= RouteFlags::Onlink;
            }
        }
        hops => message.attributes.push(RouteAttribute::MultiPath(hops.iter().map(next_hop).collect())),
    }
    message
}

fn next_hop(hop: &NextHop) -> RouteNextHop {
    let mut next = RouteNextHop::default();
    next.interface_index = hop.index;
    // The kernel counts from 0: rtnh_hops is the weight less 1.
    next.hops = u8::try_from(hop.weight.clamp(1, 256) - 1).unwrap_or(u8::MAX);
    if hop.onlink {
        next.flags = RouteNextHopFlags::Onlink;
    }
    next.attributes.extend(hop.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    next
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

const fn kind_of(kind: RouteType) -> RouteKind {
    match kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        _ => RouteKind::Other,
    }
}

fn route_of(message: RouteNetlinkMessage, family: Family) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = message else { return None };
    let unspecified = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut route = Route::new(unspecified, message.header.destination_prefix_length, Vec::new());
    route.kind = kind_of(message.header.kind);
    route.table = u32::from(message.header.table);
    let (mut index, mut gateway) = (0, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = ip_of(address)?,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::PrefSource(address) => route.source = ip_of(address),
            RouteAttribute::Oif(oif) => index = *oif,
            RouteAttribute::Gateway(address) => gateway = ip_of(address),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = Some(*mtu),
                        RouteMetric::Advmss(advmss) => route.advmss = Some(*advmss),
                        _ => {}
                    }
                }
            }
            RouteAttribute::MultiPath(hops) => route.hops = hops.iter().map(hop_from_kernel).collect(),
            _ => {}
        }
    }
    if route.hops.is_empty() && (index != 0 || gateway.is_some()) {
        let onlink = message.header.flags.contains(RouteFlags::Onlink);
        route.hops.push(NextHop { index, gateway, weight: 1, onlink });
    }
    Some(route)
}

fn hop_from_kernel(hop: &RouteNextHop) -> NextHop {
    let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip_of(address),
        _ => None,
    });
    NextHop {
        index: hop.interface_index,
        gateway,
        weight: u16::from(hop.hops) + 1,
        onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
    }
}

fn hop_of(message: RouteNetlinkMessage) -> Option<Hop> {
    let RouteNetlinkMessage::NewRoute(message) = message else { return None };
    let mut hop =
        Hop { index: 0, gateway: None, source: None, mtu: None, kind: kind_of(message.header.kind) };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.index = *index,
            RouteAttribute::Gateway(address) => hop.gateway = ip_of(address),
            // An IPv6 router for an IPv4 destination (RFC 8950).
            RouteAttribute::Via(via) => hop.gateway = hop.gateway.or_else(|| via_address(via)),
            RouteAttribute::PrefSource(address) => hop.source = ip_of(address),
            RouteAttribute::Metrics(metrics) => {
                hop.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(hop)
}

fn via_address(via: &netlink_packet_route::route::RouteVia) -> Option<IpAddr> {
    use netlink_packet_route::route::RouteVia;
    match via {
        RouteVia::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteVia::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_survives_the_way_through_a_message() {
        let mut ecmp = Route::new(
            "192.0.2.1".parse().unwrap(),
            32,
            vec![
                NextHop::via(3, "10.0.1.11".parse().unwrap()),
                NextHop::via(4, "10.0.1.12".parse().unwrap()),
            ],
        );
        ecmp.table = 1000;
        ecmp.mtu = Some(1400);
        ecmp.advmss = Some(1360);
        ecmp.hops[1].weight = 7;
        let single = Route::default_via(2, "fd00::1".parse().unwrap());
        for route in [ecmp, single] {
            let family = Family::of(route.destination);
            assert_eq!(route_of(RouteNetlinkMessage::NewRoute(route_message(&route)), family), Some(route));
        }
    }

    #[test]
    fn only_a_route_without_a_gateway_has_link_scope() {
        let direct = Route::new("10.0.0.0".parse().unwrap(), 8, vec![NextHop::direct(2)]);
        assert_eq!(route_message(&direct).header.scope, RouteScope::Link);
        let via = Route::default_via(2, "10.0.0.1".parse().unwrap());
        assert_eq!(route_message(&via).header.scope, RouteScope::Universe);
    }

    #[test]
    fn a_weight_out_of_range_is_clamped() {
        let mut hop = NextHop::direct(1);
        for (weight, kernel) in [(0, 0), (1, 0), (256, 255), (u16::MAX, 255)] {
            hop.weight = weight;
            assert_eq!(next_hop(&hop).hops, kernel);
        }
    }
}
