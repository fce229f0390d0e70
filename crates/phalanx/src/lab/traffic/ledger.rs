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
    /// Lives to the end of the run and says little.
    Idle,
    /// The client has ended its side and receives for some seconds.
    HalfClosed,
}

impl Kind {
    /// Whether it lives to the end of the run.
    pub const fn lives_long(self) -> bool {
        match self {
            Self::Long | Self::Upload | Self::Idle => true,
            Self::Short | Self::HalfClosed => false,
        }
    }

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Long => "long",
            Self::Upload => "upload",
            Self::Short => "short",
            Self::Idle => "idle",
            Self::HalfClosed => "half-closed",
        }
    }
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
    /// When it began to wait for what never came; `None`: when it was noticed.
    pub since: Option<Instant>,
    /// What it was, if it was open; filled in by the ledger.
    pub live: Option<Live>,
}

impl Broken {
    /// Connection `id`, noticed now.
    pub const fn new(id: u64, cause: String, by_server: bool, backend: Option<u32>) -> Self {
        Self { id, cause, by_server, backend, since: None, live: None }
    }
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

/// What happened in one second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Second {
    /// The longest gap that ended in it.
    pub longest: Duration,
    /// Gaps of at least `STALL` that ended in it.
    pub stalls: u64,
}

/// A gap this long is a stall: no shorter than the first retransmission of Linux (RTO_MIN, include/net/tcp.h).
const STALL: Duration = Duration::from_millis(200);

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
    /// Seconds since the book was opened.
    seconds: Vec<Second>,
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
                seconds: Vec::new(),
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
            if live.kind.lives_long() {
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
        let end = (start + gap).saturating_duration_since(book.windows[0]).as_secs() as usize;
        if book.seconds.len() <= end {
            book.seconds.resize(end + 1, Second::default());
        }
        let second = &mut book.seconds[end];
        second.longest = second.longest.max(gap);
        second.stalls += u64::from(gap >= STALL);
    }

    pub(super) fn note_completed(&self, id: u64) {
        let mut book = self.book();
        book.end(id);
        book.completed += 1;
    }

    pub(super) fn note_broken(&self, mut broken: Broken) {
        /// Half of the wait for what breaks a connection at once, and of what a client of TCP lets pass before it asks again: a
        /// connection that hears nothing for 30 s broke at their beginning, and one that is reset broke when it was.
        const SOON: Duration = Duration::from_secs(2);
        let mut book = self.book();
        broken.live = book.live.get(&broken.id).copied();
        if !broken.by_server {
            book.end(broken.id);
        }
        let window = match broken.since {
            Some(since) => book.window_of(since, since.elapsed().min(SOON)),
            None => book.windows.len() - 1,
        };
        // Both ends may see it: one connection breaks once, and the client's word comes first.
        match book.broken.entry(broken.id) {
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                let (at, known) = entry.get_mut();
                if known.by_server {
                    broken.live = broken.live.or(known.live);
                    (*at, *known) = (window, broken);
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

    /// The connections that broke, each with the number of its window.
    pub fn broken_by_window(&self) -> Vec<(usize, Broken)> {
        self.book().broken.values().cloned().collect()
    }

    /// What happened second by second, the first when the book was opened.
    pub fn seconds(&self) -> Vec<Second> {
        self.book().seconds.clone()
    }

    /// When the book was opened.
    pub fn opened_at(&self) -> Instant {
        self.book().windows[0]
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
            && live.kind.lives_long()
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
        Broken::new(id, "x".to_owned(), by_server, None)
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
