//! Finding the others: hellos, welcomes, refusals, cold start, and coming back after a time apart.

use std::{
    borrow::Cow,
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use foca::State;
use phalanx_flow::MemberId;
use rand::RngExt;

use super::{
    Membership, Task,
    swim::{self, Credit},
};
use crate::{
    config::SharedField,
    event::{Event, Warning},
    identity::Identity,
    item::MemberState,
    seal::{Opened, SEAL_OVERHEAD, Unopened},
    wire::{Control, Greeting, KIND_CONTROL, KIND_FOCA, KnownAs, MAX_DATAGRAM_BYTES, PREFIX_BYTES, Refusal},
};

/// Hellos whose answers are believed: an answer comes within a round trip, and a hello goes out ten times a second at most.
const NONCES_KEPT: usize = 32;

/// A joiner whose first hello met nobody says it so many times as often as a member that is alone: it has `bootstrap_wait` to meet somebody,
/// also where many datagrams are lost.
const JOINER_HURRIES: u32 = 5;

/// Most datagrams of items in answer to one hello: enough for some hundred members; push-pull brings the rest.
const MAX_STATE_DATAGRAMS: usize = 16;

/// Most former members that are tried while alone, beside the seeds.
const ACQUAINTANCES_TRIED: usize = 3;

/// A joiner that was refused, or welcomed by who has joined, does not turn active alone for this long: the cluster it should be in is there.
const ANSWER_HOLDS: Duration = Duration::from_secs(10);

/// Rounds of gossip that a member which resumes lets pass after it has met somebody, before it is active: meanwhile it hears of the others.
const RESUMES_AFTER: u32 = 4;

/// How long a joiner waits for the metadata of members it has heard of, before it goes ahead without.
const METADATA_WAIT: Duration = Duration::from_secs(1);

/// How long a joiner waits at most for room for what it will be sent: kernels clear some 400 MB a second at least, two million flows.
const ROOM_WAIT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Joining {
    nonces: VecDeque<u64>,
    met_active: Option<Instant>,
    answered: Option<Instant>,
    told: Option<Refusal>,
    id_in_use_since: Option<Instant>,
    pub(super) may_answer_stale: bool,
    has_room: bool,
}

impl Joining {
    /// What is waited for takes as much longer.
    pub(super) fn put_off(&mut self, by: Duration) {
        for since in
            [&mut self.met_active, &mut self.answered, &mut self.id_in_use_since].into_iter().flatten()
        {
            *since += by;
        }
    }
}

impl Membership {
    /// Opens a datagram and gives it to whom it is for.
    pub(super) fn receive(&mut self, now: Instant, from: SocketAddr, datagram: &[u8]) {
        // A socket bound to an IPv6 wildcard names IPv4 peers by their mapped addresses.
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        match self.seal.open(datagram) {
            Ok(opened) => self.receive_opened(now, from, opened),
            Err(Unopened::Foreign) => self.counters.foreign += 1,
            Err(Unopened::Damaged) => self.counters.damaged += 1,
            Err(Unopened::Replayed) => self.counters.replayed += 1,
            Err(Unopened::Stale { sender, newest }) => {
                self.counters.stale += 1;
                // At most one a tick, so that replayed datagrams cannot make us talk.
                if sender != self.config.id && std::mem::take(&mut self.joining.may_answer_stale) {
                    self.send_control(from, &Control::Stale { newest });
                }
            }
        }
    }

    fn receive_opened(&mut self, now: Instant, from: SocketAddr, mut opened: Opened) {
        let sender = opened.life.sender;
        if opened.life == self.seal.sealer.life() {
            self.counters.own += 1;
            return;
        }
        let plain = std::mem::take(&mut opened.plain);
        let Some((prefix, body)) = plain.split_first_chunk::<PREFIX_BYTES>() else {
            self.counters.damaged += 1;
            return;
        };
        let [kind, digest @ ..] = *prefix;
        if self.id_in_use(sender, from, opened.is_new_life) {
            self.counters.refused += 1;
            if let (KIND_CONTROL, Ok(Control::Hello(hello))) = (kind, postcard::from_bytes(body)) {
                let at = self.view.get(sender).map_or(self.config.address, |member| member.address);
                let (nonce, by, reason) = (hello.nonce, self.config.id, Refusal::IdInUse(at));
                self.send_control(from, &Control::Refused { nonce, by, reason });
            }
            return;
        }
        self.seal.accept(&mut opened);
        match kind {
            // Who is a member stays one while a change is rolled out; who is not is refused when it says hello.
            KIND_FOCA if u64::from_be_bytes(digest) != self.shared_digest.0 && !self.is_member(sender) => {
                self.counters.refused += 1;
            }
            KIND_FOCA => {
                let believed = self.believed(now, sender, body);
                if !self.drive(now, |swim, io| swim.handle_data(&believed, io)) {
                    self.counters.damaged += 1;
                }
                self.tell_if_doubted(now, sender);
            }
            KIND_CONTROL => match postcard::from_bytes(body) {
                Ok(control) => self.control(now, sender, control),
                Err(_) => self.counters.damaged += 1,
            },
            _ => self.counters.damaged += 1,
        }
    }

    /// Notes who is heard, and judges what it says of others. That somebody is down is denied if we have heard it ourselves in the meantime, or
    /// suspect it for too short a time for anybody to have confirmed it; and if we do not suspect it at all it is a suspicion.
    ///
    /// Who was cut off has confirmed everybody down, and says so as soon as its link is back. It will hear that it is wrong from those
    /// members; believed by others, it would tear the cluster apart. Who says of itself that it goes, or is known to leave, is believed.
    fn believed<'a>(&mut self, now: Instant, sender: MemberId, body: &'a [u8]) -> Cow<'a, [u8]> {
        let Some(source) = swim::source(body).filter(|source| source.id == sender) else {
            return Cow::Borrowed(body);
        };
        self.heard.insert(sender, (source, now));
        self.meet_renewed(now, source);
        let lately = |at: Instant| now.saturating_duration_since(at) < self.config.timing.confirm_after / 2;
        swim::judged(body, |news| {
            let about = *news.id();
            let leaves =
                || self.view.get(about.id).is_some_and(|member| member.state == MemberState::Leaving);
            if news.state() != State::Down || about.id == sender || leaves() {
                return Credit::Believed;
            }
            if self.heard.get(&about.id).is_some_and(|(identity, at)| *identity == about && lately(*at)) {
                return Credit::Denied;
            }
            match self.swim.0.iter_membership_state().find(|member| *member.id() == about) {
                Some(member) if member.state() == State::Alive => Credit::Suspected,
                Some(member)
                    if member.state() == State::Suspect
                        && self.suspected_since.get(&about.id).is_none_or(|since| lately(*since)) =>
                {
                    Credit::Denied
                }
                _ => Credit::Believed,
            }
        })
    }

    /// Who has renewed its identity says so in each datagram; but `foca` reads none that is for who we were before. Two members that renewed
    /// theirs in one moment, because a side that was cut off held both to be down, would write to each other's former ones until they
    /// confirmed each other down.
    fn meet_renewed(&mut self, now: Instant, source: Identity) {
        let is_former = |member: &foca::Member<Identity>| {
            let known = member.id();
            known.id == source.id
                && known.boot == source.boot
                && source.supersedes(known)
                && member.state() != State::Down
        };
        if self.swim.0.iter_membership_state().any(is_former) {
            self.drive(now, |swim, io| {
                swim.apply_many(std::iter::once(foca::Member::alive(source)), true, io)
            });
        }
    }

    /// Tells a member that we hear and suspect all the same. The word of the suspicion went round while it could not be reached, and is
    /// said no more: without this it would be confirmed down though it answers every probe (Lifeguard's "buddy system").
    fn tell_if_doubted(&mut self, now: Instant, sender: MemberId) {
        if !self.view.get(sender).is_some_and(|member| member.suspected) {
            return;
        }
        let pause = self.config.timing.gossip_interval;
        if self.told_doubted.get(&sender).is_some_and(|at| now.saturating_duration_since(*at) < pause) {
            return;
        }
        let doubted =
            |member: &&foca::Member<Identity>| member.id().id == sender && member.state() == State::Suspect;
        let Some(doubted) = self.swim.0.iter_membership_state().find(doubted).cloned() else { return };
        self.told_doubted.insert(sender, now);
        self.send_control(doubted.id().address, &Control::Doubted(doubted));
    }

    /// Whether a datagram comes from a second process with the id of a live member, or with ours.
    fn id_in_use(&self, sender: MemberId, from: SocketAddr, is_new_life: bool) -> bool {
        if sender == self.config.id {
            return true;
        }
        // A restart that moved looks the same until the member it was is suspected.
        is_new_life && self.view.get(sender).is_some_and(|member| member.address != from && !member.suspected)
    }

    fn control(&mut self, now: Instant, sender: MemberId, control: Control) {
        match control {
            Control::Hello(hello) if hello.identity.id == sender => self.handle_hello(now, &hello),
            Control::Welcome(welcome) if welcome.identity.id == sender => {
                self.handle_welcome(now, &welcome);
            }
            Control::Hello(_) | Control::Welcome(_) => self.counters.damaged += 1,
            Control::Refused { nonce, by, reason } => self.handle_refused(now, nonce, by, reason),
            Control::State(list) => {
                let mut items = self.board.lock();
                let bad = list.iter().filter(|item| items.receive(item, false).is_err()).count();
                drop(items);
                self.counters.damaged += u64::from(bad > 0);
            }
            Control::Stale { newest } => self.outlive(now, newest),
            Control::Doubted(doubted) => {
                // Nobody is told of others this way.
                if *doubted.id() == self.identity() && doubted.state() == State::Suspect {
                    self.drive(now, |swim, io| swim.apply_many(std::iter::once(doubted), false, io));
                }
            }
        }
    }

    fn handle_hello(&mut self, now: Instant, hello: &Greeting) {
        let peer = hello.identity;
        if let Some(field) = self.difference(hello) {
            if self.is_member(peer.id) {
                self.warn_shared(peer.id, field);
            } else {
                self.counters.refused += 1;
                // Of two joiners that differ, the one with the higher id gives way.
                if self.state != MemberState::Joining || self.config.id < peer.id {
                    let (nonce, by, reason) = (hello.nonce, self.config.id, Refusal::Differs(field));
                    self.send_control(peer.address, &Control::Refused { nonce, by, reason });
                }
                return;
            }
        }
        self.heed(now, hello.you);
        let welcome = Control::Welcome(self.greeting(hello.nonce, peer.address, Some(peer.id)));
        self.send_control(peer.address, &welcome);
        if hello.state == MemberState::Joining || !self.is_member(peer.id) {
            self.send_state(peer.address);
        }
    }

    fn handle_welcome(&mut self, now: Instant, welcome: &Greeting) {
        if !self.joining.nonces.contains(&welcome.nonce) {
            self.counters.stale += 1;
            return;
        }
        if let Some(field) = self.difference(welcome) {
            if !self.is_member(welcome.identity.id) {
                return;
            }
            self.warn_shared(welcome.identity.id, field);
        }
        self.heed(now, welcome.you);
        if welcome.state == MemberState::Active {
            // What comes next may be lost as well.
            self.joining.answered = Some(now);
        }
        let known = self.swim.0.iter_members().any(|member| *member.id() == welcome.identity);
        if !known {
            self.drive(now, |swim, io| swim.announce(welcome.identity, io));
        }
    }

    fn handle_refused(&mut self, now: Instant, nonce: u64, by: MemberId, reason: Refusal) {
        if !self.joining.nonces.contains(&nonce) {
            self.counters.stale += 1;
            return;
        }
        self.joining.answered = Some(now);
        if self.state != MemberState::Joining {
            if let Refusal::Differs(field) = reason {
                self.warn_shared(by, field);
            }
            return;
        }
        if let Refusal::IdInUse(_) = reason {
            // It may be ourselves before a restart, under another address, about to be confirmed down.
            let since = *self.joining.id_in_use_since.get_or_insert(now);
            if now.saturating_duration_since(since) < self.config.timing.confirm_after * 2 {
                return;
            }
        }
        if self.joining.told != Some(reason) {
            self.joining.told = Some(reason);
            self.events.push_back(Event::Refused { by, reason });
        }
    }

    /// Says hello to the seeds that are not members, or to somebody, so that islands find each other.
    pub(super) fn hello(&mut self, now: Instant) {
        let alone = self.swim.0.num_members() == 0;
        let joining = self.state == MemberState::Joining;
        let own = self.config.address;
        let member_at =
            |address: &SocketAddr| self.view.members.iter().any(|member| member.address == *address);
        let mut targets: Vec<_> = self
            .config
            .seeds
            .iter()
            .filter(|seed| **seed != own && (alone || !member_at(seed)))
            .copied()
            .collect();
        let pick = |rng: &mut rand::rngs::StdRng, from: &[SocketAddr]| match from.len() {
            0 => None,
            length => Some(from[rng.random_range(0..length)]),
        };
        if alone {
            let former: Vec<_> = self.acquaintances.values().copied().filter(|at| *at != own).collect();
            for _ in 0..ACQUAINTANCES_TRIED {
                targets.extend(pick(&mut self.rng, &former));
            }
        } else {
            // Not alone: one absent seed is enough at a time; a joiner also asks a member, for the items it lacks.
            targets = pick(&mut self.rng, &targets).into_iter().collect();
            if joining || targets.is_empty() {
                let members: Vec<_> =
                    self.view.members.iter().map(|member| member.address).filter(|at| *at != own).collect();
                targets.extend(pick(&mut self.rng, &members));
            }
        }
        targets.sort_unstable();
        targets.dedup();

        let nonce = self.rng.random();
        self.joining.nonces.push_back(nonce);
        if self.joining.nonces.len() > NONCES_KEPT {
            self.joining.nonces.pop_front();
        }
        for target in targets {
            let hello = Control::Hello(self.greeting(nonce, target, None));
            self.send_control(target, &hello);
        }
        let timing = &self.config.timing;
        let interval = match (alone, joining) {
            (true, true) if now.saturating_duration_since(self.started) >= timing.hello_alone / 2 => {
                timing.hello_alone / JOINER_HURRIES
            }
            (false, false) => timing.hello_settled,
            _ => timing.hello_alone,
        };
        let next = self.jitter(interval);
        self.schedule(now + next, Task::Hello);
    }

    fn greeting(&self, nonce: u64, to: SocketAddr, id: Option<MemberId>) -> Greeting {
        let you = self
            .swim
            .0
            .iter_membership_state()
            .find(|member| id.map_or(member.id().address == to, |id| member.id().id == id))
            .map(|member| KnownAs {
                boot: member.id().boot,
                generation: member.id().generation,
                down: member.state() == State::Down,
            });
        Greeting {
            nonce,
            identity: self.identity(),
            state: self.state,
            shared: self.config.shared.clone(),
            timing: self.timing_digest,
            you,
        }
    }

    fn send_state(&mut self, to: SocketAddr) {
        const ROOM: usize = MAX_DATAGRAM_BYTES - SEAL_OVERHEAD - PREFIX_BYTES - 8;
        let mut batches = vec![Vec::new()];
        let mut room = ROOM;
        let items = self.board.lock();
        for item in items.iter().filter(|item| self.view.get(item.head.id).is_some()) {
            // Each is preceded by its length, two bytes at most.
            let length = item.bytes.len() + 2;
            if length > room {
                if batches.len() == MAX_STATE_DATAGRAMS {
                    break;
                }
                batches.push(Vec::new());
                room = ROOM;
            }
            room = room.saturating_sub(length);
            if let Some(batch) = batches.last_mut() {
                batch.push(item.bytes.to_vec());
            }
        }
        drop(items);
        for batch in batches {
            self.send_control(to, &Control::State(batch));
        }
    }

    fn difference(&self, greeting: &Greeting) -> Option<SharedField> {
        let timing = (greeting.timing != self.timing_digest).then_some(SharedField::Timing);
        self.config.shared.first_difference(&greeting.shared).or(timing)
    }

    fn warn_shared(&mut self, id: MemberId, field: SharedField) {
        if self.warned_shared.insert(id, field) != Some(field) {
            self.events.push_back(Event::Warning(Warning::SharedDiffers { id, field }));
        }
    }

    /// Renews our identity if what a peer knows of us would win over it or is down.
    fn heed(&mut self, now: Instant, you: Option<KnownAs>) {
        let Some(you) = you else { return };
        let own = self.identity();
        let same_boot = you.boot == own.boot
            && (you.generation > own.generation || you.down && you.generation == own.generation);
        if same_boot {
            self.counters.renewals += 1;
            self.change_identity(now, own.renewed_beyond(you.generation));
        } else if you.boot > own.boot && self.state == MemberState::Joining {
            // Our clock ran backwards: an earlier start had a higher boot.
            // Or what was adopted is older than a start without it: then it is of no use.
            self.config.boot = you.boot.saturating_add(1);
            self.config.resume = false;
            self.change_identity(now, Identity { boot: self.config.boot, generation: 0, ..own });
            self.publish(now);
        }
    }

    /// Continues above a session of ours that others have seen.
    pub(super) fn outlive(&mut self, now: Instant, newest: u64) {
        if newest > self.seal.sealer.life().session {
            self.seal.set_session(newest.saturating_add(1));
            self.publish(now);
            // What was sent under the old session was dropped.
            self.hello_soon(now);
        }
    }

    pub(super) fn hello_soon(&mut self, now: Instant) {
        let known = self.tasks.iter().find(|(_, task)| matches!(task, Task::Hello)).map(|(key, _)| *key);
        if let Some(key) = known {
            self.tasks.remove(&key);
        }
        self.schedule(now, Task::Hello);
    }

    /// Says that there is room for what the others will send this member once it asks to join: see [`crate::Config::waits_for_room`].
    pub fn report_room(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.joining.has_room, true) {
            self.settle(now);
        }
    }

    /// Asks to join, or turns active alone, if it is time to; whether anything changed.
    pub(super) fn step(&mut self, now: Instant) -> bool {
        if self.state != MemberState::Joining
            || self.config.hold_joining
            || self.frozen.is_some()
            || self.departed
        {
            return false;
        }
        let own = self.config.id;
        let others = || self.view.members.iter().filter(|member| member.id != own);
        let all_known = others().all(|member| member.known);
        // Who has not said yet may be active: it is given as long again.
        let lowest = others().all(|member| member.id > own);
        if others().any(|member| member.known && member.state != MemberState::Joining) {
            if self.joining.met_active.is_none() {
                self.joining.met_active = Some(now);
                self.wish_push_pull();
            }
            let met = self.joining.met_active.unwrap_or(now);
            let waited = now.saturating_duration_since(met);
            // Who resumes has a table of all who were there. It comes back to one of all who are there: who is met first names the others.
            let settled = !self.is_resuming() || waited >= self.config.timing.gossip_interval * RESUMES_AFTER;
            if self.wish.is_some() || !(all_known && settled || waited >= METADATA_WAIT) {
                return false;
            }
            if self.is_resuming() {
                // It is what the others know it as; if they have taken it out meanwhile, they meet it as another side.
                self.activate_alone(now);
                return true;
            }
            let has_room = !self.config.waits_for_room || self.joining.has_room || waited >= ROOM_WAIT;
            if has_room {
                self.wish_to_join(now);
            }
            return has_room;
        }
        self.joining.met_active = None;
        if self.wish.take().is_some() {
            // Whom we asked is gone.
            self.publish(now);
        }
        let waited = now.saturating_duration_since(self.started);
        let wait = self.config.bootstrap_wait;
        let answered = self
            .joining
            .answered
            .is_some_and(|at| now.saturating_duration_since(at) < ANSWER_HOLDS.max(wait));
        if answered || waited < wait || !all_known && waited < wait * 2 || !lowest {
            return false;
        }
        self.activate_alone(now);
        true
    }
}
