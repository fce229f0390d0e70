//! What the queue of virtual time holds.

use std::cmp::Ordering;
use std::net::SocketAddr;
use std::time::Duration;

use phalanx_flow::Arrival;

/// What a packet of a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP with SYN.
    Syn,
    /// TCP with ACK and no data.
    Ack,
    /// TCP with data.
    Data,
    /// TCP with FIN.
    Fin,
    /// TCP with RST.
    Rst,
    /// UDP.
    Datagram,
    /// An ICMP error about what the backend sent: from a router on the way to the client, for the service's address.
    IcmpError,
}

/// A packet on its way from a client to a backend.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Whose.
    pub flow: usize,
    /// Of which connection on that tuple.
    pub life: u32,
    /// What it is.
    pub kind: Kind,
    /// The client's count; answers repeat it.
    pub sequence: u32,
    /// The members it came by.
    pub path: Vec<u16>,
}

/// What a backend answers, straight to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    SynAck,
    Ack,
    Reset,
}

/// Something that happens at a moment of virtual time.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Change(usize),
    /// Loss or lateness is over.
    Calm(Option<usize>),
    Sample,

    // Members.
    Wake {
        node: usize,
        life: u64,
    },
    Tick {
        node: usize,
        life: u64,
    },
    Second {
        node: usize,
        life: u64,
    },
    /// What has changed in a view is acted upon.
    View {
        node: usize,
        life: u64,
    },
    EchoTurn {
        node: usize,
        life: u64,
    },
    Resume {
        node: usize,
        stall: u64,
    },
    Datagram {
        from: SocketAddr,
        to: usize,
        bytes: Vec<u8>,
    },
    Echo {
        from: usize,
        to: usize,
        token: u64,
    },
    EchoBack {
        to: usize,
        token: u64,
    },
    PushPull {
        from: usize,
        to: usize,
        bytes: Vec<u8>,
    },
    PushPullBack {
        to: usize,
        bytes: Vec<u8>,
    },
    Dial {
        node: usize,
        peer: usize,
    },
    Up {
        node: usize,
        peer: usize,
        link: u64,
    },
    Lost {
        node: usize,
        peer: usize,
        link: u64,
    },
    Break {
        link: u64,
        silence: Option<u64>,
    },
    Flush {
        link: u64,
    },
    Bytes {
        link: u64,
        from: usize,
        to: usize,
        bytes: Vec<u8>,
    },
    Health {
        node: usize,
        backend: usize,
        usable: bool,
    },

    // Traffic.
    RouterSees {
        node: usize,
        up: bool,
        life: u64,
    },
    AtRouter(Packet),
    AtMember {
        node: usize,
        packet: Packet,
        arrival: Arrival,
    },
    AtBackend {
        backend: usize,
        packet: Packet,
    },
    AtClient {
        flow: usize,
        life: u32,
        sequence: u32,
        backend: usize,
        reply: Reply,
    },
    Client {
        flow: usize,
        token: u64,
    },
    /// Somebody on the way to a client cannot pass on what a backend sent.
    IcmpTurn,
    /// A backend still waits for the client's word that the connection is open.
    SynAckAgain {
        flow: usize,
        life: u32,
        sequence: u32,
        backend: usize,
        tries: u32,
    },
}

impl Event {
    /// What it carries from one member to another.
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Datagram { bytes, .. }
            | Self::PushPull { bytes, .. }
            | Self::PushPullBack { bytes, .. }
            | Self::Bytes { bytes, .. } => bytes,
            _ => &[],
        }
    }

    /// The member that must run for this to happen; what it is for waits while it stands still.
    pub(crate) fn node(&self) -> Option<usize> {
        match self {
            Self::Wake { node, .. }
            | Self::Tick { node, .. }
            | Self::Second { node, .. }
            | Self::View { node, .. }
            | Self::EchoTurn { node, .. }
            | Self::Dial { node, .. }
            | Self::Up { node, .. }
            | Self::Lost { node, .. }
            | Self::Health { node, .. }
            | Self::AtMember { node, .. } => Some(*node),
            Self::Datagram { to, .. }
            | Self::Echo { to, .. }
            | Self::EchoBack { to, .. }
            | Self::PushPull { to, .. }
            | Self::PushPullBack { to, .. }
            | Self::Bytes { to, .. } => Some(*to),
            _ => None,
        }
    }
}

/// An event with its time; the sequence keeps equal times in order.
#[derive(Debug)]
pub(crate) struct Timed {
    pub(crate) at: Duration,
    pub(crate) sequence: u64,
    pub(crate) event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    /// The earliest is the greatest, as a heap wants it.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}
