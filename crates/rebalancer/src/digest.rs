//! Digests of what a member holds, row by row, so that two holders can find out what one of them lacks.
//!
//! A digest does not depend on the order of the records, can be kept up to date record by record, and is the same on every
//! platform and in every version: SipHash-2-4 under a fixed key over little-endian fields.

use std::collections::BTreeMap;
use std::hash::Hasher;

use phalanx_flow::Record;
use siphasher::sip::SipHasher24;

use crate::ranking::Ranking;

/// The digest of the records of one row.
///
/// Equal digests mean equal records but for a chance of about 2^-64; the sums resist duplicates, which a plain XOR would cancel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowDigest {
    /// How many records.
    pub count: u32,
    /// The wrapping sum of the records' hashes.
    pub sum: u64,
}

impl RowDigest {
    /// Adds a record.
    pub fn add(&mut self, record: &Record) {
        self.count = self.count.wrapping_add(1);
        self.sum = self.sum.wrapping_add(record_hash(record));
    }

    /// Takes a record away that was added before.
    pub fn remove(&mut self, record: &Record) {
        self.count = self.count.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(record_hash(record));
    }
}

/// The digests of all rows that have records, by row.
pub fn row_digests<'a>(
    ranking: &dyn Ranking,
    records: impl IntoIterator<Item = &'a Record>,
) -> BTreeMap<u32, RowDigest> {
    let mut digests = BTreeMap::<u32, RowDigest>::new();
    for record in records {
        digests.entry(ranking.row_of(&record.key)).or_default().add(record);
    }
    digests
}

/// Rows whose digests differ between two holders, in order; a row that only one side has differs.
pub fn differing_rows(ours: &BTreeMap<u32, RowDigest>, theirs: &BTreeMap<u32, RowDigest>) -> Vec<u32> {
    let mut rows: Vec<u32> =
        ours.iter().filter(|&(row, digest)| theirs.get(row) != Some(digest)).map(|(&row, _)| row).collect();
    rows.extend(theirs.keys().filter(|row| !ours.contains_key(row)));
    rows.sort_unstable();
    rows
}

/// What identifies a record: flow, backend, birth and update. Idle time and local flags are not part of it.
fn record_hash(record: &Record) -> u64 {
    // The key is public: peers are authenticated, and a collision only delays a repair.
    let mut hasher = SipHasher24::new_with_keys(0x7068_616c_616e_7821, 0x726f_775f_6469_6721);
    hasher.write(&record.key.source);
    hasher.write(&record.key.destination);
    hasher.write(&record.key.source_port);
    hasher.write(&record.key.destination_port);
    hasher.write(&[record.key.protocol, record.key.family]);
    hasher.write(&record.backend.address);
    hasher.write(&record.backend.port);
    hasher.write(&[record.backend.method, record.backend.family]);
    hasher.write(&record.birth.to_le_bytes());
    hasher.write(&record.update.to_le_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestRanking, record};

    #[test]
    fn digest_does_not_depend_on_the_order() {
        let ranking = TestRanking::new(&[1, 2, 3], 16);
        let records: Vec<_> = (0..200).map(|n| record(n, 1)).collect();
        let reversed: Vec<_> = records.iter().rev().copied().collect();
        assert_eq!(row_digests(&ranking, &records), row_digests(&ranking, &reversed));
    }

    #[test]
    fn every_part_of_a_records_identity_changes_its_rows_digest() {
        let ranking = TestRanking::new(&[1, 2, 3], 16);
        let base = record(7, 1);
        let mut backend = base;
        backend.backend = record(7, 2).backend;
        let mut birth = base;
        birth.birth += 1;
        let mut update = base;
        update.update += 1;
        let of = |record: Record| row_digests(&ranking, &[record]);
        for other in [backend, birth, update] {
            assert_eq!(differing_rows(&of(base), &of(other)), [ranking.row_of(&base.key)]);
        }
        // The twin: what is not identity changes nothing.
        let mut idle = base;
        idle.idle_ms += 1;
        assert_eq!(differing_rows(&of(base), &of(idle)), []);
    }

    #[test]
    fn a_record_only_one_side_has_makes_its_row_differ_either_way() {
        let ranking = TestRanking::new(&[1, 2, 3], 16);
        let both: Vec<_> = (0..40).map(|n| record(n, 1)).collect();
        let more = record(99, 1);
        let ours = row_digests(&ranking, &both);
        let theirs = row_digests(&ranking, both.iter().chain([&more]));
        assert_eq!(differing_rows(&ours, &theirs), [ranking.row_of(&more.key)]);
        assert_eq!(differing_rows(&theirs, &ours), [ranking.row_of(&more.key)]);
        assert_eq!(differing_rows(&ours, &ours), []);
    }

    #[test]
    fn removing_undoes_adding() {
        let mut digest = RowDigest::default();
        digest.add(&record(1, 1));
        let before = digest;
        digest.add(&record(2, 1));
        assert_ne!(digest, before);
        digest.remove(&record(2, 1));
        assert_eq!(digest, before);
    }
}
