//! From views, configuration and health to the [`Plan`] in force.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::Hasher as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::member::Liveness;
use phalanx_flow::row::RANKS;
use phalanx_flow::score::Scoring;
use phalanx_flow::slots::{BackendTable, RankedBackend};
use phalanx_flow::table::{BackupSite, RankedMember, RankingError, RowTable};
use phalanx_flow::{BackendId, BackendIndex, FlowKey, FlowSeed, MemberId, MemberSlot, Row, flow_hash};
use phalanx_forwarder::{Handoff, Plan, PlanBackend, PlanMember, PlanService, SlotSet};
use phalanx_membership::{KeyRing, MemberState, MemberView, View};
use phalanx_rebalancer::{Holders, MAX_HOLDERS, Ranking, Survivors};
use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;

use crate::lost::Lost;
use crate::shared::{SharedTables, changed_slots};

/// SYNs in slots that changed are replicated at once for this long (design §4): as long as a client goes on repeating its SYN
/// before it gives the connection up for the application to see.
pub const UNSETTLED: Duration = Duration::from_secs(10);

/// What does not change while the daemon runs.
#[derive(Clone, Debug)]
pub struct Fixed {
    /// Our name.
    pub local: MemberId,
    /// Our data address: source of what we send to members and backends.
    pub address: IpAddr,
    /// Seed of the flow hash, and of the rankings.
    pub seed: FlowSeed,
    /// How members are ranked.
    pub scoring: Scoring,
    /// Number of rows.
    pub rows: usize,
    /// Where backups stand.
    pub site_rule: BackupSite,
    /// Backups of every row: 1 or 2.
    pub backups: usize,
    /// How packets are handed off.
    pub handoff: Handoff,
    /// `replicate = "syn"`.
    pub replicate_syn: bool,
}

/// A service as the configuration has it: where it is and how its flows age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Virtual address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// IP protocol number: 6 or 17.
    pub protocol: u8,
    /// All its backends, those that take no new flows among them.
    pub backends: Vec<BackendId>,
    /// A flow that no holder has seen for this long is idle.
    pub idle: Duration,
    /// How long a closing flow is kept after its last packet.
    pub linger: Duration,
    /// How long a reset flow is kept after its last packet.
    pub reset_linger: Duration,
    /// How long a half-open flow is kept after its last packet.
    pub half_open: Duration,
    /// Fragment the outer packet where the path to the backend is too narrow.
    pub fragment: bool,
}

impl Service {
    /// Whether both are the same to a client.
    fn is_at(&self, other: &Self) -> bool {
        (self.address, self.port, self.protocol) == (other.address, other.port, other.protocol)
    }

    /// Whether `key` is one of its flows.
    pub fn has(&self, key: &FlowKey) -> bool {
        self.address == key.destination_address()
            && self.port == u16::from_be_bytes(key.destination_port)
            && self.protocol == key.protocol
    }
}

/// Whom a plan's next hops lead to; positions are those of the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destinations {
    /// The members' data addresses. The position of one that went stays.
    pub members: Vec<Destination>,
    /// The backends' addresses.
    pub backends: Vec<Destination>,
}

/// An address to find the next hop to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Where it is.
    pub address: IpAddr,
    /// Whether a next hop that is not found is missed: not that of a member that is down.
    pub is_needed: bool,
}

/// A row table as the rebalancer asks for it.
#[derive(Clone)]
pub struct TableRanking {
    /// The table.
    pub table: Arc<RowTable>,
    seed: FlowSeed,
    /// Who holds what, as places in `ids`: with 65,536 rows it fits a processor's second cache, where the table does not. For each of a
    /// million records it is asked several times in a row.
    holders: Box<[[u16; MAX_HOLDERS]]>,
    ids: Box<[MemberId]>,
}

/// No member: more members than that cannot be.
const NOBODY: u16 = u16::MAX;

impl TableRanking {
    fn new(table: Arc<RowTable>, seed: FlowSeed, backups: usize) -> Self {
        let ids: Box<[MemberId]> = table.members().iter().map(|member| member.id).collect();
        let place = |id: MemberId| {
            ids.binary_search(&id).ok().and_then(|place| u16::try_from(place).ok()).unwrap_or(NOBODY)
        };
        let holders = (0..table.row_count() as u32).map(|row| {
            let mut ranked = table.ranking(row);
            if let Some(others) = ranked.get_mut(backups + 1..) {
                others.fill(None);
            }
            ranked.map(|id| id.map_or(NOBODY, place))
        });
        Self { holders: holders.collect(), table, seed, ids }
    }

    /// Whether `member` is to hold the flows of `row`.
    fn gives(&self, member: MemberId, row: u32) -> bool {
        let is_member = |place: &u16| self.ids.get(usize::from(*place)) == Some(&member);
        self.holders.get(row as usize).is_some_and(|places| places.iter().any(is_member))
    }
}

impl Ranking for TableRanking {
    fn row_of(&self, key: &FlowKey) -> u32 {
        self.table.row_function().row_of(key, flow_hash(self.seed, key))
    }

    fn holders(&self, row: u32) -> Holders {
        let Some(places) = self.holders.get(row as usize) else { return Holders::default() };
        places.map(|place| self.ids.get(usize::from(place)).copied())
    }

    fn row_count(&self) -> u32 {
        self.table.row_count() as u32
    }
}

/// A change of the row table: what transfers are computed from.
pub struct TableChange {
    /// Before.
    pub old: Arc<TableRanking>,
    /// From now on.
    pub new: Arc<TableRanking>,
    /// Who lives, and who has an empty flow table.
    pub survivors: Survivors,
    /// Whether somebody who owned rows has left.
    pub departed: bool,
    /// The change was planned, and what it moves has been, or is being, sent for the pending table.
    pub was_planned: bool,
    /// What we have sent whole for a pending table before.
    pub ahead: Option<SentAhead>,
}

/// What a planner needs to go on where another one, of an earlier process, has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// By slot: id, data address, and whether it was in the view.
    pub members: Vec<(u32, IpAddr, bool)>,
    /// Who ranks: id, weight, the number of its site, and its boot.
    pub ranked: Vec<(u32, u32, u32, u64)>,
    /// Digest of the view.
    pub view_digest: u64,
}

/// See [`phalanx_rebalancer::Ahead`].
pub struct SentAhead {
    /// The table that was in force when it was sent.
    pub base: Arc<TableRanking>,
    /// The pending table.
    pub ranking: Arc<TableRanking>,
    /// Who still has what it was sent.
    pub members: BTreeSet<MemberId>,
}

/// The table of the pending view.
struct Pending {
    base: Arc<TableRanking>,
    ranking: Arc<TableRanking>,
    boots: BTreeMap<MemberId, u64>,
    /// All that it moves has been sent by us.
    sent: bool,
}

/// A table that was in force.
struct Past {
    ranking: Arc<TableRanking>,
    rows: Arc<[Row]>,
    /// When it was left, everybody had switched to it and we had sent all it moved.
    was_settled: bool,
    /// Whom it ranked, in which lives, as far as those have not ended.
    boots: BTreeMap<MemberId, u64>,
}

impl Past {
    /// Who has come back without its flow table has nothing of this table's flows, and is not asked for any: the next of the row is.
    fn leave_out_reborn(&mut self, view: &View, slot_of: impl Fn(MemberId) -> MemberSlot) {
        let is_reborn = |id: &MemberId, boot: &u64| view.get(*id).is_some_and(|now| now.boot != *boot);
        let reborn: Vec<MemberSlot> =
            self.boots.extract_if(.., |id, boot| is_reborn(id, boot)).map(|(id, _)| slot_of(id)).collect();
        if reborn.is_empty() {
            return;
        }
        let rows = self.rows.iter().map(|row| {
            let mut ranks = [MemberSlot::NONE; RANKS];
            let left = row.ranks.iter().filter(|slot| !reborn.contains(slot));
            for (place, slot) in ranks.iter_mut().zip(left) {
                *place = *slot;
            }
            Row { ranks, ..*row }
        });
        self.rows = rows.collect();
    }
}

/// By which rows holders of before are asked, and of what they were made.
struct Asked {
    /// The table that is asked, those after it, and the one in force.
    of: Vec<Arc<[Row]>>,
    gone: BTreeSet<MemberSlot>,
    rows: Arc<[Row]>,
}

/// Earlier tables that still count, at most: a cluster that changes faster than its windows close forgets the oldest.
const MAX_PAST: usize = 4;

/// Before a member is suspected it was last heard this long ago, and may not have heard of a change of backends that was made as long before.
const LAST_HEARD: Duration = Duration::from_secs(1);

/// Changes of a service's backends that are remembered, at most.
const MAX_FORMER_SLOTS: usize = 8;

struct ServicePlan {
    config: Service,
    table: Arc<BackendTable>,
    slots: Arc<[BackendIndex]>,
    /// What `slots` was, and until when, oldest first: for as long as a member may have been lost that went by it.
    former_slots: VecDeque<(Arc<[BackendIndex]>, Instant)>,
    unsettled: Option<(Arc<SlotSet>, Instant)>,
    failed: Vec<BackendId>,
}

impl ServicePlan {
    /// The slots at a time, if they have changed since.
    fn slots_at(&self, time: Instant) -> Option<&Arc<[BackendIndex]>> {
        self.former_slots.iter().find(|(_, until)| *until > time).map(|(slots, _)| slots)
    }
}

/// Builds plans. See the module's doc.
pub struct Planner {
    fixed: Fixed,
    shared: Option<Arc<SharedTables>>,
    services: Vec<ServicePlan>,
    backends: Vec<PlanBackend>,
    backend_indexes: HashMap<BackendId, BackendIndex>,
    members: Vec<PlanMember>,
    current: Arc<TableRanking>,
    rows: Arc<[Row]>,
    /// Oldest first, while the handover window is open.
    past: Vec<Past>,
    asked: Option<Asked>,
    pending: Option<Pending>,
    lost: Lost,
    /// When the member that was suspected or lost last was last heard, and until when that counts.
    last_heard: Option<(Instant, Instant)>,
    met: Option<Met>,
    boots: BTreeMap<MemberId, u64>,
    view_digest: u64,
}

/// The active members of another side, met when a partition heals, and their table. Until both sides are one, each owns every row for
/// itself, so what one side does not know, or would rather know better, the other is asked for.
struct Met {
    members: Vec<RankedMember>,
    rows: Arc<[Row]>,
}

impl Planner {
    /// A planner that knows nobody but the local member, and no backend.
    pub fn new(fixed: Fixed) -> Result<Self, RankingError> {
        let table = RowTable::new(fixed.scoring, fixed.rows, fixed.site_rule, &[])?;
        let rows: Arc<[Row]> = table.to_rows(|_| MemberSlot::NONE).into();
        let local = PlanMember { id: fixed.local, address: fixed.address, liveness: Liveness::Alive };
        Ok(Self {
            current: Arc::new(TableRanking::new(Arc::new(table), fixed.seed, fixed.backups)),
            fixed,
            shared: None,
            services: Vec::new(),
            backends: Vec::new(),
            backend_indexes: HashMap::new(),
            members: vec![local],
            rows,
            past: Vec::new(),
            asked: None,
            pending: None,
            lost: Lost::default(),
            last_heard: None,
            met: None,
            boots: BTreeMap::new(),
            view_digest: 0,
        })
    }

    /// The same, and it shares what it computes with the other planners of this process that have been given `tables`.
    pub fn sharing(self, tables: Arc<SharedTables>) -> Self {
        Self { shared: Some(tables), ..self }
    }

    fn rank(&self, table: Arc<RowTable>) -> Arc<TableRanking> {
        Arc::new(TableRanking::new(table, self.fixed.seed, self.fixed.backups))
    }

    /// The row table of these members.
    fn row_table(&self, members: &[RankedMember]) -> Result<Arc<RowTable>, RankingError> {
        if let Some(shared) = &self.shared {
            return shared.rows(&self.current.table, members);
        }
        let mut table = RowTable::clone(&self.current.table);
        table.set_members(members)?;
        Ok(Arc::new(table))
    }

    /// Takes over a view. `Some` if who owns what changed, or if somebody lost its flow table.
    ///
    /// The old table stays as a previous one: the handover window is open until [`Self::close_window`]. `settled`: everybody has
    /// switched to the old table, and we have sent all it moved. [`Self::set_pending`] must follow.
    pub fn set_view(&mut self, view: &View, settled: bool) -> Result<Option<TableChange>, RankingError> {
        let change = self.take_view(view, settled);
        self.ask_who_lives();
        change
    }

    fn take_view(&mut self, view: &View, settled: bool) -> Result<Option<TableChange>, RankingError> {
        for member in &mut self.members {
            member.liveness = Liveness::Down;
        }
        for member in &view.members {
            let at = match self.members.iter().position(|known| known.id == member.id) {
                Some(at) => at,
                None => {
                    let new =
                        PlanMember { id: member.id, address: member.address.ip(), liveness: Liveness::Down };
                    self.members.push(new);
                    self.members.len() - 1
                }
            };
            self.members[at].address = member.address.ip();
            self.members[at].liveness = member.liveness;
        }
        self.view_digest = view.digest.0;
        self.lost.remove(|id| view.get(id).is_some_and(|member| member.known));
        self.meet(view)?;

        let ranked: Vec<RankedMember> =
            view.ranked().map(|member| ranked_member(member, member.metadata.weight)).collect();
        let boots: BTreeMap<MemberId, u64> = view.ranked().map(|member| (member.id, member.boot)).collect();
        let old_members = self.current.table.members();
        if same_members(&old_members, &ranked) && boots == self.boots {
            return Ok(None);
        }
        let live: BTreeSet<MemberId> = view.members.iter().map(|member| member.id).collect();
        // A member that came back without its flow table counts as dead in the old table from the moment it is seen, joining or active.
        let blank = view
            .members
            .iter()
            .filter(|member| self.boots.get(&member.id) != Some(&member.boot))
            .map(|member| member.id);
        let first = self.boots.is_empty();
        let survivors = Survivors { live, blank: blank.collect() };
        let gone = old_members.iter().map(|member| member.id).filter(|id| view.get(*id).is_none());
        let rows = self.asked.as_ref().map_or(&self.rows, |asked| &asked.rows);
        self.lost.add(gone, (Arc::clone(rows), old_members.len()));
        let departed = old_members.iter().any(|old| !ranked.iter().any(|member| member.id == old.id));

        let old = if first {
            // We have just come: what was before us is everybody else's table.
            let others: Vec<RankedMember> =
                ranked.iter().copied().filter(|member| member.id != self.fixed.local).collect();
            self.rank(self.row_table(&others)?)
        } else {
            Arc::clone(&self.current)
        };
        let table = self.row_table(&ranked)?;
        let was_planned = self.pending.as_ref().is_some_and(|pending| {
            pending.boots == boots && same_members(&pending.ranking.table.members(), &ranked)
        });
        let ahead = self.ahead(view);
        let before = std::mem::replace(&mut self.boots, boots);
        self.current = self.rank(table);
        self.rows = self.current.table.to_rows(|id| self.slot_of(id)).into();
        if !old.table.members().is_empty() {
            let rows = old.table.to_rows(|id| self.slot_of(id)).into();
            let was_settled = settled || first;
            let boots = if first { self.boots.clone() } else { before };
            self.past.push(Past { ranking: Arc::clone(&old), rows, was_settled, boots });
            if self.past.len() > MAX_PAST {
                self.past.remove(0);
            }
        }
        let members = &self.members;
        for past in &mut self.past {
            past.leave_out_reborn(view, |id| slot_of(members, id));
        }
        // A newcomer's own idea of who was blank before it came is wrong: only it is.
        let survivors = if first {
            Survivors { blank: BTreeSet::from([self.fixed.local]), ..survivors }
        } else {
            survivors
        };
        let new = Arc::clone(&self.current);
        Ok(Some(TableChange { old, new, survivors, departed, was_planned, ahead }))
    }

    /// Takes note of another side's members.
    fn meet(&mut self, view: &View) -> Result<(), RankingError> {
        let others = view.members.iter().filter(|member| {
            member.state == MemberState::Active && !member.admitted && member.metadata.weight > 0
        });
        let members: Vec<RankedMember> =
            others.map(|member| ranked_member(member, member.metadata.weight)).collect();
        if members.is_empty() || !view.get(self.fixed.local).is_some_and(MemberView::ranks) {
            self.met = None;
        } else if !self.met.as_ref().is_some_and(|met| same_members(&met.members, &members)) {
            let rows = self.row_table(&members)?.to_rows(|id| self.slot_of(id)).into();
            self.met = Some(Met { members, rows });
        }
        Ok(())
    }

    /// Takes over what of the view is pending. `Some`, the change to come, if something is to be sent for it.
    ///
    /// Until a change is in force, the pending table only says who else is told of flows.
    pub fn set_pending(&mut self, view: &View) -> Result<Option<TableChange>, RankingError> {
        if view.pending.is_none() {
            self.pending = None;
            return Ok(None);
        }
        let wanted: Vec<RankedMember> =
            view.pending_ranked().map(|(member, weight)| ranked_member(member, weight)).collect();
        let boots: BTreeMap<MemberId, u64> =
            view.pending_ranked().map(|(member, _)| (member.id, member.boot)).collect();
        if let Some(pending) = &self.pending
            && pending.boots == boots
            && same_members(&pending.ranking.table.members(), &wanted)
        {
            return Ok(None);
        }
        let table = self.row_table(&wanted)?;
        let new = self.rank(table);
        let blank = view.members.iter().filter(|member| self.boots.get(&member.id) != Some(&member.boot));
        let change = TableChange {
            old: Arc::clone(&self.current),
            new: Arc::clone(&new),
            survivors: Survivors {
                live: view.members.iter().map(|member| member.id).collect(),
                blank: blank.map(|member| member.id).collect(),
            },
            departed: false,
            was_planned: false,
            ahead: self.ahead(view),
        };
        self.pending = Some(Pending { base: Arc::clone(&self.current), ranking: new, boots, sent: false });
        Ok(Some(change))
    }

    /// Who would own what if we joined those who rank in this view.
    pub fn joined(&self, view: &View) -> Result<Arc<TableRanking>, RankingError> {
        let us = view.get(self.fixed.local).filter(|own| own.metadata.weight > 0);
        let members: Vec<RankedMember> =
            view.ranked().chain(us).map(|member| ranked_member(member, member.metadata.weight)).collect();
        Ok(self.rank(self.row_table(&members)?))
    }

    /// All that the pending table moves has been sent by us, and is kept up to date.
    pub fn pending_is_sent(&mut self) {
        if let Some(pending) = &mut self.pending {
            pending.sent = true;
        }
    }

    fn ahead(&self, view: &View) -> Option<SentAhead> {
        let pending = self.pending.as_ref().filter(|pending| pending.sent)?;
        let same = view.members.iter().filter(|member| pending.boots.get(&member.id) == Some(&member.boot));
        Some(SentAhead {
            base: Arc::clone(&pending.base),
            ranking: Arc::clone(&pending.ranking),
            members: same.map(|member| member.id).collect(),
        })
    }

    /// What is in force, for [`Self::restore`]. `None` while the local member does not rank: then nothing of it is worth going on with.
    ///
    /// The table before is not in it: a restart within a handover window does without step 5's first question (design §4).
    pub fn snapshot(&self) -> Option<Snapshot> {
        if !self.boots.contains_key(&self.fixed.local) {
            return None;
        }
        let ranked = self.current.table.members();
        Some(Snapshot {
            members: self
                .members
                .iter()
                .map(|member| (member.id.0, member.address, member.liveness != Liveness::Down))
                .collect(),
            ranked: ranked
                .iter()
                .map(|member| {
                    let boot = self.boots.get(&member.id).copied().unwrap_or_default();
                    (member.id.0, member.weight, member.site, boot)
                })
                .collect(),
            view_digest: self.view_digest,
        })
    }

    /// Goes on where the planner that made the snapshot has ended, as if it had only been stopped: the next view is a change from there.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), RankingError> {
        let ranked: Vec<RankedMember> = snapshot
            .ranked
            .iter()
            .map(|&(id, weight, site, _)| RankedMember { id: MemberId(id), weight, site })
            .collect();
        let mut table = RowTable::clone(&self.current.table);
        table.set_members(&ranked)?;
        self.members = snapshot
            .members
            .iter()
            .map(|&(id, address, in_view)| PlanMember {
                id: MemberId(id),
                address,
                liveness: if in_view { Liveness::Alive } else { Liveness::Down },
            })
            .collect();
        self.boots = snapshot.ranked.iter().map(|&(id, _, _, boot)| (MemberId(id), boot)).collect();
        self.view_digest = snapshot.view_digest;
        self.current = self.rank(Arc::new(table));
        self.rows = self.current.table.to_rows(|id| self.slot_of(id)).into();
        self.past.clear();
        self.asked = None;
        self.pending = None;
        self.lost = Lost::default();
        self.met = None;
        Ok(())
    }

    /// Forgets everybody but the local member, as if nothing had been restored.
    pub fn forget(&mut self) -> Result<(), RankingError> {
        self.restore(&Snapshot {
            members: vec![(self.fixed.local.0, self.fixed.address, true)],
            ..Snapshot::default()
        })
    }

    /// Takes the cookies of hand-offs from the cluster keys: the first to send, the second accepted besides.
    pub fn set_keys(&mut self, keys: &KeyRing) {
        let mut cookies = keys.cookies();
        self.fixed.handoff.cookie = cookies.next().unwrap_or_default();
        self.fixed.handoff.old_cookie = cookies.next();
    }

    /// Ends the handover window.
    pub fn close_window(&mut self) {
        self.past.clear();
        self.asked = None;
        self.lost.close_window(self.boots.len());
    }

    /// Whether half of the members or more are lost, and not met again.
    pub fn lost_half(&self) -> bool {
        self.lost.is_half(self.boots.len())
    }

    /// Whether those that are lost may live after all: then they are asked for flows that nobody here knows. Says whether the plan has
    /// changed.
    pub fn doubt_lost(&mut self, doubted: bool) -> bool {
        self.lost.doubt(doubted) && self.lost_half()
    }

    /// The tables before, oldest first, while the handover window is open.
    pub fn previous(&self) -> impl Iterator<Item = Arc<TableRanking>> {
        self.past.iter().map(|past| Arc::clone(&past.ranking))
    }

    /// Whether the table in force gives `member` the flow.
    pub fn gives_now(&self, member: MemberId, key: &FlowKey) -> bool {
        self.current.gives(member, self.current.row_of(key))
    }

    /// Whether the table in force gives `member` the flow, or one before it that still counts.
    pub fn gives(&self, member: MemberId, key: &FlowKey) -> bool {
        // All tables have the same rows.
        let row = self.current.row_of(key);
        self.current.gives(member, row) || self.past.iter().any(|past| past.ranking.gives(member, row))
    }

    /// Whether the table in force gives `member` the flow, or that of the pending view.
    pub fn gives_from_now_on(&self, member: MemberId, key: &FlowKey) -> bool {
        let row = self.current.row_of(key);
        let pending = self.pending.as_ref().map(|pending| &pending.ranking);
        [&self.current].into_iter().chain(pending).any(|table| table.gives(member, row))
    }

    /// Whether any table that counts gives `member` the flow: as [`Self::gives`], or that of the pending view.
    pub fn gives_or_will(&self, member: MemberId, key: &FlowKey) -> bool {
        self.gives(member, key) || self.gives_from_now_on(member, key)
    }

    /// The table of the pending view, while a change is planned.
    pub fn pending(&self) -> Option<Arc<TableRanking>> {
        self.pending.as_ref().map(|pending| Arc::clone(&pending.ranking))
    }

    /// The table whose holders are asked for flows that the present ones do not know, while the handover window is open.
    pub fn asked(&self) -> Option<Arc<TableRanking>> {
        self.past.get(self.asked_at()).map(|past| Arc::clone(&past.ranking))
    }

    /// Where in the past the last table is that had come to rest, whose holders had got all there was; if there is none, the oldest.
    fn asked_at(&self) -> usize {
        self.past.iter().rposition(|past| past.was_settled).unwrap_or(0)
    }

    /// Whoever was owner and backup of a row and is in the view no more cannot be asked: then the table after that one says who is.
    fn ask_who_lives(&mut self) {
        let Some(asked) = self.past.get(self.asked_at()..).filter(|past| !past.is_empty()) else {
            self.asked = None;
            return;
        };
        let of: Vec<Arc<[Row]>> =
            asked.iter().map(|past| &past.rows).chain([&self.rows]).map(Arc::clone).collect();
        let is_gone = |member: &PlanMember| member.liveness == Liveness::Down;
        let slots = (0..).map(MemberSlot).zip(&self.members);
        let gone: BTreeSet<MemberSlot> =
            slots.filter(|(_, member)| is_gone(member)).map(|(slot, _)| slot).collect();
        let is_same = |asked: &Asked| {
            asked.gone == gone && asked.of.iter().map(Arc::as_ptr).eq(of.iter().map(Arc::as_ptr))
        };
        if self.asked.as_ref().is_some_and(is_same) {
            return;
        }
        let lives = |row: &&Row| {
            let [owner, backup, _] = row.ranks;
            [owner, backup].iter().any(|slot| slot.is_some() && !gone.contains(slot))
        };
        let first = &of[0];
        let rows = if first.iter().all(|row| lives(&row)) {
            Arc::clone(first)
        } else {
            let living = |(at, row)| *of.iter().filter_map(|rows| rows.get(at)).find(lives).unwrap_or(row);
            first.iter().enumerate().map(living).collect()
        };
        self.asked = Some(Asked { of, gone, rows });
    }

    /// The table in force.
    pub fn current(&self) -> Arc<TableRanking> {
        Arc::clone(&self.current)
    }

    /// Takes over the services of a configuration; tables of services that stay are kept, until [`Self::set_usable`] says otherwise.
    pub fn set_services(&mut self, configs: &[Service]) {
        let mut old: Vec<ServicePlan> = std::mem::take(&mut self.services);
        for config in configs {
            let kept = old.iter().position(|plan| plan.config.is_at(config));
            let plan = match kept {
                Some(at) => ServicePlan { config: config.clone(), ..old.swap_remove(at) },
                None => {
                    let table = BackendTable::new(
                        service_key(self.fixed.seed, config.address, config.port, config.protocol),
                        &[],
                    );
                    let slots = table.to_indexes(|_| BackendIndex::NONE).into();
                    ServicePlan {
                        config: config.clone(),
                        table: Arc::new(table),
                        slots,
                        former_slots: VecDeque::new(),
                        unsettled: None,
                        failed: Vec::new(),
                    }
                }
            };
            self.services.push(plan);
            for backend in &config.backends {
                self.register(*backend);
            }
        }
    }

    /// The services in force.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.iter().map(|plan| &plan.config)
    }

    /// The table of a service with these backends, and the slots that would change; `None` if none would.
    fn backend_table(
        &self,
        service: usize,
        usable: &[RankedBackend],
    ) -> Option<(Arc<BackendTable>, Arc<SlotSet>)> {
        let old = &self.services[service].table;
        if let Some(shared) = &self.shared {
            let new = shared.backends(old, usable);
            let changed = shared.changes(old, &new)?;
            return Some((new, changed));
        }
        let mut new = BackendTable::clone(old);
        new.set_backends(usable);
        let changed = changed_slots(old, &new)?;
        Some((Arc::new(new), Arc::new(changed)))
    }

    /// The slots of a service that would change if these were its backends.
    pub fn slots_that_would_change(&self, service: usize, usable: &[RankedBackend]) -> Option<Arc<SlotSet>> {
        self.backend_table(service, usable).map(|(_, changed)| changed)
    }

    /// Makes these the backends that new flows of a service go to. Slots that change are unsettled for [`UNSETTLED`] from `now`.
    pub fn set_usable(&mut self, service: usize, usable: &[RankedBackend], now: Instant) {
        let Some((table, changed)) = self.backend_table(service, usable) else { return };
        for backend in usable {
            self.register(backend.id);
        }
        let index_of = |id: &BackendId| self.backend_indexes.get(id).copied().unwrap_or(BackendIndex::NONE);
        let slots = match &self.shared {
            Some(shared) => shared.slots(&table, index_of),
            None => table.to_indexes(index_of).into(),
        };
        let plan = &mut self.services[service];
        plan.table = table;
        let former = std::mem::replace(&mut plan.slots, slots);
        // A table without backends says nothing.
        if former.first().is_some_and(|backend| *backend != BackendIndex::NONE) {
            plan.former_slots.push_back((former, now));
        }
        if plan.former_slots.len() > MAX_FORMER_SLOTS {
            plan.former_slots.pop_front();
        }
        let mut unsettled = SlotSet::clone(&changed);
        if let Some((still, until)) = &plan.unsettled
            && *until > now
        {
            for (word, other) in unsettled.0.iter_mut().zip(still.0.iter()) {
                *word |= other;
            }
        }
        plan.unsettled = Some((Arc::new(unsettled), now + UNSETTLED));
    }

    /// Makes these the backends of a service whose flows are reset; whether that changes anything.
    pub fn set_failed(&mut self, service: usize, failed: &[BackendId]) -> bool {
        let plan = &mut self.services[service];
        let changes = plan.failed != failed;
        plan.failed = failed.to_vec();
        changes
    }

    /// Members are suspected, or lost; `newly`: one of them was not before.
    ///
    /// For [`UNSETTLED`] from `now` what nobody knows goes by the backends of the time when that one was last heard
    /// ([`PlanService::earlier`]): what it forwarded and told nobody, it forwarded by those.
    ///
    /// `agreed`: since when those that are missing are known to have had our lists of backends, if they have said so.
    pub fn note_missing(&mut self, now: Instant, newly: bool, agreed: Option<Instant>) {
        let last_heard = match self.last_heard {
            Some((at, _)) if !newly => at,
            _ => agreed.max(now.checked_sub(LAST_HEARD)).unwrap_or(now),
        };
        self.last_heard = Some((last_heard, now + UNSETTLED));
    }

    /// Forgets unsettled slots and what they were before whose time is over; whether that changes the plan.
    pub fn settle(&mut self, now: Instant) -> bool {
        let mut settled = false;
        if self.last_heard.is_some_and(|(_, until)| until <= now) {
            self.last_heard = None;
            settled = true;
        }
        let counts_from = self.last_heard.map(|(at, _)| at);
        for plan in &mut self.services {
            plan.former_slots.retain(|(_, until)| {
                *until + LAST_HEARD > now || counts_from.is_some_and(|from| *until > from)
            });
            if plan.unsettled.as_ref().is_some_and(|(_, until)| *until <= now) {
                plan.unsettled = None;
                settled = true;
            }
        }
        settled
    }

    /// Gives a backend a position, ours or another member's; whether it is new.
    pub fn register(&mut self, id: BackendId) -> bool {
        if self.backend_indexes.contains_key(&id) {
            return false;
        }
        let index = BackendIndex(self.backends.len() as u32);
        // Of the other family there is no address of ours to name: the tunnel then has the unspecified one, which backends take.
        let source = match (id.ip(), self.fixed.address) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => self.fixed.address,
            (IpAddr::V4(_), _) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            (IpAddr::V6(_), _) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        };
        self.backends.push(PlanBackend { id, source });
        self.backend_indexes.insert(id, index);
        true
    }

    /// The number of a flow's service, and the backend that the consistent table gives the flow.
    pub fn consistent(&self, key: &FlowKey) -> Option<(usize, Option<BackendId>)> {
        let service = self.services.iter().position(|plan| plan.config.has(key))?;
        Some((service, self.services[service].table.best(self.slot(key))))
    }

    /// Our slot of a service's table for a flow.
    pub fn slot(&self, key: &FlowKey) -> u16 {
        flow_hash(self.fixed.seed, key) as u16
    }

    /// The plan to install now.
    pub fn plan(&self) -> Plan {
        let mut members = self.members.clone();
        let mut previous = self.asked.as_ref().map(|asked| &asked.rows);
        if let Some((doubted, rows)) = self.lost.doubted(self.boots.len()) {
            for member in members.iter_mut().filter(|member| doubted.contains(&member.id)) {
                member.liveness = Liveness::Suspect;
            }
            previous = Some(rows);
        }
        // The smaller side rather lacks what the larger one has than what its own table before still moves.
        if let Some(met) = &self.met
            && (previous.is_none() || met.members.len() >= self.boots.len())
        {
            previous = Some(&met.rows);
        }
        Plan {
            local: self.slot_of(self.fixed.local),
            seed: self.fixed.seed,
            row_function: self.current.table.row_function(),
            members,
            rows: Arc::clone(&self.rows),
            previous: previous.map(Arc::clone),
            view_digest: self.view_digest,
            handoff: self.fixed.handoff,
            services: self.services.iter().map(|plan| self.plan_service(plan)).collect(),
            backends: self.backends.clone(),
        }
    }

    /// Whom the next-hop driver has to resolve for this plan.
    pub fn destinations(&self) -> Destinations {
        Destinations {
            members: self
                .members
                .iter()
                .map(|member| Destination {
                    address: member.address,
                    is_needed: member.liveness != Liveness::Down,
                })
                .collect(),
            backends: self
                .backends
                .iter()
                .map(|backend| Destination { address: backend.id.ip(), is_needed: true })
                .collect(),
        }
    }

    fn plan_service(&self, plan: &ServicePlan) -> PlanService {
        let config = &plan.config;
        PlanService {
            address: config.address,
            port: config.port,
            protocol: config.protocol,
            slots: Arc::clone(&plan.slots),
            earlier: self.last_heard.and_then(|(at, _)| plan.slots_at(at)).map(Arc::clone),
            unsettled: plan.unsettled.as_ref().map(|(set, _)| Arc::clone(set)),
            failed: plan.failed.iter().filter_map(|id| self.backend_indexes.get(id).copied()).collect(),
            idle: config.idle,
            linger: config.linger,
            reset_linger: config.reset_linger,
            half_open: config.half_open,
            replicate_syn: self.fixed.replicate_syn,
            fragment: config.fragment,
        }
    }

    /// A member's position in the plan.
    pub fn slot_of(&self, id: MemberId) -> MemberSlot {
        slot_of(&self.members, id)
    }
}

fn slot_of(members: &[PlanMember], id: MemberId) -> MemberSlot {
    members.iter().position(|member| member.id == id).map_or(MemberSlot::NONE, |at| MemberSlot(at as u16))
}

fn ranked_member(member: &MemberView, weight: u32) -> RankedMember {
    RankedMember { id: member.id, weight, site: site_number(&member.metadata.site) }
}

fn same_members(old: &[RankedMember], new: &[RankedMember]) -> bool {
    old.len() == new.len() && old.iter().all(|member| new.contains(member))
}

/// A site's number: only equality counts, and every member must find the same.
fn site_number(site: &str) -> u32 {
    let mut hasher = SipHasher24::new();
    hasher.write(site.as_bytes());
    hasher.finish() as u32
}

/// The ranking key of a service's backends: each service ranks them anew, every member alike.
pub fn service_key(seed: FlowSeed, address: IpAddr, port: u16, protocol: u8) -> [u64; 2] {
    let [k0, k1] = seed.0;
    let part = |salt: u8| {
        let mut hasher = SipHasher24::new_with_keys(k0, k1);
        hasher.write_u8(salt);
        hasher.write(&phalanx_flow::key::octets(address).0);
        hasher.write(&port.to_be_bytes());
        hasher.write_u8(protocol);
        hasher.finish()
    };
    [part(1), part(2)]
}

#[cfg(test)]
mod tests;
