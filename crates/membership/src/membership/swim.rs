//! foca, and what it needs around it.

use std::{
    borrow::Cow,
    time::{Duration, Instant},
};

use foca::{Header, Member, Message, Notification, PostcardCodec, ProbeNumber, Runtime, State, Timer};
use phalanx_flow::MemberId;
use rand::rngs::StdRng;

use crate::{
    config::Timing,
    identity::Identity,
    item::Board,
    seal::SEAL_OVERHEAD,
    wire::{MAX_DATAGRAM_BYTES, PREFIX_BYTES},
};

pub(crate) type Swim = foca::Foca<Identity, PostcardCodec, StdRng, Board>;

/// What foca asks for while it handles one input.
#[derive(Debug, Default)]
pub(crate) struct Io {
    pub(crate) sends: Vec<(Identity, Vec<u8>)>,
    pub(crate) timers: Vec<(Timer<Identity>, Duration)>,
    /// Probes that went out.
    pub(crate) pings: Vec<(ProbeNumber, MemberId)>,
    /// Answers that came in, direct ones or through others.
    pub(crate) acks: Vec<(ProbeNumber, MemberId)>,
    pub(crate) failed_probes: u64,
    pub(crate) renewals: u64,
}

impl Runtime<Identity> for Io {
    fn notify(&mut self, notification: Notification<'_, Identity>) {
        match notification {
            Notification::DataSent(Header { dst, message: Message::Ping(number), .. }) => {
                self.pings.push((*number, dst.id));
            }
            Notification::DataReceived(Header { src, message: Message::Ack(number), .. }) => {
                self.acks.push((*number, src.id));
            }
            Notification::DataReceived(Header {
                message: Message::ForwardedAck { origin, probe_number },
                ..
            }) => self.acks.push((*probe_number, origin.id)),
            Notification::ProbeFailed(..) => self.failed_probes += 1,
            Notification::Rejoin(_) => self.renewals += 1,
            // The view is read from foca's state after each input, suspicion being notified of nowhere.
            _ => {}
        }
    }

    fn send_to(&mut self, to: Identity, data: &[u8]) {
        self.sends.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, timer: Timer<Identity>, after: Duration) {
        self.timers.push((timer, after));
    }
}

/// Keeps foca 2.0.0 from telling a member that it is down whose suspicion was refuted in time.
///
/// `handle_timer(ChangeSuspectToDown)` sends `TurnUndead` also when the member's incarnation has moved on; the healthy member then
/// abandons its identity. The notification comes before the send, so: no notification, no send.
struct Guard<'a> {
    io: &'a mut Io,
    down: bool,
}

impl Runtime<Identity> for Guard<'_> {
    fn notify(&mut self, notification: Notification<'_, Identity>) {
        self.down |= matches!(notification, Notification::MemberDown(_));
        self.io.notify(notification);
    }

    fn send_to(&mut self, to: Identity, data: &[u8]) {
        if self.down {
            self.io.send_to(to, data);
        }
    }

    fn submit_after(&mut self, timer: Timer<Identity>, after: Duration) {
        self.io.submit_after(timer, after);
    }
}

pub(crate) fn handle_timer(swim: &mut Swim, io: &mut Io, timer: Timer<Identity>) -> Result<(), foca::Error> {
    if matches!(timer, Timer::ChangeSuspectToDown { .. }) {
        swim.handle_timer(timer, Guard { io, down: false })
    } else {
        swim.handle_timer(timer, io)
    }
}

/// How long a member that went down is remembered as such, so that old news of it is not believed and a partition heals.
const REMEMBER_DOWN: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn new(identity: Identity, timing: &Timing, rng: StdRng, board: Board) -> Swim {
    let at_least_one =
        |count: usize| std::num::NonZeroUsize::new(count).unwrap_or(std::num::NonZeroUsize::MIN);
    let periodic =
        |frequency, members| Some(foca::PeriodicParams { frequency, num_members: at_least_one(members) });
    let config = foca::Config {
        probe_period: timing.probe_period,
        probe_rtt: timing.probe_timeout,
        num_indirect_probes: at_least_one(usize::from(timing.indirect_probes)),
        max_transmissions: std::num::NonZeroU8::new(timing.max_transmissions)
            .unwrap_or(std::num::NonZeroU8::MIN),
        suspect_to_down_after: timing.confirm_after,
        remove_down_after: Some(REMEMBER_DOWN),
        max_packet_size: at_least_one(MAX_DATAGRAM_BYTES - SEAL_OVERHEAD - PREFIX_BYTES),
        // Partitions never heal without.
        notify_down_members: true,
        periodic_announce: periodic(Duration::from_secs(30), 1),
        periodic_announce_to_down_members: periodic(timing.retry_down, 2),
        periodic_gossip: periodic(timing.gossip_interval, 3),
    };
    foca::Foca::with_custom_broadcast(identity, config, rng, PostcardCodec, board)
}

/// Who made a datagram of foca's, as it says.
pub(crate) fn source(body: &[u8]) -> Option<Identity> {
    Some(header(body)?.0.src)
}

fn header(body: &[u8]) -> Option<(Header<Identity>, &[u8])> {
    postcard::take_from_bytes(body).ok()
}

/// What becomes of a piece of news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Credit {
    /// It is believed.
    Believed,
    /// That the member is down is taken for a suspicion, which it can refute.
    Suspected,
    /// It is left out.
    Denied,
}

/// A datagram of foca's with its news as they are judged. What cannot be read is left for foca to refuse.
pub(crate) fn judged(body: &[u8], judge: impl Fn(&Member<Identity>) -> Credit) -> Cow<'_, [u8]> {
    rewritten(body, judge).map_or(Cow::Borrowed(body), Cow::Owned)
}

/// A header, how many news there are, the news, and broadcasts (`Foca::handle_data`); `None` if all are believed.
fn rewritten(body: &[u8], judge: impl Fn(&Member<Identity>) -> Credit) -> Option<Vec<u8>> {
    let (header, after_header) = header(body)?;
    if header.message == Message::Broadcast {
        return None;
    }
    let (count, mut rest) = after_header.split_first_chunk()?;
    let count = u16::from_be_bytes(*count);
    let (mut left, mut changed) = (count, false);
    let mut news = Vec::with_capacity(rest.len());
    for _ in 0..count {
        let (member, after): (Member<Identity>, &[u8]) = postcard::take_from_bytes(rest).ok()?;
        let credit = judge(&member);
        changed |= credit != Credit::Believed;
        match credit {
            Credit::Believed => news.extend_from_slice(&rest[..rest.len() - after.len()]),
            Credit::Suspected => {
                let suspected = Member::new(*member.id(), member.incarnation(), State::Suspect);
                news = postcard::to_extend(&suspected, news).ok()?;
            }
            Credit::Denied => left -= 1,
        }
        rest = after;
    }
    let head = &body[..body.len() - after_header.len()];
    changed.then(|| [head, &left.to_be_bytes(), &news, rest].concat())
}

/// A number that changes whenever something does that a view shows.
pub(crate) fn signature(swim: &Swim) -> u64 {
    swim.iter_membership_state().fold(swim.num_members() as u64, |sum, member| {
        let id = member.id();
        let mut mixed = u64::from(id.id.0) | (member.state() as u64) << 32 | u64::from(id.generation) << 34;
        for part in [id.boot, u64::from(id.address.port()), 1] {
            mixed = (mixed ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^= mixed >> 29;
        }
        // A sum, because foca shuffles its list.
        sum.wrapping_add(mixed)
    })
}

/// A probe on its way, to measure its round trip and to know what an answer proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ping {
    pub(crate) number: ProbeNumber,
    pub(crate) to: MemberId,
    pub(crate) at: Instant,
}
