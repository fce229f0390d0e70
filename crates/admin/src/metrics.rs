//! Names, units and meanings of the metrics, and their Prometheus text.
//!
//! The daemon hands out [`Sample`]s of the metrics named here; `docs/operating/admin.md` explains each of them, and a test keeps
//! it complete.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// Whether a metric only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Grows, and starts again at zero with the daemon. `_total` is put behind its name.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A metric: its name (without `_total`), kind and meaning.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name, with the unit last where it has one.
    pub name: &'static str,
    /// Kind.
    pub kind: MetricKind,
    /// Meaning, one sentence without the full stop.
    pub help: &'static str,
    /// Names of its labels, in order.
    pub labels: &'static [&'static str],
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $id:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(
            #[doc = $help]
            pub static $id: Metric =
                Metric { name: $name, kind: MetricKind::$kind, help: $help, labels: &[$($label),*] };
        )*
        /// Every metric there is.
        pub static ALL: &[&Metric] = &[$(&$id),*];
    };
}

metrics! {
    PACKETS = Counter "phalanx_packets" ["verdict"] "Packets decided on, by verdict";
    DROPS = Counter "phalanx_drops" ["reason"] "Packets dropped, by reason";
    FLOWS = Gauge "phalanx_flows" ["state"] "Flows in the flow table, by state";
    UNPROTECTED_FLOWS = Gauge "phalanx_unprotected_flows" [] "Flows whose backup has not acknowledged them";
    CLUSTER_UNPROTECTED_FLOWS = Gauge "phalanx_cluster_unprotected_flows" [] "Flows of all members whose backup has not acknowledged them, as each member last said";
    CHANGE_PENDING = Gauge "phalanx_change_pending" [] "1 while a change of members is planned and not yet in force, else 0";
    REPAIRED_RECORDS = Counter "phalanx_repaired_records" [] "Flow records sent because a comparison of holders showed a difference";
    CACHED_FLOWS = Gauge "phalanx_cached_flows" [] "Flows of other members in the cache";
    HANDOFFS = Counter "phalanx_handoffs" ["direction"] "Packets handed off to other members (out) and by them (in)";
    RECOVERED = Counter "phalanx_recovered" [] "Packets of flows nobody knew, forwarded by the consistent table";
    TABLE_FULL = Counter "phalanx_table_full" [] "Flows not recorded because the flow table was full";
    HALF_OPEN_EVICTED = Counter "phalanx_half_open_evicted" [] "Half-open flows pushed out by newer ones";
    EVENTS_LOST = Counter "phalanx_events_lost" [] "Events of the forwarder that found their queue full";
    FOUND_BY_SCAN = Counter "phalanx_found_by_scan" [] "Flows found by a scan of the table after events were lost or a restart";
    OTHER_HOST = Counter "phalanx_other_host" [] "XDP: frames for another host's MAC address, left alone";
    FIB_LOOKUPS = Counter "phalanx_fib_lookups" [] "Packets whose next hop was unknown, so that the kernel's routes were asked";
    PUNTED = Counter "phalanx_punted" [] "Packets that the program in the kernel left to the daemon";
    FRAGMENTED = Counter "phalanx_fragmented" ["path"] "Packets fragmented outside, by path (handoff or backend)";
    MEMBERS = Gauge "phalanx_members" ["state"] "Members in this member's view, by what it believes of them (alive, suspect, down)";
    VIEW_CHANGES = Counter "phalanx_view_changes" [] "Changes of this member's view";
    LEASE_VALID = Gauge "phalanx_lease_valid" [] "1 while this member's lease stands, else 0";
    BACKEND_HEALTHY = Gauge "phalanx_backend_healthy" ["service", "backend"] "1 while the backend is healthy or not checked, else 0";
    BACKEND_FLOWS = Gauge "phalanx_backend_flows" ["service", "backend"] "Flows to the backend in this member's flow table";
    SERVICE_FAIL_OPEN = Gauge "phalanx_service_fail_open" ["service"] "1 while no backend of the service is healthy and all are used, else 0";
    HEALTH_CHECKS = Counter "phalanx_health_checks" ["service", "backend", "result"] "Health checks made, by result (good or bad)";
    REPLICATED_RECORDS = Counter "phalanx_replicated_records" ["direction"] "Flow records sent to (out) and applied for (in) other members as flows change";
    REPLICATION_PENDING = Gauge "phalanx_replication_pending_records" [] "Flow records waiting to be sent or acknowledged";
    TRANSFER_RECORDS = Counter "phalanx_transfer_records" ["direction"] "Flow records in transfer tables, sent (out) and applied (in)";
    TRANSFER_PENDING = Gauge "phalanx_transfer_pending_records" ["member"] "Flow records in transfer tables that the member has not yet acknowledged";
    TRANSFERS = Counter "phalanx_transfers" ["result"] "Transfer tables that came to an end, by result (done, given_up)";
    GOSSIP_DATAGRAMS = Counter "phalanx_gossip_datagrams" ["direction"] "Gossip datagrams received and accepted (in) and sent (out)";
    GOSSIP_DROPPED = Counter "phalanx_gossip_dropped" ["reason"] "Gossip datagrams dropped, by reason (foreign, damaged, replayed, stale)";
    ECHOES_LOST = Counter "phalanx_echoes_lost" ["member"] "Hand-off echoes that the member's forwarder did not answer";
    RELOADS = Counter "phalanx_reloads" ["result"] "Reloads of the configuration, by result (done, refused)";
    LOG_LINES_DROPPED = Counter "phalanx_log_lines_dropped" [] "Lines of the log dropped because stderr took too few";
    BUILD_INFO = Gauge "phalanx_build_info" ["version", "forwarder"] "1, with the program's version and forwarder";
    START_TIME = Gauge "phalanx_start_time_seconds" [] "When the daemon started, in seconds since 1970";
}

/// One value of a metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Which metric.
    pub metric: &'static Metric,
    /// Values of its labels, in the metric's order.
    pub labels: Vec<String>,
    /// The value.
    pub value: u64,
}

impl Sample {
    /// A value of a metric; `labels` in the metric's order, as many as it has.
    pub fn new(metric: &'static Metric, labels: &[&str], value: u64) -> Self {
        debug_assert_eq!(metric.labels.len(), labels.len(), "labels of {}", metric.name);
        Self { metric, labels: labels.iter().map(|&label| label.to_owned()).collect(), value }
    }
}

/// The samples as Prometheus text. A metric without samples is left out.
pub fn text(samples: Vec<Sample>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshot(samples)));
    let mut out = String::new();
    prometheus_client::encoding::text::encode(&mut out, &registry)?;
    Ok(out)
}

/// Samples of one moment.
#[derive(Debug)]
struct Snapshot(Vec<Sample>);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in ALL {
            let mut samples = self.0.iter().filter(|sample| sample.metric.name == metric.name).peekable();
            if samples.peek().is_none() {
                continue;
            }
            let kind = match metric.kind {
                MetricKind::Counter => MetricType::Counter,
                MetricKind::Gauge => MetricType::Gauge,
            };
            let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            for sample in samples {
                if metric.labels.is_empty() {
                    value(&mut family, sample)?;
                } else {
                    let labels: Vec<(&str, &str)> =
                        metric.labels.iter().copied().zip(sample.labels.iter().map(String::as_str)).collect();
                    value(&mut family.encode_family(&labels)?, sample)?;
                }
            }
        }
        Ok(())
    }
}

fn value(encoder: &mut MetricEncoder<'_>, sample: &Sample) -> fmt::Result {
    match sample.metric.kind {
        MetricKind::Counter => encoder.encode_counter::<NoLabelSet, _, u64>(&sample.value, None),
        MetricKind::Gauge => encoder.encode_gauge(&sample.value),
    }
}
