//! One check of one backend.

use std::future::Future;
use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::config::HealthKind;
use crate::http;

/// Why a check was bad, in a few words for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum Bad {
    /// Nothing came back, or the HTTP answer took too long.
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// The connection was refused or broke.
    #[error("connection failed: {0}")]
    Connect(io::Error),
    /// What came back was no HTTP answer.
    #[error("no HTTP answer: {0}")]
    Http(io::Error),
    /// The HTTP answer was another one than expected.
    #[error("status {found} instead of {expected}")]
    Status {
        /// What came.
        found: u16,
        /// What was expected.
        expected: u16,
    },
}

impl Bad {
    /// Whether it is what came back that was bad, and not that nothing came.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Self::Timeout(_) => false,
            Self::Connect(error) => {
                matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
            }
            Self::Http(_) | Self::Status { .. } => true,
        }
    }
}

/// A check's socket lives this much longer. What the backend still sends would meet none, and the kernel's RST for a socket that is gone has
/// no mark: it goes to the service's address by the router, and reaches the members as a packet of a connection that nobody knows.
const HELD: Duration = Duration::from_secs(1);

/// Checks over the connection that `connect` makes, all within `timeout`. `host` is the Host header where none is configured.
pub(super) async fn check(
    kind: &HealthKind,
    host: &str,
    timeout: Duration,
    connect: impl Future<Output = io::Result<TcpStream>>,
) -> Result<(), Bad> {
    let steps = async {
        let stream = connect.await.map_err(Bad::Connect)?;
        // Closed by a reset: a check every second must not leave ports in TIME_WAIT.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        if let Ok(held) = stream.as_fd().try_clone_to_owned() {
            tokio::spawn(async move {
                tokio::time::sleep(timeout + HELD).await;
                drop(held);
            });
        }
        match kind {
            HealthKind::Tcp => Ok(()),
            HealthKind::Http { path, host: configured, expect_status } => {
                let host = configured.as_deref().unwrap_or(host);
                let found = http::status(stream, host, path).await.map_err(Bad::Http)?;
                let expected = *expect_status;
                if found == expected { Ok(()) } else { Err(Bad::Status { found, expected }) }
            }
        }
    };
    tokio::time::timeout(timeout, steps).await.unwrap_or(Err(Bad::Timeout(timeout)))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(300);

    /// A server that answers every connection with `answer`, or never if it is empty.
    async fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                if !answer.is_empty() {
                    let mut buffer = [0; 512];
                    let _ = stream.read(&mut buffer).await;
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
                open.push(stream);
            }
        });
        address
    }

    fn http() -> HealthKind {
        HealthKind::Http { path: "/up".into(), host: None, expect_status: 200 }
    }

    #[tokio::test]
    async fn tcp_is_good_when_somebody_listens_and_bad_when_nobody_does() {
        let address = server("").await;
        check(&HealthKind::Tcp, "", TIMEOUT, TcpStream::connect(address)).await.unwrap();
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let bad = check(&HealthKind::Tcp, "", TIMEOUT, TcpStream::connect(nobody)).await.unwrap_err();
        assert!(matches!(bad, Bad::Connect(_)), "{bad}");
    }

    #[tokio::test]
    async fn http_wants_the_status_expected() {
        let address = server("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n").await;
        check(&http(), "h", TIMEOUT, TcpStream::connect(address)).await.unwrap();
        let address = server("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n").await;
        let bad = check(&http(), "h", TIMEOUT, TcpStream::connect(address)).await.unwrap_err();
        assert_eq!(bad.to_string(), "status 503 instead of 200");
    }

    #[tokio::test]
    async fn a_server_that_accepts_and_says_nothing_passes_tcp_and_fails_http() {
        let address = server("").await;
        check(&HealthKind::Tcp, "", TIMEOUT, TcpStream::connect(address)).await.unwrap();
        let bad = check(&http(), "h", TIMEOUT, TcpStream::connect(address)).await.unwrap_err();
        assert_eq!(bad.to_string(), "no answer within 300ms");
    }

    #[tokio::test]
    async fn what_is_no_http_is_bad() {
        let address = server("SSH-2.0-x\r\n").await;
        let bad = check(&http(), "h", TIMEOUT, TcpStream::connect(address)).await.unwrap_err();
        assert!(matches!(bad, Bad::Http(_)), "{bad}");
    }

    #[tokio::test]
    async fn what_the_backend_still_sends_meets_a_socket_and_the_connection_ends_by_a_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (checked, may_go_on) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 512];
            let _ = stream.read(&mut buffer).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            may_go_on.await.unwrap();
            // The first would be answered by a reset, and the second fail.
            for _ in 0..2 {
                stream.write_all(b"late").await.unwrap();
            }
            stream.shutdown().await.unwrap();
            stream.read(&mut buffer).await.unwrap_err().kind()
        });
        check(&http(), "h", TIMEOUT, TcpStream::connect(address)).await.unwrap();
        checked.send(()).unwrap();
        assert_eq!(server.await.unwrap(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_connection_that_never_comes_times_out() {
        let bad = check(&HealthKind::Tcp, "", TIMEOUT, std::future::pending()).await.unwrap_err();
        assert!(matches!(bad, Bad::Timeout(_)), "{bad}");
    }
}
