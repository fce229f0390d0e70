use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde::de::DeserializeOwned;
use tower::ServiceExt as _;

use crate::*;

struct Fake {
    ready: bool,
}

impl AdminSource for Fake {
    fn members(&self) -> Members {
        Members {
            cluster: "lab".into(),
            local: 1,
            view_digest: "00000000000000ff".into(),
            pending_view: None,
            warnings: Vec::new(),
            members: vec![MemberStatus {
                id: 1,
                address: "10.0.1.11".parse().unwrap(),
                site: "a".into(),
                weight: 100,
                state: "active".into(),
                liveness: "alive".into(),
                boot: u64::MAX,
                generation: 3,
                cache: false,
                version: "0.1.0".into(),
                admin_address: None,
                view_digest: "00000000000000ff".into(),
                waits: None,
                ready: false,
                flows: 7,
                unprotected_flows: 2,
                rows_owned: 65_536,
                rows_backed_up: 0,
            }],
        }
    }

    fn services(&self) -> Services {
        Services {
            services: vec![ServiceStatus {
                name: "web".into(),
                address: "192.0.2.1".parse().unwrap(),
                port: 80,
                protocol: "tcp".into(),
                method: "ipip".into(),
                fail_open: true,
                backends: vec![BackendStatus {
                    address: "10.0.2.21".parse().unwrap(),
                    weight: 100,
                    drain: false,
                    health: BackendHealth::Unhealthy,
                    flows: 7,
                }],
            }],
        }
    }

    async fn explain(&self, flow: FlowQuery) -> Explain {
        Explain {
            source: flow.source,
            destination: flow.destination,
            protocol: flow.protocol_name().into(),
            service: None,
            hash: "0123456789abcdef".into(),
            row: 0xcdef,
            ranking: Vec::new(),
            owner: Some(1),
            backup: None,
            second_backup: None,
            acting_owner: Some(1),
            slot: None,
            consistent_backend: None,
            recorded_backend: None,
            deviates: false,
            holders: Vec::new(),
            silent: Vec::new(),
            verdict: "passed to the kernel: it goes to no service".into(),
        }
    }

    fn health(&self) -> Health {
        let reasons = if self.ready { vec![] } else { vec!["the forwarder does not answer".to_owned()] };
        Health { ready: self.ready, safe_to_lose: false, reasons }
    }

    fn metrics(&self) -> Vec<Sample> {
        vec![
            Sample::new(&metrics::PACKETS, &["forward"], 10),
            Sample::new(&metrics::UNPROTECTED_FLOWS, &[], 2),
            Sample::new(&metrics::PACKETS, &["hand_off"], u64::MAX),
            Sample::new(&metrics::BACKEND_HEALTHY, &["we\"b", "10.0.2.21"], 1),
        ]
    }
}

async fn ask(method: &str, uri: &str, ready: bool) -> (StatusCode, String) {
    let request = Request::builder().method(method).uri(uri).body(Body::empty()).unwrap();
    let response = router(Arc::new(Fake { ready })).oneshot(request).await.unwrap();
    let status = response.status();
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, String::from_utf8(body.into()).unwrap())
}

async fn get<T: DeserializeOwned>(uri: &str) -> T {
    let (status, body) = ask("GET", uri, true).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    serde_json::from_str(&body).unwrap()
}

async fn refused(uri: &str) -> ErrorBody {
    let (status, body) = ask("GET", uri, true).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test]
async fn what_the_source_says_arrives_whole() {
    let source = Fake { ready: true };
    assert_eq!(get::<Members>("/v1/members").await, source.members());
    assert_eq!(get::<Services>("/v1/services").await, source.services());
    assert_eq!(get::<Health>("/healthz").await, source.health());
}

#[tokio::test]
async fn explain_takes_both_families_and_both_protocols() {
    let explain: Explain = get("/v1/explain?src=198.51.100.7:1234&dst=192.0.2.1:80").await;
    assert_eq!(explain.protocol, "tcp");
    assert_eq!(explain.source, "198.51.100.7:1234".parse().unwrap());
    let uri = "/v1/explain?src=[2001:db8::7]:1234&dst=%5B2001:db8::1%5D:53&protocol=udp";
    let explain: Explain = get(uri).await;
    assert_eq!(explain.protocol, "udp");
    assert_eq!(explain.destination, "[2001:db8::1]:53".parse().unwrap());
}

#[tokio::test]
async fn a_query_that_makes_no_sense_is_told_what_to_do() {
    for (query, parameter, words) in [
        ("", "src", "src is missing: add"),
        ("?src=198.51.100.7:1", "dst", "dst is missing: add"),
        ("?src=198.51.100.7&dst=192.0.2.1:80", "src", "not an address with a port"),
        ("?src=198.51.100.7:1&dst=[2001:db8::1]:80", "dst", "different families"),
        ("?src=198.51.100.7:1&dst=192.0.2.1:80&protocol=sctp", "protocol", "write tcp or udp"),
        ("?src=198.51.100.7:1&dst=192.0.2.1:80&proto=udp", "proto", "use src, dst and protocol"),
    ] {
        let body = refused(&format!("/v1/explain{query}")).await;
        assert_eq!(body.parameter.as_deref(), Some(parameter), "{query}");
        assert!(body.error.contains(words), "{query}: {}", body.error);
    }
}

#[tokio::test]
async fn a_member_that_is_not_ready_says_so_by_its_status() {
    let (status, body) = ask("GET", "/healthz", false).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(serde_json::from_str::<Health>(&body).unwrap().reasons.len(), 1);
}

#[tokio::test]
async fn other_routes_and_methods_are_answered_in_json() {
    let (status, body) = ask("GET", "/v2/members", true).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(serde_json::from_str::<ErrorBody>(&body).unwrap().error.contains("/v1/members"));
    let (status, body) = ask("POST", "/v1/members", true).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(serde_json::from_str::<ErrorBody>(&body).unwrap().error.contains("GET"));
}

#[tokio::test]
async fn metrics_are_one_family_each_with_help_type_and_escaped_labels() {
    let (status, body) = ask("GET", "/metrics", true).await;
    assert_eq!(status, StatusCode::OK);
    let lines: Vec<&str> = body.lines().collect();
    assert_eq!(
        lines,
        [
            "# HELP phalanx_packets Packets decided on, by verdict",
            "# TYPE phalanx_packets counter",
            "phalanx_packets_total{verdict=\"forward\"} 10",
            "phalanx_packets_total{verdict=\"hand_off\"} 18446744073709551615",
            "# HELP phalanx_unprotected_flows Flows whose backup has not acknowledged them",
            "# TYPE phalanx_unprotected_flows gauge",
            "phalanx_unprotected_flows 2",
            "# HELP phalanx_backend_healthy 1 while the backend is healthy or not checked, else 0",
            "# TYPE phalanx_backend_healthy gauge",
            "phalanx_backend_healthy{service=\"we\\\"b\",backend=\"10.0.2.21\"} 1",
            "# EOF",
        ]
    );
}

#[test]
fn the_manual_explains_every_metric_and_no_other() {
    let manual = include_str!("../../../docs/operating/admin.md");
    let mut names: Vec<String> = Vec::new();
    for metric in metrics::ALL {
        let suffix = if metric.kind == MetricKind::Counter { "_total" } else { "" };
        let name = format!("{}{suffix}", metric.name);
        assert!(manual.contains(&format!("| `{name}` |")), "the manual lacks {name}");
        for label in metric.labels {
            let row = manual.lines().find(|line| line.starts_with(&format!("| `{name}`"))).unwrap();
            assert!(row.contains(&format!("`{label}`")), "the manual lacks label {label} of {name}");
        }
        assert!(!names.contains(&name), "{name} is there twice");
        names.push(name);
    }
    let rows = manual.lines().filter(|line| line.starts_with("| `phalanx_")).count();
    assert_eq!(rows, names.len(), "the manual has rows for metrics that do not exist");
}
