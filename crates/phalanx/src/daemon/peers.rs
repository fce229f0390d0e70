//! QUIC between members: one stream of frames per pair of members, both ways, and short requests.
//!
//! ```text
//!                 ┌─────────────── Peers ───────────────┐
//!  control ──────►│ outbox per link ─► writer ─► stream  │◄──► the peer's link
//!     ▲           │ (unbounded: the replicator bounds    │
//!     │           │  what is in flight)                  │
//!     └───────────│ PeerEvent ◄── reader ◄── stream      │
//!                 └─────────────────────────────────────┘
//! ```
//! Of two members the one with the lower id dials, and opens the stream of frames; so there is one connection and nothing to deduplicate.
//! A lost connection is dialled again with capped backoff; what was in flight then is the replicator's to send again.
//! Every connection is a *link* with a number of its own, and events name it: what a link that is gone still says is ignored.
//!
//! Certificates are self-signed and pinned by the fingerprint that the (sealed) gossip carries, in both directions.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use aws_lc_rs::digest;
use phalanx_flow::MemberId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Protocol name in the TLS handshake (RFC 7301); the number changes with the framing.
const ALPN: &[u8] = b"phalanx/1";

/// A frame or request longer than this is a fault or an attack: the stream is reset.
const MAX_FRAME_BYTES: usize = 4 << 20;

/// First pause before dialling again, and the longest.
const REDIAL_FIRST: Duration = Duration::from_millis(50);
const REDIAL_LAST: Duration = Duration::from_secs(1);

/// A dead peer's connection ends after this long; gossip has said so long before.
const IDLE_TIMEOUT: Duration = Duration::from_secs(6);
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Path MTUs are probed up to this: what a 1,500-byte packet needs once it is handed off over IPv6, rounded up (design §4).
pub const PROBED_MTU: u16 = 1600;
const PROBED_PAYLOAD: u16 = PROBED_MTU - 28;

/// Pieces of a stream that are taken at once: some 64 kB, as much as the network gives the socket at once.
const PIECES: usize = 44;

/// QUIC has found the path MTU by then.
const MTU_SETTLED: Duration = Duration::from_secs(10);

/// How long a request may take in all.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// SHA-256 of a certificate.
pub type Fingerprint = [u8; 32];

/// A member's key pair for QUIC, made anew at every start.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Identity {
    /// Makes a self-signed certificate.
    pub fn generate() -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed(vec!["phalanx".to_owned()])
            .context("make a QUIC certificate")?;
        Ok(Self { certificate: made.cert.der().clone(), key: made.signing_key.serialize_der().into() })
    }

    /// What the gossip carries.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate)
    }
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
    fingerprint
}

/// A member to be connected with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub id: MemberId,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its certificate's fingerprint.
    pub fingerprint: Fingerprint,
}

/// What peers did.
#[derive(Debug)]
pub enum PeerEvent {
    /// The stream of frames to the peer is open, both ways.
    Connected(MemberId, Link),
    /// It is gone, with whatever was in flight.
    Disconnected(MemberId, Link),
    /// Bytes of the stream of frames, in order, cut anywhere.
    Frame(MemberId, Link, Vec<u8>),
    /// The peer asks; dropping `reply` refuses.
    Request {
        /// Who asks.
        from: MemberId,
        /// What.
        body: Vec<u8>,
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<u8>>,
    },
}

/// Number of a connection; no two of a process have the same.
pub type Link = u64;

/// First byte of a stream: what it is for.
const FRAMES: u8 = b'F';
const REQUEST: u8 = b'R';

/// A peer that the view names, and the task that dials it if it is ours to dial.
type Wanted = (Peer, Option<JoinHandle<()>>);

struct Open {
    link: Link,
    since: Instant,
    connection: quinn::Connection,
    outbox: mpsc::UnboundedSender<Vec<u8>>,
}

struct Shared {
    local: MemberId,
    endpoint: quinn::Endpoint,
    by_fingerprint: Mutex<HashMap<Fingerprint, MemberId>>,
    wanted: Mutex<HashMap<MemberId, Wanted>>,
    open: Mutex<HashMap<MemberId, Open>>,
    next_link: AtomicU64,
    events: mpsc::UnboundedSender<PeerEvent>,
}

/// The QUIC side of a member. Cheap to clone.
#[derive(Clone)]
pub struct Peers(Arc<Shared>);

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peers {
    /// Listens on `address`; must be called within a tokio runtime.
    pub fn start(
        local: MemberId,
        identity: &Identity,
        address: SocketAddr,
        events: mpsc::UnboundedSender<PeerEvent>,
    ) -> anyhow::Result<Self> {
        let listen = || format!("listen for QUIC on {address} (member.address, cluster.transfer_port)");
        let socket = std::net::UdpSocket::bind(address).with_context(listen)?;
        let mut settings = quinn::EndpointConfig::default();
        settings.max_udp_payload_size(PROBED_PAYLOAD)?;
        let runtime = quinn::default_runtime().context("no runtime")?;
        let mut endpoint = quinn::Endpoint::new(settings, Some(server_config(identity)?), socket, runtime)
            .with_context(listen)?;
        endpoint.set_default_client_config(client_config(identity)?);
        let shared = Arc::new(Shared {
            local,
            endpoint,
            by_fingerprint: Mutex::default(),
            wanted: Mutex::default(),
            open: Mutex::default(),
            next_link: AtomicU64::new(1),
            events,
        });
        tokio::spawn(accept(Arc::clone(&shared)));
        Ok(Self(shared))
    }

    /// Says whom to be connected with; others are let go.
    pub fn set_peers(&self, peers: &[Peer]) {
        *lock(&self.0.by_fingerprint) = peers.iter().map(|peer| (peer.fingerprint, peer.id)).collect();
        let mut wanted = lock(&self.0.wanted);
        wanted.retain(|id, (known, dialer)| {
            let keep = peers.iter().any(|peer| peer.id == *id && peer == known);
            if !keep {
                if let Some(dialer) = dialer {
                    dialer.abort();
                }
                self.reset(*id);
            }
            keep
        });
        for peer in peers {
            wanted.entry(peer.id).or_insert_with(|| {
                let dialer =
                    (self.0.local < peer.id).then(|| tokio::spawn(dial(Arc::clone(&self.0), peer.clone())));
                (peer.clone(), dialer)
            });
        }
    }

    /// Closes the connection to a peer; its link says so, and it is dialled again if it is still wanted.
    pub fn reset(&self, id: MemberId) {
        if let Some(open) = lock(&self.0.open).get(&id) {
            open.connection.close(1_u32.into(), b"reset");
        }
    }

    /// Queues bytes on a link's stream of frames; lost if the link is gone, of which [`PeerEvent::Disconnected`] says or has said so.
    pub fn send(&self, to: MemberId, link: Link, frame: Vec<u8>) {
        if let Some(open) = lock(&self.0.open).get(&to)
            && open.link == link
        {
            let _ = open.outbox.send(frame);
        }
    }

    /// Asks a connected peer.
    pub async fn request(&self, to: MemberId, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let connection = lock(&self.0.open)
            .get(&to)
            .map(|open| open.connection.clone())
            .ok_or_else(|| anyhow!("member {to} is not connected"))?;
        tokio::time::timeout(REQUEST_TIMEOUT, async {
            let (mut send, mut receive) = connection.open_bi().await?;
            send.write_all(&[REQUEST]).await?;
            send.write_all(body).await?;
            send.finish()?;
            Ok(receive.read_to_end(MAX_FRAME_BYTES).await?)
        })
        .await
        .with_context(|| format!("member {to} did not answer in {REQUEST_TIMEOUT:?}"))?
    }

    /// The largest IP packet known to reach a peer whole, in bytes, once QUIC has had the time to find it (RFC 8899);
    /// at most [`PROBED_MTU`].
    pub fn path_mtu(&self, id: MemberId) -> Option<u16> {
        let open = lock(&self.0.open);
        let open = open.get(&id).filter(|open| open.since.elapsed() >= MTU_SETTLED)?;
        let headers = if open.connection.remote_address().is_ipv4() { 28 } else { 48 };
        Some(open.connection.stats().path.current_mtu.saturating_add(headers))
    }

    /// Lets what is queued go out, then closes.
    pub async fn shutdown(&self) {
        for (_, dialer) in lock(&self.0.wanted).values_mut() {
            if let Some(dialer) = dialer.take() {
                dialer.abort();
            }
        }
        self.0.endpoint.close(0_u32.into(), b"leaving");
        let _ = tokio::time::timeout(Duration::from_millis(200), self.0.endpoint.wait_idle()).await;
    }
}

/// Keeps one connection to `peer` for as long as it is wanted.
async fn dial(shared: Arc<Shared>, peer: Peer) {
    let mut pause = REDIAL_FIRST;
    loop {
        match connect(&shared, &peer).await {
            Ok((connection, send, receive)) => {
                pause = REDIAL_FIRST;
                let requests = tokio::spawn(serve_requests(Arc::clone(&shared), peer.id, connection.clone()));
                run_link(&shared, peer.id, connection, send, receive).await;
                requests.abort();
            }
            Err(error) => tracing::debug!(peer = %peer.id, address = %peer.address, "dial: {error:#}"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(REDIAL_LAST);
    }
}

async fn connect(
    shared: &Shared,
    peer: &Peer,
) -> anyhow::Result<(quinn::Connection, quinn::SendStream, quinn::RecvStream)> {
    let connection = shared.endpoint.connect(peer.address, "phalanx")?.await?;
    if peer_fingerprint(&connection)? != peer.fingerprint {
        connection.close(2_u32.into(), b"wrong certificate");
        bail!("the certificate at {} is not the one member {} gossips", peer.address, peer.id);
    }
    let (mut send, receive) = connection.open_bi().await?;
    send.write_all(&[FRAMES]).await?;
    Ok((connection, send, receive))
}

/// Runs one link until its connection ends.
async fn run_link(
    shared: &Shared,
    peer: MemberId,
    connection: quinn::Connection,
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) {
    let link = shared.next_link.fetch_add(1, Ordering::Relaxed);
    let (outbox, mut queue) = mpsc::unbounded_channel::<Vec<u8>>();
    let before = lock(&shared.open)
        .insert(peer, Open { link, since: Instant::now(), connection: connection.clone(), outbox });
    if let Some(before) = before {
        before.connection.close(1_u32.into(), b"replaced");
        let _ = shared.events.send(PeerEvent::Disconnected(peer, before.link));
    }
    let _ = shared.events.send(PeerEvent::Connected(peer, link));
    let write = async {
        while let Some(frame) = queue.recv().await {
            send.write_chunk(frame.into()).await?;
        }
        Ok::<_, quinn::WriteError>(())
    };
    let read = async {
        // One a datagram: what has come is told of at once.
        let mut pieces: [_; PIECES] = std::array::from_fn(|_| Default::default());
        while let Some(count) = receive.read_chunks(&mut pieces).await? {
            let _ = shared.events.send(PeerEvent::Frame(peer, link, pieces[..count].concat()));
        }
        Ok::<_, quinn::ReadError>(())
    };
    tokio::select! {
        _ = write => {}
        _ = read => {}
        _ = connection.closed() => {}
    }
    connection.close(1_u32.into(), b"stream lost");
    let mut open = lock(&shared.open);
    if open.get(&peer).is_some_and(|open| open.link == link) {
        open.remove(&peer);
        let _ = shared.events.send(PeerEvent::Disconnected(peer, link));
    }
}

async fn accept(shared: Arc<Shared>) {
    while let Some(incoming) = shared.endpoint.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let address = incoming.remote_address();
            if let Err(error) = serve(shared, incoming).await {
                tracing::debug!(%address, "connection from peer ended: {error:#}");
            }
        });
    }
}

async fn serve(shared: Arc<Shared>, incoming: quinn::Incoming) -> anyhow::Result<()> {
    let connection = incoming.await?;
    let print = peer_fingerprint(&connection)?;
    let known = || lock(&shared.by_fingerprint).get(&print).copied();
    let mut from = known();
    // A joiner may dial before its metadata has reached us.
    for _ in 0..20 {
        if from.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        from = known();
    }
    let Some(from) = from else {
        connection.close(2_u32.into(), b"unknown certificate");
        bail!("a certificate nobody gossips");
    };
    serve_requests(shared, from, connection).await
}

/// Serves the streams that a peer opens.
async fn serve_requests(
    shared: Arc<Shared>,
    from: MemberId,
    connection: quinn::Connection,
) -> anyhow::Result<()> {
    loop {
        let (mut send, mut receive) = connection.accept_bi().await?;
        let shared = Arc::clone(&shared);
        let connection = connection.clone();
        tokio::spawn(async move {
            let mut kind = [0];
            if receive.read_exact(&mut kind).await.is_err() {
                return;
            }
            match kind[0] {
                FRAMES if from < shared.local => run_link(&shared, from, connection, send, receive).await,
                REQUEST => {
                    let Ok(body) = receive.read_to_end(MAX_FRAME_BYTES).await else { return };
                    let (reply, answer) = oneshot::channel();
                    let _ = shared.events.send(PeerEvent::Request { from, body, reply });
                    if let Ok(answer) = answer.await {
                        let _ = send.write_all(&answer).await;
                        let _ = send.finish();
                    } else {
                        let _ = send.reset(0_u32.into());
                    }
                }
                _ => connection.close(3_u32.into(), b"unknown stream"),
            }
        });
    }
}

fn peer_fingerprint(connection: &quinn::Connection) -> anyhow::Result<Fingerprint> {
    let identity = connection.peer_identity().context("no certificate")?;
    let chain =
        identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| anyhow!("no X.509 certificate"))?;
    Ok(fingerprint(chain.first().context("no certificate")?))
}

fn transport() -> anyhow::Result<Arc<quinn::TransportConfig>> {
    let mut transport = quinn::TransportConfig::default();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(PROBED_PAYLOAD);
    transport
        .mtu_discovery_config(Some(discovery))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into()?))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window((16_u32 << 20).into())
        .send_window(32 << 20)
        .max_concurrent_bidi_streams(64_u32.into())
        .max_concurrent_uni_streams(0_u32.into());
    Ok(Arc::new(transport))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn server_config(identity: &Identity) -> anyhow::Result<quinn::ServerConfig> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Pinned(provider())))
        .with_single_cert(
            vec![identity.certificate.clone()],
            PrivateKeyDer::Pkcs8(identity.key.clone_key()),
        )?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport()?);
    Ok(config)
}

fn client_config(identity: &Identity) -> anyhow::Result<quinn::ClientConfig> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned(provider())))
        .with_client_auth_cert(
            vec![identity.certificate.clone()],
            PrivateKeyDer::Pkcs8(identity.key.clone_key()),
        )?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport()?);
    Ok(config)
}

/// Takes any certificate whose holder proves the key; the fingerprint is compared once the handshake is done.
#[derive(Debug)]
struct Pinned(Arc<rustls::crypto::CryptoProvider>);

impl Pinned {
    fn check(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }
}

fn no_tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}

impl rustls::client::danger::ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.check(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl rustls::server::danger::ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<rustls::server::danger::ClientCertVerified, rustls::Error> {
        Ok(rustls::server::danger::ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.check(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
