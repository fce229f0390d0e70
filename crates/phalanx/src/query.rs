//! `phalanx members`, `services` and `explain`: questions to a daemon's admin API, and their answers as tables.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use phalanx_admin::{BackendHealth, ErrorBody, Explain, Members, Services};
use serde::de::DeserializeOwned;

use crate::http;

/// A daemon that asks its peers answers within a few seconds.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The answer to `path`: as it came, or as `table` shows it.
pub(crate) fn ask<T: DeserializeOwned>(
    admin: SocketAddr,
    path: &str,
    json: bool,
    table: fn(&T) -> String,
) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, body) = runtime.block_on(http::get_from(admin, path, TIMEOUT)).with_context(|| {
        format!("no daemon answers on {admin}: is it running, and is that its admin.listen (--admin)?")
    })?;
    if status != 200 {
        let said = serde_json::from_slice::<ErrorBody>(&body).map(|body| body.error);
        bail!("{}", said.unwrap_or_else(|_| format!("{admin} answers with status {status}: is it Phalanx?")));
    }
    let unread = || format!("what {admin} answers cannot be read: is it Phalanx of this version?");
    let answer: T = serde_json::from_slice(&body).with_context(unread)?;
    if json {
        let value: serde_json::Value = serde_json::from_slice(&body).with_context(unread)?;
        Ok(format!("{}\n", serde_json::to_string_pretty(&value)?))
    } else {
        Ok(table(&answer))
    }
}

pub(crate) fn members(answer: &Members) -> String {
    let mut rows = vec![
        ["id", "address", "site", "weight", "state", "liveness", "flows", "unprotected", "owns", "view"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for member in &answer.members {
        let here = if member.id == answer.local { "*" } else { "" };
        rows.push(vec![
            format!("{}{here}", member.id),
            member.address.to_string(),
            dash(&member.site),
            if member.weight == 0 { "director".to_owned() } else { member.weight.to_string() },
            match &member.waits {
                Some(what) => format!("{}, waits {what}", member.state),
                None => member.state.clone(),
            },
            member.liveness.clone(),
            member.flows.to_string(),
            member.unprotected_flows.to_string(),
            member.rows_owned.to_string(),
            match member.view_digest.as_str() {
                "" => "?".to_owned(),
                digest if digest == answer.view_digest => "same".to_owned(),
                _ => "other".to_owned(),
            },
        ]);
    }
    let mut out = format!("cluster {}, view {}\n{}", answer.cluster, answer.view_digest, columns(&rows));
    if let Some(pending) = &answer.pending_view {
        let waiting = answer.members.iter().filter(|member| member.state == "active" && !member.ready);
        let waiting: Vec<String> = waiting.map(|member| member.id.to_string()).collect();
        let _ = writeln!(
            out,
            "a change is planned, to view {pending}; not ready yet: {}",
            dash(&waiting.join(", "))
        );
    }
    for warning in &answer.warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    out
}

pub(crate) fn services(answer: &Services) -> String {
    let mut rows = vec![
        ["service", "address", "method", "backend", "weight", "drain", "health", "flows"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for service in &answer.services {
        for (index, backend) in service.backends.iter().enumerate() {
            let head = |text: String| if index == 0 { text } else { String::new() };
            let open = if service.fail_open { " (fails open)" } else { "" };
            rows.push(vec![
                head(format!("{}{open}", service.name)),
                head(format!("{} {}", service.protocol, SocketAddr::new(service.address, service.port))),
                head(service.method.clone()),
                backend.address.to_string(),
                backend.weight.to_string(),
                if backend.drain { "yes" } else { "no" }.to_owned(),
                match backend.health {
                    BackendHealth::Unchecked => "-",
                    BackendHealth::Healthy => "healthy",
                    BackendHealth::Unhealthy => "UNHEALTHY",
                }
                .to_owned(),
                backend.flows.to_string(),
            ]);
        }
    }
    columns(&rows)
}

pub(crate) fn explain(answer: &Explain) -> String {
    let some = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<13}{value}");
    };
    line("flow", format!("{} {} -> {}", answer.protocol, answer.source, answer.destination));
    line("service", some(answer.service.clone()));
    line("row", format!("{} (flow hash {})", answer.row, answer.hash));
    line("owner", some(answer.owner.map(|id| id.to_string())));
    line("backup", some(answer.backup.map(|id| id.to_string())));
    if let Some(second) = answer.second_backup {
        line("second backup", second.to_string());
    }
    if answer.acting_owner != answer.owner {
        line("acting owner", some(answer.acting_owner.map(|id| id.to_string())));
    }
    if let Some(slot) = answer.slot {
        let backend = some(answer.consistent_backend.map(|ip| ip.to_string()));
        line("consistent", format!("{backend} (slot {slot})"));
    }
    let note = if answer.deviates { " (deviates: only state keeps this flow alive)" } else { "" };
    line("recorded", format!("{}{note}", some(answer.recorded_backend.map(|ip| ip.to_string()))));
    line("here", answer.verdict.clone());

    let mut rows = vec![["rank", "member", "score", "weight", "liveness"].map(str::to_owned).to_vec()];
    for (rank, ranked) in (1..).zip(&answer.ranking) {
        rows.push(vec![
            format!("{rank}"),
            ranked.member.to_string(),
            ranked.score.clone(),
            ranked.weight.to_string(),
            ranked.liveness.clone(),
        ]);
    }
    let _ = write!(out, "\n{}", columns(&rows));

    if answer.holders.is_empty() {
        out.push_str("\nno member holds the flow\n");
    } else {
        let head = ["holder", "role", "backend", "state", "idle", "protected", "recovered"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let yes = |value: bool| if value { "yes" } else { "no" }.to_owned();
        for holder in &answer.holders {
            rows.push(vec![
                holder.member.to_string(),
                holder.role.clone(),
                holder.backend.to_string(),
                holder.state.clone(),
                humantime::format_duration(Duration::from_millis(holder.idle_ms)).to_string(),
                yes(holder.protected),
                yes(holder.recovered),
            ]);
        }
        let _ = write!(out, "\n{}", columns(&rows));
    }
    if !answer.silent.is_empty() {
        let silent: Vec<String> = answer.silent.iter().map(u32::to_string).collect();
        let _ = writeln!(out, "did not answer: {}", silent.join(", "));
    }
    out
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// Rows with their columns aligned to the left, two spaces between.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use phalanx_admin::{Holder, MemberStatus, Ranked};

    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["id", "name"], ["10", "a"], ["7", "longer"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.map(str::to_owned).to_vec()).collect();
        assert_eq!(columns(&rows), "id  name\n10  a\n7   longer\n");
    }

    #[test]
    fn members_show_who_answers_and_who_sees_something_else() {
        let member = |id: u32, digest: &str| MemberStatus {
            id,
            address: "10.0.1.11".parse().unwrap(),
            site: String::new(),
            weight: if id == 2 { 0 } else { 100 },
            state: "active".into(),
            liveness: "alive".into(),
            boot: 1,
            generation: 1,
            cache: false,
            version: "0.1.0".into(),
            admin_address: None,
            view_digest: digest.into(),
            waits: (id == 2).then(|| "to leave".into()),
            ready: id == 1,
            flows: 5,
            unprotected_flows: 0,
            rows_owned: 9,
            rows_backed_up: 9,
        };
        let answer = Members {
            cluster: "lab".into(),
            local: 1,
            view_digest: "aa".into(),
            pending_view: Some("cc".into()),
            warnings: vec!["backends differ".into()],
            members: vec![member(1, "aa"), member(2, "bb")],
        };
        let text = members(&answer);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "cluster lab, view aa");
        assert!(lines[2].starts_with("1*") && lines[2].ends_with("same"), "{text}");
        assert!(lines[3].contains("director") && lines[3].ends_with("other"), "{text}");
        assert!(lines[3].contains("active, waits to leave"), "{text}");
        assert_eq!(lines[4], "a change is planned, to view cc; not ready yet: 2");
        assert_eq!(lines[5], "warning: backends differ");
    }

    #[test]
    fn explain_shows_the_ranking_the_holders_and_the_deviation() {
        let mut answer = Explain {
            source: "198.51.100.7:1234".parse().unwrap(),
            destination: "192.0.2.1:80".parse().unwrap(),
            protocol: "tcp".into(),
            service: Some("web".into()),
            hash: "00000000000000cd".into(),
            row: 0xcd,
            ranking: vec![Ranked { member: 3, score: "ff".into(), weight: 100, liveness: "suspect".into() }],
            owner: Some(3),
            backup: Some(1),
            second_backup: None,
            acting_owner: Some(1),
            slot: Some(0xcd),
            consistent_backend: Some("10.0.2.21".parse().unwrap()),
            recorded_backend: Some("10.0.2.22".parse().unwrap()),
            deviates: true,
            holders: vec![Holder {
                member: 1,
                role: "backup".into(),
                backend: "10.0.2.22".parse().unwrap(),
                state: "established".into(),
                recovered: false,
                protected: true,
                idle_ms: 1500,
            }],
            silent: vec![3],
            verdict: "forwarded to 10.0.2.22".into(),
        };
        let text = explain(&answer);
        for words in [
            "tcp 198.51.100.7:1234 -> 192.0.2.1:80",
            "acting owner 1",
            "10.0.2.21 (slot 205)",
            "10.0.2.22 (deviates",
            "suspect",
            "1s 500ms",
            "did not answer: 3",
        ] {
            assert!(text.contains(words), "{words} is missing in\n{text}");
        }
        answer.holders.clear();
        answer.deviates = false;
        answer.acting_owner = answer.owner;
        let text = explain(&answer);
        assert!(text.contains("no member holds the flow"));
        assert!(!text.contains("deviates") && !text.contains("acting"));
    }

    #[test]
    fn nobody_there_is_one_sentence_with_what_to_do() {
        // A listener that is dropped at once leaves a port where nobody listens.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = ask::<Members>(address, "/v1/members", false, members).unwrap_err();
        assert!(error.to_string().contains("is it running"), "{error}");
    }
}
