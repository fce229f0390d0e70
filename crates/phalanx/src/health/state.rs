//! From single checks to "healthy".

/// Whether a backend is healthy, by counting checks.
///
/// ```text
///               bad × fall in a row
///   Healthy ─────────────────────────► Unhealthy
///      ▲                                   │
///      └───────────────────────────────────┘
///               good × rise in a row
/// ```
/// A check that agrees with the state starts the count again. Before the first good check a single answer that says no suffices: nothing is
/// known then that it would contradict, and a member that has just joined must not send new connections where no other member does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    healthy: bool,
    /// No check has said so yet.
    assumed: bool,
    /// Checks in a row that contradict the state.
    against: u32,
    rise: u32,
    fall: u32,
}

impl Health {
    /// A backend that checks have shown to be healthy.
    pub const fn healthy(rise: u32, fall: u32) -> Self {
        Self { healthy: true, assumed: false, against: 0, rise, fall }
    }

    /// A backend taken for healthy until it denies it, or `fall` checks in a row are bad: at the start of a daemon, when nobody has checked
    /// yet and connections may be there already.
    pub const fn assumed(rise: u32, fall: u32) -> Self {
        Self { assumed: true, ..Self::healthy(rise, fall) }
    }

    /// A backend taken for unhealthy until one good check: one that was added while others serve.
    pub const fn added(rise: u32, fall: u32) -> Self {
        Self { healthy: false, assumed: false, against: rise.saturating_sub(1), rise, fall }
    }

    /// Whether the backend is healthy.
    pub const fn is_healthy(&self) -> bool {
        self.healthy
    }

    /// Counts a check; the new state if it changed. `answered`: a bad one was so by what came back, not for want of it.
    pub fn handle_check(&mut self, good: bool, answered: bool) -> Option<bool> {
        let denied = self.assumed && answered;
        self.assumed &= !good;
        if good == self.healthy {
            self.against = 0;
            return None;
        }
        self.against = self.against.saturating_add(1);
        let needed = match self.healthy {
            true if denied => 1,
            true => self.fall,
            false => self.rise,
        };
        if self.against < needed {
            return None;
        }
        self.healthy = good;
        self.assumed = false;
        self.against = 0;
        Some(good)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The state after each check; `+` is a good one, `-` a bad one, `x` a bad answer, `H` and `U` are the answers expected, `.` is no change.
    fn walk(mut health: Health, checks: &str, expected: &str) {
        let answers: String = checks
            .chars()
            .map(|check| match health.handle_check(check == '+', check == 'x') {
                Some(true) => 'H',
                Some(false) => 'U',
                None => '.',
            })
            .collect();
        assert_eq!(answers, expected, "{checks}");
    }

    #[test]
    fn it_takes_fall_bad_checks_in_a_row_to_fall_and_rise_good_ones_to_rise() {
        walk(Health::healthy(2, 3), "---", "..U");
        walk(Health::healthy(2, 3), "---++", "..U.H");
        walk(Health::healthy(1, 1), "-+-+", "UHUH");
        walk(Health::healthy(2, 3), "---++---", "..U.H..U");
    }

    #[test]
    fn a_check_that_agrees_starts_the_count_again() {
        walk(Health::healthy(2, 3), "--+--+--+", ".........");
        walk(Health::healthy(2, 3), "---+-+-+-", "..U......");
        walk(Health::healthy(2, 3), "++++---", "......U");
    }

    #[test]
    fn an_added_backend_needs_one_good_check_and_later_rise() {
        assert!(!Health::added(3, 1).is_healthy());
        walk(Health::added(3, 1), "+", "H");
        walk(Health::added(3, 1), "-++++-+++", "...H.U..H");
        walk(Health::added(1, 2), "-+--+", ".H.UH");
    }

    #[test]
    fn what_nobody_has_checked_is_believed_when_it_says_no_and_not_when_it_is_silent() {
        walk(Health::assumed(2, 3), "x", "U");
        walk(Health::assumed(2, 3), "-x++xx", ".U.H..");
        walk(Health::assumed(2, 3), "---", "..U");
        walk(Health::assumed(2, 3), "+xxx", "...U");
        walk(Health::healthy(2, 3), "xxx", "..U");
    }

    #[test]
    fn every_state_and_check_is_covered_for_small_counts() {
        for (rise, fall) in [(1, 1), (1, 3), (2, 2), (3, 1)] {
            for bits in 0u32..1 << 10 {
                let checks: Vec<bool> = (0..10).map(|bit| bits >> bit & 1 == 1).collect();
                let mut health = Health::healthy(rise, fall);
                for end in 1..=checks.len() {
                    let changed = health.handle_check(checks[end - 1], true);
                    // The reference: the state is what the latest long enough run said.
                    let mut state = true;
                    let mut run = 0;
                    for &check in &checks[..end] {
                        run = if check == state { 0 } else { run + 1 };
                        if run == if state { fall } else { rise } {
                            state = check;
                            run = 0;
                        }
                    }
                    assert_eq!(health.is_healthy(), state, "{rise} {fall} {checks:?} {end}");
                    assert!(changed.is_none_or(|now| now == state));
                }
            }
        }
    }
}
