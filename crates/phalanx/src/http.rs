//! One GET over one connection: for the command line's questions to the daemon, and for health checks.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Bytes of a body at most: the metrics of a thousand backends are below 1 MB.
const MAX_BODY: usize = 16 << 20;

/// GETs `path` over `stream`; the status and the whole body. The caller bounds the time.
pub async fn get(stream: TcpStream, host: &str, path: &str) -> io::Result<(u16, Vec<u8>)> {
    let (status, body) = exchange(stream, host, path, true).await?;
    Ok((status, body))
}

/// GETs `path` over `stream` and leaves after the status. The caller bounds the time.
pub async fn status(stream: TcpStream, host: &str, path: &str) -> io::Result<u16> {
    exchange(stream, host, path, false).await.map(|(status, _)| status)
}

/// GETs `path` from `server` within `timeout`.
pub async fn get_from(server: SocketAddr, path: &str, timeout: Duration) -> io::Result<(u16, Vec<u8>)> {
    let ask = async { get(TcpStream::connect(server).await?, &server.to_string(), path).await };
    tokio::time::timeout(timeout, ask).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn exchange(stream: TcpStream, host: &str, path: &str, body: bool) -> io::Result<(u16, Vec<u8>)> {
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, concat!("phalanx/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status().as_u16();
        let bytes = if body {
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
            body.map_err(io::Error::other)?.to_bytes().to_vec()
        } else {
            Vec::new()
        };
        Ok((status, bytes))
    };
    // The connection makes progress only while it is polled; the answer decides, and dropping the connection closes it. Who sends the
    // first FIN keeps a port in TIME_WAIT: not us.
    let connection = connection.without_shutdown();
    tokio::pin!(answer, connection);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        ended = &mut connection => match ended {
            // Everything has arrived: what is left of the answer needs no connection.
            Ok(_) => answer.await,
            Err(error) => Err(io::Error::other(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// A server that answers one connection with `answer`, and what it was asked.
    async fn server(answer: &'static [u8]) -> (SocketAddr, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            let mut buffer = [0; 1024];
            while !asked.ends_with(b"\r\n\r\n") {
                let count = stream.read(&mut buffer).await.unwrap();
                asked.extend_from_slice(&buffer[..count]);
            }
            stream.write_all(answer).await.unwrap();
            String::from_utf8(asked).unwrap()
        });
        (address, task)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn a_whole_body_arrives_with_and_without_a_length() {
        for answer in [
            &b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"[..],
            b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ] {
            let (address, asked) = server(answer).await;
            assert_eq!(get_from(address, "/x?y=1", SECOND).await.unwrap(), (200, b"hello".to_vec()));
            let asked = asked.await.unwrap();
            assert!(asked.starts_with("GET /x?y=1 HTTP/1.1\r\n"), "{asked}");
            assert!(asked.contains(&format!("host: {address}\r\n")), "{asked}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_short_or_no_http_is_an_error() {
        for answer in [&b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello"[..], b"SSH-2.0-x\r\n", b""] {
            let (address, _asked) = server(answer).await;
            assert!(get_from(address, "/", SECOND).await.is_err());
        }
    }

    #[tokio::test]
    async fn the_status_does_not_wait_for_the_body() {
        let (address, _asked) = server(b"HTTP/1.1 503 Busy\r\ncontent-length: 900\r\n\r\n").await;
        let stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(status(stream, "h", "/").await.unwrap(), 503);
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_times_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let error = get_from(address, "/", Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
