//! The one place where views, flows and backends meet.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::member::Liveness;
use phalanx_flow::slots::RankedBackend;
use phalanx_flow::table::RankingError;
use phalanx_flow::{
    BackendId, FlowEvent, FlowEventKind, FlowFlags, FlowKey, FlowState, MemberId, MemberSlot, Record,
};
use phalanx_forwarder::{Forwarder, InstallError, RowSet, Upserted};
use phalanx_membership::{Digest, KeyRing, MemberState, MemberView, View};
use phalanx_rebalancer::{
    Ahead, Apply, ApplyBatch, ApplyResult, Change, Event as ReplicationEvent, PeerError, Policy, Ranking,
    Replicator, ViewInput, changed_rows, plan, plan_refill,
};

use crate::change::{Consequence, Happening, Phase};
use crate::lost::Traffic;
use crate::planner::{Destinations, Planner, Service, TableChange};

mod cached;
mod former;
mod repair;
mod room;

use cached::Kept;
use former::SUSPECTED_AFTER;
pub use former::doubt_all;
use repair::Repair;
pub use repair::{REPAIR_EVERY, RepairCounters};
use room::RoomToJoin;

/// Events taken at once, so that a burst does not keep views and frames waiting.
const EVENTS_AT_ONCE: usize = 16_384;

/// How often the forwarder's counters are looked at: whether it had to leave out events, and whether packets come.
const COUNTERS_EVERY: Duration = Duration::from_millis(250);

/// How often flows that nobody would ever protect are told again, and how many at once. A peer that refuses them for want of room is
/// asked no more often than this.
const TELL_AGAIN_EVERY: Duration = Duration::from_secs(5);
const TOLD_AGAIN_AT_ONCE: usize = 4096;

/// Other members' transfers have had this long when a member drops what it holds no more.
const SWEEP_AFTER: Duration = Duration::from_secs(1);

/// How long a member that ranks no more waits for its transfers and for the others to switch before it goes anyway, and how long it
/// stays after that for packets that were on their way.
const LEAVE_AT_MOST: Duration = Duration::from_secs(10);
const LEAVE_GRACE: Duration = Duration::from_millis(500);

/// Who is asked for its due work later than this did not run meanwhile, and what others sent is still to be heard. Drivers ask many times a
/// second.
const STOOD_STILL: Duration = Duration::from_secs(2);

/// What does not change while a member runs.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Our name.
    pub local: MemberId,
    /// We have a cache of all associations (`cache = "all"`).
    pub cache: bool,
    /// What the cache has of a departed member's flows is flushed once it was offered to the new owners (claim 20, \[750\]).
    pub flush_on_leave: bool,
    /// When a new flow is told to its backup.
    pub policy: Policy,
    /// `false` is the lab's `--no-replication` twin.
    pub replication: bool,
}

/// What a driver does or says when asked by [`Control::poll_event`].
#[derive(Debug)]
pub enum Event {
    /// A plan is in force: these are to be resolved.
    Installed(Destinations),
    /// The forwarder refused a plan; the one before goes on.
    NotInstalled(InstallError),
    /// The view cannot be ranked; what was in force goes on.
    Unranked(RankingError),
    /// Another view: who owns what may have changed.
    ViewChanged,
    /// Where members stand in the plan, for hand-off echoes.
    Slots(HashMap<MemberId, MemberSlot>),
    /// So many records go to other members because of a change.
    Planned(usize),
    /// There is room for what the others will send us: the membership may ask to join.
    RoomMade,
    /// All that the pending view of this name moves has been sent: the membership is to report it.
    ReadyFor(Digest),
    /// The same, though these members do not acknowledge what they are sent.
    StuckFor(Digest, Vec<MemberId>),
    /// The replicator has something to say.
    Replication(ReplicationEvent),
    /// Too much waited for a peer; it gets a table of so many records instead.
    Refilled(MemberId, usize),
    /// The forwarder had to leave out events, or an earlier process has not worked them off; so many flows were found by a scan.
    Missed(usize),
    /// Half of the members or more were lost, and perhaps it is we who are cut off: whether they are asked for flows that nobody here
    /// knows.
    Doubting(bool),
    /// The handover window is closed, and so many entries of former rows are gone.
    WindowClosed(usize),
    /// What we held is handed over: the membership may say farewell.
    ReadyToLeave,
}

/// The control plane of one member, sans-io.
///
/// **Inputs**: [`handle_view`](Self::handle_view), [`handle_connected`](Self::handle_connected),
/// [`handle_disconnected`](Self::handle_disconnected) and [`handle_data`](Self::handle_data) as they come;
/// [`handle_timeout`](Self::handle_timeout) every few milliseconds, because it takes the forwarder's events; `now` never goes back.
/// **Outputs**, after every input until each returns `None`: [`poll_message`](Self::poll_message), then
/// [`poll_event`](Self::poll_event).
/// **Commands**: [`set_services`](Self::set_services), [`set_usable`](Self::set_usable), [`set_failed`](Self::set_failed), [`set_keys`](Self::set_keys),
/// [`begin_leave`](Self::begin_leave).
pub struct Control {
    settings: Settings,
    planner: Planner,
    replicator: Replicator,
    forwarder: Arc<dyn Forwarder>,
    view: Arc<View>,
    /// Our lists of backends, as the others know them, and since when.
    backends: (Digest, Option<Instant>),
    linger: Duration,
    window_opened: Option<Instant>,
    /// When entries that no table gives us are to be dropped.
    sweep_at: Option<Instant>,
    /// Nothing is dropped before: entries have come that no table gives us.
    strangers_until: Option<Instant>,
    /// Since when we are back with flows of which we may have missed the end.
    doubted_since: Option<Instant>,
    /// The others held us to be down as often, or we them.
    generation: u32,
    transferring: bool,
    change: Phase,
    room: RoomToJoin,
    repair: Repair,
    kept_cached: Option<Kept>,
    leaving_since: Option<Instant>,
    /// Since when we rank no more.
    unranked_since: Option<Instant>,
    ready_to_leave_at: Option<Instant>,
    left: bool,
    /// Until the first view: we go on with tables of an earlier process, which belong to this boot.
    resumed: Option<u64>,
    /// What the forwarder saw while it had no daemon is still to be told.
    to_tell_seen: bool,
    events_lost: u64,
    traffic: Traffic,
    counters_at: Option<Instant>,
    /// When due work was last asked for.
    ran: Option<Instant>,
    tell_again_at: Option<Instant>,
    view_changes: u64,
    events: VecDeque<Event>,
}

impl Control {
    /// A member that has heard of nobody. The planner's plan should be the one in force.
    pub fn new(
        settings: Settings,
        planner: Planner,
        replicator: Replicator,
        forwarder: Arc<dyn Forwarder>,
    ) -> Self {
        let linger = longest_linger(&planner);
        Self {
            settings,
            planner,
            replicator,
            forwarder,
            view: Arc::default(),
            backends: (Digest::default(), None),
            linger,
            window_opened: None,
            sweep_at: None,
            strangers_until: None,
            doubted_since: None,
            generation: 0,
            transferring: false,
            change: Phase::Settled,
            room: RoomToJoin::default(),
            repair: Repair::default(),
            kept_cached: None,
            leaving_since: None,
            unranked_since: None,
            ready_to_leave_at: None,
            left: false,
            resumed: None,
            to_tell_seen: false,
            events_lost: 0,
            traffic: Traffic::default(),
            counters_at: None,
            ran: None,
            tell_again_at: None,
            view_changes: 0,
            events: VecDeque::new(),
        }
    }

    /// The same with a forwarder that has the flows of an earlier process, of boot `boot`, and a planner that was
    /// [restored](Planner::restore): the first view is a change from there, not the first one. [`doubt_all`] comes first.
    #[must_use]
    pub const fn resumed(mut self, boot: u64) -> Self {
        self.resumed = Some(boot);
        self
    }

    /// The view in force.
    pub const fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// What makes the plans.
    pub const fn planner(&self) -> &Planner {
        &self.planner
    }

    /// What tells the others.
    pub const fn replicator(&self) -> &Replicator {
        &self.replicator
    }

    /// Whether entries that belong to nobody may still be here, to be swept.
    pub const fn is_sweeping(&self) -> bool {
        self.sweep_at.is_some()
    }

    /// Whether the table before still counts.
    pub const fn window_open(&self) -> bool {
        self.window_opened.is_some()
    }

    /// Whether we were told to leave.
    pub const fn leaving(&self) -> bool {
        self.leaving_since.is_some()
    }

    /// How far we are with the planned change, if there is one.
    pub const fn change(&self) -> Phase {
        self.change
    }

    /// Views since the start that changed who owns what.
    pub const fn view_changes(&self) -> u64 {
        self.view_changes
    }

    // Inputs.

    /// Takes a view of the membership.
    pub fn handle_view(&mut self, now: Instant, view: Arc<View>) {
        let digest_changed = view.digest != self.view.digest;
        let settled = !self.transferring && self.everybody_switched();
        let dropped = self.view.pending.is_some() && view.pending != self.view.pending;
        let planned_before = self.planner.pending();
        let suspected = std::mem::replace(&mut self.view, Arc::clone(&view));
        let suspected = suspects(&suspected);
        let resumed = self.resumed.take();
        let own = view.get(self.settings.local);
        if let Some(backends) = own.map(|own| own.metadata.backends)
            && backends != self.backends.0
        {
            self.backends = (backends, Some(now));
        }
        if resumed.is_some_and(|boot| own.is_some_and(|own| own.boot != boot)) {
            // The others know a later start of this member, which had not these flows.
            forget_flows(&*self.forwarder);
            if let Err(error) = self.planner.forget() {
                self.events.push_back(Event::Unranked(error));
            }
        }
        self.doubt_if_back(now, resumed.is_some());
        let tables = self.planner.set_view(&view, settled);
        let (change, planned) = match tables.and_then(|change| Ok((change, self.planner.set_pending(&view)?)))
        {
            Ok(tables) => tables,
            Err(error) => return self.events.push_back(Event::Unranked(error)),
        };
        if let Some(planned) = &planned {
            // First, because it takes as long as the others take to plan what they send.
            self.make_room(&*planned.old, &*planned.new);
        }
        self.make_room_to_join();
        if change.as_ref().is_some_and(|change| change.departed) {
            self.traffic.begin();
        }
        let lost = change.as_ref().is_some_and(loses_members);
        let still = suspects(&view);
        if lost || !still.is_empty() {
            let newly = !still.is_subset(&suspected) || lost && suspected.is_empty();
            let agree = |id: &MemberId| {
                view.get(*id).is_some_and(|missing| missing.metadata.backends == self.backends.0)
            };
            let agreed = self.backends.1.filter(|_| !still.is_empty() && still.iter().all(agree));
            self.planner.note_missing(now, newly, agreed);
        }
        if digest_changed || change.is_some() {
            self.view_changes += 1;
            self.events.push_back(Event::ViewChanged);
        }
        self.install();
        if change.is_some() || dropped {
            self.mark_former(planned_before.as_deref());
        }
        let slots = view.members.iter().map(|member| (member.id, self.planner.slot_of(member.id))).collect();
        self.events.push_back(Event::Slots(slots));
        self.replicator.handle_view(now, self.view_input());
        if let Some(change) = change {
            self.switch(&change, now);
        }
        if let Some(planned) = planned {
            self.send_tables(&planned, now);
        }
        if dropped {
            // Entries that were sent for a change that is planned no more, if any, belong to nobody.
            self.sweep_at = Some(now + SWEEP_AFTER);
        }
        if resumed.is_some() {
            // The earlier process may have died before it told anybody.
            self.to_tell_seen = true;
            self.find_missed(now);
        }
        self.tell_seen_if_due(now);
        (self.change, _) = self.change.after(now, Happening::Pending(view.pending));
        self.pump(now);
        self.report_if_due(now);
    }

    /// No member has answered this one for half of its lease, so that others may act for it.
    pub fn handle_unheard(&mut self, now: Instant) {
        // Of two members the other one is rather lost.
        if self.view.members.len() > 2 {
            self.doubt(now);
        }
    }

    /// A stream to `peer` is open.
    pub fn handle_connected(&mut self, now: Instant, peer: MemberId) {
        self.replicator.handle_connected(now, peer);
        self.pump(now);
    }

    /// The stream to `peer` is gone.
    pub fn handle_disconnected(&mut self, now: Instant, peer: MemberId) {
        self.replicator.handle_disconnected(now, peer);
        self.pump(now);
    }

    /// Takes bytes of `peer`'s stream, cut anywhere. After an error, close the connection.
    pub fn handle_data(&mut self, now: Instant, from: MemberId, bytes: &[u8]) -> Result<(), PeerError> {
        let result = self.replicator.handle_data(now, from, bytes);
        self.pump(now);
        result
    }

    /// Takes the forwarder's events and does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let still = self.ran.replace(now).map(|ran| now.saturating_duration_since(ran)).unwrap_or_default();
        if still >= STOOD_STILL {
            self.stood_still(still);
        }
        if still >= SUSPECTED_AFTER {
            self.doubt(now);
        }
        self.take_events(now);
        if self.replicator.poll_timeout().is_some_and(|due| due <= now) {
            self.replicator.handle_timeout(now);
        }
        self.pump(now);
        self.report_if_due(now);
        self.say_if_room_is_made();
        self.look_at_counters_if_due(now);
        if self.planner.settle(now) {
            self.install();
        }
        self.repair_if_due(now);
        self.tell_again_if_due(now);
        self.close_window_if_due(now);
        self.believe_if_due(now);
        self.sweep_if_due(now);
        self.forget_cached_if_due(now);
        self.leave_if_due(now);
    }

    /// Time that we did not live through closes no window and ends no doubt: what others did in it we are still to hear.
    fn stood_still(&mut self, by: Duration) {
        let times =
            [&mut self.window_opened, &mut self.sweep_at, &mut self.strangers_until, &mut self.doubted_since];
        for since in times {
            *since = since.map(|at| at + by);
        }
        self.traffic.begin();
    }

    // Commands.

    /// Takes over the services of a configuration. [`Self::set_usable`] must follow.
    pub fn set_services(&mut self, services: &[Service]) {
        self.planner.set_services(services);
        self.linger = longest_linger(&self.planner);
    }

    /// Takes the cookies of hand-offs from the cluster keys.
    pub fn set_keys(&mut self, keys: &KeyRing) {
        self.planner.set_keys(keys);
        self.install();
    }

    /// Makes these the backends that new flows go to, one list a service in their order; half-open flows in slots that change are
    /// replicated first (design §4).
    pub fn set_usable(&mut self, now: Instant, usable: &[Vec<RankedBackend>]) {
        let changed: Vec<_> = usable
            .iter()
            .enumerate()
            .filter_map(|(index, backends)| {
                let slots = self.planner.slots_that_would_change(index, backends)?;
                Some((self.planner.services().nth(index)?.clone(), slots))
            })
            .collect();
        if !changed.is_empty() {
            self.take_events(now);
            let mut half_open = Vec::new();
            let planner = &self.planner;
            self.forwarder.visit(&RowSet::All, &mut |record| {
                let in_changed_slot = || {
                    changed.iter().any(|(service, slots)| {
                        service.has(&record.key) && slots.contains(planner.slot(&record.key))
                    })
                };
                if record.state == FlowState::HalfOpen && in_changed_slot() {
                    half_open.push(*record);
                }
            });
            for record in half_open {
                let event = FlowEvent { kind: FlowEventKind::Changed, at_once: true, record };
                self.replicator.handle_event(now, event);
            }
            self.pump(now);
        }
        for (index, backends) in usable.iter().enumerate() {
            self.planner.set_usable(index, backends, now);
        }
        self.install();
    }

    /// Makes these the backends whose TCP flows are reset (`on_failure = "reset"`), one list a service in their order.
    pub fn set_failed(&mut self, failed: &[Vec<BackendId>]) {
        let mut changed = false;
        for (index, backends) in failed.iter().enumerate() {
            changed |= self.planner.set_failed(index, backends);
        }
        if changed {
            self.install();
        }
    }

    /// Begins to leave: [`Event::ReadyToLeave`] comes once what we hold is handed over. Told twice, it comes without waiting.
    pub fn begin_leave(&mut self, now: Instant) {
        if self.leaving_since.is_none() {
            self.leaving_since = Some(now);
        } else {
            self.ready_to_leave_at = Some(now);
        }
    }

    // Outputs.

    /// The next frame for a peer. Do not ask while the peers' streams are full.
    pub fn poll_message(&mut self, now: Instant) -> Option<(MemberId, Vec<u8>)> {
        let message = self.replicator.poll_message();
        if message.is_none() {
            self.pump(now);
        }
        message
    }

    /// What happened, for the driver to act on or to say.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    // Views and plans.

    /// Puts the planner's plan in force.
    fn install(&mut self) {
        let event = match self.forwarder.install(self.planner.plan()) {
            Ok(()) => Event::Installed(self.planner.destinations()),
            Err(error) => Event::NotInstalled(error),
        };
        self.events.push_back(event);
    }

    fn view_input(&self) -> ViewInput {
        let of = |wanted: &dyn Fn(&MemberView) -> bool| -> BTreeSet<MemberId> {
            self.view.members.iter().filter(|member| wanted(member)).map(|member| member.id).collect()
        };
        ViewInput {
            ranking: self.planner.current(),
            previous: self.planner.previous().map(|table| table as Arc<dyn Ranking>).collect(),
            pending: self.planner.pending().map(|table| table as Arc<dyn Ranking>),
            live: of(&|_| true),
            suspects: suspects(&self.view),
            caches: of(&|member| member.metadata.cache),
            policy: self.settings.policy,
            enabled: self.settings.replication,
        }
    }

    /// A table has come into force: sends what it moves, unless that was done ahead, and opens the handover window.
    fn switch(&mut self, change: &TableChange, now: Instant) {
        self.count_from_now(change);
        if !change.was_planned {
            self.send_tables(change, now);
        }
        self.protect_what_came_ahead(change);
        if change.departed && self.settings.cache {
            self.offer_cached(change, now);
        }
        self.table_changed(now);
        self.window_opened = self.planner.previous().next().map(|_| now);
        self.sweep_at = Some(now + SWEEP_AFTER);
    }

    /// Who owns a row is the only one to know when its live flows were last seen, however it goes: where the owner is another, their time
    /// begins anew. Who is lost may have forwarded any flow, by its table or its cache, and told nobody: then the time of all does.
    /// Of what has ended all holders hear in time; it must go in time too, whatever changes, since its tuple will be used again.
    fn count_from_now(&self, change: &TableChange) {
        let lost = loses_members(change);
        let other_owner = |row: &u32| lost || change.old.holders(*row)[0] != change.new.holders(*row)[0];
        let rows = RowSet::from_rows((0..change.new.row_count()).filter(other_owner));
        let mut flows = Vec::new();
        self.forwarder.visit(&rows, &mut |record| {
            if record.state == FlowState::Established {
                flows.push((record.key, 0));
            }
        });
        self.forwarder.touch(&flows);
    }

    /// Flows that we own from now on and that were sent ahead: whoever sent them to us has sent them to our backups, or is one. The same
    /// if our backups held the row before, as we did. The next comparison finds those it refused.
    fn protect_what_came_ahead(&self, change: &TableChange) {
        let local = Some(self.settings.local);
        let came_ahead = |row| {
            change.was_planned
                || change.ahead.as_ref().is_some_and(|ahead| ahead.ranking.holders(row).contains(&local))
        };
        let rows = (0..change.new.row_count()).filter(|&row| {
            let holders = change.new.holders(row);
            let old = change.old.holders(row);
            let mut backups = holders[1..].iter().flatten();
            let has_held =
                |backup: &MemberId| old.contains(&Some(*backup)) && change.survivors.keeps_state(*backup);
            holders[0] == local
                && holders != old
                && (came_ahead(row) || old.contains(&local) && holders[1].is_some() && backups.all(has_held))
        });
        let rows = RowSet::from_rows(rows);
        let mut ahead = Vec::new();
        self.forwarder.visit(&rows, &mut |record| {
            let protected = record.flags.has(FlowFlags::PROTECTED);
            if record.birth != 0 && !protected && record.state != FlowState::HalfOpen {
                ahead.push((record.key, record.birth, record.update));
            }
        });
        for (key, birth, update) in ahead {
            if !self.replicator.is_unprotected(&key) {
                self.forwarder.protect(&key, birth, update);
            }
        }
    }

    /// Sends our part of a change's transfer tables (claims 19 and 20).
    fn send_tables(&mut self, change: &TableChange, now: Instant) {
        // What the forwarder recorded until now belongs to the tables that are sent.
        self.take_events(now);
        self.with_change(change, |this, change| {
            let rows = RowSet::from_rows(changed_rows(change));
            let mut records = Vec::new();
            this.forwarder.visit(&rows, &mut |record| records.push(*record));
            let transfer = plan(change, records);
            this.events.push_back(Event::Planned(transfer.len()));
            this.replicator.begin_transfer(now, transfer);
        });
        self.transferring = true;
    }

    /// The change as the rebalancer sees it.
    fn with_change(&mut self, table_change: &TableChange, act: impl FnOnce(&mut Self, &Change<'_>)) {
        let caches: BTreeSet<MemberId> =
            self.view.members.iter().filter(|member| member.metadata.cache).map(|member| member.id).collect();
        let change = Change {
            local: self.settings.local,
            old: &*table_change.old,
            new: &*table_change.new,
            survivors: &table_change.survivors,
            caches: &caches,
            ahead: table_change.ahead.as_ref().map(|sent| Ahead {
                base: &*sent.base,
                ranking: &*sent.ranking,
                members: &sent.members,
            }),
        };
        act(self, &change);
    }

    /// Says that we are ready for the pending view, once we are.
    fn report_if_due(&mut self, now: Instant) {
        let acked = self.replicator.transfers().map(|transfer| transfer.acked).sum();
        let progress = Happening::Progress { done: !self.transferring, acked };
        let (phase, consequence) = self.change.after(now, progress);
        self.change = phase;
        match consequence {
            Consequence::Nothing => {}
            Consequence::Report(name) => {
                self.planner.pending_is_sent();
                self.events.push_back(Event::ReadyFor(name));
            }
            Consequence::ReportStuck(name) => {
                let stuck = self.replicator.transfers().map(|transfer| transfer.to).collect();
                self.events.push_back(Event::StuckFor(name, stuck));
            }
        }
    }

    /// The window closes when every active member has gossiped the new digest, our transfers are done, and one linger has passed; not
    /// while somebody is suspected, who may be lost with all that holders have, or nobody ranks: then what former ones have is all there is.
    fn close_window_if_due(&mut self, now: Instant) {
        let Some(opened) = self.window_opened else { return };
        if self.view.ranked().next().is_none() {
            return;
        }
        if now.duration_since(opened) < self.linger || self.transferring || !self.everybody_switched() {
            return;
        }
        if !self.took_leave(now) || self.suspects() {
            return;
        }
        self.window_opened = None;
        self.planner.close_window();
        self.install();
        self.replicator.handle_view(now, self.view_input());
        let dropped = self.drop_former(now);
        if self.doubted_since.is_none() {
            self.believe_what_is_ours();
        }
        self.events.push_back(Event::WindowClosed(dropped));
    }

    /// Whether any table that counts gives us the flow.
    fn is_ours(&self, key: &FlowKey) -> bool {
        self.planner.gives_or_will(self.settings.local, key)
    }

    fn everybody_switched(&self) -> bool {
        self.view
            .members
            .iter()
            .filter(|member| member.is_in_force() && member.id != self.settings.local)
            .all(|member| member.view_digest == self.view.digest)
    }

    fn leave_if_due(&mut self, now: Instant) {
        if self.leaving_since.is_none() {
            return;
        }
        let local = self.view.get(self.settings.local);
        if local.is_some_and(|local| local.state == MemberState::Leaving) {
            let since = *self.unranked_since.get_or_insert(now);
            // What nobody was to send, because other holders were to be there that are lost since, goes now or with us.
            let handed_over = !self.transferring && self.everybody_switched() && self.took_leave(now);
            if (handed_over || now.duration_since(since) >= LEAVE_AT_MOST) && self.ready_to_leave_at.is_none()
            {
                self.ready_to_leave_at = Some(now + LEAVE_GRACE);
                // Who is gone is not heard when it says what it has seen: from here on the owners see it themselves.
                self.forwarder.flush_cache();
            }
        }
        if self.ready_to_leave_at.is_some_and(|at| at <= now) && !self.left {
            self.left = true;
            self.events.push_back(Event::ReadyToLeave);
        }
    }

    // Flows.

    fn take_events(&mut self, now: Instant) {
        let mut events = Vec::new();
        self.forwarder.poll_events(&mut events, EVENTS_AT_ONCE);
        for event in events {
            self.replicator.handle_event(now, event);
        }
    }

    /// Looks for what events would have said, if their queue overflowed; and whether packets come, if many members were lost.
    fn look_at_counters_if_due(&mut self, now: Instant) {
        if self.counters_at.is_some_and(|at| now.duration_since(at) < COUNTERS_EVERY) {
            return;
        }
        self.counters_at = Some(now);
        let counters = self.forwarder.counters();
        let doubted = self.traffic.look(now, &counters);
        if self.planner.doubt_lost(doubted) {
            self.events.push_back(Event::Doubting(doubted));
            self.install();
        }
        if counters.events_lost > self.events_lost {
            self.events_lost = counters.events_lost;
            self.find_missed(now);
            self.pump(now);
        }
    }

    /// Events are missing: whatever is not stamped or not protected is looked at as if it had just changed.
    fn find_missed(&mut self, now: Instant) {
        let mut missed = Vec::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            let protected = record.flags.has(FlowFlags::PROTECTED);
            if record.birth == 0 || (!protected && record.state != FlowState::HalfOpen) {
                missed.push(*record);
            }
        });
        self.events.push_back(Event::Missed(missed.len()));
        for record in missed {
            let kind = if record.birth == 0 { FlowEventKind::New } else { FlowEventKind::Changed };
            self.replicator.handle_event(now, FlowEvent { kind, at_once: false, record });
        }
    }

    /// The forwarder has seen packets while it had no daemon, and nobody was told: tells the owners, once there are any. Whose row has never
    /// changed hands hears of it in no other way, and would take its flow for idle.
    fn tell_seen_if_due(&mut self, now: Instant) {
        let local = self.settings.local;
        let is_back = self.view.get(local).is_some_and(MemberView::is_in_force);
        let others = self.view.members.iter().any(|member| member.is_in_force() && member.id != local);
        if !self.to_tell_seen || !is_back || !others {
            return;
        }
        self.to_tell_seen = false;
        // Who was looked for what had changed when nobody else was in the view told nobody.
        self.find_missed(now);
        let mut seen = Vec::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            if record.birth != 0 && matches!(record.state, FlowState::Established | FlowState::Closing) {
                seen.push(*record);
            }
        });
        if self.settings.cache {
            let cached = self.forwarder.flush_cache();
            self.forwarder.upsert_cache(&cached);
            seen.extend(cached);
        }
        for record in seen {
            let event = FlowEvent { kind: FlowEventKind::Touched, at_once: false, record };
            self.replicator.handle_event(now, event);
        }
    }

    /// Tells of flows again that are unprotected though nothing is on its way.
    fn tell_again_if_due(&mut self, now: Instant) {
        if *self.tell_again_at.get_or_insert(now + TELL_AGAIN_EVERY) > now {
            return;
        }
        self.tell_again_at = Some(now + TELL_AGAIN_EVERY);
        for key in self.replicator.stalled(TOLD_AGAIN_AT_ONCE) {
            let record = self.forwarder.get(&key);
            self.replicator.handle_stalled(&key, record);
        }
        self.pump(now);
    }

    /// Carries out whatever the replicator wants of the forwarder, until it wants nothing more.
    fn pump(&mut self, now: Instant) {
        loop {
            let mut idle = true;
            while let Some(batch) = self.replicator.poll_apply() {
                idle = false;
                let results = self.apply(now, &batch);
                self.replicator.handle_applied(now, batch.id, &results);
            }
            while let Some(lookup) = self.replicator.poll_lookup() {
                idle = false;
                let records: Vec<Option<Record>> =
                    lookup.keys.iter().map(|key| self.forwarder.get(key)).collect();
                self.replicator.handle_lookup(now, lookup.id, &records);
            }
            while let Some(event) = self.replicator.poll_event() {
                idle = false;
                self.handle_replication(event, now);
            }
            if idle {
                return;
            }
        }
    }

    fn handle_replication(&mut self, event: ReplicationEvent, now: Instant) {
        match event {
            ReplicationEvent::AllDone => self.transferring = false,
            ReplicationEvent::Digests { from, digests } => return self.handle_digests(from, digests),
            ReplicationEvent::Differing { from, round, rows } => {
                return self.handle_differing(now, from, round, rows);
            }
            ReplicationEvent::Overflow { peer } => {
                let mut records = Vec::new();
                self.forwarder.visit(&RowSet::All, &mut |record| records.push(*record));
                // Also what it is to hold once a planned change is in force.
                let tables: Vec<_> =
                    [self.planner.current()].into_iter().chain(self.planner.pending()).collect();
                let mut records_sent = 0;
                for table in tables {
                    let refill = plan_refill(&*table, peer, records.iter().copied());
                    records_sent += refill.len();
                    self.replicator.begin_transfer(now, refill);
                }
                self.events.push_back(Event::Refilled(peer, records_sent));
                self.transferring = true;
            }
            _ => {}
        }
        self.events.push_back(Event::Replication(event));
    }

    fn apply(&mut self, now: Instant, batch: &ApplyBatch) -> Vec<ApplyResult> {
        let mut results = Vec::with_capacity(batch.records.len() + batch.items.len());
        self.upsert(now, &batch.records, &mut results);
        let mut upserts: Vec<Record> = Vec::new();
        for item in &batch.items {
            if let Apply::Upsert(record) = item {
                upserts.push(*record);
                continue;
            }
            self.upsert(now, &upserts, &mut results);
            upserts.clear();
            results.push(self.apply_one(item));
        }
        self.upsert(now, &upserts, &mut results);
        results
    }

    /// Upserts records; backends that nobody here knew get a place in the plan first.
    fn upsert(&mut self, now: Instant, records: &[Record], results: &mut Vec<ApplyResult>) {
        if records.is_empty() {
            return;
        }
        let mut answers = self.forwarder.upsert(records);
        if answers.contains(&Upserted::UnknownBackend) {
            let mut new = false;
            for record in records {
                new |= self.planner.register(record.backend);
            }
            if new {
                self.install();
            }
            answers = self
                .forwarder
                .upsert(records)
                .into_iter()
                .zip(answers)
                // What the first round applied is stale in the second, and applied all the same.
                .map(|(second, first)| if first == Upserted::UnknownBackend { second } else { first })
                .collect();
        }
        for (answer, record) in answers.iter().zip(records) {
            if *answer == Upserted::Stale {
                self.open_by(now, record);
            }
        }
        // Whoever has an older record may have seen a later packet.
        let seen: Vec<(FlowKey, u32)> = answers
            .iter()
            .zip(records)
            .filter(|(answer, _)| **answer == Upserted::Stale)
            .map(|(_, record)| (record.key, record.idle_ms))
            .collect();
        if !seen.is_empty() {
            self.forwarder.touch(&seen);
        }
        self.mark_strangers(now, records);
        results.extend(answers.into_iter().map(|answer| match answer {
            Upserted::Applied => ApplyResult::Applied,
            Upserted::Stale => ApplyResult::Stale,
            Upserted::Full => ApplyResult::Full,
            Upserted::UnknownBackend => ApplyResult::UnknownBackend,
        }));
    }

    /// While we could not be reached another member has recovered a flow that we know from its SYN, and the client's answer came to it alone:
    /// ours is open too, or would end as one that was never answered.
    fn open_by(&mut self, now: Instant, theirs: &Record) {
        if theirs.state == FlowState::HalfOpen || !theirs.flags.has(FlowFlags::RECOVERED) {
            return;
        }
        let is_asked_for = |ours: &Record| {
            ours.state == FlowState::HalfOpen && ours.birth != 0 && ours.backend == theirs.backend
        };
        let Some(ours) = self.forwarder.get(&theirs.key).filter(is_asked_for) else { return };
        let record = Record {
            state: theirs.state,
            update: ours.update.wrapping_add(1),
            idle_ms: ours.idle_ms.min(theirs.idle_ms),
            ..ours
        };
        if self.forwarder.upsert(&[record]) == [Upserted::Applied] {
            let event = FlowEvent { kind: FlowEventKind::Changed, at_once: true, record };
            self.replicator.handle_event(now, event);
        }
    }

    fn apply_one(&mut self, item: &Apply) -> ApplyResult {
        let done = |did: bool| if did { ApplyResult::Applied } else { ApplyResult::Stale };
        match *item {
            // Gathered by the caller.
            Apply::Upsert(_) => ApplyResult::Stale,
            Apply::Remove { key, birth, min_idle_ms } => {
                done(self.forwarder.remove(&key, birth, Duration::from_millis(u64::from(min_idle_ms))))
            }
            Apply::End { key, birth, min_idle_ms } => {
                let min_idle = Duration::from_millis(u64::from(min_idle_ms));
                let is_this = |record: Record| record.birth == birth;
                done(
                    self.forwarder.remove(&key, birth, min_idle)
                        || !self.forwarder.get(&key).is_some_and(is_this),
                )
            }
            Apply::Touch { key, idle_ms } => {
                self.forwarder.touch(&[(key, idle_ms)]);
                ApplyResult::Applied
            }
            Apply::CacheUpsert(record) => {
                if self.planner.register(record.backend) {
                    self.install();
                }
                if self.ready_to_leave_at.is_none() {
                    self.forget_former(&record.key, |former| former.is_replaced_by(&record));
                    self.forwarder.upsert_cache(&[record]);
                }
                ApplyResult::Applied
            }
            Apply::CacheRemove { key } => {
                self.forget_former(&key, |_| true);
                self.forwarder.remove_cache(&[key]);
                ApplyResult::Applied
            }
            Apply::Stamp { key, birth } => done(self.forwarder.stamp(&key, birth)),
            Apply::Protect { key, birth, update } => {
                self.forwarder.protect(&key, birth, update);
                ApplyResult::Applied
            }
        }
    }
}

/// Empties a forwarder's tables. What it presumes of used tuples, which nobody is told of, goes by itself in the time of a half-open flow.
pub fn forget_flows(forwarder: &dyn Forwarder) {
    let mut keys = Vec::new();
    forwarder.visit(&RowSet::All, &mut |record| keys.push(record.key));
    for key in keys {
        forwarder.remove(&key, 0, Duration::ZERO);
    }
    forwarder.flush_cache();
}

/// Whom the view suspects.
fn suspects(view: &View) -> BTreeSet<MemberId> {
    view.members.iter().filter(|member| member.liveness != Liveness::Alive).map(|member| member.id).collect()
}

/// Whether members have gone with what they held.
fn loses_members(change: &TableChange) -> bool {
    change.old.table.members().iter().any(|member| !change.survivors.keeps_state(member.id))
}

fn longest_linger(planner: &Planner) -> Duration {
    planner.services().map(|service| service.linger).max().unwrap_or_default()
}

#[cfg(test)]
mod tests;
