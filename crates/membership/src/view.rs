//! The set of members, as this member sees it.

use std::{net::SocketAddr, sync::Arc};

use phalanx_flow::{MemberId, member::Liveness};

use crate::{
    config::Digest,
    item::{MemberState, Metadata},
};

/// The members that are not confirmed down, this one included, sorted by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Sorted by id; the local member is among them.
    pub members: Vec<MemberView>,
    /// Digest of (id, boot, weight, site) of the active members: what ranks. Equal on all members that agree on it,
    /// in whatever order they learned it.
    pub digest: Digest,
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
        self.state == MemberState::Active && self.metadata.weight > 0
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

    /// Sorts, decides whether to believe the suspicions, and computes the digest.
    pub(crate) fn new(mut members: Vec<MemberView>, own: MemberId) -> Self {
        members.sort_unstable_by_key(|member| member.id);
        let others = members.iter().filter(|member| member.id != own).count();
        let doubted = members
            .iter()
            .filter(|member| member.id != own && (member.suspected || member.echo_failing))
            .count();
        let distrusts_itself = distrusts_itself(others, doubted);
        for member in &mut members {
            let doubted = member.suspected || member.echo_failing;
            member.liveness = if doubted && !distrusts_itself && member.id != own {
                Liveness::Suspect
            } else {
                Liveness::Alive
            };
        }
        let digest = digest(&members);
        Self { members, digest, distrusts_itself }
    }

    /// Takes in what member `after.id` says anew of itself; returns what it said before, if that differs. Its liveness stays.
    pub(crate) fn replace(&mut self, after: MemberView) -> Option<(MemberView, &MemberView)> {
        let at = self.members.binary_search_by_key(&after.id, |member| member.id).ok()?;
        let member = self.members.get_mut(at)?;
        let after = MemberView { liveness: member.liveness, ..after };
        let rank = |of: &MemberView| (of.state == MemberState::Active, of.metadata.weight);
        let before = std::mem::replace(member, after);
        if rank(&before) != rank(member) || before.metadata.site != member.metadata.site {
            self.digest = digest(&self.members);
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

fn digest(members: &[MemberView]) -> Digest {
    let mut bytes = Vec::with_capacity(members.len() * 24);
    for member in members.iter().filter(|member| member.state == MemberState::Active) {
        bytes.extend_from_slice(&member.id.0.to_be_bytes());
        bytes.extend_from_slice(&member.boot.to_be_bytes());
        bytes.extend_from_slice(&member.metadata.weight.to_be_bytes());
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
            member(3),
        ] {
            assert_ne!(View::new(vec![member(1), changed], MemberId(1)).digest, base);
        }
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
