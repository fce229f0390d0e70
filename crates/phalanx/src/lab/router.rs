//! The router: spreads the service's packets over next hops, and drops a dead one a while later, as BFD would.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use phalanx_netlink::{Netlink, NextHop, Route};

use super::netns::Netns;

/// The route to the service and the next hops it should have.
#[derive(Debug)]
pub struct Router {
    netlink: Netlink,
    service: IpAddr,
    detect: Duration,
    hops: Vec<Hop>,
    pinned: Option<u32>,
    installed: Vec<NextHop>,
}

#[derive(Clone, Copy, Debug)]
struct Hop {
    number: u32,
    hop: NextHop,
    state: State,
}

/// ```text
///          alive                 dead
///   Out ──────────► In ────────────────────► Dying
///    ▲               ▲          alive          │ │
///    │               └─────────────────────────┘ │
///    └────────── withdrawn, or detected ◄────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not in the route.
    Out,
    /// In the route.
    In,
    /// In the route, dead since then: nobody has noticed yet.
    Dying(Instant),
}

impl Router {
    /// A router without next hops that notices a death after `detect`.
    pub fn new(netns: &Netns, service: IpAddr, detect: Duration) -> Result<Self> {
        Ok(Self {
            netlink: netns.netlink()?,
            service,
            detect,
            hops: Vec::new(),
            pinned: None,
            installed: Vec::new(),
        })
    }

    /// Tells it of a next hop that it may use once it is alive.
    pub fn add(&mut self, number: u32, hop: NextHop) {
        self.hops.push(Hop { number, hop, state: State::Out });
    }

    /// Says whether a next hop answers. An answering one is used at once; a silent one is dropped after the detection time.
    pub fn handle_liveness(&mut self, number: u32, alive: bool, now: Instant) {
        for hop in self.hops.iter_mut().filter(|hop| hop.number == number) {
            hop.state = match (hop.state, alive) {
                (_, true) => State::In,
                (State::In, false) => State::Dying(now),
                (state, false) => state,
            };
        }
    }

    /// Takes a next hop out at once: it said that it leaves.
    pub fn withdraw(&mut self, number: u32) {
        for hop in self.hops.iter_mut().filter(|hop| hop.number == number) {
            hop.state = State::Out;
        }
    }

    /// Sends all packets by one next hop, or (`None`) by all again. One that is dead or has been withdrawn stays unused.
    pub fn pin(&mut self, number: Option<u32>) {
        self.pinned = number;
    }

    /// Whether a next hop is in use.
    pub fn uses(&self, number: u32) -> bool {
        self.hops.iter().any(|hop| hop.number == number && hop.state != State::Out)
    }

    /// Drops what has been dead for long enough and makes the route so.
    pub fn poll(&mut self, now: Instant) -> Result<()> {
        for hop in &mut self.hops {
            if let State::Dying(since) = hop.state
                && now.saturating_duration_since(since) >= self.detect
            {
                hop.state = State::Out;
            }
        }
        let wanted: Vec<NextHop> = self
            .hops
            .iter()
            .filter(|hop| hop.state != State::Out && self.pinned.is_none_or(|number| hop.number == number))
            .map(|hop| hop.hop)
            .collect();
        if wanted == self.installed {
            return Ok(());
        }
        let prefix = if self.service.is_ipv4() { 32 } else { 128 };
        let route = Route::new(self.service, prefix, wanted.clone());
        if wanted.is_empty() {
            self.netlink.delete_route(&route)?;
        } else {
            self.netlink.replace_route(&route)?;
        }
        self.installed = wanted;
        Ok(())
    }
}
