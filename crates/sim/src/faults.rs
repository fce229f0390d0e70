//! Faults planted on purpose, to show which checker sees them.
//!
//! All of them sit between the cores: in the forwarder's wrapper ([`crate::forwarder`]), in the frames between members, in the views a
//! member is given, or in what it does with a packet. The cores themselves know nothing of them.

use std::sync::Arc;

use phalanx_flow::MemberId;
use phalanx_flow::member::Liveness;
use phalanx_membership::{MemberView, View};
use phalanx_rebalancer::codec::{Control, Frame, Item};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// One member ranks the other way round where two members have even ids between them.
    WrongTieBreak,
    /// One member never acknowledges what it was told.
    DroppedAck,
    /// Owners do not tell the backup of a new flow.
    ForgottenBackup,
    /// One member stays with the second plan it got.
    StaleTable,
    /// A lease never runs out.
    NoLease,
    /// A SYN is forwarded by the cache.
    CacheUsedForSyn,
    /// A recovered record replaces one made by a SYN.
    RecoveredOverwrites,
    /// A member that comes back without its flow table is taken for one that refuted a suspicion.
    BootTakenForRefutation,
    /// There is no handover window.
    NoWindow,
    /// Whoever forwards a flow of another owner does not tell it.
    NoTouches,
    /// Transfer tables are acknowledged and not applied.
    TransferLost,
    /// Hand-offs are not counted.
    HopsNotCounted,
    /// Who is suspected gets traffic as before.
    SuspicionIgnored,
    /// Entries of rows that were lost stay for ever.
    FormerKept,
    /// An owner takes an entry for idle without asking.
    IdleNotAsked,
    /// A backup never becomes the owner of its entries: it forgets them when the owner goes.
    BackupForgets,
    /// Records name their backend wrongly after a change of backends: the consistent choice is put in.
    BackendRecomputed,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::WrongTieBreak,
        Self::DroppedAck,
        Self::ForgottenBackup,
        Self::StaleTable,
        Self::NoLease,
        Self::CacheUsedForSyn,
        Self::RecoveredOverwrites,
        Self::BootTakenForRefutation,
        Self::NoWindow,
        Self::NoTouches,
        Self::TransferLost,
        Self::HopsNotCounted,
        Self::SuspicionIgnored,
        Self::FormerKept,
        Self::IdleNotAsked,
        Self::BackupForgets,
        Self::BackendRecomputed,
    ];

    /// What it is called in tables and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::WrongTieBreak => "wrong-tie-break",
            Self::DroppedAck => "dropped-acknowledgement",
            Self::ForgottenBackup => "forgotten-backup",
            Self::StaleTable => "stale-table",
            Self::NoLease => "no-lease",
            Self::CacheUsedForSyn => "cache-used-for-syn",
            Self::RecoveredOverwrites => "recovered-overwrites",
            Self::BootTakenForRefutation => "boot-taken-for-refutation",
            Self::NoWindow => "no-handover-window",
            Self::NoTouches => "no-touches",
            Self::TransferLost => "transfer-lost",
            Self::HopsNotCounted => "hops-not-counted",
            Self::SuspicionIgnored => "suspicion-ignored",
            Self::FormerKept => "former-entries-kept",
            Self::IdleNotAsked => "idle-not-asked",
            Self::BackupForgets => "backup-forgets",
            Self::BackendRecomputed => "backend-recomputed",
        }
    }

    /// The fault of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// Whether only one member has it: the second, which every cluster has.
    pub fn concerns(self, member: MemberId) -> bool {
        match self {
            Self::WrongTieBreak | Self::StaleTable | Self::DroppedAck => member == MemberId(2),
            _ => true,
        }
    }
}

/// The view a faulty member believes in, who believed in `before`.
pub(crate) fn view(fault: Option<Fault>, view: Arc<View>, before: &View) -> Arc<View> {
    let change = |change: &dyn Fn(&mut MemberView)| {
        let mut view = View::clone(&view);
        view.members.iter_mut().for_each(change);
        Arc::new(view)
    };
    match fault {
        Some(Fault::BootTakenForRefutation) => change(&|member| {
            if let Some(was) = before.get(member.id).filter(|was| was.boot != member.boot) {
                // As if it had been there all the time.
                let (state, admitted) = (was.state, was.admitted);
                *member = MemberView { boot: was.boot, state, admitted, ..member.clone() };
            }
        }),
        Some(Fault::SuspicionIgnored) => change(&|member| member.liveness = Liveness::Alive),
        _ => view,
    }
}

/// What a faulty member sends in the place of a frame, and what it tells itself in the place of its answer.
pub(crate) fn frame(fault: Fault, local: MemberId, frame: Frame) -> (Option<Frame>, Option<Frame>) {
    let keep = |frame: Frame, wanted: fn(&Item) -> bool| match frame {
        Frame::Batch { seq, items } => {
            Frame::Batch { seq, items: items.into_iter().filter(wanted).collect() }
        }
        other => other,
    };
    match Some(fault).filter(|fault| fault.concerns(local)) {
        Some(Fault::DroppedAck) if matches!(frame, Frame::Control(Control::Ack { .. })) => (None, None),
        Some(Fault::ForgottenBackup) => {
            (Some(keep(frame, |item| !matches!(item, Item::Associate { cache: false, .. }))), None)
        }
        Some(Fault::NoTouches) => (Some(keep(frame, |item| !matches!(item, Item::Touch { .. }))), None),
        Some(Fault::IdleNotAsked) => {
            let Frame::Batch { seq, items } = frame else { return (Some(frame), None) };
            let items = items.into_iter().map(|item| match item {
                Item::IdleReply { key, birth, .. } => Item::IdleReply { key, birth, idle_ms: None },
                other => other,
            });
            (Some(Frame::Batch { seq, items: items.collect() }), None)
        }
        Some(Fault::TransferLost) => match frame {
            Frame::Chunk { id, .. } => {
                (None, Some(Frame::Control(Control::ChunkAck { id, refused: Vec::new() })))
            }
            other => (Some(other), None),
        },
        _ => (Some(frame), None),
    }
}
