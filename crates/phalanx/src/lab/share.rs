//! Which backend the consistent table gives: how many live connections would be lost without state.

use std::net::SocketAddr;

use phalanx_control::planner::service_key;
use phalanx_flow::slots::{BackendTable, RankedBackend};
use phalanx_flow::{BackendId, FlowKey, FlowSeed, Method, flow_hash, key};

use super::member::{BackendLine, HASH_SEED};
use super::traffic::Live;

/// The backend table that every member computes from the present configuration.
#[derive(Debug)]
pub struct ConsistentTable {
    seed: FlowSeed,
    target: SocketAddr,
    table: BackendTable,
    numbers: Vec<(BackendId, u32)>,
}

impl ConsistentTable {
    /// The table of the lab's one service.
    pub fn new(target: SocketAddr, method: Method, gue_port: u16, backends: &[BackendLine]) -> Self {
        let seed = u128::from_str_radix(HASH_SEED, 16).unwrap_or_default();
        let seed = FlowSeed([(seed >> 64) as u64, seed as u64]);
        let id = |backend: &BackendLine| BackendId::new(backend.address, method, gue_port);
        let ranked: Vec<RankedBackend> = backends
            .iter()
            .map(|backend| RankedBackend {
                id: id(backend),
                weight: if backend.drain { 0 } else { backend.weight },
            })
            .collect();
        Self {
            seed,
            target,
            table: BackendTable::new(service_key(seed, target.ip(), target.port(), key::TCP), &ranked),
            numbers: backends.iter().map(|backend| (id(backend), backend.number)).collect(),
        }
    }

    /// The number of the backend that a new connection from `source` would get from a member without state.
    pub fn backend_of(&self, source: SocketAddr) -> Option<u32> {
        let key =
            FlowKey::new(key::TCP, (source.ip(), source.port()), (self.target.ip(), self.target.port()))?;
        // The slot is the low 16 bits of the flow hash (docs/design/0001-seams.md).
        let slot = flow_hash(self.seed, &key) as u16;
        let best = self.table.best(slot)?;
        self.numbers.iter().find(|(id, _)| *id == best).map(|(_, number)| *number)
    }

    /// The share of the connections whose backend is another one; `None` if none has a backend yet.
    pub fn deviating_share(&self, live: &[Live]) -> Option<f64> {
        let mut known = 0u32;
        let mut deviating = 0u32;
        for connection in live {
            let Some(backend) = connection.backend else { continue };
            known += 1;
            if self.backend_of(connection.source) != Some(backend) {
                deviating += 1;
            }
        }
        (known > 0).then(|| f64::from(deviating) / f64::from(known))
    }
}

#[cfg(test)]
mod tests {
    use super::super::traffic::Kind;
    use super::*;

    fn backends(count: u32) -> Vec<BackendLine> {
        (1..=count)
            .map(|number| BackendLine {
                number,
                address: format!("10.0.1.{}", 100 + number).parse().unwrap(),
                weight: 100,
                drain: false,
            })
            .collect()
    }

    #[test]
    fn draining_one_of_three_backends_makes_its_connections_deviate_and_no_other() {
        let target = "192.0.2.1:80".parse().unwrap();
        let mut lines = backends(3);
        let before = ConsistentTable::new(target, Method::L2, 6080, &lines);
        let live: Vec<Live> = (2000..5000)
            .map(|port| {
                let source = SocketAddr::from(([198, 18, 0, 2], port));
                Live { kind: Kind::Long, source, backend: before.backend_of(source) }
            })
            .collect();
        assert_eq!(before.deviating_share(&live), Some(0.0));
        lines[1].drain = true;
        let after = ConsistentTable::new(target, Method::L2, 6080, &lines);
        let drained = live.iter().filter(|live| live.backend == Some(2)).count() as f64 / live.len() as f64;
        assert!((0.28..0.39).contains(&drained), "{drained}");
        assert_eq!(after.deviating_share(&live), Some(drained));
        assert_eq!(after.deviating_share(&[]), None);
    }
}
