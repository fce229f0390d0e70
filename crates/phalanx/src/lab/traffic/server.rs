//! The servers: one thread serves all backends, on sockets made in their namespaces.
//!
//! A server says which backend it is, checks every byte the client sends, and answers with its own stream.

use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::pattern;
use super::wire::{BANNER_BYTES, Banner, HEADER_BYTES, HELLO_BYTES, Hello, REPLY_BYTES, Request, reply};
use super::{Broken, Ledger};

/// Room for one request.
const BUFFER_BYTES: usize = 64 * 1024;

/// Serves until `stop` turns true. Runs on the calling thread.
pub(super) fn serve(
    listeners: Vec<(u32, StdListener)>,
    ledger: Arc<Ledger>,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        for (backend, listener) in listeners {
            let listener = TcpListener::from_std(listener)?;
            tokio::spawn(accept(backend, listener, ledger.clone()));
        }
        let _ = stop.wait_for(|stop| *stop).await;
        Ok(())
    })
}

async fn accept(backend: u32, listener: TcpListener, ledger: Arc<Ledger>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                ledger.note_accepted();
                tokio::spawn(connection(backend, stream, ledger.clone()));
            }
            // The client gave up before we took it, or descriptors ran out: the client sees it and counts it.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

async fn connection(backend: u32, mut stream: TcpStream, ledger: Arc<Ledger>) {
    let mut id = None;
    match converse(backend, &mut stream, &mut id).await {
        Ok(()) => {}
        Err(cause) => {
            // Before the client named itself there is no connection to blame: the client counts it by itself.
            if let Some(id) = id {
                ledger.note_broken(Broken { id, cause, by_server: true, backend: Some(backend) });
            }
        }
    }
}

/// The whole of a connection; an error says why it is broken.
async fn converse(backend: u32, stream: &mut TcpStream, id: &mut Option<u64>) -> Result<(), String> {
    let _ = stream.set_nodelay(true);
    let banner: [u8; BANNER_BYTES] = Banner { backend }.to_bytes();
    stream.write_all(&banner).await.map_err(|error| describe("server", &error))?;
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello).await.map_err(|error| describe("server", &error))?;
    let hello = Hello::from_bytes(&hello).ok_or("server: the client's greeting is wrong")?;
    *id = Some(hello.id);

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
        stream.write_all(&buffer[..total]).await.map_err(|error| describe("server", &error))?;
        sent += u64::from(request.reply);
        number += 1;
    }
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
