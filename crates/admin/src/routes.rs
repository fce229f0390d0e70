//! The routes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use crate::metrics;
use crate::source::{AdminSource, FlowQuery};
use crate::types::{ErrorBody, Explain, Health, Members, Services};

/// The content type of the OpenMetrics text that `prometheus-client` writes.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The admin API over `source`, to be served on a loopback socket.
pub fn router<S: AdminSource>(source: Arc<S>) -> Router {
    Router::new()
        .route("/v1/members", get(members::<S>))
        .route("/v1/services", get(services::<S>))
        .route("/v1/explain", get(explain::<S>))
        .route("/healthz", get(health::<S>))
        .route("/metrics", get(metrics_text::<S>))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(source)
}

/// An answer that is not what was asked for.
struct Failure(StatusCode, ErrorBody);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

async fn members<S: AdminSource>(State(source): State<Arc<S>>) -> Json<Members> {
    Json(source.members())
}

async fn services<S: AdminSource>(State(source): State<Arc<S>>) -> Json<Services> {
    Json(source.services())
}

async fn explain<S: AdminSource>(
    State(source): State<Arc<S>>,
    query: Result<Query<HashMap<String, String>>, QueryRejection>,
) -> Result<Json<Explain>, Failure> {
    let Query(query) = query.map_err(|_| blame(None, "the query cannot be read: write it as in /v1/explain?src=198.51.100.7:1234&dst=192.0.2.1:80&protocol=tcp"))?;
    let flow = flow(&query)?;
    Ok(Json(source.explain(flow).await))
}

async fn health<S: AdminSource>(State(source): State<Arc<S>>) -> (StatusCode, Json<Health>) {
    let health = source.health();
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health))
}

async fn metrics_text<S: AdminSource>(State(source): State<Arc<S>>) -> Result<Response, Failure> {
    match metrics::text(source.metrics()) {
        Ok(text) => Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response()),
        Err(_) => Err(Failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            ErrorBody {
                error: "the metrics could not be written as text: report this".into(),
                parameter: None,
            },
        )),
    }
}

async fn no_route() -> Failure {
    let error = "there is nothing here: ask for /v1/members, /v1/services, /v1/explain, /healthz or /metrics";
    Failure(StatusCode::NOT_FOUND, ErrorBody { error: error.into(), parameter: None })
}

async fn no_method() -> Failure {
    let error = "this route only answers GET: the configuration file changes things, and SIGHUP applies it";
    Failure(StatusCode::METHOD_NOT_ALLOWED, ErrorBody { error: error.into(), parameter: None })
}

fn blame(parameter: Option<&str>, error: impl Into<String>) -> Failure {
    let body = ErrorBody { error: error.into(), parameter: parameter.map(str::to_owned) };
    Failure(StatusCode::BAD_REQUEST, body)
}

fn flow(query: &HashMap<String, String>) -> Result<FlowQuery, Failure> {
    let known = ["src", "dst", "protocol"];
    if let Some(unknown) = query.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(blame(
            Some(unknown),
            format!("there is no parameter {unknown}: use src, dst and protocol"),
        ));
    }
    let source = socket(query, "src", "198.51.100.7:1234")?;
    let destination = socket(query, "dst", "192.0.2.1:80")?;
    if source.is_ipv4() != destination.is_ipv4() {
        return Err(blame(
            Some("dst"),
            "src and dst are of different families: give both as IPv4 or both as IPv6",
        ));
    }
    let protocol = match query.get("protocol").map(String::as_str) {
        None | Some("tcp") => 6,
        Some("udp") => 17,
        Some(other) => {
            return Err(blame(Some("protocol"), format!("protocol is {other}: write tcp or udp")));
        }
    };
    Ok(FlowQuery { source, destination, protocol })
}

fn socket(query: &HashMap<String, String>, parameter: &str, example: &str) -> Result<SocketAddr, Failure> {
    let Some(text) = query.get(parameter) else {
        return Err(blame(
            Some(parameter),
            format!("{parameter} is missing: add for example {parameter}={example}"),
        ));
    };
    text.parse().map_err(|_| {
        blame(
            Some(parameter),
            format!(
                "{parameter} is not an address with a port: write it like {example} or [2001:db8::7]:1234"
            ),
        )
    })
}
