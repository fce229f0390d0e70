//! Room in the flow table for what the others will send: memory that the kernel clears before it gives it, while records would wait for it.

use phalanx_flow::MemberId;
use phalanx_membership::MemberState;
use phalanx_rebalancer::Ranking;

use super::{Control, Event};

/// How far a joiner is with its room. It asks to join when it is made, so that nobody's change waits for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum RoomToJoin {
    /// Nobody was met.
    #[default]
    None,
    /// It is being made, since the others said that they hold so many flows.
    For(u64),
    /// It was made, or is made with the change.
    Made,
}

impl Control {
    /// What others will send us when `new` follows `old`, by what they say that they have.
    pub(super) fn make_room(&self, old: &dyn Ranking, new: &dyn Ranking) {
        self.forwarder.make_room(expected_records(self.settings.local, old, new, self.held_by_others()));
    }

    /// The flows that the other members hold, those counted twice that two of them hold.
    fn held_by_others(&self) -> u64 {
        let others = self.view.members.iter().filter(|member| member.id != self.settings.local);
        others.map(|member| member.metadata.flows).sum()
    }

    /// A joiner makes room when it has met the others.
    pub(super) fn make_room_to_join(&mut self) {
        let own = self.view.get(self.settings.local);
        if self.room == RoomToJoin::Made || !own.is_some_and(|own| own.state == MemberState::Joining) {
            return;
        }
        let held = self.held_by_others();
        let met = self.view.ranked().next().is_some();
        if met && self.room != RoomToJoin::For(held) {
            self.room = RoomToJoin::For(held);
            match self.planner.joined(&self.view) {
                Ok(joined) => self.make_room(&*self.planner.current(), &*joined),
                Err(error) => self.events.push_back(Event::Unranked(error)),
            }
        }
    }

    pub(super) fn say_if_room_is_made(&mut self) {
        if matches!(self.room, RoomToJoin::For(_)) && self.forwarder.has_room() {
            self.room = RoomToJoin::Made;
            self.events.push_back(Event::RoomMade);
        }
    }
}

/// How many records `local` will be sent when `new` follows `old`, if the other members hold so many: each row has as many flows as any
/// other, and each flow is held as often as its row has holders.
pub(super) fn expected_records(local: MemberId, old: &dyn Ranking, new: &dyn Ranking, held: u64) -> usize {
    let (mut copies, mut gained) = (0_u64, 0_u64);
    for row in 0..new.row_count() {
        let holders = old.holders(row);
        copies += holders.iter().flatten().count() as u64;
        gained += u64::from(new.holders(row).contains(&Some(local)) && !holders.contains(&Some(local)));
    }
    let expected = (u128::from(held) * u128::from(gained)).checked_div(u128::from(copies));
    expected.and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
}
