//! The cluster in which the conformance suite and the fixtures play: the same for every forwarder.
//!
//! ```text
//!  clients 10.9.0.0/16, 2001:db8:9::/48 ── router ── us, member 1, 10.0.0.1; members 2 to 4 at 10.0.0.2 to .4
//!  services 192.0.2.1: tcp 80, tcp 443 (fragments), tcp 81 (no backend), udp 53;  2001:db8::1: tcp 80, udp 53
//!  backends 0: l2 10.0.1.1   1: ipip 10.0.1.2   2: gue 10.0.1.3   3: ipip fd00:1::4   4: gue fd00:1::5   5: l2 10.0.1.6
//! ```

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use phalanx_flow::member::Liveness;
use phalanx_flow::{
    BackendId, BackendIndex, FlowKey, FlowSeed, MemberId, MemberSlot, Method, Row, RowFunction,
};

use super::frames::{COOKIE, OUR_MAC, ROUTER_MAC, VIEW_DIGEST};
use crate::plan::{Handoff, NextHop, NextHops, Plan, PlanBackend, PlanMember, PlanService, SLOTS, SlotSet};

/// The UDP port of the hand-off tunnel.
pub const HANDOFF_PORT: u16 = 6081;
/// Our data address.
pub const OUR_ADDRESS: &str = "10.0.0.1";

/// What differs from one case to the next.
#[derive(Clone, Debug)]
pub struct World {
    /// The ranking of every row, by member id.
    pub row: Vec<u32>,
    /// The same of the table before, while a handover window is open.
    pub previous: Option<Vec<u32>>,
    /// What we believe of members that are not alive.
    pub liveness: Vec<(u32, Liveness)>,
    /// The consistent table's backend in every slot.
    pub backend: u32,
    /// What that was in every slot before a member was lost.
    pub earlier: Option<u32>,
    /// Every slot changes just now.
    pub unsettled: bool,
    /// A backend that has failed and whose flows are reset.
    pub failed: Option<u32>,
    /// Replicate on the first packet.
    pub replicate_syn: bool,
    /// Fragment hand-offs where the path is too narrow.
    pub fragment_hand_offs: bool,
    /// The path's MTU, to members and backends alike.
    pub mtu: u16,
    /// Whether next hops are resolved.
    pub resolved: bool,
}

impl Default for World {
    fn default() -> Self {
        Self {
            row: vec![1, 2, 3],
            previous: None,
            liveness: Vec::new(),
            backend: 0,
            earlier: None,
            unsettled: false,
            failed: None,
            replicate_syn: false,
            fragment_hand_offs: false,
            mtu: 1500,
            resolved: true,
        }
    }
}

/// An address.
///
/// # Panics
/// If it is none.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// The key of a flow from its line: `tcp 10.9.0.1 40000 192.0.2.1 80`.
///
/// # Panics
/// If the line is wrong.
pub fn key(line: &str) -> FlowKey {
    let words: Vec<&str> = line.split(' ').collect();
    let port = |text: &str| text.parse::<u16>().expect("a port");
    let protocol = if words[0] == "tcp" { 6 } else { 17 };
    FlowKey::new(protocol, (ip(words[1]), port(words[2])), (ip(words[3]), port(words[4])))
        .expect("one family")
}

/// The backends, by their index.
pub fn backends() -> Vec<BackendId> {
    vec![
        BackendId::new(ip("10.0.1.1"), Method::L2, 0),
        BackendId::new(ip("10.0.1.2"), Method::IpIp, 0),
        BackendId::new(ip("10.0.1.3"), Method::Gue, 5555),
        BackendId::new(ip("fd00:1::4"), Method::IpIp, 0),
        BackendId::new(ip("fd00:1::5"), Method::Gue, 5555),
        BackendId::new(ip("10.0.1.6"), Method::L2, 0),
    ]
}

impl World {
    /// The plan of member 1.
    pub fn plan(&self) -> Plan {
        let slot = |id: u32| MemberSlot(id as u16 - 1);
        let row = |ids: &[u32]| {
            let mut row = Row::EMPTY;
            for (place, id) in row.ranks.iter_mut().zip(ids) {
                *place = slot(*id);
            }
            row
        };
        let row_function = RowFunction::Rendezvous { mask: 0xffff };
        let rows = |ids: &[u32]| -> Arc<[Row]> { vec![row(ids); row_function.row_count() as usize].into() };
        let liveness = |id| {
            let known = self.liveness.iter().find(|(member, _)| *member == id);
            known.map_or(Liveness::Alive, |(_, liveness)| *liveness)
        };
        let slots = |backend| -> Arc<[BackendIndex]> { vec![BackendIndex(backend); SLOTS].into() };
        let service = |address: &str, port, protocol| PlanService {
            address: ip(address),
            port,
            protocol,
            slots: slots(self.backend),
            earlier: self.earlier.map(slots),
            unsettled: self.unsettled.then(|| Arc::new(SlotSet::new(0..=u16::MAX))),
            failed: self.failed.map(BackendIndex).into_iter().collect(),
            idle: Duration::from_secs(60),
            linger: Duration::from_secs(10),
            reset_linger: Duration::from_secs(1),
            half_open: Duration::from_secs(5),
            replicate_syn: self.replicate_syn,
            fragment: false,
        };
        Plan {
            local: MemberSlot(0),
            seed: FlowSeed([1, 2]),
            row_function,
            members: (1..=4)
                .map(|id| PlanMember {
                    id: MemberId(id),
                    address: ip(&format!("10.0.0.{id}")),
                    liveness: liveness(id),
                })
                .collect(),
            rows: rows(&self.row),
            previous: self.previous.as_deref().map(rows),
            view_digest: VIEW_DIGEST,
            handoff: Handoff {
                port: HANDOFF_PORT,
                cookie: COOKIE,
                old_cookie: Some(COOKIE + 1),
                fragment: self.fragment_hand_offs,
            },
            services: vec![
                service("192.0.2.1", 80, 6),
                PlanService { fragment: true, ..service("192.0.2.1", 443, 6) },
                PlanService { slots: slots(u32::MAX), ..service("192.0.2.1", 81, 6) },
                service("192.0.2.1", 53, 17),
                service("2001:db8::1", 80, 6),
                service("2001:db8::1", 53, 17),
            ],
            backends: backends()
                .into_iter()
                .map(|id| PlanBackend {
                    id,
                    source: if id.family == 4 { ip(OUR_ADDRESS) } else { ip("fd00::1") },
                })
                .collect(),
        }
    }

    /// Everything is behind the router on `interface`.
    pub fn next_hops(&self, interface: u32) -> NextHops {
        let hop = self.resolved.then_some(NextHop {
            interface,
            source_mac: OUR_MAC,
            destination_mac: ROUTER_MAC,
            mtu: self.mtu,
        });
        NextHops { members: vec![hop; 4], backends: vec![hop; backends().len()] }
    }
}
