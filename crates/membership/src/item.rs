//! What members say of themselves: versioned items, last writer wins, on foca's custom broadcasts.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use phalanx_flow::MemberId;
use serde::{Deserialize, Serialize};

use crate::{
    config::{ConfigError, Digest, MAX_NAME_BYTES},
    identity::{Identity, member_id},
};

/// Largest encoded item: several must fit one datagram.
pub const MAX_ITEM_BYTES: usize = 400;

/// Most members whose items are kept, alive or not: bounds what a peer gone mad can make us hold.
pub const MAX_ITEMS: usize = 8192;

/// What a member says of itself; its driver fills it in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Its share relative to the others'; 0 is a director, which dispatches and never owns.
    /// A driver says the weight it wants; in a view it is the one in force, and [`crate::MemberView::wish`] the one wanted.
    pub weight: u32,
    /// Where it stands; at most [`MAX_NAME_BYTES`] bytes.
    pub site: String,
    /// Its admin REST address, if others may know it.
    pub admin_address: Option<SocketAddr>,
    /// Its QUIC address, for transfers and for push-pull.
    pub transfer_address: Option<SocketAddr>,
    /// SHA-256 of its QUIC certificate, which its peers pin.
    pub fingerprint: [u8; 32],
    /// Whether it wants every association (`cache = "all"`).
    pub cache: bool,
    /// Its software version; at most [`MAX_NAME_BYTES`] bytes.
    pub version: String,
    /// Digest of its backend lists: a difference is a warning on every member.
    pub backends: Digest,
    /// Flows it holds.
    pub flows: u64,
    /// Flows it owns whose backup has not acknowledged.
    pub unprotected: u64,
}

impl Metadata {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        for (field, name) in [("site", &self.site), ("version", &self.version)] {
            if name.len() > MAX_NAME_BYTES {
                return Err(ConfigError::NameTooLong { field, bytes: name.len() });
            }
        }
        Ok(())
    }

    /// Whether `other` differs in more than the counters, which need not be told at once.
    pub(crate) fn differs_from(&self, other: &Self) -> bool {
        // All fields by name, so that a new one is not forgotten here.
        let Self {
            weight,
            site,
            admin_address,
            transfer_address,
            fingerprint,
            cache,
            version,
            backends,
            flows: _,
            unprotected: _,
        } = self;
        *weight != other.weight
            || *site != other.site
            || *admin_address != other.admin_address
            || *transfer_address != other.transfer_address
            || *fingerprint != other.fingerprint
            || *cache != other.cache
            || *version != other.version
            || *backends != other.backends
    }
}

/// Where a member stands in its life in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MemberState {
    /// Known and probed, owns nothing yet.
    Joining,
    /// Ranks, if its weight is above 0.
    Active,
    /// Ranks no more, still there to hand over what it held.
    Leaving,
}

/// What a member asks to become; it is so when every active member has sent what follows from it, and the member says so itself
/// (docs/design/0006-planned-changes.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wish {
    /// To be active, or to be so no more: a join or a new weight, or a leave.
    pub active: bool,
    /// With this weight.
    pub weight: u32,
    /// No two wishes of one boot have the same, so that a wish made again is a change of its own.
    pub serial: u64,
}

/// One member's word on itself, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Item {
    pub(crate) head: ItemHead,
    pub(crate) state: MemberState,
    /// The serial of the wish that is in force.
    pub(crate) serial: u64,
    pub(crate) wish: Option<Wish>,
    pub(crate) view_digest: Digest,
    /// The pending view for which this member has sent all it has to send; 0: none.
    pub(crate) done: Digest,
    pub(crate) metadata: Metadata,
}

/// The part that is decoded first: most items received are known already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ItemHead {
    #[serde(with = "member_id")]
    pub(crate) id: MemberId,
    pub(crate) boot: u64,
    pub(crate) session: u64,
    pub(crate) version: u64,
}

impl ItemHead {
    fn age(&self) -> (u64, u64, u64) {
        (self.boot, self.session, self.version)
    }

    fn is_newer_than(&self, other: &Self) -> bool {
        self.age().cmp(&other.age()) == Ordering::Greater
    }
}

impl foca::Invalidates for ItemHead {
    fn invalidates(&self, other: &Self) -> bool {
        self.id == other.id && !other.is_newer_than(self)
    }
}

/// A known item, ready to be passed on as it came.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) head: ItemHead,
    pub(crate) state: MemberState,
    pub(crate) serial: u64,
    pub(crate) wish: Option<Wish>,
    pub(crate) view_digest: Digest,
    pub(crate) done: Digest,
    pub(crate) metadata: Arc<Metadata>,
    pub(crate) bytes: Arc<[u8]>,
}

/// The newest item of every member, our own included.
#[derive(Debug)]
pub(crate) struct Items {
    own: MemberId,
    known: BTreeMap<MemberId, Known>,
    changed: Vec<MemberId>,
    /// Somebody holds an item of ours from a later session than this one.
    outlived_by: u64,
}

impl Items {
    pub(crate) fn new(own: MemberId) -> Self {
        Self { own, known: BTreeMap::new(), changed: Vec::new(), outlived_by: 0 }
    }

    pub(crate) fn get(&self, id: MemberId) -> Option<&Known> {
        self.known.get(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
    }

    /// Whose items changed since last asked.
    pub(crate) fn take_changed(&mut self) -> Vec<MemberId> {
        std::mem::take(&mut self.changed)
    }

    /// The session of a later item of ours, if somebody holds one, since last asked.
    pub(crate) fn take_outlived_by(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.outlived_by)).filter(|session| *session != 0)
    }

    /// Drops items of members that are neither in the view nor of use for healing.
    pub(crate) fn retain(&mut self, keep: impl Fn(MemberId) -> bool) {
        let own = self.own;
        self.known.retain(|id, _| *id == own || keep(*id));
    }

    /// Takes an item in if it is newer than what is known; `ours` if it comes from this member itself.
    pub(crate) fn receive(&mut self, bytes: &[u8], ours: bool) -> Result<Option<ItemHead>, ItemError> {
        if bytes.len() > MAX_ITEM_BYTES {
            return Err(ItemError);
        }
        let (head, _) = postcard::take_from_bytes::<ItemHead>(bytes).map_err(|_| ItemError)?;
        if head.id == self.own && !ours {
            let session = self.known.get(&head.id).map_or(0, |known| known.head.session);
            if head.session > session {
                self.outlived_by = self.outlived_by.max(head.session);
            }
            return Ok(None);
        }
        match self.known.get(&head.id) {
            Some(known) if !head.is_newer_than(&known.head) => return Ok(None),
            None if self.known.len() >= MAX_ITEMS => return Ok(None),
            _ => {}
        }
        let item: Item = postcard::from_bytes(bytes).map_err(|_| ItemError)?;
        item.metadata.validate().map_err(|_| ItemError)?;
        self.known.insert(
            head.id,
            Known {
                head,
                state: item.state,
                serial: item.serial,
                wish: item.wish,
                view_digest: item.view_digest,
                done: item.done,
                metadata: Arc::new(item.metadata),
                bytes: bytes.into(),
            },
        );
        self.changed.push(head.id);
        Ok(Some(head))
    }
}

/// An item that does not decode. The rest of its datagram is dropped with it.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("a metadata item does not decode")]
pub(crate) struct ItemError;

/// The items, shared with foca, which keeps its handler to itself.
/// The lock is never contended: both ends live in one [`crate::Membership`].
#[derive(Clone, Debug)]
pub(crate) struct Board(Arc<Mutex<Items>>);

impl Board {
    pub(crate) fn new(own: MemberId) -> Self {
        Self(Arc::new(Mutex::new(Items::new(own))))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Items> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl foca::BroadcastHandler<Identity> for Board {
    type Key = ItemHead;
    type Error = ItemError;

    fn receive_item(
        &mut self,
        data: &[u8],
        sender: Option<&Identity>,
    ) -> Result<Option<ItemHead>, ItemError> {
        self.lock().receive(data, sender.is_none())
    }
}
