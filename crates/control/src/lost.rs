//! Many members gone at once: are they down, or are we cut off?
//!
//! A member that was cut off from all others confirms them down and owns every row. When its link is back, packets may come before the
//! first gossip does, of flows that the others hold; to send those by the consistent table would break them. So while half of the
//! members or more are lost, and packets have only just begun to come (again), the lost are *doubted*: an unknown flow's packets are
//! handed to its holder in the last table that had them, as to a suspected member's (design §4, step 5). If the holder lives it
//! forwards them; if it is down the packet is lost, and the client sends it again.
//!
//! ```text
//!   half or more are lost ──► doubted ──── packets come for DOUBT ───► believed down
//!                                ▲                                          │
//!                                └────────── no packet for SILENCE ─────────┘
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::decide::Outcome;
use phalanx_flow::{MemberId, Row};
use phalanx_forwarder::Counters;

/// So long after the first packet the others are believed to be down: gossip that can come has come. A member that is met again is in
/// the view after some 0.3 s.
pub(crate) const DOUBT: Duration = Duration::from_secs(2);

/// Who got no packet for so long may have been cut off. Longer than the first pauses between retransmissions of a connection that
/// waits for its holder.
pub(crate) const SILENCE: Duration = Duration::from_secs(5);

/// Members that ranked, and are in the view no more though they did not leave.
#[derive(Default)]
pub(crate) struct Lost {
    members: BTreeSet<MemberId>,
    /// These, and those of them that are back.
    ever: BTreeSet<MemberId>,
    /// The table that had them, and how many it ranked.
    table: Option<(Arc<[Row]>, usize)>,
    doubted: bool,
}

impl Lost {
    /// These have gone from a table of so many, whose rows are `rows`.
    pub(crate) fn add(&mut self, gone: impl Iterator<Item = MemberId>, table: (Arc<[Row]>, usize)) {
        let gone: Vec<MemberId> = gone.filter(|member| !self.members.contains(member)).collect();
        if gone.is_empty() {
            return;
        }
        if !self.doubted {
            // Those before are believed to be down, and what their table said of rows has changed hands since.
            *self = Self::default();
        }
        self.ever.extend(&gone);
        self.members.extend(gone);
        self.table.get_or_insert(table);
        self.doubted = true;
    }

    /// These are (again) in the view, and have said what they are.
    pub(crate) fn remove(&mut self, live: impl Fn(MemberId) -> bool) {
        self.members.retain(|member| !live(*member));
        if self.members.is_empty() {
            *self = Self::default();
        }
    }

    /// The handover window has closed; `ranked` members are left. Less than half lost is an ordinary failure, and over.
    pub(crate) fn close_window(&mut self, ranked: usize) {
        if !self.is_half(ranked) {
            *self = Self::default();
        }
    }

    /// Whether half of the members or more are lost, now that `ranked` are left. Who has left by itself is not lost: that few are left then
    /// says nothing of us.
    pub(crate) fn is_half(&self, ranked: usize) -> bool {
        self.table.as_ref().is_some_and(|(_, before)| self.ever.len() * 2 >= *before && ranked * 2 <= *before)
    }

    /// Whether anything changed by it.
    pub(crate) fn doubt(&mut self, doubted: bool) -> bool {
        std::mem::replace(&mut self.doubted, doubted) != doubted
    }

    /// Who is doubted, and the rows by which it may be asked, now that `ranked` members are left.
    pub(crate) fn doubted(&self, ranked: usize) -> Option<(&BTreeSet<MemberId>, &Arc<[Row]>)> {
        let (rows, _) = self.table.as_ref()?;
        (self.doubted && self.is_half(ranked)).then_some((&self.members, rows))
    }
}

/// Whether packets come: see the module's picture.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    packets: u64,
    last: Option<Instant>,
    since: Option<Instant>,
}

impl Traffic {
    /// Members were lost: packets that came before say nothing.
    pub(crate) fn begin(&mut self) {
        self.since = None;
    }

    /// Looks at the counters; says whether the lost are to be doubted.
    pub(crate) fn look(&mut self, now: Instant, counters: &Counters) -> bool {
        let packets = counters.outcomes.iter().sum::<u64>() - counters.outcome(Outcome::Passed);
        if packets != self.packets {
            self.packets = packets;
            self.last = Some(now);
            self.since.get_or_insert(now);
        } else if self.last.is_none_or(|last| now.duration_since(last) >= SILENCE) {
            self.since = None;
        }
        self.since.is_none_or(|since| now.duration_since(since) < DOUBT)
    }
}
