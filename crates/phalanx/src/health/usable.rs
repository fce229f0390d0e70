//! Which backends take new flows.

/// A backend of a service, as far as new flows are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Weight for new flows: 0 for a backend that is drained.
    pub weight: u32,
    /// What the checks say; true without checks.
    pub healthy: bool,
}

/// The weights with which a service's backends are ranked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usable {
    /// One per candidate, in their order; 0 takes no new flows.
    pub weights: Vec<u32>,
    /// No backend that takes new flows is healthy, so all of them are used.
    pub fail_open: bool,
}

/// The weights of a service's backends for new flows.
///
/// Backends that are not healthy take none, unless that leaves nobody: then health does not count (fail open), because checks that
/// all fail at once rather mean that checking is broken, and a backend that may be dead is no worse than none.
/// Drained backends take none in any case.
pub fn usable_backends(candidates: &[Candidate]) -> Usable {
    let takes = |candidate: &&Candidate| candidate.weight > 0;
    let any = candidates.iter().any(|candidate| candidate.weight > 0);
    let fail_open = any && !candidates.iter().filter(takes).any(|candidate| candidate.healthy);
    let weight = |candidate: &Candidate| {
        if candidate.healthy || fail_open { candidate.weight } else { 0 }
    };
    Usable { weights: candidates.iter().map(weight).collect(), fail_open }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable(candidates: &[(u32, bool)]) -> (Vec<u32>, bool) {
        let candidates: Vec<Candidate> =
            candidates.iter().map(|&(weight, healthy)| Candidate { weight, healthy }).collect();
        let Usable { weights, fail_open } = usable_backends(&candidates);
        (weights, fail_open)
    }

    #[test]
    fn healthy_backends_keep_their_weight_and_the_others_take_nothing() {
        assert_eq!(usable(&[(100, true), (50, false), (25, true)]), (vec![100, 0, 25], false));
        assert_eq!(usable(&[(100, true), (50, true)]), (vec![100, 50], false));
    }

    #[test]
    fn when_no_backend_is_healthy_all_are_used_and_it_is_said() {
        assert_eq!(usable(&[(100, false), (50, false)]), (vec![100, 50], true));
        // One healthy backend is enough to close again.
        assert_eq!(usable(&[(100, false), (50, true)]), (vec![0, 50], false));
    }

    #[test]
    fn a_drained_backend_takes_nothing_even_when_it_alone_is_healthy() {
        assert_eq!(usable(&[(0, true), (50, true)]), (vec![0, 50], false));
        assert_eq!(usable(&[(0, true), (50, false)]), (vec![0, 50], true));
        assert_eq!(usable(&[(0, false), (50, false)]), (vec![0, 50], true));
    }

    #[test]
    fn a_service_that_is_drained_whole_takes_nothing_and_does_not_fail_open() {
        assert_eq!(usable(&[(0, true), (0, false)]), (vec![0, 0], false));
        assert_eq!(usable(&[]), (vec![], false));
    }
}
