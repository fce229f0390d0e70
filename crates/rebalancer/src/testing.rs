//! What the tests of this crate share.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use phalanx_flow::{BackendId, FlowFlags, FlowKey, FlowState, MemberId, Method, Record};

use crate::ranking::{Holders, MAX_HOLDERS, Ranking};

/// A weighted rendezvous ranking, simple and slow, over made-up scores.
#[derive(Clone, Debug)]
pub(crate) struct TestRanking {
    rows: Vec<Holders>,
    /// How many of each row's hold its flows.
    holders: usize,
}

impl TestRanking {
    pub(crate) fn new(members: &[u32], rows: u32) -> Self {
        Self::weighted(&members.iter().map(|&id| (id, 1)).collect::<Vec<_>>(), rows)
    }

    /// Members with weights; weight 0 is not ranked.
    pub(crate) fn weighted(members: &[(u32, u32)], rows: u32) -> Self {
        let row = |row: u32| {
            let mut ranked: Vec<_> = members
                .iter()
                .filter(|(_, weight)| *weight > 0)
                .map(|&(id, weight)| {
                    let score = mix(u64::from(row) << 32 | u64::from(id));
                    let cost = -((score as f64 + 1.0) / 2f64.powi(64)).ln() / f64::from(weight);
                    (cost, MemberId(id))
                })
                .collect();
            ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
            std::array::from_fn(|rank| ranked.get(rank).map(|r| r.1))
        };
        Self { rows: (0..rows).map(row).collect(), holders: 2 }
    }

    /// The same members with so many backups a row; otherwise it is one.
    pub(crate) fn with_backups(self, backups: usize) -> Self {
        assert!(backups < MAX_HOLDERS);
        Self { holders: backups + 1, ..self }
    }

    /// Backups a row.
    pub(crate) fn backups(&self) -> usize {
        self.holders - 1
    }

    /// A table written by hand: owner and backups of each row, 0 for nobody.
    pub(crate) fn by_hand<const HOLDERS: usize>(rows: &[[u32; HOLDERS]]) -> Self {
        let id = |id: &u32| (*id != 0).then_some(MemberId(*id));
        let row = |row: &[u32; HOLDERS]| std::array::from_fn(|rank| row.get(rank).and_then(id));
        Self { rows: rows.iter().map(row).collect(), holders: HOLDERS }
    }
}

impl Ranking for TestRanking {
    fn row_of(&self, key: &FlowKey) -> u32 {
        let port = u32::from(u16::from_be_bytes(key.source_port));
        (mix(u64::from(port)) % self.rows.len() as u64) as u32
    }

    fn holders(&self, row: u32) -> Holders {
        let mut holders = self.rows.get(row as usize).copied().unwrap_or_default();
        holders[self.holders..].fill(None);
        holders
    }

    fn row_count(&self) -> u32 {
        self.rows.len() as u32
    }
}

/// SplitMix64's finisher.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The key of flow number `n`.
pub(crate) fn key(n: u16) -> FlowKey {
    let ip = |last| IpAddr::V4(Ipv4Addr::new(192, 0, 2, last));
    FlowKey::new(6, (ip(1), n), (ip(200), 443)).expect("both are IPv4")
}

/// The name of backend number `n`.
pub(crate) fn backend(n: u8) -> BackendId {
    BackendId::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, n)), Method::Gue, 6080)
}

/// An established record of flow `n` with a backend.
pub(crate) fn record(n: u16, to: u8) -> Record {
    Record {
        key: key(n),
        backend: backend(to),
        birth: 1_000,
        update: 1,
        state: FlowState::Established,
        flags: FlowFlags(0),
        idle_ms: 0,
    }
}

/// Where virtual time begins.
#[expect(
    clippy::disallowed_methods,
    reason = "an Instant can be had in no other way; nothing depends on which it is"
)]
pub(crate) fn epoch() -> Instant {
    Instant::now()
}
