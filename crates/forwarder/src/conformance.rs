//! One suite for every forwarder: what it must do, said in terms of frames in and out and of the [`Forwarder`] trait only.
//!
//! An implementation brings a [`Harness`] and calls [`run`]; [`fixtures`] is the table of packets that goes with it.

pub mod fixtures;
pub mod frames;
mod suite;
pub mod world;

use crate::engine::TableLimits;
use crate::{Forwarder, Plan};

/// What came out of a forwarder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Emitted {
    /// An Ethernet frame towards the router.
    Frame(Vec<u8>),
    /// An IP packet of the forwarder's own that the kernel routed to a client.
    ToClient(Vec<u8>),
}

/// A forwarder with something at the other end of its interface.
pub trait Harness {
    /// The forwarder.
    fn forwarder(&self) -> &dyn Forwarder;

    /// The interface's index, for next hops.
    fn interface(&self) -> u32;

    /// Sends frames to the forwarder's interface and returns what comes out: at least `expected`, if they come at all, and whatever
    /// comes with them.
    fn exchange(&mut self, frames: &[Vec<u8>], expected: usize) -> Vec<Emitted>;
}

/// Starts a fresh forwarder with a plan.
pub type Start<'a> = dyn FnMut(Plan, TableLimits) -> Box<dyn Harness> + 'a;

/// Runs the whole suite; prints each claim before it is tested.
///
/// # Panics
/// If the forwarder does not conform.
pub fn run(start: &mut Start<'_>) {
    for (claim, test) in suite::ALL {
        println!("conformance: {claim}");
        test(start);
    }
}
