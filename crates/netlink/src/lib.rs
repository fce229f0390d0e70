//! A small synchronous wrapper of rtnetlink: links, addresses, routes, rules, neighbours, tc, and a monitor; and frames on a link.
//!
//! [`Netlink`] asks and waits for the answer; [`Monitor`] says that something changed; [`FrameSender`] sends.
//! All work in the network namespace that the calling thread is in when they are opened, and stay there.
//!
//! Invariant: this crate knows nothing of Phalanx, and the packet types of `netlink-packet-route`, whose names change with
//! every release, do not appear in its interface.

mod address;
mod error;
mod frame;
mod link;
mod monitor;
mod neighbour;
mod route;
mod rule;
mod socket;
mod tc;

pub use address::Address;
pub use error::Error;
pub use frame::FrameSender;
pub use link::{Link, Mac, Veth};
pub use monitor::{Changes, Monitor};
pub use neighbour::{Neighbour, Reachability};
pub use route::{Family, Hop, Lookup, MAIN_TABLE, NextHop, Route, RouteKind};
pub use rule::Rule;
pub use socket::Netlink;
pub use tc::{BpfFilter, BpfInstruction, Filter};

/// What every operation of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
