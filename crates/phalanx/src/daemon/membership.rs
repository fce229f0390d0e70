//! Drives [`Membership`]: its gossip socket, its deadlines, the forwarder's lease and the hand-off echoes.
//!
//! ```text
//!  control ── Command (unbounded, seldom) ──► ┌─────────────────────┐ ── MembershipEvent (unbounded) ──► control
//!                                             │ thread "membership" │
//!  gossip socket (UDP) ◄────────────────────► │  owns Membership    │ ── renew_lease, send_echo ───────► forwarder
//!                                             └─────────────────────┘
//! ```
//! A thread of its own, so that nothing the runtime does delays a probe: a member that answers late is suspected.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use phalanx_flow::{MemberId, MemberSlot};
use phalanx_forwarder::Forwarder;
use phalanx_membership::{
    Config, Counters, Digest, Event, KeyRing, Membership, Metadata, PushPullError, Shared, View,
};
use tokio::sync::{mpsc, oneshot};

/// The thread looks at commands, echoes and the forwarder at least this often.
const WAKE: Duration = Duration::from_millis(10);

/// How long a program in the kernel goes on recording when its daemon is dead: what it records then is told to nobody, and the backup may know
/// an earlier connection of the same tuple. Much more than `WAKE`, or a busy machine would send its new flows to their backups.
pub const ALONE: Duration = Duration::from_millis(100);

/// A forwarder that has shown no sign of life for this long does not carry packets: its threads wake every few tens of milliseconds.
const FORWARDER_DEAD: Duration = Duration::from_millis(500);

/// Echoes to at most this many peers a probe period, in turn, so that the cost stays the same in a large cluster.
const ECHOES_A_PERIOD: usize = 4;

/// An echo that has not come back after this long is lost.
const ECHO_TIMEOUT: Duration = Duration::from_millis(250);

/// The thread does little, and all others wait for it.
const MEMBERSHIP_NICE: i32 = -15;

/// Room for the datagrams of a burst; the kernel's limit may make it less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// What the control task asks of the thread.
#[derive(Debug)]
pub enum Command {
    /// See [`Membership::update_metadata`].
    Metadata(Metadata),
    /// See [`Membership::begin_leave`].
    BeginLeave,
    /// See [`Membership::report_room`].
    RoomMade,
    /// See [`Membership::report_done`].
    Done(Digest),
    /// See [`Membership::leave`].
    Leave,
    /// See [`Membership::set_keys`].
    Keys(KeyRing),
    /// See [`Membership::set_shared`].
    Shared(Shared),
    /// A peer's push-pull request, and where the reply goes.
    PushPull(Vec<u8>, oneshot::Sender<Vec<u8>>),
    /// The reply to ours.
    PushPullReply(Vec<u8>),
    /// Positions of the members in the plan in force, for echoes.
    Slots(HashMap<MemberId, MemberSlot>),
    /// Ends the thread.
    Stop,
}

/// What the control task hears.
#[derive(Debug)]
pub enum MembershipEvent {
    /// The view has changed in anything.
    View(Arc<View>),
    /// An event of the membership.
    Event(Event),
    /// Send this request to the member, and its reply back with [`Command::PushPullReply`].
    PushPull(MemberId, Vec<u8>),
    /// A reading of the counters, once a second.
    Counters(Counters, HashMap<MemberId, u64>),
}

/// The driver: owns the thread.
pub struct MembershipDriver {
    commands: std_mpsc::Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl MembershipDriver {
    /// Binds the gossip socket to the member's data address and starts. The forwarder's lease is renewed for `longest_lease` at the most.
    pub fn start(
        config: Config,
        forwarder: Arc<dyn Forwarder>,
        longest_lease: Duration,
        events: mpsc::UnboundedSender<MembershipEvent>,
    ) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind(config.address).with_context(|| {
            format!(
                "listen for gossip on {}: member.address must be an address of this host and cluster.gossip_port free",
                config.address
            )
        })?;
        socket.set_nonblocking(true)?;
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        let echo_period = config.timing.probe_period;
        let local = config.id;
        let membership = Membership::new(config, u64::from_ne_bytes(seed), Instant::now())
            .context("start the membership")?;
        let (commands, inbox) = std_mpsc::channel();
        let mut worker = Worker {
            local,
            membership,
            socket,
            forwarder,
            longest_lease,
            events,
            inbox,
            last_view: Arc::default(),
            slots: HashMap::new(),
            echoes: Echoes::new(echo_period),
            alive: true,
        };
        let thread = std::thread::Builder::new().name("membership".to_owned()).spawn(move || worker.run())?;
        Ok(Self { commands, thread: Some(thread) })
    }

    /// Sends a command; lost if the thread has ended.
    pub fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

impl Drop for MembershipDriver {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    local: MemberId,
    membership: Membership,
    socket: UdpSocket,
    forwarder: Arc<dyn Forwarder>,
    longest_lease: Duration,
    events: mpsc::UnboundedSender<MembershipEvent>,
    inbox: std_mpsc::Receiver<Command>,
    last_view: Arc<View>,
    slots: HashMap<MemberId, MemberSlot>,
    echoes: Echoes,
    alive: bool,
}

impl Worker {
    fn run(&mut self) {
        run_first();
        let mut buffer = vec![0; 64 << 10];
        let mut report_at = Instant::now();
        loop {
            self.wait();
            loop {
                match self.socket.recv_from(&mut buffer) {
                    Ok((length, from)) => {
                        self.membership.handle_datagram(Instant::now(), from, &buffer[..length]);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    // An ICMP error about an earlier datagram; the member it went to is found dead by its silence.
                    Err(_) => {}
                }
            }
            while let Ok(command) = self.inbox.try_recv() {
                if matches!(command, Command::Stop) {
                    return;
                }
                self.carry_out(command);
            }
            let now = Instant::now();
            self.watch_forwarder(now);
            if self.membership.poll_timeout().is_some_and(|due| due <= now) {
                self.membership.handle_timeout(now);
            }
            self.echo(now);
            self.drain();
            self.renew_lease();
            if report_at <= now {
                report_at = now + Duration::from_secs(1);
                let counters = *self.membership.counters();
                self.tell(MembershipEvent::Counters(counters, self.echoes.lost.clone()));
            }
        }
    }

    /// Waits for a datagram, or for the next deadline.
    fn wait(&self) {
        let due = self.membership.poll_timeout().map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = due.map_or(WAKE, |due| due.min(WAKE));
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let mut polled = [rustix::event::PollFd::new(&self.socket, rustix::event::PollFlags::IN)];
        let _ = rustix::event::poll(&mut polled, Some(&timeout));
    }

    fn carry_out(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Metadata(metadata) => {
                if let Err(error) = self.membership.update_metadata(now, metadata) {
                    tracing::error!("the member's metadata is refused: {error}");
                }
            }
            Command::BeginLeave => self.membership.begin_leave(now),
            Command::RoomMade => self.membership.report_room(now),
            Command::Done(name) => self.membership.report_done(now, name),
            Command::Leave => self.membership.leave(now),
            Command::Keys(keys) => self.membership.set_keys(&keys),
            Command::Shared(shared) => self.membership.set_shared(shared),
            Command::PushPull(request, reply) => match self.membership.handle_push_pull(now, &request) {
                Ok(answer) => drop(reply.send(answer)),
                Err(error) => Self::refuse(&error),
            },
            Command::PushPullReply(reply) => {
                if let Err(error) = self.membership.handle_push_pull_reply(now, &reply) {
                    Self::refuse(&error);
                }
            }
            Command::Slots(slots) => self.slots = slots,
            Command::Stop => {}
        }
    }

    fn refuse(error: &PushPullError) {
        tracing::debug!("push-pull: {error}");
    }

    /// Alive means the packet path is: a member whose forwarder stands still says nothing any more.
    fn watch_forwarder(&mut self, now: Instant) {
        let alive = self.forwarder.idle_for() < FORWARDER_DEAD;
        if alive != self.alive {
            self.alive = alive;
            if alive {
                tracing::info!("the forwarder runs again");
            } else {
                tracing::error!("the forwarder stands still: this member keeps silent until it runs again");
            }
        }
        self.membership.set_forwarder_alive(now, alive);
    }

    fn renew_lease(&self) {
        if self.membership.is_resuming() {
            // The earlier start's lease is as good as it ever was, until it ends.
            return;
        }
        let left = self
            .membership
            .lease_valid_until()
            .map(|until| until.saturating_duration_since(Instant::now()))
            .unwrap_or_default();
        self.forwarder.renew_lease(left.min(self.longest_lease));
    }

    fn echo(&mut self, now: Instant) {
        let mut tokens = Vec::new();
        self.forwarder.poll_echoes(&mut tokens);
        for token in tokens {
            if let Some(peer) = self.echoes.answered(token) {
                self.membership.handle_echo_result(now, peer, true);
            }
        }
        for peer in self.echoes.overdue(now) {
            self.membership.handle_echo_result(now, peer, false);
        }
        if self.echoes.due <= now {
            let view = &self.last_view;
            let peers: Vec<(MemberId, MemberSlot)> = view
                .members
                .iter()
                .filter(|member| member.id != self.local && member.known)
                .filter_map(|member| Some((member.id, *self.slots.get(&member.id)?)))
                .collect();
            for (peer, slot) in self.echoes.turn(now, &peers) {
                let token = self.echoes.token(now, peer);
                // What has no next hop yet counts as lost: nothing could be handed off either.
                let _ = self.forwarder.send_echo(slot, token);
            }
        }
    }

    fn drain(&mut self) {
        while let Some(transmit) = self.membership.poll_transmit() {
            self.send(transmit.to, &transmit.payload);
        }
        while let Some(event) = self.membership.poll_event() {
            match event {
                Event::PushPull { with, .. } => {
                    let request = self.membership.push_pull_request();
                    self.tell(MembershipEvent::PushPull(with, request));
                }
                Event::Stalled { late } => {
                    tracing::warn!(?late, "this process did not run for longer than its lease");
                    self.forwarder.discard_backlog();
                    self.tell(MembershipEvent::Event(Event::Stalled { late }));
                }
                event => self.tell(MembershipEvent::Event(event)),
            }
        }
        // Who resumes has its tables from an earlier start, which are better than a view without the others.
        if !self.membership.is_resuming() && *self.membership.view() != *self.last_view {
            self.last_view = Arc::new(self.membership.view().clone());
            self.tell(MembershipEvent::View(Arc::clone(&self.last_view)));
        }
    }

    fn send(&self, to: SocketAddr, payload: &[u8]) {
        if let Err(error) = self.socket.send_to(payload, to) {
            // Gossip is repeated; a destination that stays unreachable is found dead.
            tracing::trace!(%to, "gossip: {error}");
        }
    }

    fn tell(&self, event: MembershipEvent) {
        let _ = self.events.send(event);
    }
}

/// Lets this thread run before the others of a busy machine, if we may: who answers a probe late is suspected.
fn run_first() {
    // On Linux a nice value is a thread's own, and 0 is the calling one (setpriority(2)).
    // SAFETY: the call takes no pointers.
    let status = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, MEMBERSHIP_NICE) };
    if status != 0 {
        tracing::debug!("the membership thread keeps its priority: {}", std::io::Error::last_os_error());
    }
}

/// Echoes under way.
struct Echoes {
    period: Duration,
    due: Instant,
    next_token: u64,
    next_peer: usize,
    sent: HashMap<u64, (MemberId, Instant)>,
    lost: HashMap<MemberId, u64>,
}

impl Echoes {
    fn new(period: Duration) -> Self {
        Self {
            period,
            due: Instant::now(),
            next_token: 1,
            next_peer: 0,
            sent: HashMap::new(),
            lost: HashMap::new(),
        }
    }

    fn answered(&mut self, token: u64) -> Option<MemberId> {
        self.sent.remove(&token).map(|(peer, _)| peer)
    }

    fn overdue(&mut self, now: Instant) -> Vec<MemberId> {
        let late: Vec<u64> = self
            .sent
            .iter()
            .filter(|(_, (_, at))| now.duration_since(*at) >= ECHO_TIMEOUT)
            .map(|(token, _)| *token)
            .collect();
        let peers: Vec<MemberId> = late.iter().filter_map(|token| self.answered(*token)).collect();
        for peer in &peers {
            *self.lost.entry(*peer).or_default() += 1;
        }
        peers
    }

    /// Whose turn it is in this period.
    fn turn(&mut self, now: Instant, peers: &[(MemberId, MemberSlot)]) -> Vec<(MemberId, MemberSlot)> {
        self.due = now + self.period;
        let count = peers.len().min(ECHOES_A_PERIOD);
        let turn = (0..count).map(|at| peers[(self.next_peer + at) % peers.len()]).collect();
        self.next_peer = self.next_peer.wrapping_add(count);
        turn
    }

    fn token(&mut self, now: Instant, peer: MemberId) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.sent.insert(token, (peer, now));
        token
    }
}
