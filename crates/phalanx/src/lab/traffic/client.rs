//! The clients: one thread in the client's namespace, one task a connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::pattern::{self, mix};
use super::server::describe;
use super::wire::{BANNER_BYTES, Banner, Hello, MAX_LENGTH, REPLY_BYTES, Request, TRICKLE_BYTES, reply};
use super::{Broken, Kind, Ledger, TrafficOptions};

/// A connection that makes no progress for this long is broken (the definition).
const NO_PROGRESS: Duration = Duration::from_secs(30);
/// Requests of a short connection.
const SHORT_REQUESTS: u64 = 4;
/// Bytes of a small request: 32 to 511; of a small reply: up to 1,535, so that some need two segments.
const SMALL_REQUEST: (u64, u64) = (32, 480);
const SMALL_REPLY: (u64, u64) = (16, 1520);
/// Bytes of an upload's request: dozens of full-size segments.
const UPLOAD_BYTES: u32 = 64 * 1024;
const _: () = assert!(UPLOAD_BYTES <= MAX_LENGTH);
/// Mean time between two exchanges of an idle connection: many changes pass by between them.
const IDLE_INTERVAL: Duration = Duration::from_secs(15);
/// A half-closed connection receives a piece this often, and 30 to 89 pieces: 3 to 9 s.
const PAUSE: Duration = Duration::from_millis(100);
const PIECES: (u64, u64) = (30, 60);
const _: () = assert!((PIECES.0 + PIECES.1) as u32 * TRICKLE_BYTES <= MAX_LENGTH);

/// Opens and drives connections until `stop` turns true and all have ended. Runs on the calling thread, in whose namespace the
/// sockets are made.
pub(super) fn run(
    options: TrafficOptions,
    ledger: Arc<Ledger>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let mut tasks = tokio::task::JoinSet::new();
        let ids = Arc::new(AtomicU64::new(0));
        let new_id = || ids.fetch_add(1, Ordering::Relaxed);
        let gap = Duration::from_secs(1) / options.ramp.max(1);
        let mut next = Instant::now();
        let kinds = [
            (Kind::Upload, options.uploads),
            (Kind::Long, options.connections),
            (Kind::Idle, options.idle),
            (Kind::HalfClosed, options.half_closed),
        ];
        for kind in kinds.into_iter().flat_map(|(kind, count)| (0..count).map(move |_| kind)) {
            if *stop.borrow() {
                break;
            }
            let (ledger, stop, ids) = (ledger.clone(), stop.clone(), ids.clone());
            tasks.spawn(async move {
                loop {
                    let id = ids.fetch_add(1, Ordering::Relaxed);
                    connection(id, kind, options, ledger.clone(), stop.clone()).await;
                    // Of these there are always so many: the next takes the place of the last.
                    if kind != Kind::HalfClosed || *stop.borrow() {
                        break;
                    }
                }
            });
            next += gap;
            tokio::time::sleep_until(next).await;
        }
        if options.short_rate > 0 {
            let gap = Duration::from_secs(1) / options.short_rate;
            while !*stop.borrow() {
                tasks.spawn(connection(new_id(), Kind::Short, options, ledger.clone(), stop.clone()));
                // Finished tasks are taken out as we go, so that a long run does not pile them up.
                while tasks.try_join_next().is_some() {}
                next = (next + gap).max(Instant::now());
                tokio::time::sleep_until(next).await;
            }
        }
        while tasks.join_next().await.is_some() {}
        Ok(())
    })
}

async fn connection(
    id: u64,
    kind: Kind,
    options: TrafficOptions,
    ledger: Arc<Ledger>,
    stop: watch::Receiver<bool>,
) {
    let mut progress = Progress { id, backend: None, waiting_since: Instant::now(), ledger: &ledger };
    match converse(id, kind, &options, &mut progress, stop).await {
        Ok(()) => ledger.note_completed(id),
        Err(cause) => {
            let since = progress.waiting_since.into_std();
            let broken = Broken { since: Some(since), ..Broken::new(id, cause, false, progress.backend) };
            ledger.note_broken(broken);
        }
    }
}

struct Progress<'a> {
    id: u64,
    backend: Option<u32>,
    /// When the present wait began: what breaks a connection came after.
    waiting_since: Instant,
    ledger: &'a Ledger,
}

impl Progress<'_> {
    /// Waits for `step` and books the time as a gap, also when it fails.
    async fn gap<T>(&mut self, what: &str, step: impl Future<Output = io::Result<T>>) -> Result<T, String> {
        self.gap_beyond(Duration::ZERO, what, step).await
    }

    /// As [`Progress::gap`], where this long a wait is what was asked for.
    async fn gap_beyond<T>(
        &mut self,
        expected: Duration,
        what: &str,
        step: impl Future<Output = io::Result<T>>,
    ) -> Result<T, String> {
        let start = Instant::now();
        self.waiting_since = start;
        let result = timeout(NO_PROGRESS, step).await;
        let gap = start.elapsed().saturating_sub(expected);
        self.ledger.note_gap(self.id, (start + expected).into_std(), gap);
        match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(describe(what, &error)),
            Err(_) => Err(format!("{what}: no progress for {} s", NO_PROGRESS.as_secs())),
        }
    }
}

/// The whole of a connection; an error says why it is broken.
async fn converse(
    id: u64,
    kind: Kind,
    options: &TrafficOptions,
    progress: &mut Progress<'_>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), String> {
    let ledger = progress.ledger;
    ledger.note_attempt();
    let start = Instant::now();
    let mut stream = match timeout(NO_PROGRESS, TcpStream::connect(options.target)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(describe("connect", &error)),
        Err(_) => return Err(format!("connect: no answer for {} s", NO_PROGRESS.as_secs())),
    };
    let source: SocketAddr = stream.local_addr().map_err(|error| describe("connect", &error))?;
    ledger.note_opened(id, kind, source, start.into_std(), start.elapsed());
    let _ = stream.set_nodelay(true);

    let largest =
        if kind == Kind::Upload { UPLOAD_BYTES } else { (SMALL_REQUEST.0 + SMALL_REQUEST.1) as u32 };
    let hello = Hello { largest, id }.to_bytes();
    let mut banner = [0; BANNER_BYTES];
    progress
        .gap("client", async {
            stream.write_all(&hello).await?;
            stream.read_exact(&mut banner).await
        })
        .await?;
    let banner = Banner::from_bytes(&banner).ok_or("client: wrong byte in the banner")?;
    progress.backend = Some(banner.backend);
    ledger.note_backend(id, banner.backend);

    let (own, server) = (pattern::client_seed(id), pattern::server_seed(id));
    if kind == Kind::HalfClosed {
        return receive_half_closed(id, stream, progress).await;
    }
    let interval = if kind == Kind::Idle { IDLE_INTERVAL } else { options.interval };
    let (mut sent, mut received) = (0u64, 0u64);
    let mut buffer = Vec::new();
    for number in 0u64.. {
        let dice = mix(own ^ number.wrapping_mul(3));
        let request = match kind {
            Kind::Upload => Request { length: UPLOAD_BYTES, reply: 16, pause_ms: 0 },
            Kind::Long | Kind::Short | Kind::Idle | Kind::HalfClosed => Request {
                length: (SMALL_REQUEST.0 + dice % SMALL_REQUEST.1) as u32,
                reply: (SMALL_REPLY.0 + (dice >> 32) % SMALL_REPLY.1) as u32,
                pause_ms: 0,
            },
        };
        let header = request.to_bytes(id, number);
        buffer.clear();
        buffer.extend_from_slice(&header);
        buffer.resize(header.len() + request.length as usize, 0);
        pattern::fill(own, sent, &mut buffer[header.len()..]);
        sent += u64::from(request.length);

        let wanted = REPLY_BYTES + request.reply as usize;
        progress
            .gap("client", async {
                stream.write_all(&buffer).await?;
                buffer.resize(wanted, 0);
                stream.read_exact(&mut buffer[..wanted]).await
            })
            .await?;
        if buffer[..REPLY_BYTES] != reply(id, number) {
            return Err(format!("client: wrong byte in the header of reply {number}"));
        }
        if let Some(place) = pattern::first_difference(server, received, &buffer[REPLY_BYTES..wanted]) {
            return Err(format!("client: wrong byte at {place}"));
        }
        received += u64::from(request.reply);
        ledger.note_bytes(u64::from(request.length) + u64::from(request.reply));

        if kind == Kind::Short && number + 1 == SHORT_REQUESTS || *stop.borrow() {
            break;
        }
        // Half to one and a half of the interval, so that connections do not march in step.
        let half = interval / 2;
        let pause = half + interval.mul_f64((mix(dice) >> 40) as f64 / (1u64 << 24) as f64);
        tokio::select! {
            () = sleep(pause) => {}
            // The last exchange after the stop shows that the connection lives to the end.
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }
    // Our end, and then the server's: both sides agree that all was said.
    stream.shutdown().await.map_err(|error| describe("client", &error))?;
    expect_end(stream, Duration::ZERO, progress).await
}

/// The server's end, which may take this long.
async fn expect_end(
    mut stream: TcpStream,
    expected: Duration,
    progress: &mut Progress<'_>,
) -> Result<(), String> {
    let mut rest = [0; 1];
    match progress.gap_beyond(expected, "client", stream.read(&mut rest)).await? {
        0 => Ok(()),
        _ => Err("client: more bytes than were asked for".to_owned()),
    }
}

/// Asks once, ends our side, and receives for some seconds: from then on members see nothing of the connection but acknowledgements.
async fn receive_half_closed(
    id: u64,
    mut stream: TcpStream,
    progress: &mut Progress<'_>,
) -> Result<(), String> {
    let (own, server) = (pattern::client_seed(id), pattern::server_seed(id));
    let dice = mix(own);
    let request = Request {
        length: (SMALL_REQUEST.0 + dice % SMALL_REQUEST.1) as u32,
        reply: TRICKLE_BYTES * (PIECES.0 + (dice >> 32) % PIECES.1) as u32,
        pause_ms: PAUSE.as_millis() as u32,
    };
    let mut buffer = request.to_bytes(id, 0).to_vec();
    let header = buffer.len();
    buffer.resize(header + request.length as usize, 0);
    pattern::fill(own, 0, &mut buffer[header..]);
    let mut head = [0; REPLY_BYTES];
    progress
        .gap("client", async {
            stream.write_all(&buffer).await?;
            stream.shutdown().await?;
            stream.read_exact(&mut head).await
        })
        .await?;
    if head != reply(id, 0) {
        return Err("client: wrong byte in the header of reply 0".to_owned());
    }
    let mut received = 0u64;
    buffer.resize(TRICKLE_BYTES as usize, 0);
    while received < u64::from(request.reply) {
        let left = (u64::from(request.reply) - received).min(buffer.len() as u64) as usize;
        let count = progress.gap_beyond(PAUSE, "client", stream.read(&mut buffer[..left])).await?;
        if count == 0 {
            return Err("client: ended early".to_owned());
        }
        if let Some(place) = pattern::first_difference(server, received, &buffer[..count]) {
            return Err(format!("client: wrong byte at {place}"));
        }
        received += count as u64;
    }
    progress.ledger.note_bytes(u64::from(request.length) + u64::from(request.reply));
    // The server waits after the last piece as after every other.
    expect_end(stream, PAUSE, progress).await
}
