//! Asking members' admin API, from inside their namespaces.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;

use super::netns::Netns;

/// Where every member's admin API listens, each in its own namespace.
pub const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7980);
/// A daemon on this machine that takes longer is stopped or dead.
const TIMEOUT: Duration = Duration::from_millis(500);
/// How often a starting member is asked whether it is ready, and a ready one for its counters.
const READY_PERIOD: Duration = Duration::from_millis(50);
const SCRAPE_PERIOD: Duration = Duration::from_secs(1);
/// An answer that is longer is none of ours.
const MAX_ANSWER_BYTES: u64 = 16 << 20;

/// Asks the daemon in `netns`; returns status and body.
pub fn get(netns: &Netns, path: &str) -> Result<(u16, String)> {
    exchange(netns.connect(ADMIN, TIMEOUT)?, path)
}

/// As [`get`], for an answer in JSON; `None` if there is none, or one that is not what was asked for.
pub fn ask<T: DeserializeOwned>(netns: &Netns, path: &str) -> Option<T> {
    let (status, body) = get(netns, path).ok()?;
    (status == 200).then(|| serde_json::from_str(&body).ok())?
}

fn exchange(mut stream: TcpStream, path: &str) -> Result<(u16, String)> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
    parse(&answer)
}

fn parse(answer: &[u8]) -> Result<(u16, String)> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").context("the admin API's answer has no end of header")?;
    let status = head
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .context("the admin API's answer has no status")?;
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        bail!("the admin API answers in chunks, which the lab does not read");
    }
    Ok((status, body.to_owned()))
}

/// The samples of a Prometheus text: name with labels, and value.
pub fn samples(text: &str) -> impl Iterator<Item = (&str, f64)> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (name, value) = line.trim().rsplit_once(' ')?;
        Some((name, value.parse().ok()?))
    })
}

/// The value of a label in a sample's name.
pub fn label<'a>(name: &'a str, label: &str) -> Option<&'a str> {
    let labels = name.split_once('{')?.1.strip_suffix('}')?;
    labels.split(',').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        (key == label).then(|| value.trim_matches('"'))
    })
}

/// Counters of one member over all its starts.
#[derive(Clone, Debug, Default)]
struct Counters {
    /// Sums of starts that ended.
    before: BTreeMap<String, f64>,
    /// The present start's.
    now: BTreeMap<String, f64>,
}

impl Counters {
    fn handle_sample(&mut self, name: &str, value: f64) {
        let last = self.now.insert(name.to_owned(), value).unwrap_or_default();
        // A counter that went back belongs to a new start. Gauges (no `_total`) are not summed.
        if value < last && name.contains("_total") {
            *self.before.entry(name.to_owned()).or_default() += last;
        }
    }
}

/// What the lab wants to know of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Nothing: it is not running.
    Nothing,
    /// Whether it is ready.
    Ready,
    /// Its counters.
    Counters,
}

#[derive(Debug)]
struct Target {
    netns: Arc<Netns>,
    interest: Interest,
    counters: Counters,
    scraped: Option<Instant>,
}

/// Asks all members from a thread of its own, so that a stopped one delays nobody.
#[derive(Clone, Debug)]
pub struct Scraper {
    targets: Arc<Mutex<Vec<Target>>>,
    /// Milliseconds between two looks at a member's counters.
    period_ms: Arc<AtomicU64>,
}

impl Scraper {
    /// Starts to ask nothing of the members in these namespaces.
    pub fn start(members: impl Iterator<Item = Arc<Netns>>) -> Result<Self> {
        let targets = members
            .map(|netns| Target {
                netns,
                interest: Interest::Nothing,
                counters: Counters::default(),
                scraped: None,
            })
            .collect();
        let targets = Arc::new(Mutex::new(targets));
        let period_ms = Arc::new(AtomicU64::new(SCRAPE_PERIOD.as_millis() as u64));
        let (weak, period) = (Arc::downgrade(&targets), Arc::clone(&period_ms));
        thread::Builder::new().name("lab-scraper".to_owned()).spawn(move || {
            // The thread ends when the last handle has gone.
            while let Some(targets) = weak.upgrade() {
                Self { targets, period_ms: Arc::clone(&period) }.round();
                thread::sleep(READY_PERIOD);
            }
        })?;
        Ok(Self { targets, period_ms })
    }

    /// Says how often ready members are asked for their counters.
    pub fn set_period(&self, period: Duration) {
        self.period_ms.store(period.as_millis() as u64, Ordering::Relaxed);
    }

    fn targets(&self) -> std::sync::MutexGuard<'_, Vec<Target>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn round(&self) {
        let count = self.targets().len();
        let period = Duration::from_millis(self.period_ms.load(Ordering::Relaxed));
        for index in 0..count {
            let (netns, interest) = {
                let mut targets = self.targets();
                let target = &mut targets[index];
                let due = target.scraped.is_none_or(|scraped| scraped.elapsed() >= period);
                match target.interest {
                    Interest::Counters if due => target.scraped = Some(Instant::now()),
                    Interest::Ready => {}
                    Interest::Nothing | Interest::Counters => continue,
                }
                (target.netns.clone(), target.interest)
            };
            match interest {
                Interest::Ready => {
                    if matches!(get(&netns, "/healthz"), Ok((200, _))) {
                        let mut targets = self.targets();
                        // It may have been killed meanwhile.
                        if targets[index].interest == Interest::Ready {
                            targets[index].interest = Interest::Counters;
                        }
                    }
                }
                _ => self.scrape(index, &netns),
            }
        }
    }

    fn scrape(&self, index: usize, netns: &Netns) {
        if let Ok((200, text)) = get(netns, "/metrics") {
            let mut targets = self.targets();
            for (name, value) in samples(&text) {
                targets[index].counters.handle_sample(name, value);
            }
        }
    }

    /// Says what is of interest of the member at `index`.
    pub fn set_interest(&self, index: usize, interest: Interest) {
        self.targets()[index].interest = interest;
    }

    /// Whether the member at `index` has said that it is ready.
    pub fn is_ready(&self, index: usize) -> bool {
        self.targets()[index].interest == Interest::Counters
    }

    /// The present value of a sample of the member at `index`.
    pub fn value(&self, index: usize, name: &str) -> Option<f64> {
        self.targets()[index].counters.now.get(name).copied()
    }

    /// Asks every running member once more, now.
    pub fn refresh(&self) {
        for target in self.targets().iter_mut() {
            target.scraped = None;
        }
        self.round();
    }

    /// Counters by name and labels, summed over members and their starts.
    pub fn totals(&self) -> BTreeMap<String, f64> {
        let mut totals: BTreeMap<String, f64> = BTreeMap::new();
        for target in self.targets().iter() {
            for (name, value) in target.counters.now.iter().chain(&target.counters.before) {
                *totals.entry(name.clone()).or_default() += value;
            }
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_and_comments_are_not() {
        let text =
            "# HELP a b\n# TYPE a counter\na_total{verdict=\"forward\",x=\"1\"} 12\nb 1.5\nodd\n# EOF\n";
        let found: Vec<_> = samples(text).collect();
        assert_eq!(found, [("a_total{verdict=\"forward\",x=\"1\"}", 12.0), ("b", 1.5)]);
        assert_eq!(label(found[0].0, "verdict"), Some("forward"));
        assert_eq!(label(found[0].0, "reason"), None);
        assert_eq!(label("b", "verdict"), None);
    }

    #[test]
    fn a_restarted_members_counters_add_up_and_gauges_do_not() {
        let mut counters = Counters::default();
        for value in [5.0, 9.0, 2.0] {
            counters.handle_sample("packets_total", value);
            counters.handle_sample("flows", value);
        }
        assert_eq!(counters.before.get("packets_total"), Some(&9.0));
        assert_eq!(counters.now["packets_total"], 2.0);
        assert_eq!(counters.before.get("flows"), None);
    }

    #[test]
    fn an_answer_is_split_into_status_and_body() {
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello").unwrap(), (200, "hello".to_owned()));
        assert!(parse(b"HTTP/1.1 200 OK\r\n").is_err());
        assert!(parse(b"nonsense\r\n\r\n").is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n").is_err());
    }
}
