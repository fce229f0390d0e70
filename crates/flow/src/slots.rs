//! The backend table of a service: slot to best backend (design §3).
//!
//! The same ranking as the members', so that a backend that goes moves only its own slots, and members that disagree on one backend
//! agree on all others.

use alloc::vec::Vec;

use crate::entry::{BackendId, BackendIndex};
use crate::ranking::{Candidate, Ranking};
use crate::score::Scorer;
use crate::siphash::siphash;

/// Slots of every service: the low 16 bits of the flow hash, the same bits as the rendezvous row.
pub const SLOTS: usize = 65_536;

/// A backend and its share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RankedBackend {
    /// Its name.
    pub id: BackendId,
    /// Its share, relative to the other backends'; 0: drained, gets no new flows.
    pub weight: u32,
}

/// Which backend is the best of each slot: by rendezvous, SipHash-2-4 of `name ‖ slot u32` (little-endian), weighted by the
/// logarithmic method as [`Scoring::Rendezvous`](crate::score::Scoring::Rendezvous); a backend's name is the SipHash-2-4 of its id.
/// Independent of the order in which the backends are listed or changed.
#[derive(Clone, Debug)]
pub struct BackendTable {
    key: [u64; 2],
    ranking: Ranking<BackendId, 1>,
}

impl BackendTable {
    /// Ranks `backends`. Of a backend that is listed twice the largest weight counts.
    pub fn new(key: [u64; 2], backends: &[RankedBackend]) -> Self {
        let mut backends = backends.to_vec();
        backends.sort_unstable_by_key(|backend| (backend.id, core::cmp::Reverse(backend.weight)));
        backends.dedup_by_key(|backend| backend.id);
        let candidates = backends.iter().map(|backend| (backend.id, candidate(key, backend)));
        Self { key, ranking: Ranking::new(Scorer::Backend(key), SLOTS, false, candidates) }
    }

    /// The ranking key, by which tables of different services differ.
    pub const fn key(&self) -> [u64; 2] {
        self.key
    }

    /// Adds a backend, or gives one that is there this weight.
    pub fn add(&mut self, backend: RankedBackend) {
        if !self.ranking.reweight(backend.id, backend.weight) {
            self.ranking.add(backend.id, candidate(self.key, &backend));
        }
    }

    /// Takes a backend out; `false` if it was not there.
    pub fn remove(&mut self, id: &BackendId) -> bool {
        self.ranking.remove(*id)
    }

    /// Gives a backend another weight (0: drains it); `false` if it was not there.
    pub fn reweight(&mut self, id: &BackendId, weight: u32) -> bool {
        self.ranking.reweight(*id, weight)
    }

    /// Makes `backends` the backends, by as few changes as possible, or by a rebuild where that is cheaper.
    pub fn set_backends(&mut self, backends: &[RankedBackend]) {
        let mut wanted = backends.to_vec();
        wanted.sort_unstable_by_key(|backend| (backend.id, core::cmp::Reverse(backend.weight)));
        wanted.dedup_by_key(|backend| backend.id);
        let present = self.backends();
        let find = |list: &[RankedBackend], id: BackendId| -> Option<RankedBackend> {
            list.binary_search_by_key(&id, |backend| backend.id).ok().and_then(|at| list.get(at).copied())
        };
        let gone: Vec<BackendId> =
            present.iter().map(|backend| backend.id).filter(|id| find(&wanted, *id).is_none()).collect();
        let changed: Vec<RankedBackend> =
            wanted.iter().copied().filter(|backend| find(&present, backend.id) != Some(*backend)).collect();
        // A change costs one or two hashes a slot, a rebuild as many as there are backends.
        if gone.len().saturating_add(changed.len()) > wanted.len() {
            *self = Self::new(self.key, &wanted);
            return;
        }
        for id in gone {
            self.remove(&id);
        }
        for backend in changed {
            self.add(backend);
        }
    }

    /// The backend of a slot; `None` if no backend has a weight.
    pub fn best(&self, slot: u16) -> Option<BackendId> {
        let [best] = self.ranking.best(slot.into());
        best
    }

    /// All backends, drained ones too, by id.
    pub fn backends(&self) -> Vec<RankedBackend> {
        let mut backends: Vec<RankedBackend> = self
            .ranking
            .candidates()
            .map(|(id, candidate)| RankedBackend { id, weight: candidate.weight })
            .collect();
        backends.sort_unstable_by_key(|backend| backend.id);
        backends
    }

    /// The slots whose backend differs between the two tables.
    pub fn changed_slots<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u16> + 'a {
        (0..=u16::MAX).filter(|slot| self.best(*slot) != other.best(*slot))
    }

    /// The slots as a forwarder reads them, [`SLOTS`] of them. `index_of` gives each backend its place in the plan, and is asked
    /// once for each; a slot without a backend gets [`BackendIndex::NONE`].
    pub fn to_indexes(&self, index_of: impl Fn(&BackendId) -> BackendIndex) -> Vec<BackendIndex> {
        let indexes = self.ranking.map_positions(|id| index_of(&id), || BackendIndex::NONE);
        (0..SLOTS)
            .map(|slot| {
                let [position] = self.ranking.positions(slot);
                indexes.get(position as usize).copied().unwrap_or(BackendIndex::NONE)
            })
            .collect()
    }
}

fn candidate(key: [u64; 2], backend: &RankedBackend) -> Candidate {
    let BackendId { address, port, method, family } = backend.id;
    let mut bytes = [0; 20];
    let parts = address.into_iter().chain(port).chain([method, family]);
    for (byte, part) in bytes.iter_mut().zip(parts) {
        *byte = part;
    }
    Candidate { name: siphash(key, &bytes), weight: backend.weight, site: 0 }
}

#[cfg(test)]
mod tests;
