//! Our part in a planned change: send ahead what the pending table moves, and say when that is done
//! (docs/design/0006-planned-changes.md).
//!
//! ```text
//!                 a view is pending: send                 all sent, or STUCK_AFTER without progress: report
//!   Settled ───────────────────────────────► Sending ─────────────────────────────────► Reported
//!      ▲                                       │  ▲                                        │
//!      │     nothing is pending any more       │  │      another view is pending: send     │
//!      └───────────────────────────────────────┴──┼────────────────────────────────────────┤
//!                                                 └────────────────────────────────────────┘
//! ```
//! Who wishes the change and puts it in force is `phalanx_membership`'s business; here nobody waits for anybody.

use std::time::{Duration, Instant};

use phalanx_membership::Digest;

/// Transfers that have not moved on for this long wait for a peer that cannot be reached, though gossip reaches it: the change must not
/// wait with them. What they carry goes on being sent, and counts as unprotected once the change is in force. Longer than a lost
/// connection needs to be found (6 s) and dialled again.
pub const STUCK_AFTER: Duration = Duration::from_secs(10);

/// See the module's picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No change is planned.
    Settled,
    /// Tables for the pending view are on their way.
    Sending {
        /// The pending view.
        name: Digest,
        /// Records acknowledged so far, and since when.
        acked: usize,
        /// When that was last news.
        since: Instant,
    },
    /// We have said that we are ready for the pending view.
    Reported {
        /// The pending view.
        name: Digest,
    },
}

/// What happens to a [`Phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// The pending view has this name; `None`: no change is planned.
    Pending(Option<Digest>),
    /// Time passes, and the transfers stand like this.
    Progress {
        /// None is under way.
        done: bool,
        /// Records acknowledged, over all that are.
        acked: usize,
    },
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// Nothing.
    Nothing,
    /// Say that we are ready for this pending view.
    Report(Digest),
    /// The same, though transfers are stuck.
    ReportStuck(Digest),
}

impl Phase {
    /// The next phase, and what follows. The only place where phases change.
    pub fn after(self, now: Instant, happening: Happening) -> (Self, Consequence) {
        match (self, happening) {
            (Self::Sending { name, .. } | Self::Reported { name }, Happening::Pending(Some(same)))
                if name == same =>
            {
                (self, Consequence::Nothing)
            }
            (_, Happening::Pending(Some(name))) => {
                (Self::Sending { name, acked: 0, since: now }, Consequence::Nothing)
            }
            (_, Happening::Pending(None)) => (Self::Settled, Consequence::Nothing),
            (Self::Sending { name, .. }, Happening::Progress { done: true, .. }) => {
                (Self::Reported { name }, Consequence::Report(name))
            }
            (Self::Sending { name, acked, .. }, Happening::Progress { acked: more, .. }) if more != acked => {
                (Self::Sending { name, acked: more, since: now }, Consequence::Nothing)
            }
            (Self::Sending { name, since, .. }, Happening::Progress { .. })
                if now.saturating_duration_since(since) >= STUCK_AFTER =>
            {
                (Self::Reported { name }, Consequence::ReportStuck(name))
            }
            (Self::Settled | Self::Sending { .. } | Self::Reported { .. }, Happening::Progress { .. }) => {
                (self, Consequence::Nothing)
            }
        }
    }

    /// Whether we have sent all that the pending table moves.
    pub fn is_reported(self) -> bool {
        matches!(self, Self::Reported { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant cannot be made otherwise; only differences count"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn every_happening_in_every_phase_leads_where_the_picture_says() {
        let now = start();
        let (one, two) = (Digest(1), Digest(2));
        let sending = |name, acked, since| Phase::Sending { name, acked, since };
        let reported = |name| Phase::Reported { name };
        let fresh = sending(one, 5, now);
        let old = sending(one, 5, now - STUCK_AFTER);
        let pending = Happening::Pending;
        let progress = |done, acked| Happening::Progress { done, acked };
        let nothing = Consequence::Nothing;
        let table = [
            (Phase::Settled, pending(None), Phase::Settled, nothing),
            (Phase::Settled, pending(Some(one)), sending(one, 0, now), nothing),
            (Phase::Settled, progress(true, 0), Phase::Settled, nothing),
            (Phase::Settled, progress(false, 9), Phase::Settled, nothing),
            (fresh, pending(None), Phase::Settled, nothing),
            (fresh, pending(Some(one)), fresh, nothing),
            (fresh, pending(Some(two)), sending(two, 0, now), nothing),
            (fresh, progress(true, 5), reported(one), Consequence::Report(one)),
            (fresh, progress(false, 6), sending(one, 6, now), nothing),
            (fresh, progress(false, 5), fresh, nothing),
            (old, progress(false, 6), sending(one, 6, now), nothing),
            (old, progress(false, 5), reported(one), Consequence::ReportStuck(one)),
            (old, progress(true, 5), reported(one), Consequence::Report(one)),
            (reported(one), pending(None), Phase::Settled, nothing),
            (reported(one), pending(Some(one)), reported(one), nothing),
            (reported(one), pending(Some(two)), sending(two, 0, now), nothing),
            (reported(one), progress(true, 5), reported(one), nothing),
            (reported(one), progress(false, 9), reported(one), nothing),
        ];
        for (from, happening, to, consequence) in table {
            assert_eq!(from.after(now, happening), (to, consequence), "{happening:?} in {from:?}");
        }
    }
}
