//! Keeps the forwarder's next hops: egress interface and MACs per member and backend, from the kernel's routes and neighbours.
//!
//! A thread of its own, because netlink is asked synchronously:
//! it resolves all destinations whenever the plan or the kernel's tables change, and once a second while one has no neighbour yet.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use phalanx_control::{Destination, Destinations};
use phalanx_forwarder::{Forwarder, NextHop, NextHops};
use phalanx_netlink::{Lookup, Mac, Monitor, Netlink, Reachability, RouteKind};

/// How long a wait for changes in the kernel lasts before the driver looks whether the plan has changed.
const WAIT: Duration = Duration::from_millis(20);

/// While a destination is unresolved, the kernel is asked again this often; otherwise everything is read anew every [`REFRESH`], in case
/// a notification was lost.
const RETRY: Duration = Duration::from_millis(200);
const REFRESH: Duration = Duration::from_secs(5);

/// Neighbours are confirmed this often, so that a MAC that moved is noticed though we never hear its owner's replies.
const CONFIRM: Duration = Duration::from_secs(10);

/// The driver: owns the thread.
pub struct NextHopDriver {
    wanted: Arc<Mutex<Destinations>>,
    unresolved: Arc<Mutex<Vec<IpAddr>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NextHopDriver {
    /// Starts resolving for `forwarder`.
    pub fn start(forwarder: Arc<dyn Forwarder>) -> anyhow::Result<Self> {
        let wanted = Arc::<Mutex<Destinations>>::default();
        let unresolved = Arc::<Mutex<Vec<IpAddr>>>::default();
        let stop = Arc::<AtomicBool>::default();
        let mut resolver = Resolver {
            netlink: Netlink::open().context("open a netlink socket for routes and neighbours")?,
            forwarder,
            known: HashMap::new(),
            confirmed: HashMap::new(),
        };
        let mut monitor = Monitor::open().context("watch the kernel's routes and neighbours")?;
        let thread = std::thread::Builder::new().name("next-hops".to_owned()).spawn({
            let (wanted, unresolved, stop) =
                (Arc::clone(&wanted), Arc::clone(&unresolved), Arc::clone(&stop));
            move || {
                let mut current = Destinations::default();
                let mut due = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    let changed = match monitor.wait(WAIT) {
                        Ok(changes) => {
                            changes.links || changes.addresses || changes.routes || changes.neighbours
                        }
                        Err(error) => {
                            tracing::warn!("watching routes and neighbours: {error}");
                            std::thread::sleep(RETRY);
                            true
                        }
                    };
                    let destinations = lock(&wanted).clone();
                    let now = Instant::now();
                    if !changed && destinations == current && now < due {
                        continue;
                    }
                    current = destinations;
                    let missing = resolver.resolve_all(&current, now);
                    due = now + if missing.is_empty() { REFRESH } else { RETRY };
                    *lock(&unresolved) = missing;
                }
            }
        })?;
        Ok(Self { wanted, unresolved, stop, thread: Some(thread) })
    }

    /// Says whom to resolve from now on.
    pub fn set_destinations(&self, destinations: Destinations) {
        *lock(&self.wanted) = destinations;
    }

    /// Who has no next hop at the moment.
    pub fn unresolved(&self) -> Vec<IpAddr> {
        lock(&self.unresolved).clone()
    }
}

impl Drop for NextHopDriver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the kernel says of a destination.
enum Resolved {
    /// An address of this host: nothing is ever sent to it.
    Local,
    /// It is reached so.
    By(NextHop),
    /// No route, or no neighbour yet.
    Missing,
}

struct Resolver {
    netlink: Netlink,
    forwarder: Arc<dyn Forwarder>,
    /// The last good MAC per (interface, neighbour): a neighbour that is being confirmed keeps it.
    known: HashMap<(u32, IpAddr), Mac>,
    confirmed: HashMap<(u32, IpAddr), Instant>,
}

impl Resolver {
    /// Resolves all, tells the forwarder, and returns who has no next hop.
    fn resolve_all(&mut self, destinations: &Destinations, now: Instant) -> Vec<IpAddr> {
        let mut missing = Vec::new();
        let mut resolve = |destinations: &[Destination]| -> Vec<Option<NextHop>> {
            destinations
                .iter()
                .map(|&Destination { address, is_needed }| {
                    let resolved = self.resolve(address, now).unwrap_or_else(|error| {
                        tracing::debug!(%address, "next hop: {error}");
                        Resolved::Missing
                    });
                    match resolved {
                        Resolved::Local => None,
                        Resolved::By(hop) => Some(hop),
                        Resolved::Missing => {
                            if is_needed && !missing.contains(&address) {
                                missing.push(address);
                            }
                            None
                        }
                    }
                })
                .collect()
        };
        let next_hops =
            NextHops { members: resolve(&destinations.members), backends: resolve(&destinations.backends) };
        self.forwarder.set_next_hops(next_hops);
        missing
    }

    fn resolve(&mut self, address: IpAddr, now: Instant) -> phalanx_netlink::Result<Resolved> {
        let hop = self.netlink.lookup(&Lookup::to(address))?;
        match hop.kind {
            RouteKind::Unicast => {}
            RouteKind::Local => return Ok(Resolved::Local),
            _ => return Ok(Resolved::Missing),
        }
        let link = self.netlink.link_by_index(hop.index)?;
        let mtu = hop.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu)).min(u32::from(u16::MAX)) as u16;
        let neighbour = hop.gateway.unwrap_or(address);
        let place = (hop.index, neighbour);
        let entry = self.netlink.neighbour(hop.index, neighbour)?;
        let mac = entry.as_ref().and_then(phalanx_netlink::Neighbour::usable_mac);
        let due = self.confirmed.get(&place).is_none_or(|at| now.duration_since(*at) >= CONFIRM);
        // An operator's own entry is not asked for: there is nothing to confirm, and the kernel (5.16 and later, `__neigh_update`)
        // would turn it into an ordinary one, which goes when nobody answers.
        let permanent = entry.is_some_and(|entry| entry.state == Reachability::Permanent);
        if mac.is_none() || due && !permanent {
            self.confirmed.insert(place, now);
            self.netlink.resolve_neighbour(hop.index, neighbour)?;
        }
        let mac = match mac {
            Some(mac) => {
                self.known.insert(place, mac);
                Some(mac)
            }
            None => self.known.get(&place).copied(),
        };
        Ok(mac.zip(link.mac).map_or(Resolved::Missing, |(destination, source)| {
            Resolved::By(NextHop {
                interface: hop.index,
                source_mac: source.0,
                destination_mac: destination.0,
                mtu,
            })
        }))
    }
}
