//! The set of members, as this member sees it.

use std::{net::SocketAddr, sync::Arc};

use phalanx_flow::{MemberId, member::Liveness};

use crate::{
    config::Digest,
    item::{MemberState, Metadata, Wish},
};

/// The members that are not confirmed down, this one included, sorted by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Sorted by id; the local member is among them.
    pub members: Vec<MemberView>,
    /// Digest of (id, boot, weight, serial, site) of the active members: what ranks. Equal on all members that agree on it,
    /// in whatever order they learned it.
    pub digest: Digest,
    /// While a change is planned: the digest this view will have once all that is wished is in force. It names the pending view.
    pub pending: Option<Digest>,
    /// This member suspects too many at once to trust its own judgement, so every [`MemberView::liveness`] is `Alive`.
    pub distrusts_itself: bool,
}

/// One member of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberView {
    /// Its name.
    pub id: MemberId,
    /// Its data address and gossip port.
    pub address: SocketAddr,
    /// A new boot has lost the flow table of the old one.
    pub boot: u64,
    /// A new generation of the same boot is the same member with its state.
    pub generation: u32,
    /// Where it stands in its life; `Joining` until its metadata is known.
    pub state: MemberState,
    /// What it says of itself; defaults (weight 0) until known.
    pub metadata: Arc<Metadata>,
    /// The serial of the wish that is in force.
    pub serial: u64,
    /// What it wants to become.
    pub wish: Option<Wish>,
    /// Whether it belongs to our side. Active members of another side, met when a partition heals, rank when both sides have
    /// sent each other what they hold.
    pub admitted: bool,
    /// The pending view for which it has sent all it has to send; 0: none.
    pub done: Digest,
    /// Whether `metadata` is its own word.
    pub known: bool,
    /// The digest of the view it had when it last spoke: who has switched.
    pub view_digest: Digest,
    /// What packets should believe: `Alive` or `Suspect`.
    pub liveness: Liveness,
    /// SWIM suspects it, whether or not this member trusts its own judgement.
    pub suspected: bool,
    /// Gossip reaches it but hand-off echoes do not come back.
    pub echo_failing: bool,
}

impl MemberView {
    /// Whether it owns rows.
    pub fn ranks(&self) -> bool {
        self.is_in_force() && self.metadata.weight > 0
    }

    /// Whether its probes or its echoes fail.
    pub fn is_doubted(&self) -> bool {
        self.suspected || self.echo_failing
    }

    /// Whether it is active, on our side.
    pub fn is_in_force(&self) -> bool {
        self.state == MemberState::Active && self.admitted
    }

    /// The weight it has in the pending view; `None` if it is not active there.
    pub fn pending_weight(&self) -> Option<u32> {
        self.wanted().map(|(weight, _)| weight)
    }

    /// What the member is to be when all wishes are in force: weight and serial.
    fn wanted(&self) -> Option<(u32, u64)> {
        match (self.state, self.wish) {
            (MemberState::Leaving, _) | (MemberState::Joining, None) => None,
            (_, Some(wish)) => wish.active.then_some((wish.weight, wish.serial)),
            (MemberState::Active, None) => Some((self.metadata.weight, self.serial)),
        }
    }

    fn in_force(&self) -> Option<(u32, u64)> {
        self.is_in_force().then_some((self.metadata.weight, self.serial))
    }

    /// Whether it has sent all it has to send for the pending view `name`, or has switched to it.
    pub fn is_ready_for(&self, name: Digest) -> bool {
        self.done == name || self.view_digest == name
    }
}

impl View {
    /// The member called `id`.
    pub fn get(&self, id: MemberId) -> Option<&MemberView> {
        self.members.binary_search_by_key(&id, |member| member.id).ok().and_then(|at| self.members.get(at))
    }

    /// The members that own rows: active, weight above 0.
    pub fn ranked(&self) -> impl Iterator<Item = &MemberView> {
        self.members.iter().filter(|member| member.ranks())
    }

    /// The members that will own rows in the pending view, with their weights there.
    pub fn pending_ranked(&self) -> impl Iterator<Item = (&MemberView, u32)> {
        self.members
            .iter()
            .filter_map(|member| Some((member, member.pending_weight().filter(|weight| *weight > 0)?)))
    }

    /// Sorts, decides whether to believe the suspicions, and computes the digest.
    pub(crate) fn new(mut members: Vec<MemberView>, own: MemberId) -> Self {
        members.sort_unstable_by_key(|member| member.id);
        let mut view = Self { members, digest: Digest::default(), pending: None, distrusts_itself: false };
        view.judge(own);
        view.compute_digests();
        view
    }

    /// Decides as the member called `own` whether to believe the suspicions: sets each [`MemberView::liveness`].
    pub fn judge(&mut self, own: MemberId) {
        let is_doubted = |member: &MemberView| member.id != own && member.is_doubted();
        let others = self.members.iter().filter(|member| member.id != own).count();
        let doubted = self.members.iter().filter(|member| is_doubted(member)).count();
        self.distrusts_itself = distrusts_itself(others, doubted);
        for member in &mut self.members {
            member.liveness = if is_doubted(member) && !self.distrusts_itself {
                Liveness::Suspect
            } else {
                Liveness::Alive
            };
        }
    }

    /// Goes on as if too many were doubted to believe it, if any is.
    pub(crate) fn distrust(&mut self) {
        for member in &mut self.members {
            self.distrusts_itself |= member.liveness == Liveness::Suspect;
            member.liveness = Liveness::Alive;
        }
    }

    fn compute_digests(&mut self) {
        self.digest = digest(&self.members, MemberView::in_force);
        let pending = digest(&self.members, MemberView::wanted);
        self.pending = (pending != self.digest).then_some(pending);
    }

    /// Takes in what member `after.id` says anew of itself; returns what it said before, if that differs. Its liveness stays.
    pub(crate) fn replace(&mut self, after: MemberView) -> Option<(MemberView, &MemberView)> {
        let at = self.members.binary_search_by_key(&after.id, |member| member.id).ok()?;
        let member = self.members.get_mut(at)?;
        let after = MemberView { liveness: member.liveness, ..after };
        let rank = |of: &MemberView| (of.in_force(), of.wanted());
        let before = std::mem::replace(member, after);
        if rank(&before) != rank(member) || before.metadata.site != member.metadata.site {
            self.compute_digests();
        }
        self.members.get(at).map(|after| (before, after))
    }
}

/// Whether who doubts `doubted` of `others` should rather doubt itself: half of them or more (design §6).
///
/// A single doubted member is always believed: with one or two others, half would be every failure there can be, and an HA pair
/// would never divert (docs/design/0002-membership.md).
pub(crate) const fn distrusts_itself(others: usize, doubted: usize) -> bool {
    doubted >= 2 && doubted * 2 >= others
}

fn digest(members: &[MemberView], ranked: impl Fn(&MemberView) -> Option<(u32, u64)>) -> Digest {
    let mut bytes = Vec::with_capacity(members.len() * 32);
    for member in members {
        let Some((weight, serial)) = ranked(member) else { continue };
        bytes.extend_from_slice(&member.id.0.to_be_bytes());
        bytes.extend_from_slice(&member.boot.to_be_bytes());
        bytes.extend_from_slice(&weight.to_be_bytes());
        bytes.extend_from_slice(&serial.to_be_bytes());
        // The length first, so that no two lists of members encode alike. MAX_NAME_BYTES fits.
        bytes.extend_from_slice(&(member.metadata.site.len() as u32).to_be_bytes());
        bytes.extend_from_slice(member.metadata.site.as_bytes());
    }
    Digest::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u32) -> MemberView {
        MemberView {
            id: MemberId(id),
            address: ([10, 0, 0, id as u8], 7000).into(),
            boot: 1,
            generation: 0,
            state: MemberState::Active,
            metadata: Arc::new(Metadata { weight: 1, ..Metadata::default() }),
            known: true,
            serial: 1,
            wish: None,
            admitted: true,
            done: Digest(0),
            view_digest: Digest(0),
            liveness: Liveness::Alive,
            suspected: false,
            echo_failing: false,
        }
    }

    #[test]
    fn the_digest_ignores_order_generation_and_who_does_not_rank() {
        let a = View::new(vec![member(1), member(2), member(3)], MemberId(1));
        let renewed = MemberView { generation: 9, address: ([10, 9, 9, 9], 1).into(), ..member(2) };
        let joining = MemberView { state: MemberState::Joining, ..member(4) };
        let b = View::new(vec![joining, member(3), renewed, member(1)], MemberId(3));
        assert_eq!(a.digest, b.digest);
        assert_eq!(b.ranked().count(), 3);
    }

    #[test]
    fn the_digest_sees_boot_weight_site_and_membership() {
        let base = View::new(vec![member(1), member(2)], MemberId(1)).digest;
        let metadata =
            |weight, site: &str| Arc::new(Metadata { weight, site: site.to_owned(), ..Metadata::default() });
        for changed in [
            MemberView { boot: 2, ..member(2) },
            MemberView { metadata: metadata(2, ""), ..member(2) },
            MemberView { metadata: metadata(1, "a"), ..member(2) },
            MemberView { state: MemberState::Leaving, ..member(2) },
            MemberView { serial: 2, ..member(2) },
            MemberView { admitted: false, ..member(2) },
            member(3),
        ] {
            assert_ne!(View::new(vec![member(1), changed], MemberId(1)).digest, base);
        }
    }

    #[test]
    fn the_pending_view_is_named_by_the_digest_it_will_have() {
        let wish = |active, weight, serial| Some(Wish { active, weight, serial });
        let joiner = MemberView { state: MemberState::Joining, wish: wish(true, 5, 7), ..member(3) };
        let leaver = MemberView { wish: wish(false, 1, 8), ..member(2) };
        let heavier = MemberView { wish: wish(true, 9, 9), ..member(1) };
        let before = View::new(vec![heavier, leaver, joiner.clone()], MemberId(1));
        assert_eq!(before.digest, View::new(vec![member(1), member(2)], MemberId(1)).digest);
        let pending: Vec<_> = before.pending_ranked().map(|(member, weight)| (member.id.0, weight)).collect();
        assert_eq!(pending, [(1, 9), (3, 5)]);

        let with = |id, weight, serial| MemberView {
            metadata: Arc::new(Metadata { weight, ..Metadata::default() }),
            serial,
            ..member(id)
        };
        let after = View::new(vec![with(1, 9, 9), with(3, 5, 7)], MemberId(1));
        assert_eq!(before.pending, Some(after.digest));
        assert_eq!(after.pending, None);
        // One of them has switched, and the name of the pending view is the same still.
        let between = View::new(vec![with(1, 9, 9), member(2), joiner], MemberId(1));
        assert_ne!(between.pending, before.pending, "the leave was not wished here");
        let leaving = MemberView { state: MemberState::Leaving, ..member(2) };
        let joiner = MemberView { state: MemberState::Joining, wish: wish(true, 5, 7), ..member(3) };
        let between = View::new(vec![with(1, 9, 9), leaving, joiner], MemberId(1));
        assert_eq!(between.pending, before.pending);
    }

    #[test]
    fn who_waits_without_a_wish_or_leaves_is_in_no_pending_view() {
        let idle = MemberView { state: MemberState::Joining, ..member(2) };
        let gone = MemberView { state: MemberState::Leaving, ..member(3) };
        assert_eq!(View::new(vec![member(1), idle, gone], MemberId(1)).pending, None);
        // The twin: a member of another side is.
        let foreign = MemberView { admitted: false, ..member(2) };
        let view = View::new(vec![member(1), foreign], MemberId(1));
        assert_eq!(view.pending, Some(View::new(vec![member(1), member(2)], MemberId(1)).digest));
        assert_eq!(view.ranked().count(), 1);
    }

    #[test]
    fn one_doubted_member_is_believed_and_half_of_many_are_not() {
        let doubt = |ids: &[u32], count: u32| {
            let members =
                (1..=count).map(|id| MemberView { suspected: ids.contains(&id), ..member(id) }).collect();
            View::new(members, MemberId(1))
        };
        for count in [2, 3, 10] {
            let view = doubt(&[2], count);
            assert!(!view.distrusts_itself);
            assert_eq!(view.get(MemberId(2)).map(|m| m.liveness), Some(Liveness::Suspect));
        }
        let view = doubt(&[2, 3], 5);
        assert!(view.distrusts_itself);
        assert!(view.members.iter().all(|m| m.liveness == Liveness::Alive));
        assert!(!doubt(&[2, 3], 6).distrusts_itself);
    }
}
