//! How the connections fared.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Lives to the end of the run.
    Long,
    /// Lives to the end of the run and sends full-size segments.
    Upload,
    /// A few requests.
    Short,
}

/// A connection that did not fare well.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Its number.
    pub id: u64,
    /// Why, in a few words that are the same for the same cause.
    pub cause: String,
    /// The server saw it, not the client.
    pub by_server: bool,
    /// The backend that had it, as far as known.
    pub backend: Option<u32>,
}

/// A connection in progress.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// What it is for.
    pub kind: Kind,
    /// The client's address and port.
    pub source: SocketAddr,
    /// The backend that has it, once it said so.
    pub backend: Option<u32>,
}

/// Totals so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Connects tried.
    pub attempted: u64,
    /// Connections that were opened.
    pub opened: u64,
    /// Connections the servers took.
    pub accepted: u64,
    /// Connections that said all they had to say.
    pub completed: u64,
    /// Connections that broke.
    pub broken: u64,
    /// Connections in progress.
    pub live: u64,
    /// Long-lived ones and uploads among them that know their backend.
    pub long_live: u64,
    /// Bytes of payload checked at both ends.
    pub bytes: u64,
}

/// What was measured between two events.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// The longest gap of each connection in progress, sorted.
    pub stalls: Vec<Duration>,
    /// The times that connects took, sorted.
    pub connects: Vec<Duration>,
    /// Connections that broke.
    pub broken: u64,
}

/// The book that clients and servers write and the lab reads.
///
/// A gap belongs to the window in which its middle lies: a request sent just before a member dies waits mostly after.
#[derive(Debug)]
pub struct Ledger {
    attempted: AtomicU64,
    accepted: AtomicU64,
    bytes: AtomicU64,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    /// Starts of the windows, the first at the beginning.
    windows: Vec<Instant>,
    live: HashMap<u64, Live>,
    long_live: u64,
    opened: u64,
    completed: u64,
    broken: HashMap<u64, (usize, Broken)>,
    /// Longest gap by window and connection.
    gaps: Vec<HashMap<u64, Duration>>,
    connects: Vec<Vec<Duration>>,
}

impl Ledger {
    /// An empty book whose first window starts now.
    pub(super) fn new() -> Self {
        Self {
            attempted: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            book: Mutex::new(Book {
                windows: vec![Instant::now()],
                live: HashMap::new(),
                long_live: 0,
                opened: 0,
                completed: 0,
                broken: HashMap::new(),
                gaps: vec![HashMap::new()],
                connects: vec![Vec::new()],
            }),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // A writer that panicked was one connection's task; what it wrote stays true.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a new window.
    pub fn start_window(&self) {
        let mut book = self.book();
        book.windows.push(Instant::now());
        book.gaps.push(HashMap::new());
        book.connects.push(Vec::new());
    }

    pub(super) fn note_attempt(&self) {
        self.attempted.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_accepted(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn note_opened(
        &self,
        id: u64,
        kind: Kind,
        source: SocketAddr,
        start: Instant,
        took: Duration,
    ) {
        let mut book = self.book();
        book.opened += 1;
        book.live.insert(id, Live { kind, source, backend: None });
        let window = book.window_of(start, took);
        if let Some(connects) = book.connects.get_mut(window) {
            connects.push(took);
        }
    }

    pub(super) fn note_backend(&self, id: u64, backend: u32) {
        let mut book = self.book();
        if let Some(live) = book.live.get_mut(&id) {
            live.backend = Some(backend);
            if live.kind != Kind::Short {
                book.long_live += 1;
            }
        }
    }

    pub(super) fn note_gap(&self, id: u64, start: Instant, gap: Duration) {
        let mut book = self.book();
        let window = book.window_of(start, gap);
        if let Some(gaps) = book.gaps.get_mut(window) {
            let longest = gaps.entry(id).or_default();
            *longest = gap.max(*longest);
        }
    }

    pub(super) fn note_completed(&self, id: u64) {
        let mut book = self.book();
        book.end(id);
        book.completed += 1;
    }

    pub(super) fn note_broken(&self, broken: Broken) {
        let mut book = self.book();
        if !broken.by_server {
            book.end(broken.id);
        }
        let window = book.windows.len() - 1;
        // Both ends may see it: one connection breaks once, and the client's word comes first.
        match book.broken.entry(broken.id) {
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                if entry.get().1.by_server {
                    entry.get_mut().1 = broken;
                }
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert((window, broken));
            }
        }
    }

    /// Totals so far.
    pub fn counts(&self) -> Counts {
        let book = self.book();
        Counts {
            attempted: self.attempted.load(Ordering::Relaxed),
            opened: book.opened,
            accepted: self.accepted.load(Ordering::Relaxed),
            completed: book.completed,
            broken: book.broken.len() as u64,
            live: book.live.len() as u64,
            long_live: book.long_live,
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    /// The connections in progress.
    pub fn live(&self) -> Vec<Live> {
        self.book().live.values().copied().collect()
    }

    /// The connections that broke.
    pub fn broken(&self) -> Vec<Broken> {
        self.book().broken.values().map(|(_, broken)| broken.clone()).collect()
    }

    /// What was measured, window by window.
    pub fn windows(&self) -> Vec<Window> {
        let book = self.book();
        (0..book.windows.len())
            .map(|index| {
                let mut stalls: Vec<_> = book.gaps[index].values().copied().collect();
                stalls.sort_unstable();
                let mut connects = book.connects[index].clone();
                connects.sort_unstable();
                let broken = book.broken.values().filter(|(window, _)| *window == index).count() as u64;
                Window { stalls, connects, broken }
            })
            .collect()
    }
}

impl Book {
    fn window_of(&self, start: Instant, gap: Duration) -> usize {
        let middle = start + gap / 2;
        self.windows.partition_point(|window| *window <= middle).saturating_sub(1)
    }

    fn end(&mut self, id: u64) {
        if let Some(live) = self.live.remove(&id)
            && live.kind != Kind::Short
            && live.backend.is_some()
        {
            self.long_live -= 1;
        }
    }
}

/// The value that a share of the sorted values does not exceed; `None` if there are none.
pub fn percentile(sorted: &[Duration], share: f64) -> Option<Duration> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> SocketAddr {
        "198.18.0.2:1000".parse().unwrap()
    }

    fn broken(id: u64, by_server: bool) -> Broken {
        Broken { id, cause: "x".to_owned(), by_server, backend: None }
    }

    #[test]
    fn a_gap_belongs_to_the_window_of_its_middle() {
        let ledger = Ledger::new();
        std::thread::sleep(Duration::from_millis(20));
        let before = Instant::now() - Duration::from_millis(10);
        ledger.start_window();
        ledger.note_gap(1, before, Duration::from_millis(5));
        ledger.note_gap(1, before, Duration::from_millis(500));
        ledger.note_gap(1, before, Duration::from_millis(400));
        let windows = ledger.windows();
        assert_eq!(windows[0].stalls, [Duration::from_millis(5)]);
        assert_eq!(windows[1].stalls, [Duration::from_millis(500)], "the longest of each connection counts");
    }

    #[test]
    fn a_connection_breaks_once_whoever_sees_it() {
        let ledger = Ledger::new();
        for id in [1, 2] {
            ledger.note_opened(id, Kind::Long, source(), Instant::now(), Duration::ZERO);
            ledger.note_backend(id, 1);
        }
        assert_eq!(ledger.counts().long_live, 2);
        ledger.note_broken(broken(1, true));
        assert_eq!(ledger.counts().broken, 1, "what only the server saw counts too");
        ledger.note_broken(broken(1, false));
        ledger.note_completed(2);
        let counts = ledger.counts();
        assert_eq!((counts.opened, counts.broken, counts.completed), (2, 1, 1));
        assert_eq!((counts.live, counts.long_live), (0, 0));
        assert!(!ledger.broken()[0].by_server);
    }

    #[test]
    fn percentiles_of_few_values_are_values() {
        let ms = Duration::from_millis;
        assert_eq!(percentile(&[], 0.99), None);
        assert_eq!(percentile(&[ms(5)], 0.99), Some(ms(5)));
        let hundred: Vec<_> = (1..=100).map(ms).collect();
        assert_eq!(percentile(&hundred, 0.99), Some(ms(99)));
        assert_eq!(percentile(&hundred, 0.5), Some(ms(50)));
        assert_eq!(percentile(&hundred, 1.0), Some(ms(100)));
    }
}
