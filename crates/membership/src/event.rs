//! What comes out of a [`crate::Membership`].

use std::{fmt, net::SocketAddr, time::Duration};

use phalanx_flow::{MemberId, member::Liveness};

use crate::{
    config::{Digest, SharedField},
    item::MemberState,
    wire::Refusal,
};

/// A sealed datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To whom.
    pub to: SocketAddr,
    /// At most [`crate::wire::MAX_DATAGRAM_BYTES`] bytes.
    pub payload: Vec<u8>,
}

/// What the driver should know of. The view has changed already when an event about it comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A member has come into the view (in whatever state), or come back.
    MemberUp(MemberId),
    /// A member has gone out of the view, or out of its boot.
    MemberDown {
        /// Who.
        id: MemberId,
        /// Why.
        reason: DownReason,
    },
    /// What packets should believe of a member has changed.
    Liveness {
        /// Of whom.
        id: MemberId,
        /// `Alive` or `Suspect`.
        liveness: Liveness,
    },
    /// A member's address, state, or metadata other than counters has changed.
    MemberChanged(MemberId),
    /// What ranks has changed.
    ViewChanged(Digest),
    /// A change is planned, under this name, or another one, or none any more: [`crate::View::pending`]. Once this member has sent
    /// all it has to send, [`crate::Membership::report_done`].
    PendingChanged(Option<Digest>),
    /// Our own state has changed.
    StateChanged(MemberState),
    /// The others have been told that we have gone; nothing comes out any more.
    Left,
    /// We cannot join. The driver ends the program with [`Refusal::sentence`] and exit status 2.
    Refused {
        /// Who says so.
        by: MemberId,
        /// Why.
        reason: Refusal,
    },
    /// Something the operator should see.
    Warning(Warning),
    /// It is time to exchange the whole state with a member: send it [`crate::Membership::push_pull_request`] on a stream.
    PushPull {
        /// With whom.
        with: MemberId,
        /// Its transfer (QUIC) address.
        address: SocketAddr,
    },
    /// Half of the lease has gone by since the last proof that somebody hears us: others may suspect this member and act for it. Said once,
    /// until the next proof.
    Unheard,
    /// The process did not run for longer than its lease: packets received meanwhile must be thrown away.
    Stalled {
        /// For how long.
        late: Duration,
    },
}

/// Why a member has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DownReason {
    /// It was suspected and did not refute it.
    Confirmed,
    /// It said that it would.
    Left,
    /// It has come back under a new boot, without the flow table it had.
    Restarted,
}

/// Something the operator should see; displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// Its backend lists differ from ours: new connections may go to different backends.
    BackendsDiffer(MemberId),
    /// A member differs in what must be equal, as happens while a change is rolled out.
    SharedDiffers {
        /// Who.
        id: MemberId,
        /// In what.
        field: SharedField,
    },
    /// Its round trip is above half of the probe timeout.
    SlowPath {
        /// Whose.
        id: MemberId,
        /// How long.
        round_trip: Duration,
        /// The probe timeout.
        probe_timeout: Duration,
        /// The profile in use.
        profile: String,
    },
    /// Gossip reaches it but the hand-off echo does not.
    EchoFails(MemberId),
    /// We have waited for it too long, and went on with a planned change without its word.
    NotReady(MemberId),
    /// We suspect half of the others or more, and so rather ourselves.
    DistrustsItself,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BackendsDiffer(id) => {
                write!(
                    f,
                    "the backends of member {id} differ from this member's: reload both from one configuration"
                )
            }
            Self::SharedDiffers { id, field } => write!(
                f,
                "{} of member {id} differs from this member's: finish rolling out the change, it could not join again as it is",
                field.name()
            ),
            Self::SlowPath { id, round_trip, probe_timeout, profile } => write!(
                f,
                "the round trip to member {id} is {round_trip:?}, above half of the probe timeout ({probe_timeout:?}) of \
                 profile {profile:?}: set profile = \"wan\" on every member"
            ),
            Self::EchoFails(id) => write!(
                f,
                "gossip reaches member {id} but hand-off packets do not come back: check its forwarder and the path's MTU and filters"
            ),
            Self::NotReady(id) => write!(
                f,
                "member {id} has not said for too long that it is ready for a planned change, which was made without its word: look at its log"
            ),
            Self::DistrustsItself => {
                write!(
                    f,
                    "this member suspects half of the others or more and ignores it: check its own links"
                )
            }
        }
    }
}

/// What happened, counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams that came in.
    pub received: u64,
    /// Datagrams that went out.
    pub sent: u64,
    /// Bytes that went out, sealed.
    pub sent_bytes: u64,
    /// Dropped: not ours, or under a key we do not have.
    pub foreign: u64,
    /// Dropped: does not authenticate, or does not decode once opened.
    pub damaged: u64,
    /// Dropped: seen before, or too old to tell.
    pub replayed: u64,
    /// Dropped: of an earlier process of its sender.
    pub stale: u64,
    /// Dropped: our own, come back to us.
    pub own: u64,
    /// Dropped: from who cannot join.
    pub refused: u64,
    /// Dropped: came while our forwarder was not alive, or after we left.
    pub not_alive: u64,
    /// Probes that neither the member nor those asked to help got an answer to.
    pub failed_probes: u64,
    /// Members that became suspect in our eyes.
    pub suspicions: u64,
    /// Members confirmed down in our eyes.
    pub confirmations: u64,
    /// Times we renewed our identity because others held us to be down.
    pub renewals: u64,
    /// Times we did not run for longer than a probe timeout.
    pub late: u64,
    /// Times we did not run for longer than the lease.
    pub stalls: u64,
}
