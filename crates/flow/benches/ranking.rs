//! One change among 1,000 members or backends, beside the full rebuild: `cargo bench -p phalanx-flow --bench ranking`.
//!
//! The limit is 10 ms for a change.
#![expect(clippy::expect_used, reason = "a benchmark runs on the host and may fail loudly")]
#![expect(clippy::arithmetic_side_effects, reason = "a benchmark runs on the host and may fail loudly")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use phalanx_flow::{
    BackendId, BackendIndex, BackendTable, BackupSite, FlowKey, FlowSeed, MemberId, MemberSlot, Method,
    RankedBackend, RankedMember, RowTable, Scoring, flow_hash,
};

const COUNT: u32 = 1000;
const ROWS: usize = 65_536;
const KEY: [u64; 2] = [1, 2];

fn members(weight: fn(u32) -> u32) -> Vec<RankedMember> {
    (1..=COUNT).map(|n| RankedMember { id: MemberId(n), weight: weight(n), site: n % 3 }).collect()
}

fn backends(weight: fn(u32) -> u32) -> Vec<RankedBackend> {
    (1..=COUNT).map(|n| RankedBackend { id: backend(n), weight: weight(n) }).collect()
}

fn backend(n: u32) -> BackendId {
    BackendId::new(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 | n)), Method::IpIp, 0)
}

fn member_table(members: &[RankedMember], rule: BackupSite) -> RowTable {
    RowTable::new(Scoring::Rendezvous { key: KEY }, ROWS, rule, members).expect("the members differ")
}

/// A name, and the weight of the n-th.
type Weights = (&'static str, fn(u32) -> u32);
/// A name, and what is done to the table.
type Change<'a, T> = (&'static str, &'a dyn Fn(&mut T));

const WEIGHTS: [Weights; 2] = [("equal", |_| 1), ("distinct", |n| n)];

fn row_table(criterion: &mut Criterion) {
    for (weights, weight) in WEIGHTS {
        for (rule_name, rule) in [("any", BackupSite::Any), ("other", BackupSite::Other)] {
            let mut group =
                criterion.benchmark_group(format!("1000 members, {weights} weights, site {rule_name}"));
            let list = members(weight);
            let table = member_table(&list, rule);
            let newcomer = RankedMember { id: MemberId(5000), weight: weight(500), site: 1 };
            let changes: [Change<'_, RowTable>; 5] = [
                ("add", &|table| table.add(newcomer).expect("the id is free")),
                ("remove", &|table| table.remove(MemberId(500)).expect("the id is there")),
                ("double weight", &|table| {
                    table.reweight(MemberId(500), 2 * weight(500)).expect("the id is there")
                }),
                ("raise weight to more than all others'", &|table| {
                    table.reweight(MemberId(500), 1 << 20).expect("the id is there")
                }),
                ("drain", &|table| table.reweight(MemberId(500), 0).expect("the id is there")),
            ];
            for (name, change) in changes {
                group.bench_function(name, |bencher| {
                    bencher.iter_batched_ref(|| table.clone(), change, BatchSize::PerIteration);
                });
            }
            group.bench_function("to_rows", |bencher| {
                bencher.iter(|| table.to_rows(|id| MemberSlot(id.0 as u16)));
            });
            let mut changed = table.clone();
            changed.add(newcomer).expect("the id is free");
            group.bench_function("changed_rows", |bencher| {
                bencher.iter(|| table.changed_rows(&changed).count())
            });
            if rule == BackupSite::Any {
                group.bench_function("rebuild", |bencher| bencher.iter(|| member_table(&list, rule)));
            }
        }
    }
}

fn backend_table(criterion: &mut Criterion) {
    for (weights, weight) in WEIGHTS {
        let mut group = criterion.benchmark_group(format!("1000 backends, {weights} weights"));
        let list = backends(weight);
        let table = BackendTable::new(KEY, &list);
        let newcomer = RankedBackend { id: backend(5000), weight: weight(500) };
        let changes: [Change<'_, BackendTable>; 5] = [
            ("add", &|table| table.add(newcomer)),
            ("remove", &|table| assert!(table.remove(&backend(500)))),
            ("double weight", &|table| assert!(table.reweight(&backend(500), 2 * weight(500)))),
            ("raise weight to more than all others'", &|table| {
                assert!(table.reweight(&backend(500), 1 << 20))
            }),
            ("drain", &|table| assert!(table.reweight(&backend(500), 0))),
        ];
        for (name, change) in changes {
            group.bench_function(name, |bencher| {
                bencher.iter_batched_ref(|| table.clone(), change, BatchSize::PerIteration);
            });
        }
        group.bench_function("to_indexes", |bencher| {
            bencher.iter(|| table.to_indexes(|id| BackendIndex(u32::from(id.port[0]))));
        });
        group.bench_function("rebuild", |bencher| bencher.iter(|| BackendTable::new(KEY, &list)));
    }
}

fn hash(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow_hash");
    for (name, client, service) in [("IPv4", "10.0.0.1", "192.0.2.1"), ("IPv6", "2001:db8::1", "2001:db8::2")]
    {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let key = FlowKey::new(6, (ip(client), 40_000), (ip(service), 443)).expect("one family");
        group.bench_function(name, |bencher| {
            bencher.iter(|| flow_hash(black_box(FlowSeed(KEY)), black_box(&key)));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(1000))
        .without_plots();
    targets = row_table, backend_table, hash
}
criterion_main!(benches);
