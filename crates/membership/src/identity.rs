//! Who a member is, as gossip names it.

use std::{fmt, net::SocketAddr};

use phalanx_flow::MemberId;
use serde::{Deserialize, Serialize};

/// Serialises a [`MemberId`] as its number; `flow` has no dependencies and so no `serde`.
pub(crate) mod member_id {
    use phalanx_flow::MemberId;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(id: &MemberId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(id.0)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MemberId, D::Error> {
        u32::deserialize(deserializer).map(MemberId)
    }
}

/// One life of one member.
///
/// `foca` keeps one entry per [`MemberId`]; of two identities with the same id the later one wins: the higher boot, then the higher
/// generation, then (two processes that were given the same numbers by mistake) the higher address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The member's name, the same in every life.
    #[serde(with = "member_id")]
    pub id: MemberId,
    /// The data address and gossip port: gossip is bound to the address that packets are handed off to, so that alive means
    /// the packet path is.
    pub address: SocketAddr,
    /// Grows with every start that lost the flow table: a new boot is the crash of the old one and a join.
    pub boot: u64,
    /// Grows whenever SWIM renews the identity: the same member with its state.
    pub generation: u32,
}

impl Identity {
    /// Whether `self` is a later life than `other`.
    pub fn supersedes(&self, other: &Self) -> bool {
        (self.boot, self.generation, self.address) > (other.boot, other.generation, other.address)
    }

    /// The same member with its state, under the next generation.
    #[must_use]
    pub(crate) fn renewed_beyond(self, generation: u32) -> Self {
        Self { generation: self.generation.max(generation).saturating_add(1), ..self }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "member {} at {} (boot {}, generation {})",
            self.id, self.address, self.boot, self.generation
        )
    }
}

impl foca::Identity for Identity {
    type Addr = MemberId;

    fn renew(&self) -> Option<Self> {
        Some(self.renewed_beyond(0))
    }

    fn addr(&self) -> MemberId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.supersedes(adversary)
    }
}
