//! From foca's state and the members' items to a view, and from one view to the next.

use std::{cmp::Ordering, sync::Arc, time::Instant};

use foca::State;
use phalanx_flow::{MemberId, member::Liveness};

use super::{ECHO_LOSSES, Links, Membership, RECOVERY, swim};
use crate::{
    config::Digest,
    event::{DownReason, Event, Warning},
    identity::Identity,
    item::{Items, MemberState, Metadata},
    view::{MemberView, View},
};

impl Membership {
    /// Brings the view, the lease and our own state up to date. Every input ends here.
    pub(super) fn settle(&mut self, now: Instant) {
        let outlived_by = self.board.lock().take_outlived_by();
        if let Some(session) = outlived_by {
            self.outlive(now, session);
        }
        // Each round is caused by a change of our own state: three states, a wish before each, and the admission of others.
        for _ in 0..8 {
            self.refresh(now);
            if !self.step(now) && !self.change(now) {
                break;
            }
        }
        // Nobody else knows of anything: nobody else will own what we own. Who asks to join has nothing yet.
        let own = self.config.id;
        let is_new = |member: &MemberView| member.known && member.state == MemberState::Joining;
        if self.view.members.iter().all(|member| member.id == own || is_new(member))
            && self.state == MemberState::Active
            && self.frozen.is_none()
        {
            self.lease = Some(now + self.config.timing.lease);
        }
    }

    fn refresh(&mut self, now: Instant) {
        let signature = swim::signature(&self.swim.0);
        let mut changed = self.board.lock().take_changed();
        let before = (self.view.digest, self.view.distrusts_itself, self.view.pending);
        let rebuilt = signature != self.signature || self.rebuild;
        if rebuilt {
            self.rebuild(now, signature);
        } else if changed.is_empty() {
            return;
        } else {
            // The usual case, many times a second in a large cluster: somebody says something new of itself.
            for id in &changed {
                self.meet(*id);
                self.replace(*id);
            }
        }
        if before.2 != self.view.pending {
            self.events.push_back(Event::PendingChanged(self.view.pending));
            if self.view.pending != Some(self.done) {
                self.done = Digest::default();
            }
            self.publish_soon = true;
        }
        if before.0 != self.view.digest {
            self.events.push_back(Event::ViewChanged(self.view.digest));
            // So that the others learn who has switched.
            self.publish_soon = true;
        }
        self.publish_if_due(now);
        if self.view.distrusts_itself && !before.1 {
            self.events.push_back(Event::Warning(Warning::DistrustsItself));
        }
        if rebuilt || changed.contains(&self.config.id) {
            changed = self.view.members.iter().map(|member| member.id).collect();
        }
        self.compare_backends(&changed);
    }

    fn rebuild(&mut self, now: Instant, signature: u64) {
        self.signature = signature;
        if self.view.members.len() > 1 && self.swim.0.num_members() == 0 && !self.departed {
            self.forget_everyone();
            // To whoever it was that went, and may be back: the next hello was to go to one of many, some time.
            self.hello_soon(now);
            self.signature = swim::signature(&self.swim.0);
        }
        self.rebuild = false;
        let members: Vec<Identity> = self.swim.0.iter_members().map(|member| *member.id()).collect();
        for member in members {
            // Echoes that an earlier start did not answer are no word on this one.
            if self.view.get(member.id).is_some_and(|known| known.boot != member.boot) {
                self.echo_losses.remove(&member.id);
            }
            self.meet(member.id);
        }
        let mut view = self.build();
        self.judge_links(now, &mut view);
        let suspected = |id: &MemberId| view.get(*id).is_some_and(|member| member.suspected);
        self.suspected_since.retain(|id, _| suspected(id));
        for member in view.members.iter().filter(|member| member.suspected) {
            self.suspected_since.entry(member.id).or_insert(now);
        }
        let old = std::mem::replace(&mut self.view, view);
        self.tell(&old);
    }

    /// Who could hear nobody hears one after the other again, and at some time doubts but a few: those it has not heard yet.
    /// If they are few because others were confirmed down there is nothing to wait for.
    fn judge_links(&mut self, now: Instant, view: &mut View) {
        let is_heard = |id| view.get(id).is_some_and(|member| !member.is_doubted());
        self.links = match self.links {
            _ if view.distrusts_itself => Links::Doubtful,
            Links::Doubtful if !self.view.members.iter().any(|old| old.is_doubted() && is_heard(old.id)) => {
                Links::Sound
            }
            Links::Doubtful => Links::Recovering(now + self.config.timing.probe_period * RECOVERY),
            Links::Recovering(until) if until <= now => Links::Sound,
            links => links,
        };
        if let Links::Recovering(_) = self.links {
            view.distrust();
        }
    }

    fn replace(&mut self, id: MemberId) {
        let Some(known) = self.view.get(id) else { return };
        let identity =
            Identity { id, address: known.address, boot: known.boot, generation: known.generation };
        let after = self.member_view(&self.board.lock(), &identity, known.suspected);
        let told = self.view.replace(after).is_some_and(|(before, after)| differs(&before, after));
        if told && id != self.config.id {
            self.events.push_back(Event::MemberChanged(id));
        }
    }

    fn build(&self) -> View {
        let own = self.identity();
        let items = self.board.lock();
        let mut members = Vec::with_capacity(self.swim.0.num_members() + 1);
        members.push(self.member_view(&items, &own, false));
        for member in self.swim.0.iter_membership_state() {
            if member.state() != State::Down && member.id().id != own.id {
                members.push(self.member_view(&items, member.id(), member.state() == State::Suspect));
            }
        }
        View::new(members, own.id)
    }

    fn member_view(&self, items: &Items, identity: &Identity, suspected: bool) -> MemberView {
        // What an earlier boot said of itself is no word on this one.
        let item = items.get(identity.id).filter(|item| item.head.boot == identity.boot);
        MemberView {
            id: identity.id,
            address: identity.address,
            boot: identity.boot,
            generation: identity.generation,
            state: item.map_or(MemberState::Joining, |item| item.state),
            metadata: item.map_or_else(|| Arc::new(Metadata::default()), |item| Arc::clone(&item.metadata)),
            serial: item.map_or(0, |item| item.serial),
            wish: item.and_then(|item| item.wish),
            admitted: identity.id == self.config.id
                || self.met.get(&identity.id) == Some(&identity.boot)
                || item.is_none_or(|item| item.state != MemberState::Active),
            done: item.map_or(Digest(0), |item| item.done),
            known: item.is_some(),
            view_digest: item.map_or(Digest(0), |item| item.view_digest),
            liveness: Liveness::Alive,
            suspected,
            echo_failing: self.echo_losses.get(&identity.id).is_some_and(|losses| *losses >= ECHO_LOSSES),
        }
    }

    /// Tells what is different from the `old` view. Both are sorted by id.
    fn tell(&mut self, old: &View) {
        let own = self.config.id;
        let (mut before, mut after) = (old.members.iter().peekable(), self.view.members.iter().peekable());
        let mut gone = Vec::new();
        loop {
            let order = match (before.peek(), after.peek()) {
                (Some(before), Some(after)) => before.id.cmp(&after.id),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => break,
            };
            let before = if order.is_le() { before.next() } else { None };
            let after = if order.is_ge() { after.next() } else { None };
            match (before, after) {
                (Some(before), None) => {
                    let reason = if before.state == MemberState::Leaving {
                        DownReason::Left
                    } else {
                        self.counters.confirmations += 1;
                        DownReason::Confirmed
                    };
                    self.events.push_back(Event::MemberDown { id: before.id, reason });
                    gone.push(before.id);
                }
                (None, Some(after)) if after.id != own => {
                    self.acquaintances.insert(after.id, after.address);
                    self.events.push_back(Event::MemberUp(after.id));
                    if after.liveness == Liveness::Suspect {
                        self.counters.suspicions += 1;
                        self.events.push_back(Event::Liveness { id: after.id, liveness: Liveness::Suspect });
                    }
                }
                (Some(before), Some(after)) if after.id != own => {
                    if before.boot != after.boot {
                        let reason = DownReason::Restarted;
                        self.events.push_back(Event::MemberDown { id: before.id, reason });
                        self.events.push_back(Event::MemberUp(after.id));
                    } else if differs(before, after) {
                        self.events.push_back(Event::MemberChanged(after.id));
                    }
                    if before.address != after.address {
                        self.acquaintances.insert(after.id, after.address);
                    }
                    if before.liveness != after.liveness {
                        self.counters.suspicions += u64::from(after.liveness == Liveness::Suspect);
                        self.events.push_back(Event::Liveness { id: after.id, liveness: after.liveness });
                    }
                }
                _ => {}
            }
        }
        for id in gone {
            self.met.remove(&id);
            self.echo_losses.remove(&id);
            self.slow_answers.remove(&id);
            self.told_doubted.remove(&id);
            self.heard.remove(&id);
            self.warned_backends.remove(&id);
            self.warned_shared.remove(&id);
        }
    }

    fn compare_backends(&mut self, with: &[MemberId]) {
        let (own, ours) = (self.config.id, self.config.metadata.backends);
        let members = with.iter().filter_map(|id| self.view.get(*id));
        for member in members.filter(|member| member.known && member.id != own) {
            let theirs = member.metadata.backends;
            if theirs == ours {
                self.warned_backends.remove(&member.id);
            } else if self.warned_backends.insert(member.id, (theirs, ours)) != Some((theirs, ours)) {
                self.events.push_back(Event::Warning(Warning::BackendsDiffer(member.id)));
            }
        }
    }

    /// Whether `id` is a member now, in whatever state.
    pub(super) fn is_member(&self, id: MemberId) -> bool {
        self.view.get(id).is_some()
    }
}

/// Whether there is more to tell than counters and digests.
fn differs(before: &MemberView, after: &MemberView) -> bool {
    before.address != after.address
        || before.state != after.state
        || before.known != after.known
        || before.wish != after.wish
        || before.admitted != after.admitted
        || !Arc::ptr_eq(&before.metadata, &after.metadata) && before.metadata.differs_from(&after.metadata)
}
