//! The search for entries whose time is over, and the count of those that are there.

use std::time::Duration;

use phalanx_flow::{FlowEvent, FlowEventKind};
use phalanx_forwarder::engine::entry::{is_told, life};

use crate::maps::{Kind, now_ms};
use crate::{XdpForwarder, lock, read};

/// How often the tables are searched for entries whose time is over.
const SCAN_EVERY_MS: u64 = 1_000;
/// A count of the flows is used for this long: counting a full table takes tenths of a second.
const COUNT_EVERY_MS: u64 = 1_000;

/// Where the search for entries whose time is over stands.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    table: usize,
    cursor: Option<u32>,
    next_ms: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counted {
    until_ms: u64,
    pub(crate) flows: u64,
    pub(crate) half_open: u64,
    pub(crate) cached: u64,
}

impl XdpForwarder {
    /// Searches a share of the tables for entries whose time is over.
    pub(crate) fn find_expired(&self, events: &mut Vec<FlowEvent>) {
        let mut scan = lock(&self.scan);
        let now_ms = now_ms();
        if now_ms < scan.next_ms {
            return;
        }
        let plan = self.engine.plan();
        let names = read(&self.names);
        let tables = self.maps.tables();
        let (kind, table) = tables[scan.table];
        let mut over = Vec::new();
        let next = table.batch(scan.cursor, &mut |key, entry| {
            let life = match kind {
                Kind::Cached => plan.service_of(key).map_or(Duration::ZERO, |service| service.idle),
                Kind::Established | Kind::HalfOpen => life(&plan, key, entry),
            };
            if now_ms.saturating_sub(entry.last_seen_ms) > life.as_millis() as u64 {
                over.push((*key, *entry));
            }
        });
        for (key, entry) in over {
            // One that became established while another CPU held its set for too long: the flow itself is not over.
            let moved_on = kind == Kind::HalfOpen && self.maps.is_established(&key);
            match self.record(&names, &key, &entry, now_ms) {
                Some(record) if kind != Kind::Cached && !moved_on && is_told(&entry) => {
                    events.push(FlowEvent { kind: FlowEventKind::Expired, at_once: false, record });
                }
                _ => self.maps.delete(kind, &key),
            }
        }
        scan.cursor = next.unwrap_or(None);
        if scan.cursor.is_none() {
            scan.table = (scan.table + 1) % tables.len();
            if scan.table == 0 {
                scan.next_ms = now_ms + SCAN_EVERY_MS;
            }
        }
    }

    pub(crate) fn counted(&self) -> Counted {
        let mut counted = lock(&self.counted);
        let now_ms = now_ms();
        if now_ms >= counted.until_ms {
            let count = |wanted: Kind| {
                let mut count = 0_u64;
                for (_, table) in self.maps.tables().into_iter().filter(|(kind, _)| *kind == wanted) {
                    let _ = table.each(&mut |_, _| count += 1);
                }
                count
            };
            *counted = Counted {
                flows: count(Kind::Established),
                half_open: count(Kind::HalfOpen),
                cached: count(Kind::Cached),
                until_ms: 0,
            };
            // A small table is counted each time.
            if counted.flows + counted.half_open + counted.cached > 10_000 {
                counted.until_ms = now_ms + COUNT_EVERY_MS;
            }
        }
        *counted
    }
}
