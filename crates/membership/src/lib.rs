//! Who is in the cluster: SWIM over foca, sans-io.
//!
//! Members find and lose each other by gossip; [`Membership`] is the state machine, [`View`] its result. Time, randomness, datagrams
//! and streams are arguments and outputs; the driver that owns the sockets lives in `phalanx`, the one that owns virtual time in
//! [`harness`].
//!
//! Invariant: this crate never reads a clock, never opens a socket and knows nothing of flows.
//! Invariant: nothing a network can deliver makes it panic, and nothing that does not authenticate changes it.
#![forbid(unsafe_code)]

pub mod config;
pub mod event;
pub mod harness;
pub mod identity;
pub mod item;
pub mod membership;
pub mod seal;
pub mod trial;
pub mod view;
pub mod wire;

pub use config::{Config, ConfigError, Digest, Shared, SharedField, Timing};
pub use event::{Counters, DownReason, Event, Transmit, Warning};
pub use identity::Identity;
pub use item::{MemberState, Metadata, Wish};
pub use membership::{Input, Membership};
pub use seal::{KeyError, KeyRing};
pub use view::{MemberView, View};
pub use wire::{PushPullError, Refusal};
