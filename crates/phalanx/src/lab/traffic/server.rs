//! The servers: one thread serves all backends, on sockets made in their namespaces.
//!
//! A server says which backend it is, checks every byte the client sends, and answers with its own stream.
//! It answers health checks too, and says that it is ill when the lab wants it to be, while it serves on.

use std::collections::BTreeSet;
use std::io;
use std::net::TcpListener as StdListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::pattern;
use super::wire::{
    BANNER_BYTES, Banner, HEADER_BYTES, HEALTH_CHECK, HELLO_BYTES, Hello, REPLY_BYTES, Request,
    TRICKLE_BYTES, reply,
};
use super::{Broken, Ledger};

/// Room for one request.
const BUFFER_BYTES: usize = 64 * 1024;

/// Backends that are to fail their health checks.
pub(super) type Ill = Arc<Mutex<BTreeSet<u32>>>;

/// Serves until `stop` turns true. Runs on the calling thread.
pub(super) fn serve(
    listeners: Vec<(u32, StdListener)>,
    ledger: Arc<Ledger>,
    ill: Ill,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        for (backend, listener) in listeners {
            let listener = TcpListener::from_std(listener)?;
            tokio::spawn(accept(backend, listener, ledger.clone(), ill.clone()));
        }
        let _ = stop.wait_for(|stop| *stop).await;
        Ok(())
    })
}

async fn accept(backend: u32, listener: TcpListener, ledger: Arc<Ledger>, ill: Ill) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(backend, stream, ledger.clone(), ill.clone()));
            }
            // The client gave up before we took it, or descriptors ran out: the client sees it and counts it.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn connection(backend: u32, mut stream: TcpStream, ledger: Arc<Ledger>, ill: Ill) {
    let _ = stream.set_nodelay(true);
    let mut hello = [0; HELLO_BYTES];
    // Before the client named itself there is no connection to blame: the client counts it by itself.
    if stream.read_exact(&mut hello).await.is_err() {
        return;
    }
    if hello.starts_with(HEALTH_CHECK) {
        let well = !ill.lock().unwrap_or_else(PoisonError::into_inner).contains(&backend);
        answer_check(&mut stream, well).await;
        return;
    }
    ledger.note_accepted();
    let mut id = None;
    match converse(backend, &mut stream, &hello, &mut id).await {
        Ok(()) => {}
        Err(cause) => {
            if let Some(id) = id {
                ledger.note_broken(Broken::new(id, cause, true, Some(backend)));
            }
        }
    }
}

/// The whole of a connection; an error says why it is broken.
async fn converse(
    backend: u32,
    stream: &mut TcpStream,
    hello: &[u8; HELLO_BYTES],
    id: &mut Option<u64>,
) -> Result<(), String> {
    let hello = Hello::from_bytes(hello).ok_or("server: the client's greeting is wrong")?;
    *id = Some(hello.id);
    let banner: [u8; BANNER_BYTES] = Banner { backend }.to_bytes();
    stream.write_all(&banner).await.map_err(|error| describe("server", &error))?;

    let (client, own) = (pattern::client_seed(hello.id), pattern::server_seed(hello.id));
    let (mut received, mut sent, mut number) = (0u64, 0u64, 0u64);
    let mut buffer = vec![0; BUFFER_BYTES.min(hello.largest as usize + REPLY_BYTES)];
    loop {
        let mut header = [0; HEADER_BYTES];
        if !read_or_end(stream, &mut header).await.map_err(|error| describe("server", &error))? {
            // The client is done: so are we, and it waits for our end.
            let _ = stream.shutdown().await;
            return Ok(());
        }
        let request = Request::from_bytes(hello.id, number, &header)
            .ok_or_else(|| format!("server: wrong byte in the header of request {number}"))?;
        let mut left = request.length as usize;
        while left > 0 {
            let part = left.min(buffer.len());
            let part = &mut buffer[..part];
            stream.read_exact(part).await.map_err(|error| describe("server", &error))?;
            if let Some(place) = pattern::first_difference(client, received, part) {
                return Err(format!("server: wrong byte at {place}"));
            }
            received += part.len() as u64;
            left -= part.len();
        }
        let total = REPLY_BYTES + request.reply as usize;
        if buffer.len() < total {
            buffer.resize(total, 0);
        }
        buffer[..REPLY_BYTES].copy_from_slice(&reply(hello.id, number));
        pattern::fill(own, sent, &mut buffer[REPLY_BYTES..total]);
        let pieces = if request.pause_ms == 0 { total } else { TRICKLE_BYTES as usize };
        for piece in buffer[..total].chunks(pieces) {
            stream.write_all(piece).await.map_err(|error| describe("server", &error))?;
            if request.pause_ms > 0 {
                tokio::time::sleep(Duration::from_millis(request.pause_ms.into())).await;
            }
        }
        sent += u64::from(request.reply);
        number += 1;
    }
}

/// Answers a health check. Who checks sees for itself when the answer does not arrive.
async fn answer_check(stream: &mut TcpStream, well: bool) {
    /// A check says no more than that; then it waits.
    const MOST: usize = 4096;
    let (mut seen, mut part) = (Vec::new(), [0; 512]);
    while !seen.windows(4).any(|window| window == b"\r\n\r\n") && seen.len() < MOST {
        match stream.read(&mut part).await {
            Ok(0) | Err(_) => return,
            Ok(count) => seen.extend_from_slice(&part[..count]),
        }
    }
    let status = if well { "200 OK" } else { "503 Service Unavailable" };
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// Fills `buffer`, or says `false` if the stream ended before its first byte.
async fn read_or_end(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<bool> {
    let first = stream.read(buffer).await?;
    if first == 0 {
        return Ok(false);
    }
    stream.read_exact(&mut buffer[first..]).await?;
    Ok(true)
}

/// A short name of an error, so that equal causes count together.
pub(super) fn describe(side: &str, error: &io::Error) -> String {
    let what = match error.kind() {
        io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::UnexpectedEof => "ended early".to_owned(),
        io::ErrorKind::BrokenPipe => "broken pipe".to_owned(),
        io::ErrorKind::TimedOut => "the kernel gave up".to_owned(),
        io::ErrorKind::HostUnreachable => "host unreachable".to_owned(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
        _ => error.to_string(),
    };
    format!("{side}: {what}")
}
