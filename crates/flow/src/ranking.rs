//! The ranking of candidates in every row, changed incrementally. Members and backends share it.
//!
//! A row keeps its best `K` candidates. Who joins is compared with the last of them; when one of them goes, the row is computed anew.
//! With N candidates each of them stands in K / N of the rows and a row costs N hashes, so a change costs about
//! K + 1 hashes per row, however many candidates there are.

use alloc::vec::Vec;
use core::cmp::Ordering;

use crate::score::{Bar, Scorer};

/// Who is ranked, by what [`Scorer::value`] takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// What is hashed.
    pub(crate) name: u64,
    /// 0: not ranked.
    pub(crate) weight: u32,
    pub(crate) site: u32,
}

/// One place of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    value: u64,
    /// Position in the list of candidates.
    index: u32,
    /// 0: nobody.
    weight: u32,
}

impl Place {
    const EMPTY: Self = Self { value: 0, index: u32::MAX, weight: 0 };

    #[inline(always)]
    const fn score(&self) -> (u64, u32) {
        (self.value, self.weight)
    }
}

/// What comparing two places needs; apart from the rows, so that those can change meanwhile.
#[derive(Clone, Debug)]
struct Field<I> {
    scorer: Scorer,
    candidates: Vec<Candidate>,
    /// Beside the candidates, so that a scan of all reads few bytes; `None`: vacant.
    ids: Vec<Option<I>>,
}

impl<I: Copy + Ord> Field<I> {
    #[inline(always)]
    fn place(&self, row: u32, index: u32, candidate: &Candidate) -> Place {
        Place { value: self.scorer.value(row, candidate.name), index, weight: candidate.weight }
    }

    fn id(&self, index: u32) -> Option<I> {
        self.ids.get(index as usize).copied().flatten()
    }

    fn site(&self, place: &Place) -> Option<u32> {
        self.candidates.get(place.index as usize).map(|candidate| candidate.site)
    }

    /// Whether `a` is ranked before `b`. Equal scores go to the higher id (claim 11).
    #[inline(always)]
    fn beats(&self, a: &Place, b: &Place) -> bool {
        if a.weight == 0 || b.weight == 0 {
            return a.weight != 0;
        }
        match self.scorer.compare(a.score(), b.score()) {
            Ordering::Greater => true,
            Ordering::Less => false,
            Ordering::Equal => self.id(a.index) > self.id(b.index),
        }
    }

    /// Puts `place` where it belongs in a row that does not have it.
    #[inline(always)]
    fn offer<const K: usize>(&self, best: &mut [Place; K], other: Option<&mut Place>, place: Place) {
        if let (Some(other), Some(owner)) = (other, best.first())
            && owner.weight != 0
            && self.site(owner) != self.site(&place)
        {
            if self.beats(&place, owner) {
                *other = *owner;
            } else if self.beats(&place, other) {
                *other = place;
            }
        }
        let below = |last: &Place| {
            self.scorer.surely_below(place.score(), &Bar::new(last.score())) || !self.beats(&place, last)
        };
        if best.last().is_none_or(below) {
            return;
        }
        let mut carried = place;
        for held in best.iter_mut() {
            if self.beats(&carried, held) {
                core::mem::swap(held, &mut carried);
            }
        }
    }

    /// Computes a row from nothing.
    fn scan<const K: usize>(&self, row: u32, best: &mut [Place; K], mut other: Option<&mut Place>) {
        *best = [Place::EMPTY; K];
        if let Some(other) = other.as_deref_mut() {
            *other = Place::EMPTY;
        }
        let mut last_bar = Bar::new(Place::EMPTY.score());
        let mut other_bar = last_bar;
        for (index, candidate) in (0_u32..).zip(&self.candidates) {
            if candidate.weight == 0 {
                continue;
            }
            let place = self.place(row, index, candidate);
            let below = |bar: &Bar| self.scorer.surely_below(place.score(), bar);
            if below(&last_bar) && (other.is_none() || below(&other_bar)) {
                continue;
            }
            self.offer(best, other.as_deref_mut(), place);
            last_bar = best.last().map_or(last_bar, |last| Bar::new(last.score()));
            other_bar = other.as_deref().map_or(other_bar, |other| Bar::new(other.score()));
        }
    }
}

/// The best `K` of every row.
#[derive(Clone, Debug)]
pub(crate) struct Ranking<I, const K: usize> {
    field: Field<I>,
    /// Positions whose candidate has gone.
    vacant: Vec<u32>,
    rows: Vec<[Place; K]>,
    /// With the site rule: the best of another site than the best's. Otherwise empty.
    others: Vec<Place>,
}

impl<I: Copy + Ord, const K: usize> Ranking<I, K> {
    /// Ranks `candidates`, whose ids all differ, in `rows` rows. `other_site`: keep the best of another site than the best's, too.
    pub(crate) fn new(
        scorer: Scorer,
        rows: usize,
        other_site: bool,
        candidates: impl Iterator<Item = (I, Candidate)>,
    ) -> Self {
        let (ids, candidates) = candidates.map(|(id, candidate)| (Some(id), candidate)).unzip();
        let mut ranking = Self {
            field: Field { scorer, candidates, ids },
            vacant: Vec::new(),
            rows: alloc::vec![[Place::EMPTY; K]; rows],
            others: if other_site { alloc::vec![Place::EMPTY; rows] } else { Vec::new() },
        };
        let mut others = ranking.others.iter_mut();
        for (row, best) in (0_u32..).zip(&mut ranking.rows) {
            ranking.field.scan(row, best, others.next());
        }
        ranking
    }

    pub(crate) fn row_count(&self) -> usize {
        self.rows.len()
    }

    /// All candidates, those of weight 0 too, in no particular order.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = (I, Candidate)> {
        self.field
            .ids
            .iter()
            .zip(&self.field.candidates)
            .filter_map(|(id, candidate)| Some(((*id)?, *candidate)))
    }

    /// What is known of `id`.
    pub(crate) fn get(&self, id: I) -> Option<Candidate> {
        self.candidates().find_map(|(known, candidate)| (known == id).then_some(candidate))
    }

    /// Adds a candidate that is not there yet.
    pub(crate) fn add(&mut self, id: I, candidate: Candidate) {
        let index = match self.vacant.pop() {
            Some(index) => index,
            None => {
                self.field.candidates.push(candidate);
                self.field.ids.push(None);
                // Far below 2^32: every candidate takes 16 bytes and more.
                (self.field.ids.len() as u32).wrapping_sub(1)
            }
        };
        if let Some(entry) = self.field.candidates.get_mut(index as usize) {
            *entry = candidate;
        }
        if let Some(entry) = self.field.ids.get_mut(index as usize) {
            *entry = Some(id);
        }
        if candidate.weight != 0 {
            self.refresh(index, &candidate, 0);
        }
    }

    /// Takes a candidate out; `false` if it was not there.
    pub(crate) fn remove(&mut self, id: I) -> bool {
        let Some(index) = self.position(id) else { return false };
        if let Some(entry) = self.field.ids.get_mut(index as usize) {
            *entry = None;
        }
        self.set_weight(index, 0);
        self.vacant.push(index);
        true
    }

    /// Gives a candidate another weight; `false` if it was not there.
    pub(crate) fn reweight(&mut self, id: I, weight: u32) -> bool {
        let Some(index) = self.position(id) else { return false };
        self.set_weight(index, weight);
        true
    }

    /// Who is ranked in a row, best first.
    pub(crate) fn best(&self, row: usize) -> [Option<I>; K] {
        self.positions(row).map(|index| self.field.id(index))
    }

    /// As [`Ranking::best`], by position in [`Ranking::map_positions`]. With the site rule the second is of another site where
    /// there is one, and the one it displaces comes third.
    pub(crate) fn positions(&self, row: usize) -> [u32; K] {
        let Some(best) = self.rows.get(row) else { return [Place::EMPTY.index; K] };
        let mut positions = best.map(|place| place.index);
        if let Some(other) = self.others.get(row)
            && other.weight != 0
        {
            let mut carried = other.index;
            for position in positions.iter_mut().skip(1) {
                core::mem::swap(position, &mut carried);
                if carried == other.index {
                    break;
                }
            }
        }
        positions
    }

    /// `map` of every candidate, by position; `vacant` where there is none.
    pub(crate) fn map_positions<T>(
        &self,
        mut map: impl FnMut(I) -> T,
        mut vacant: impl FnMut() -> T,
    ) -> Vec<T> {
        self.field
            .ids
            .iter()
            .map(|id| match id {
                Some(id) => map(*id),
                None => vacant(),
            })
            .collect()
    }

    fn position(&self, id: I) -> Option<u32> {
        (0_u32..).zip(&self.field.ids).find_map(|(index, known)| (*known == Some(id)).then_some(index))
    }

    fn set_weight(&mut self, index: u32, weight: u32) {
        let Some(candidate) = self.field.candidates.get_mut(index as usize) else { return };
        if candidate.weight == weight {
            return;
        }
        let previous = candidate.weight;
        candidate.weight = weight;
        let candidate = *candidate;
        self.refresh(index, &candidate, previous);
    }

    /// Brings every row up to date after the weight of the candidate at `index` changed from `previous` (0: it was not ranked).
    fn refresh(&mut self, index: u32, candidate: &Candidate, previous: u32) {
        let mut others = self.others.iter_mut();
        for (row, best) in (0_u32..).zip(&mut self.rows) {
            let other = others.next();
            let is_it = |place: &Place| place.index == index;
            if previous != 0 && (best.iter().any(is_it) || other.as_deref().is_some_and(is_it)) {
                // Who rises from its place needs no look at the others, only to be put in again above.
                let rises = self.field.scorer.is_strict() && candidate.weight > previous;
                if !rises {
                    self.field.scan(row, best, other);
                    continue;
                }
                take_out(best, index);
            }
            if candidate.weight != 0 {
                self.field.offer(best, other, self.field.place(row, index, candidate));
            }
        }
    }
}

/// Takes the candidate at `index` out of a row, if it is there, and closes the gap.
fn take_out<const K: usize>(best: &mut [Place; K], index: u32) {
    if !best.iter().any(|place| place.index == index) {
        return;
    }
    let mut carried = Place::EMPTY;
    for place in best.iter_mut().rev() {
        core::mem::swap(place, &mut carried);
        if carried.index == index {
            return;
        }
    }
}
