//! What members say to each other beside foca's own messages.

use std::net::SocketAddr;

use phalanx_flow::MemberId;
use serde::{Deserialize, Serialize};

use crate::{
    config::{Digest, Shared, SharedField},
    identity::{Identity, member_id},
    item::MemberState,
};

/// Largest gossip datagram: below the smallest path MTU in practice, IPv6 and UDP headers included.
pub const MAX_DATAGRAM_BYTES: usize = 1400;

/// Largest push-pull message, in bytes; some 8,000 members.
pub const MAX_PUSH_PULL_BYTES: usize = 4 << 20;

/// Most member entries in a push-pull message.
pub(crate) const MAX_PUSH_PULL_MEMBERS: usize = 8192;

/// The first byte of a sealed datagram's plain text. The digest of what must be equal everywhere follows, then the message.
pub(crate) const KIND_FOCA: u8 = 0;
/// A [`Control`] message follows.
pub(crate) const KIND_CONTROL: u8 = 1;
/// Kind and digest.
pub(crate) const PREFIX_BYTES: usize = 9;

/// What the sender knows of its peer's own id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownAs {
    pub(crate) boot: u64,
    pub(crate) generation: u32,
    pub(crate) down: bool,
}

/// Who says hello, and with which configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    /// Chosen by who says hello, repeated by who answers: an answer recorded earlier is no answer.
    pub(crate) nonce: u64,
    pub(crate) identity: Identity,
    pub(crate) state: MemberState,
    pub(crate) shared: Shared,
    pub(crate) timing: Digest,
    /// What the sender knows of the receiver, if it knows whom it is talking to.
    pub(crate) you: Option<KnownAs>,
}

/// Messages that need no membership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Control {
    /// To a seed, while alone and from time to time after.
    Hello(Greeting),
    /// The answer: here I am, announce yourself.
    Welcome(Greeting),
    /// The answer to who cannot join.
    Refused {
        nonce: u64,
        #[serde(with = "member_id")]
        by: MemberId,
        reason: Refusal,
    },
    /// The items the sender knows, to a joiner, as many as fit.
    State(Vec<Vec<u8>>),
    /// The receiver's datagrams look older than what was heard from it before.
    Stale { newest: u64 },
    /// The receiver is suspected, and has been heard of since: in foca's words, so that it refutes that at once.
    Doubted(foca::Member<Identity>),
}

/// Why a member cannot join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// A part of the configuration differs that must be equal on every member.
    Differs(SharedField),
    /// A live member at another address has the same id.
    IdInUse(SocketAddr),
}

impl Refusal {
    /// One sentence for the operator of the member refused: the field and what to do.
    pub fn sentence(self, by: MemberId) -> String {
        match self {
            Self::Differs(field) => format!(
                "{} differs from that of member {by}: make it the same on every member and start this one again",
                field.name()
            ),
            Self::IdInUse(address) => format!(
                "member.id is already in use by a live member at {address}, says member {by}: give this member an id of its own"
            ),
        }
    }
}

/// The whole state, both ways, over an authenticated stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PushPull {
    pub(crate) shared: Digest,
    pub(crate) from: Identity,
    pub(crate) members: Vec<foca::Member<Identity>>,
    pub(crate) items: Vec<Vec<u8>>,
}

/// A push-pull message that was not applied; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushPullError {
    /// Longer than [`MAX_PUSH_PULL_BYTES`]: not from one of us.
    #[error("a push-pull message of {0} bytes is too long")]
    TooLong(usize),
    /// It does not decode: the peer speaks another version, or is not one of us.
    #[error("a push-pull message does not decode")]
    Malformed,
    /// The peer is not a member and differs in what must be equal: it is, or will be, refused.
    #[error("a push-pull message comes from member {0}, whose configuration differs in what must be equal")]
    Refused(MemberId),
}

impl PushPull {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, PushPullError> {
        if bytes.len() > MAX_PUSH_PULL_BYTES {
            return Err(PushPullError::TooLong(bytes.len()));
        }
        let message: Self = postcard::from_bytes(bytes).map_err(|_| PushPullError::Malformed)?;
        if message.members.len() > MAX_PUSH_PULL_MEMBERS || message.items.len() > MAX_PUSH_PULL_MEMBERS {
            return Err(PushPullError::Malformed);
        }
        Ok(message)
    }
}
