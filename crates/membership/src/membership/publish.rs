//! What we say of ourselves, and the exchange of everything known.

use std::time::Instant;

use rand::RngExt;

use super::{Membership, PUBLISH_SPACING, SPACING_CROWD, STRANGERS_KEPT, encode};
use crate::{
    event::Event,
    item::{Item, ItemHead, MemberState, Metadata},
    wire::{PushPull, PushPullError},
};

impl Membership {
    pub(super) fn publish_if_due(&mut self, now: Instant) {
        let spacing = PUBLISH_SPACING * (self.view.members.len() / SPACING_CROWD).max(1) as u32;
        let spaced = self.published.is_none_or(|at| now.saturating_duration_since(at) >= spacing);
        if self.publish_soon && spaced {
            self.publish(now);
        }
    }

    pub(super) fn publish(&mut self, now: Instant) {
        self.version += 1;
        self.published = Some(now);
        self.publish_soon = false;
        let identity = self.identity();
        let item = Item {
            head: ItemHead {
                id: identity.id,
                boot: identity.boot,
                session: self.seal.sealer.life().session,
                version: self.version,
            },
            // Who resumes never stopped being what the others know it as.
            state: if self.is_resuming() { MemberState::Active } else { self.state },
            serial: if self.is_resuming() { self.config.boot } else { self.serial },
            wish: self.wish,
            view_digest: self.view.digest,
            done: self.done,
            metadata: Metadata {
                weight: if self.state == MemberState::Joining {
                    self.config.metadata.weight
                } else {
                    self.weight
                },
                ..self.config.metadata.clone()
            },
        };
        let bytes = encode(&item);
        // Refused only if it were too long, which validated metadata never is.
        self.drive(now, |swim, _| swim.add_broadcast(&bytes).map(|_| ()));
    }

    pub(super) fn enter(&mut self, now: Instant, state: MemberState) {
        self.state = state;
        self.events.push_back(Event::StateChanged(state));
        self.publish(now);
    }

    /// Keeps what is remembered of former members in proportion to the present ones.
    pub(super) fn forget_strangers(&mut self) {
        let most = self.view.members.len() * 2 + STRANGERS_KEPT;
        if self.acquaintances.len() > most {
            self.acquaintances.retain(|id, _| self.view.get(*id).is_some());
        }
        let mut items = self.board.lock();
        if items.iter().count() > most {
            items.retain(|id| self.view.get(id).is_some());
        }
    }

    pub(super) fn wish_push_pull(&mut self) {
        let own = self.config.id;
        let candidates: Vec<_> = self
            .view
            .members
            .iter()
            .filter(|member| member.id != own && !member.suspected)
            .filter_map(|member| member.metadata.transfer_address.map(|address| (member.id, address)))
            .collect();
        if !candidates.is_empty() {
            let (with, address) = candidates[self.rng.random_range(0..candidates.len())];
            self.events.push_back(Event::PushPull { with, address });
        }
    }

    pub(super) fn apply_push_pull(&mut self, now: Instant, bytes: &[u8]) -> Result<(), PushPullError> {
        self.catch_up(now);
        let message = PushPull::decode(bytes)?;
        if message.shared != self.shared_digest && self.view.get(message.from.id).is_none() {
            return Err(PushPullError::Refused(message.from.id));
        }
        if self.frozen.is_some() || self.departed || message.from.id == self.config.id {
            return Ok(());
        }
        let members = message.members.into_iter().filter(|member| member.state() != foca::State::Down);
        let members = members.chain([foca::Member::alive(message.from)]);
        self.drive(now, |swim, io| swim.apply_many(members, true, io));
        let mut items = self.board.lock();
        // One that does not decode is left out; the others stand for themselves.
        let bad = message.items.iter().filter(|item| items.receive(item, false).is_err()).count();
        drop(items);
        self.counters.damaged += u64::from(bad > 0);
        self.settle(now);
        Ok(())
    }
}
