//! A forwarder without sockets: frames go in and come out by calls. For tests and the simulator.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use phalanx_flow::packet::{FrameBuf, HEADROOM, Link};
use phalanx_flow::{BackendId, MemberSlot};

use crate::engine::{Clock, Engine, TableLimits};
use crate::plan::Plan;
use crate::rewrite::{self, Offload, OwnFrame, Scratch, Sink};
use crate::{Counters, Forwarder, InstallError, SendError};

/// What came out of a forwarder for a frame that went in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// An Ethernet frame to send.
    Frame {
        /// On which interface.
        interface: u32,
        /// The whole frame.
        bytes: Vec<u8>,
        /// What is left to the network card.
        offload: Offload,
    },
    /// An IP packet to a client, for the kernel to route.
    ToClient(Vec<u8>),
    /// The frame was not ours.
    Pass,
}

/// An [`Engine`] with its packets rewritten, and nothing else.
#[derive(Debug)]
pub struct MemoryForwarder {
    engine: Engine,
    sent: Mutex<Vec<Output>>,
}

impl MemoryForwarder {
    /// A forwarder that carries out `plan`, with empty tables and no lease.
    pub fn new(plan: Plan, limits: TableLimits) -> Result<Self, InstallError> {
        Self::with_clock(plan, limits, Clock::started_now())
    }

    /// The same, and `clock` says what time it is.
    pub fn with_clock(plan: Plan, limits: TableLimits, clock: Clock) -> Result<Self, InstallError> {
        Ok(Self { engine: Engine::with_clock(plan, limits, clock)?, sent: Mutex::default() })
    }

    /// The engine inside.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What comes out for a frame that comes in on the interface `ingress`.
    pub fn inject(&self, frame: &[u8], link: Link, ingress: u32) -> Vec<Output> {
        self.inject_unfinished(frame, link, ingress, Offload::NONE)
    }

    /// The same for a frame that is merged, or whose checksum is unfinished.
    pub fn inject_unfinished(&self, frame: &[u8], link: Link, ingress: u32, offload: Offload) -> Vec<Output> {
        let mut bytes = vec![0; HEADROOM];
        bytes.extend_from_slice(frame);
        let mut outputs = Outputs(Vec::new());
        if let Some(mut frame) = FrameBuf::new(&mut bytes, HEADROOM, frame.len()) {
            let mut scratch = Scratch::default();
            let batch = self.engine.batch();
            rewrite::process(&batch, &mut scratch, &mut frame, link, ingress, offload, &mut outputs);
        }
        outputs.0
    }

    /// What [`Forwarder::send_echo`] and [`Forwarder::send_probe`] sent since the last call.
    pub fn take_sent(&self) -> Vec<Output> {
        std::mem::take(&mut *self.sent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn send(&self, frame: OwnFrame) {
        let OwnFrame { interface, bytes } = frame;
        let output = Output::Frame { interface, bytes, offload: Offload::NONE };
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).push(output);
    }
}

struct Outputs(Vec<Output>);

impl Sink for Outputs {
    fn frame(&mut self, interface: u32, frame: &mut FrameBuf<'_>, offload: Offload) {
        self.0.push(Output::Frame { interface, bytes: frame.bytes().to_vec(), offload });
    }

    fn copy(&mut self, interface: u32, frame: &[u8]) {
        self.0.push(Output::Frame { interface, bytes: frame.to_vec(), offload: Offload::NONE });
    }

    fn to_client(&mut self, ip_packet: &[u8]) {
        self.0.push(Output::ToClient(ip_packet.to_vec()));
    }

    fn pass(&mut self) {
        self.0.push(Output::Pass);
    }
}

/// Implements what every forwarder on the host leaves to its engine.
#[macro_export]
macro_rules! forward_to_engine {
    ($engine:ident) => {
        fn set_next_hops(&self, next_hops: $crate::NextHops) {
            self.$engine.set_next_hops(next_hops);
        }

        fn renew_lease(&self, term: std::time::Duration) {
            self.$engine.renew_lease(term);
        }

        fn upsert(&self, records: &[phalanx_flow::Record]) -> Vec<$crate::Upserted> {
            self.$engine.upsert(records)
        }

        fn make_room(&self, records: usize) {
            self.$engine.make_room(records);
        }

        fn has_room(&self) -> bool {
            self.$engine.has_room()
        }

        fn remove(&self, key: &phalanx_flow::FlowKey, birth: u64, min_idle: std::time::Duration) -> bool {
            self.$engine.remove(key, birth, min_idle)
        }

        fn stamp(&self, key: &phalanx_flow::FlowKey, birth: u64) -> bool {
            self.$engine.stamp(key, birth)
        }

        fn protect(&self, key: &phalanx_flow::FlowKey, birth: u64, update: u32) {
            self.$engine.protect(key, birth, update);
        }

        fn set_former(&self, keys: &[phalanx_flow::FlowKey], former: bool) {
            self.$engine.set_former(keys, former);
        }

        fn touch(&self, flows: &[(phalanx_flow::FlowKey, u32)]) {
            self.$engine.touch(flows);
        }

        fn upsert_cache(&self, records: &[phalanx_flow::Record]) {
            self.$engine.upsert_cache(records);
        }

        fn remove_cache(&self, keys: &[phalanx_flow::FlowKey]) {
            self.$engine.remove_cache(keys);
        }

        fn flush_cache(&self) -> Vec<phalanx_flow::Record> {
            self.$engine.flush_cache()
        }

        fn get(&self, key: &phalanx_flow::FlowKey) -> Option<phalanx_flow::Record> {
            self.$engine.get(key)
        }

        fn visit(&self, rows: &$crate::RowSet, show: &mut dyn FnMut(&phalanx_flow::Record)) {
            self.$engine.visit(rows, show);
        }

        fn poll_events(&self, events: &mut Vec<phalanx_flow::FlowEvent>, limit: usize) -> bool {
            self.$engine.poll_events(events, limit)
        }

        fn poll_echoes(&self, tokens: &mut Vec<u64>) {
            self.$engine.poll_echoes(tokens);
        }
    };
}

impl Forwarder for MemoryForwarder {
    forward_to_engine!(engine);

    fn install(&self, plan: Plan) -> Result<(), InstallError> {
        self.engine.install(plan)
    }

    fn send_echo(&self, to: MemberSlot, token: u64) -> Result<(), SendError> {
        let frame = rewrite::echo_frame(&self.engine.batch(), to, token)?;
        self.send(frame);
        Ok(())
    }

    fn send_probe(&self, backend: &BackendId, ip_packet: &[u8]) -> Result<(), SendError> {
        let frame = rewrite::probe_frame(&self.engine.batch(), backend, ip_packet)?;
        self.send(frame);
        Ok(())
    }

    fn discard_backlog(&self) {}

    fn idle_for(&self) -> Duration {
        Duration::ZERO
    }

    fn counters(&self) -> Counters {
        self.engine.read_counters()
    }
}
