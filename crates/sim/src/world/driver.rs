//! What the daemon's drivers do between the cores and the world: `crates/phalanx/src/daemon` in virtual time.

use std::sync::Arc;
use std::time::Duration;

use phalanx_control::Event as ControlEvent;
use phalanx_membership::{Event as MemberEvent, Membership, View};
use phalanx_rebalancer::Ranking as _;
use rand::RngExt as _;

use super::World;
use super::event::Event;
use super::node;
use crate::faults::{self, Fault};
use crate::schedule::Change;
use crate::settings::Balancer;

/// The daemon's control task looks at its forwarder this often; here only when something waits there, and else every [`idle_tick`](crate::settings::Settings::idle_tick).
const TICK: Duration = Duration::from_millis(2);

/// As in the daemon's membership driver.
const ECHOES_A_PERIOD: usize = 4;
const ECHO_TIMEOUT: Duration = Duration::from_millis(250);

/// From `Left` to the end of the process, and to the router's knowing it.
const ROUTE_WITHDRAWN: Duration = Duration::from_millis(200);

impl World {
    /// What the forwarder of `at` has seen while it had no daemon is known from now on.
    fn hear_from_tables(&mut self, at: usize) {
        let Some(forwarder) = self.nodes[at].forwarder.clone() else { return };
        for flow in &mut self.flows {
            if let Some(record) = phalanx_forwarder::Forwarder::get(&*forwarder, &flow.key) {
                let idle = Duration::from_millis(record.idle_ms.into());
                flow.forwarded = flow.forwarded.max(self.now.saturating_sub(idle));
            }
        }
    }

    /// Starts the daemon of `node`, over the forwarder it has.
    pub(super) fn start_daemon(&mut self, at: usize) {
        if self.settings.balancer != Balancer::Phalanx {
            self.nodes[at].life += 1;
            self.nodes[at].boot += 1;
            self.nodes[at].forwarder = None;
            self.local_tables[at].clear();
            let life = self.nodes[at].life;
            self.announce_to_router(at, true, life);
            return;
        }
        let seed = self.seeds.random();
        let usable: Vec<bool> = self.backends.iter().map(|backend| backend.usable && backend.alive).collect();
        let (epoch, now) = (self.epoch, self.now);
        let entry = &mut self.nodes[at];
        entry.life += 1;
        if entry.forwarder.is_none() {
            entry.boot += 1;
        }
        entry.usable = usable;
        entry.leaving = false;
        entry.stalled = None;
        entry.steady_since = now;
        entry.silent_since = None;
        match node::start(&self.settings, entry, &self.tables, epoch, now, seed) {
            Ok(process) => {
                entry.process = Some(process);
                self.hear_from_tables(at);
            }
            Err(error) => return self.tell(|| format!("m{} does not start: {error}", at + 1)),
        }
        let life = self.nodes[at].life;
        self.push_in(Duration::from_secs(1), Event::Second { node: at, life });
        self.push_in(self.settings.timing.probe_period, Event::EchoTurn { node: at, life });
        self.after_membership(at);
        self.after_control(at);
        self.schedule_tick(at, self.settings.idle_tick);
    }

    // Inputs of the membership.

    fn with_membership<R>(
        &mut self,
        at: usize,
        act: impl FnOnce(&mut Membership, std::time::Instant) -> R,
    ) -> Option<R> {
        let clock = self.nodes[at].clock(self.epoch, self.now);
        let process = self.nodes[at].process.as_mut()?;
        let result = act(&mut process.membership, clock);
        self.after_membership(at);
        Some(result)
    }

    pub(super) fn wake(&mut self, at: usize, life: u64) {
        let now = self.now;
        let entry = &mut self.nodes[at];
        let Some(process) = entry.process.as_mut().filter(|_| entry.life == life) else { return };
        if process.wake.is_none_or(|due| due > now) {
            return;
        }
        process.wake = None;
        self.with_membership(at, |membership, clock| membership.handle_timeout(clock));
    }

    pub(super) fn datagram(&mut self, from: std::net::SocketAddr, at: usize, bytes: &[u8]) {
        self.with_membership(at, |membership, clock| membership.handle_datagram(clock, from, bytes));
    }

    pub(super) fn push_pull(&mut self, from: usize, at: usize, bytes: &[u8]) {
        let reply = self.with_membership(at, |membership, clock| membership.handle_push_pull(clock, bytes));
        if let Some(Ok(bytes)) = reply
            && self.linked(from, at)
        {
            let late = self.latency() * 3 + self.nodes[at].slow;
            self.push_in(late, Event::PushPullBack { to: from, bytes });
        }
    }

    pub(super) fn push_pull_back(&mut self, at: usize, bytes: &[u8]) {
        // A reply that does not decode changes nothing.
        self.with_membership(at, |membership, clock| {
            let _ = membership.handle_push_pull_reply(clock, bytes);
        });
    }

    /// Once a second a member says what has changed of itself.
    pub(super) fn second(&mut self, at: usize, life: u64) {
        let entry = &mut self.nodes[at];
        let weight = entry.weight;
        let Some(process) = entry.process.as_mut().filter(|_| entry.life == life) else { return };
        process.metadata.weight = weight;
        process.metadata.unprotected = process.control.replicator().unprotected() as u64;
        let metadata = process.metadata.clone();
        self.with_membership(at, |membership, clock| drop(membership.update_metadata(clock, metadata)));
        self.push_in(Duration::from_secs(1), Event::Second { node: at, life });
    }

    // Hand-off echoes.

    pub(super) fn echo_turn(&mut self, at: usize, life: u64) {
        let now = self.now;
        let id = self.nodes[at].id;
        let entry = &mut self.nodes[at];
        let Some(process) = entry.process.as_mut().filter(|_| entry.life == life) else { return };
        let overdue: Vec<u64> = process
            .echoes
            .sent
            .iter()
            .filter(|(_, (_, sent))| now - *sent >= ECHO_TIMEOUT)
            .map(|(token, _)| *token)
            .collect();
        let mut lost = Vec::new();
        for token in overdue {
            lost.extend(process.echoes.sent.remove(&token).map(|(peer, _)| peer));
        }
        let peers: Vec<_> = process
            .last_view
            .members
            .iter()
            .filter(|member| member.id != id && member.known && process.slots.contains_key(&member.id))
            .map(|member| member.id)
            .collect();
        let count = peers.len().min(ECHOES_A_PERIOD);
        let turn: Vec<_> =
            (0..count).map(|turn| peers[(process.echoes.next_peer + turn) % peers.len()]).collect();
        process.echoes.next_peer = process.echoes.next_peer.wrapping_add(count);
        let mut sent = Vec::new();
        for peer in turn {
            process.echoes.next_token += 1;
            let token = process.echoes.next_token;
            process.echoes.sent.insert(token, (peer, now));
            sent.push((peer, token));
        }
        for peer in lost {
            self.with_membership(at, |membership, clock| membership.handle_echo_result(clock, peer, false));
        }
        for (peer, token) in sent {
            if let Some(to) = self.node_of(peer)
                && self.delivers(at, to)
            {
                let late = self.latency();
                self.push_in(late, Event::Echo { from: at, to, token });
            }
        }
        self.push_in(self.settings.timing.probe_period, Event::EchoTurn { node: at, life });
    }

    /// An echo has come to the forwarder of `at`, which answers without its daemon.
    pub(super) fn echo(&mut self, from: usize, at: usize, token: u64) {
        if self.nodes[at].forwarder.is_some() && self.delivers(at, from) {
            let late = self.latency();
            self.push_in(late, Event::EchoBack { to: from, token });
        }
    }

    pub(super) fn echo_back(&mut self, at: usize, token: u64) {
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        let Some((peer, _)) = process.echoes.sent.remove(&token) else { return };
        self.with_membership(at, |membership, clock| membership.handle_echo_result(clock, peer, true));
    }

    // Outputs of the membership.

    pub(super) fn after_membership(&mut self, at: usize) {
        let (epoch, now) = (self.epoch, self.now);
        self.nodes[at].ran = now;
        let clock = self.nodes[at].clock(epoch, now);
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        let from = process.membership.identity().address;
        let mut transmits = Vec::new();
        while let Some(transmit) = process.membership.poll_transmit() {
            transmits.push(transmit);
        }
        let mut events = Vec::new();
        while let Some(event) = process.membership.poll_event() {
            events.push(event);
        }
        let pause = self.settings.view_pause;
        let view = if pause.is_zero() { changed_view(process) } else { None };
        let look = !pause.is_zero() && !std::mem::replace(&mut process.view_due, true);
        let lease = process.membership.lease_valid_until();
        let left = lease.map(|until| until.saturating_duration_since(clock)).unwrap_or_default();
        let due = process.membership.poll_timeout();
        if let Some(forwarder) = &self.nodes[at].forwarder {
            phalanx_forwarder::Forwarder::renew_lease(&**forwarder, left);
        }
        if look {
            let life = self.nodes[at].life;
            self.push_in(pause, Event::View { node: at, life });
        }
        if let Some(due) = due {
            let due = self.nodes[at].when(epoch, due).max(now);
            let life = self.nodes[at].life;
            if let Some(process) = &mut self.nodes[at].process
                && process.wake.is_none_or(|known| due < known)
            {
                process.wake = Some(due);
                self.push(due, Event::Wake { node: at, life });
            }
        }
        for transmit in transmits {
            let Some(to) = self.node_at(transmit.to) else { continue };
            for _ in 0..if self.network.random_bool(self.settings.duplicates) { 2 } else { 1 } {
                if self.delivers(at, to) {
                    let late = self.latency();
                    self.push_in(late, Event::Datagram { from, to, bytes: transmit.payload.clone() });
                }
            }
        }
        if let Some(view) = view {
            self.view(at, view);
        }
        for event in events {
            self.member_event(at, event);
        }
    }

    fn node_at(&self, address: std::net::SocketAddr) -> Option<usize> {
        let at = node::at_address(address)?;
        self.nodes.get(at)?.process.is_some().then_some(at)
    }

    /// What has changed of the view meanwhile is acted upon.
    pub(super) fn view_due(&mut self, at: usize, life: u64) {
        let entry = &mut self.nodes[at];
        let Some(process) = entry.process.as_mut().filter(|_| entry.life == life) else { return };
        process.view_due = false;
        if let Some(view) = changed_view(process) {
            self.view(at, view);
        }
    }

    fn member_event(&mut self, at: usize, event: MemberEvent) {
        let name = at + 1;
        match event {
            MemberEvent::PushPull { with, .. } => {
                let Some(to) = self.node_of(with).filter(|to| self.linked(at, *to)) else { return };
                let Some(process) = &self.nodes[at].process else { return };
                let bytes = process.membership.push_pull_request();
                let late = self.latency() * 3 + self.nodes[at].slow;
                self.push_in(late, Event::PushPull { from: at, to, bytes });
            }
            MemberEvent::Left => {
                self.tell(|| format!("m{name} has left"));
                // With nobody there to be given anything it is gone as it would be in a crash.
                let id = self.nodes[at].id;
                let alone = self.nodes[at].process.as_ref().is_some_and(|process| {
                    process.last_view.members.iter().all(|other| other.id == id || !other.is_in_force())
                });
                let gone = Change::Leave(at);
                if alone {
                    self.check(|checker, world, findings| checker.changing(world, &gone, findings));
                }
                self.end_daemon(at, true);
                if alone {
                    self.check(|checker, world, findings| checker.changed(world, &gone, findings));
                }
                let life = self.nodes[at].life;
                self.push_in(ROUTE_WITHDRAWN, Event::RouterSees { node: at, up: false, life });
            }
            MemberEvent::Refused { by, reason } => {
                self.tell(|| format!("m{name} is refused by m{by}: {reason:?}"));
            }
            MemberEvent::Stalled { late } => {
                self.tell(|| format!("m{name} notices that it stood still for {late:?}"));
            }
            MemberEvent::Unheard => {
                self.tell(|| format!("m{name} is heard by nobody"));
                let clock = self.nodes[at].clock(self.epoch, self.now);
                if let Some(process) = self.nodes[at].process.as_mut() {
                    process.control.handle_unheard(clock);
                }
            }
            MemberEvent::MemberUp(id) => self.tell(|| format!("m{name} sees m{id} come")),
            MemberEvent::MemberDown { id, reason } => {
                self.tell(|| format!("m{name} sees m{id} go: {reason:?}"));
            }
            MemberEvent::Liveness { id, liveness } => {
                self.tell(|| format!("m{name} holds m{id} to be {liveness:?}"));
            }
            MemberEvent::StateChanged(state) => {
                self.tell(|| format!("m{name} is {state:?}"));
                if state == phalanx_membership::MemberState::Active {
                    let life = self.nodes[at].life;
                    self.announce_to_router(at, true, life);
                }
            }
            _ => {}
        }
    }

    fn view(&mut self, at: usize, view: Arc<View>) {
        let Some(before) = self.nodes[at].process.as_ref().map(|process| Arc::clone(process.control.view()))
        else {
            return;
        };
        let view = faults::view(self.settings.fault, view, &before);
        let (id, clock) = (self.nodes[at].id, self.nodes[at].clock(self.epoch, self.now));
        if self.settings.fault == Some(Fault::BackupForgets) {
            self.forget_as_backup(at, &view);
        }
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        process.control.handle_view(clock, Arc::clone(&view));
        let gone: Vec<usize> = process
            .links
            .keys()
            .copied()
            .filter(|peer| view.get(phalanx_flow::MemberId(*peer as u32 + 1)).is_none())
            .collect();
        let new: Vec<usize> = view
            .members
            .iter()
            .filter(|member| member.id != id && member.known)
            .filter_map(|member| (member.id.0 as usize).checked_sub(1))
            .filter(|peer| !process.links.contains_key(peer) && process.dialling.insert(*peer))
            .collect();
        for peer in gone {
            self.hang_up(at, peer);
        }
        for peer in new {
            let late = self.latency() * 2;
            self.push_in(late, Event::Dial { node: at, peer });
        }
        self.after_control(at);
    }

    /// [`Fault::BackupForgets`].
    fn forget_as_backup(&mut self, at: usize, view: &View) {
        let id = self.nodes[at].id;
        let (Some(process), Some(forwarder)) = (&self.nodes[at].process, &self.nodes[at].forwarder) else {
            return;
        };
        let table = process.control.planner().current();
        for record in forwarder.flows() {
            let [owner, backup, _] = table.holders(table.row_of(&record.key));
            if backup == Some(id) && owner.is_some_and(|owner| view.get(owner).is_none()) {
                phalanx_forwarder::Forwarder::remove(&**forwarder, &record.key, 0, Duration::ZERO);
            }
        }
    }

    // Control.

    /// Asks for the forwarder's events at the control task's next tick.
    pub(super) fn tick_soon(&mut self, at: usize) {
        self.schedule_tick(at, TICK);
    }

    fn schedule_tick(&mut self, at: usize, within: Duration) {
        let due = self.now + within;
        let entry = &mut self.nodes[at];
        let life = entry.life;
        if let Some(process) = &mut entry.process
            && process.tick.is_none_or(|known| due < known)
        {
            process.tick = Some(due);
            self.push(due, Event::Tick { node: at, life });
        }
    }

    pub(super) fn tick(&mut self, at: usize, life: u64) {
        let (epoch, now) = (self.epoch, self.now);
        let entry = &mut self.nodes[at];
        let clock = entry.clock(epoch, now);
        let Some(process) = entry.process.as_mut().filter(|_| entry.life == life) else { return };
        if process.tick.is_none_or(|due| due > now) {
            return;
        }
        process.tick = None;
        process.control.handle_timeout(clock);
        self.after_control(at);
        self.schedule_tick(at, self.settings.idle_tick);
    }

    pub(super) fn after_control(&mut self, at: usize) {
        let (epoch, now) = (self.epoch, self.now);
        let clock = self.nodes[at].clock(epoch, now);
        loop {
            let Some(process) = self.nodes[at].process.as_mut() else { return };
            let mut frames = Vec::new();
            while let Some(frame) = process.control.poll_message(clock) {
                frames.push(frame);
            }
            let mut events = Vec::new();
            while let Some(event) = process.control.poll_event() {
                events.push(event);
            }
            if frames.is_empty() && events.is_empty() {
                break;
            }
            for (to, frame) in frames {
                self.send_frame(at, to, frame);
            }
            for event in events {
                self.control_event(at, event);
            }
        }
        let Some(process) = self.nodes[at].process.as_ref() else { return };
        if let Some(due) = process.control.replicator().poll_timeout() {
            let due = self.nodes[at].when(epoch, due).max(now + TICK);
            self.schedule_tick(at, due - now);
        }
    }

    fn control_event(&mut self, at: usize, event: ControlEvent) {
        let name = at + 1;
        match event {
            ControlEvent::Slots(slots) => {
                if let Some(process) = &mut self.nodes[at].process {
                    process.slots = slots.into_iter().collect();
                }
            }
            ControlEvent::ReadyToLeave => {
                self.tell(|| format!("m{name} has handed over what it held"));
                self.with_membership(at, |membership, clock| membership.leave(clock));
            }
            ControlEvent::RoomMade => {
                self.with_membership(at, |membership, clock| membership.report_room(clock));
            }
            ControlEvent::ReadyFor(pending) => {
                self.tell(|| format!("m{name} is ready for view {:016x}", pending.0));
                self.with_membership(at, |membership, clock| membership.report_done(clock, pending));
            }
            ControlEvent::StuckFor(pending, peers) => {
                self.tell(|| format!("m{name} goes on to view {:016x} without {peers:?}", pending.0));
                self.with_membership(at, |membership, clock| membership.report_done(clock, pending));
            }
            ControlEvent::NotInstalled(error) => {
                let line = format!("m{name}: {error}");
                self.findings.violate_as("install", self.now, line);
            }
            ControlEvent::Unranked(error) => {
                let line = format!("m{name}: {error}");
                self.findings.violate_as("install", self.now, line);
            }
            ControlEvent::WindowClosed(dropped) => {
                self.tell(|| format!("m{name} closes its handover window, {dropped} entries dropped"));
            }
            ControlEvent::Planned(records) => {
                self.tell(|| format!("m{name} has a new table and sends {records} records"));
            }
            ControlEvent::Replication(event) => self.tell(|| format!("m{name}: {event:?}")),
            ControlEvent::Refilled(to, records) => {
                self.tell(|| format!("m{name} refills m{to} with {records} records"));
            }
            ControlEvent::Missed(flows) => self.tell(|| format!("m{name} missed events of {flows} flows")),
            _ => {}
        }
    }

    /// Tells a running member to leave.
    pub(super) fn begin_leave(&mut self, at: usize) {
        let clock = self.nodes[at].clock(self.epoch, self.now);
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        process.control.begin_leave(clock);
        self.nodes[at].leaving = true;
        self.with_membership(at, |membership, clock| membership.begin_leave(clock));
        self.after_control(at);
    }

    /// A member hears how a backend is.
    pub(super) fn health(&mut self, at: usize, backend: usize, usable: bool) {
        let clock = self.nodes[at].clock(self.epoch, self.now);
        let entry = &mut self.nodes[at];
        if entry.usable.get(backend).is_none_or(|known| *known == usable) {
            return;
        }
        entry.usable[backend] = usable;
        // A backend that comes is heard of with the configuration that has it.
        let reloaded = entry.lacks.contains(&backend).then(|| {
            entry.lacks = 0..0;
            node::services(&self.settings, entry)
        });
        let lists = node::usable_lists(&self.settings, entry);
        let Some(process) = entry.process.as_mut() else { return };
        if let Some(services) = reloaded {
            process.control.set_services(&services);
        }
        process.control.set_usable(clock, &lists);
        self.after_control(at);
    }
}

/// The view, if it is not the one that is acted by.
fn changed_view(process: &mut node::Process) -> Option<Arc<View>> {
    let view = process.membership.view();
    if *view == *process.last_view {
        return None;
    }
    process.last_view = Arc::new(view.clone());
    Some(Arc::clone(&process.last_view))
}
