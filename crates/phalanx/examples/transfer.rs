//! A million flows to a joiner, between real daemons, beside a plain QUIC stream of as many bytes (`cargo xtask bench transfer`).
//!
//! ```text
//!   client namespace              member 1                      member 2 (joins, is killed, joins again)
//!  ┌──────────────────┐  packets ┌──────────────────┐   QUIC   ┌──────────────────┐
//!  │ generator: 2 UDP │ ───────► │ phalanx run      │ ───────► │ phalanx run      │   the transfer
//!  │ packets a flow   │          ├──────────────────┤          ├──────────────────┤
//!  └──────────────────┘          │ quinn client     │ ───────► │ quinn server     │   the reference, by turns
//!                                └──────────────────┘          └──────────────────┘
//! ```
//! The first part has `transfer_rate` at its highest and no packets: how fast the transfer is, from the moment when member 1 has its
//! tables until the last record is acknowledged as applied, by its own log. The second part has `transfer_rate` at its default and half
//! of the packets that member 1 forwards at most: how many fewer arrive at the backend while a transfer runs.
//!
//! Call it with the program to start members with, and optionally the number of rounds, of flows, and `speed` or `forwarding` for one
//! part alone.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use phalanx::lab::netns::Netns;
use phalanx::lab::world::{INTERFACE, SERVICE_PORT};
use phalanx::lab::{Action, Event, Lab, LabOptions, metrics};
use phalanx_netlink::{BpfFilter, BpfInstruction};
use phalanx_rebalancer::codec;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Unless told otherwise.
const ROUNDS: usize = 5;
const FLOWS: u64 = 1_000_000;
/// The targets of the issue: of the plain stream's speed, and of the packets forwarded without a transfer.
const SPEED_TARGET: f64 = 0.5;
const FORWARDED_TARGET: f64 = 0.9;
/// Packets per second while the table is filled: few enough that none is lost for want of processors.
const FILL_RATE: u64 = 60_000;
/// Packets per `sendmmsg`, and bytes of one: IPv4, UDP, and a few of payload.
const BATCH: usize = 64;
const PACKET_BYTES: usize = 32;
/// How long packets are counted.
const WINDOW: Duration = Duration::from_secs(3);
/// Whatever takes longer does not happen.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at the site.
const TICK: Duration = Duration::from_millis(10);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let program = PathBuf::from(arguments.first().ok_or("name the program to start members with")?);
    let rounds = arguments.get(1).map_or(Ok(ROUNDS), |text| text.parse())?;
    let flows = arguments.get(2).map_or(Ok(FLOWS), |text| text.parse())?;
    let part = arguments.get(3).map(String::as_str);
    if !matches!(part, None | Some("speed" | "forwarding")) {
        return Err("the parts are speed and forwarding".into());
    }
    if part != Some("forwarding") {
        speed(&program, rounds, flows)?;
    }
    if part != Some("speed") {
        forwarding(&program, rounds, flows)?;
    }
    Ok(())
}

/// A transfer as fast as it goes, beside the plain stream.
fn speed(program: &Path, rounds: usize, flows: u64) -> Result<()> {
    let mut site = Site::new(program, flows, "transfer_rate = 100000000")?;
    site.fill(flows)?;
    let mut ratios = Vec::new();
    println!("round  records  transfer MB/s  plain stream MB/s  ratio");
    for round in 1..=rounds {
        let plain = || site.plain_stream(flows);
        // Who goes first alternates.
        let before = (round % 2 == 0).then(plain).transpose()?;
        let (records, took) = site.join()?;
        site.kill()?;
        let plain = match before {
            Some(plain) => plain,
            None => site.plain_stream(flows)?,
        };
        let transfer = megabytes(records) / took.as_secs_f64();
        let reference = megabytes(flows) / plain.as_secs_f64();
        ratios.push(transfer / reference);
        println!(
            "{round:>5}  {records:>7}  {transfer:>13.1}  {reference:>17.1}  {:>5.2}",
            transfer / reference
        );
    }
    summary("transfer / plain stream", &mut ratios, SPEED_TARGET);
    Ok(())
}

/// Packets forwarded while a transfer runs at its default pace, beside none.
fn forwarding(program: &Path, rounds: usize, flows: u64) -> Result<()> {
    let mut site = Site::new(program, flows, "")?;
    site.fill(flows)?;
    site.load.offer(u64::MAX);
    thread::sleep(Duration::from_secs(1));
    let most = site.forwarded()?;
    let half = (most / 2.0) as u64;
    println!("\nforwarded at most: {most:.0} packets/s; offered from here on: {half} packets/s");
    println!("round  packets/s without a transfer  with one  ratio");
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        site.load.offer(half);
        thread::sleep(Duration::from_millis(500));
        let without = site.forwarded()?;
        let started = site.begin_join()?;
        let with = site.forwarded()?;
        if site.ended(started)?.is_some() {
            return Err("the transfer was over before the packets were counted: take more flows".into());
        }
        site.load.offer(0);
        site.wait_for_end(started)?;
        site.kill()?;
        ratios.push(with / without);
        println!("{round:>5}  {without:>28.0}  {with:>8.0}  {:>5.2}", with / without);
    }
    summary("forwarded with / without a transfer", &mut ratios, FORWARDED_TARGET);
    Ok(())
}

/// What so many records are on the wire, in millions of bytes.
fn megabytes(records: u64) -> f64 {
    records as f64 * record_bytes() as f64 / 1e6
}

/// Bytes of one record in a transfer table.
fn record_bytes() -> usize {
    codec::ITEM
}

fn summary(what: &str, ratios: &mut [f64], target: f64) {
    ratios.sort_unstable_by(f64::total_cmp);
    let middle = ratios.len() / 2;
    let median = if ratios.len().is_multiple_of(2) {
        f64::midpoint(ratios[middle - 1], ratios[middle])
    } else {
        ratios[middle]
    };
    let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
    println!("{what}: median {median:.2} ({least:.2} to {most:.2}), target {target}");
}

/// Two members' hosts, of which the first runs, a backend that counts, and the generator.
struct Site {
    lab: Lab,
    log: PathBuf,
    load: Arc<Load>,
    _directory: tempfile::TempDir,
}

impl Site {
    fn new(program: &Path, flows: u64, cluster_lines: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut lab = Lab::new(LabOptions {
            members: 1,
            backends: 1,
            udp: true,
            traffic: false,
            program: Some(program.canonicalize()?),
            keep: Some(directory.path().to_owned()),
            service_lines: "idle_timeout = \"1h\"".to_owned(),
            cluster_lines: cluster_lines.to_owned(),
            forwarder_lines: format!("max_flows = {}", 2 * flows),
            // Says only that there is a second host to join from.
            events: vec![Event { at: Duration::ZERO, action: Action::Join(None) }],
            ..LabOptions::default()
        })?;
        discard_datagrams(&lab.world().backends[0].netns)?;
        lab.start_members()?;
        // All packets go by member 1, whoever has joined.
        lab.carry_out(Action::Enter(Some(1)))?;
        let load = Load::start(&lab, flows)?;
        Ok(Self { lab, log: directory.path().join("member1.log"), load, _directory: directory })
    }

    /// Sends every flow two packets, which makes it established, until member 1 has all of them.
    fn fill(&mut self, flows: u64) -> Result<()> {
        let begun = Instant::now();
        self.load.offer(FILL_RATE);
        loop {
            self.tick()?;
            let known = self.value("phalanx_flows{state=\"established\"}")?;
            if known >= flows {
                self.load.offer(0);
                println!("{known} flows after {:.0} s", begun.elapsed().as_secs_f64());
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("only {known} of {flows} flows after {PATIENCE:?}").into());
            }
            thread::sleep(10 * TICK);
        }
    }

    fn tick(&mut self) -> Result<()> {
        thread::sleep(TICK);
        Ok(self.lab.poll()?)
    }

    fn value(&self, name: &str) -> Result<u64> {
        let (_, text) = metrics::get(&self.lab.world().members[0].netns, "/metrics")?;
        let found = metrics::samples(&text).find(|(sample, _)| *sample == name);
        Ok(found.map_or(0, |(_, value)| value as u64))
    }

    /// Has member 2 join and waits until it has everything; how many records, and how long that took.
    fn join(&mut self) -> Result<(u64, Duration)> {
        let started = self.begin_join()?;
        let took = self.wait_for_end(started)?;
        Ok((started.records, took))
    }

    fn begin_join(&mut self) -> Result<Started> {
        let lines = self.lines()?.len();
        self.lab.carry_out(Action::Join(Some(2)))?;
        let begun = Instant::now();
        loop {
            self.tick()?;
            let all = self.lines()?;
            for (index, line) in all.iter().enumerate().skip(lines) {
                let records = line.split_once("transfer tables records=").map(|(_, count)| count.trim());
                if let Some(records) = records.map(str::parse::<u64>).transpose()?
                    && records > 0
                {
                    return Ok(Started { line: index, at: time_of(line)?, records });
                }
            }
            if begun.elapsed() > PATIENCE {
                return Err("member 1 sends member 2 nothing".into());
            }
        }
    }

    /// How long the transfer took, if it is over.
    fn ended(&self, started: Started) -> Result<Option<Duration>> {
        let lines = self.lines()?;
        let end = lines.iter().skip(started.line).find(|line| line.contains("transfers done"));
        Ok(match end {
            Some(line) => Some(time_of(line)?.saturating_sub(started.at)),
            None => None,
        })
    }

    fn wait_for_end(&mut self, started: Started) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            self.tick()?;
            if let Some(took) = self.ended(started)? {
                return Ok(took);
            }
            if begun.elapsed() > PATIENCE {
                return Err("the transfer does not end".into());
            }
        }
    }

    /// Kills member 2 and waits until member 1 is alone again.
    fn kill(&mut self) -> Result<()> {
        self.lab.carry_out(Action::Kill(2))?;
        let begun = Instant::now();
        while self.value("phalanx_members{state=\"alive\"}")? != 1
            || self.value("phalanx_members{state=\"suspect\"}")? != 0
        {
            self.tick()?;
            if begun.elapsed() > PATIENCE {
                return Err("member 1 does not notice that member 2 is dead".into());
            }
        }
        Ok(())
    }

    fn lines(&self) -> Result<Vec<String>> {
        Ok(std::fs::read_to_string(&self.log)?.lines().map(str::to_owned).collect())
    }

    /// Packets per second that arrive at the backend.
    fn forwarded(&mut self) -> Result<f64> {
        let before = (self.received()?, Instant::now());
        while before.1.elapsed() < WINDOW {
            self.tick()?;
        }
        Ok((self.received()? - before.0) as f64 / before.1.elapsed().as_secs_f64())
    }

    fn received(&self) -> Result<u64> {
        let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
        let text = self.lab.world().backends[0].netns.enter(read)??;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).ok_or("no eth0")?;
        // Bytes and packets received (net/core/net-procfs.c).
        Ok(line.split_whitespace().nth(1).ok_or("no packets")?.parse()?)
    }

    /// Sends as many bytes as `records` have over one stream of a plain QUIC connection from member 1's host to member 2's, with the
    /// windows and the MTU that members use; how long until the receiver says that it has them all.
    fn plain_stream(&self, records: u64) -> Result<Duration> {
        let bytes = records * record_bytes() as u64;
        let hosts = &self.lab.world().members;
        let IpAddr::V4(address) = hosts[1].v4 else { return Err("no IPv4".into()) };
        let address = SocketAddr::from((address, 9999));
        let made = rcgen::generate_simple_self_signed(vec!["reference".to_owned()])?;
        let certificate = made.cert.der().clone();
        let key = made.signing_key.serialize_der();
        let (ready, listening) = std::sync::mpsc::channel();
        let own = certificate.clone();
        let server =
            hosts[1].netns.spawn_thread(move || runtime()?.block_on(receive(address, own, key, ready)))?;
        listening.recv()?;
        let client =
            hosts[0].netns.spawn_thread(move || runtime()?.block_on(send(address, certificate, bytes)))?;
        let took = client.join().map_err(|_| "the sender panicked")???;
        server.join().map_err(|_| "the receiver panicked")???;
        Ok(took)
    }
}

/// A transfer that has begun.
#[derive(Clone, Copy)]
struct Started {
    line: usize,
    at: Duration,
    records: u64,
}

/// Time of day of a log line: it begins with one of RFC 3339.
fn time_of(line: &str) -> Result<Duration> {
    let time = line.get(11..26).ok_or("a log line without a time")?;
    let mut parts = time.split(':');
    let mut next = || parts.next().ok_or("a log line without a time");
    let (hours, minutes, seconds) = (next()?, next()?, next()?);
    let whole = hours.parse::<u64>()? * 3600 + minutes.parse::<u64>()? * 60;
    Ok(Duration::from_secs(whole) + Duration::from_secs_f64(seconds.parse()?))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// As members have it (`daemon/peers.rs`).
fn transport() -> Arc<quinn::TransportConfig> {
    let mut transport = quinn::TransportConfig::default();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(1572);
    transport
        .mtu_discovery_config(Some(discovery))
        .stream_receive_window((16_u32 << 20).into())
        .send_window(32 << 20);
    Arc::new(transport)
}

async fn receive(
    address: SocketAddr,
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
    ready: std::sync::mpsc::Sender<()>,
) -> Result<()> {
    let key = PrivatePkcs8KeyDer::from(key);
    let mut config = quinn::ServerConfig::with_single_cert(vec![certificate], key.into())?;
    config.transport_config(transport());
    let endpoint = quinn::Endpoint::server(config, address)?;
    ready.send(())?;
    let connection = endpoint.accept().await.ok_or("nobody came")?.await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    while receive.read_chunk(64 << 10, true).await?.is_some() {}
    send.write_all(b"all").await?;
    send.finish()?;
    connection.closed().await;
    Ok(())
}

async fn send(address: SocketAddr, certificate: CertificateDer<'static>, bytes: u64) -> Result<Duration> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let mut config = quinn::ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(transport());
    let mut endpoint = quinn::Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into())?;
    endpoint.set_default_client_config(config);
    let connection = endpoint.connect(address, "reference")?.await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    let begun = Instant::now();
    let chunk = vec![0x5a; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(chunk.len() as u64) as usize;
        send.write_all(&chunk[..count]).await?;
        left -= count as u64;
    }
    send.finish()?;
    let _ = receive.read_to_end(16).await?;
    let took = begun.elapsed();
    connection.close(0_u32.into(), b"done");
    endpoint.wait_idle().await;
    Ok(took)
}

/// The generator's wishes.
struct Load {
    /// Packets per second; 0: none; `u64::MAX`: as many as go.
    rate: AtomicU64,
    stop: AtomicBool,
}

impl Load {
    fn start(lab: &Lab, flows: u64) -> Result<Arc<Self>> {
        let load = Arc::new(Self { rate: AtomicU64::new(0), stop: AtomicBool::new(false) });
        let IpAddr::V4(service) = lab.world().service() else { return Err("no IPv4".into()) };
        let own = Arc::clone(&load);
        drop(lab.world().client.spawn_thread(move || {
            if let Err(error) = own.generate(service, flows) {
                eprintln!("the generator: {error}");
            }
        })?);
        Ok(load)
    }

    fn offer(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// Sends two packets of each flow in turn, from as many addresses as it takes.
    fn generate(&self, service: Ipv4Addr, flows: u64) -> Result<()> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(255.into()))?;
        let to: socket2::SockAddr = SocketAddr::from((service, 0)).into();
        let mut packets = vec![[0u8; PACKET_BYTES]; BATCH];
        let (mut next, mut sent, mut begun, mut known) = (0u64, 0u64, Instant::now(), 0);
        while !self.stop.load(Ordering::Relaxed) {
            let rate = self.rate.load(Ordering::Relaxed);
            if rate != known {
                (sent, begun, known) = (0, Instant::now(), rate);
            }
            let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
            if rate == 0 || (rate != u64::MAX && sent >= due) {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            for packet in &mut packets {
                *packet = datagram(service, (next / 2) % flows);
                next += 1;
            }
            let mut vectors: Vec<libc::iovec> = packets
                .iter_mut()
                .map(|packet| libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: PACKET_BYTES })
                .collect();
            let mut messages: Vec<libc::mmsghdr> = vectors
                .iter_mut()
                .map(|vector| {
                    // SAFETY: mmsghdr is plain old data, for which zero is a value.
                    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                    message.msg_hdr.msg_name = to.as_ptr().cast_mut().cast();
                    message.msg_hdr.msg_namelen = to.len();
                    message.msg_hdr.msg_iov = vector;
                    message.msg_hdr.msg_iovlen = 1;
                    message
                })
                .collect();
            // SAFETY: every message points to an address and a packet that outlive the call.
            let count = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0) };
            sent += u64::try_from(count).unwrap_or_default();
        }
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.load.stop.store(true, Ordering::Relaxed);
    }
}

/// A UDP datagram of a flow (RFC 791, RFC 768), from a block for benchmarks (RFC 2544); the kernel sums the IPv4 header.
fn datagram(service: Ipv4Addr, flow: u64) -> [u8; PACKET_BYTES] {
    const PORTS: u64 = 50_000;
    let mut packet = [0; PACKET_BYTES];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(PACKET_BYTES as u16).to_be_bytes());
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&[198, 19, 1, 1 + (flow / PORTS) as u8]);
    packet[16..20].copy_from_slice(&service.octets());
    packet[20..22].copy_from_slice(&(1024 + (flow % PORTS) as u16).to_be_bytes());
    packet[22..24].copy_from_slice(&SERVICE_PORT.to_be_bytes());
    packet[24..26].copy_from_slice(&((PACKET_BYTES - 20) as u16).to_be_bytes());
    packet
}

/// Drops all UDP that a backend receives, once it is counted: nobody listens, and its kernel would answer.
fn discard_datagrams(backend: &Netns) -> Result<()> {
    let op = |code, jt, jf, k| BpfInstruction { code, jt, jf, k };
    let program = vec![op(0x30, 0, 0, 23), op(0x15, 0, 1, 17), op(0x06, 0, 0, 2), op(0x06, 0, 0, u32::MAX)];
    let mut netlink = backend.netlink()?;
    let index = netlink.link(INTERFACE)?.index;
    netlink.ensure_clsact(index)?;
    Ok(netlink.add_bpf_filter(&BpfFilter { index, priority: 1, handle: 1, program })?)
}
