//! Runs the checks and carries their packets.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use phalanx_flow::BackendId;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::check::{Bad, check};
use super::path::{self, HealthError};
use super::{Health, ProbeSender};
use crate::config::{Config, HealthConfig, HealthKind};

/// A packet of a check is at most as long as the device's MTU; more means that somebody changed it.
const PACKET_BYTES: usize = 2048;

/// A backend became healthy, or stopped being so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthChange {
    /// The service's name.
    pub service: String,
    /// The backend.
    pub backend: BackendId,
    /// What it is now.
    pub healthy: bool,
    /// Why: the last check, in a few words.
    pub reason: String,
}

/// What is known of a backend that is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendCheck {
    /// The service's name.
    pub service: String,
    /// The backend.
    pub backend: BackendId,
    /// Whether it is healthy.
    pub healthy: bool,
    /// Good checks so far.
    pub good: u64,
    /// Bad checks so far.
    pub bad: u64,
    /// Why the last bad check was bad; empty if none was.
    pub last_bad: String,
}

/// Which backend the connection from a local port is a check of.
///
/// An entry stays until its port is used again, because the kernel still sends a reset after the socket has gone.
#[derive(Debug, Default)]
pub(super) struct Ports(Mutex<HashMap<u16, BackendId>>);

impl Ports {
    pub(super) fn assign(&self, port: u16, backend: BackendId) {
        lock(&self.0).insert(port, backend);
    }

    pub(super) fn backend(&self, port: u16) -> Option<BackendId> {
        lock(&self.0).get(&port).copied()
    }
}

/// One of the backends under check.
#[derive(Clone, Debug, PartialEq)]
struct Target {
    service: String,
    socket: SocketAddr,
    backend: BackendId,
    health: HealthConfig,
    source: IpAddr,
}

#[derive(Debug)]
struct Running {
    target: Target,
    status: Arc<Mutex<BackendCheck>>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Checks the backends of a configuration.
///
/// Order of calls: [`HealthDriver::start`] in a tokio runtime; [`HealthDriver::reload`] whenever the configuration has changed;
/// [`HealthDriver::statuses`] at any time; dropping it stops all checks and removes what was made in the kernel.
pub struct HealthDriver {
    sender: Arc<dyn ProbeSender>,
    changes: mpsc::UnboundedSender<HealthChange>,
    ports: Arc<Ports>,
    running: Vec<Running>,
    /// The task that reads the TUN device; none while no service is checked.
    packets: Option<JoinHandle<()>>,
}

impl HealthDriver {
    /// Starts the checks. Every backend is taken for healthy until it denies it or is silent too often. Makes nothing in the
    /// kernel if no service has checks.
    pub fn start(
        config: &Config,
        sender: Arc<dyn ProbeSender>,
        changes: mpsc::UnboundedSender<HealthChange>,
    ) -> Result<Self, HealthError> {
        let mut driver = Self { sender, changes, ports: Arc::default(), running: Vec::new(), packets: None };
        driver.apply(config, Health::assumed)?;
        Ok(driver)
    }

    /// Goes over to another configuration. Backends whose check is unchanged go on as they were; new ones are taken for unhealthy
    /// until their first good check. On an error the old checks go on.
    pub fn reload(&mut self, config: &Config) -> Result<(), HealthError> {
        self.apply(config, Health::added)
    }

    /// What is known of each backend that is checked, in the order of the configuration. Backends that are not in it are not
    /// checked: take them for healthy.
    pub fn statuses(&self) -> Vec<BackendCheck> {
        self.running.iter().map(|running| lock(&running.status).clone()).collect()
    }

    fn apply(&mut self, config: &Config, first: fn(u32, u32) -> Health) -> Result<(), HealthError> {
        let targets = targets(config);
        if !targets.is_empty() && self.packets.is_none() {
            let device = path::open()?;
            // SAFETY: a `File` keeps its descriptor, and open, until it is dropped, and `AsyncFd` owns it.
            let device = unsafe { AsyncFd::register(device) };
            let device = device.map_err(|error| HealthError::Device(error.into()))?;
            let (ports, sender) = (Arc::clone(&self.ports), Arc::clone(&self.sender));
            self.packets = Some(tokio::spawn(carry(device, ports, sender)));
        }
        let mut old: Vec<Running> = std::mem::take(&mut self.running);
        for target in targets {
            let kept = old.iter().position(|running| running.target == target);
            let running = match kept {
                Some(index) => old.swap_remove(index),
                None => {
                    // The same backend with other timing keeps what is known of it.
                    let known = old
                        .iter()
                        .find(|running| {
                            running.target.service == target.service
                                && running.target.backend == target.backend
                        })
                        .map(|running| lock(&running.status).healthy);
                    let (rise, fall) = (target.health.rise, target.health.fall);
                    let health = match known {
                        Some(true) => Health::healthy(rise, fall),
                        Some(false) => Health::added(rise, fall),
                        None => first(rise, fall),
                    };
                    self.spawn(target, health)
                }
            };
            self.running.push(running);
        }
        Ok(())
    }

    fn spawn(&self, target: Target, health: Health) -> Running {
        let status = Arc::new(Mutex::new(BackendCheck {
            service: target.service.clone(),
            backend: target.backend,
            healthy: health.is_healthy(),
            good: 0,
            bad: 0,
            last_bad: String::new(),
        }));
        let ports = Arc::clone(&self.ports);
        let connect = {
            let target = target.clone();
            move || {
                let (target, ports) = (target.clone(), Arc::clone(&ports));
                async move { path::connect(target.source, target.socket, target.backend, &ports).await }
            }
        };
        let task =
            tokio::spawn(run(target.clone(), health, Arc::clone(&status), self.changes.clone(), connect));
        Running { target, status, task }
    }
}

impl Drop for HealthDriver {
    fn drop(&mut self) {
        if let Some(packets) = self.packets.take() {
            packets.abort();
            path::close();
        }
    }
}

impl std::fmt::Debug for HealthDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HealthDriver").field("running", &self.running).finish_non_exhaustive()
    }
}

/// The backends to check.
fn targets(config: &Config) -> Vec<Target> {
    let mut out = Vec::new();
    for service in &config.services {
        let Some(health) = &service.health else { continue };
        for backend in &service.backends {
            out.push(Target {
                service: service.name.clone(),
                socket: service.socket(),
                backend: service.backend_id(backend),
                health: health.clone(),
                source: config.member.address,
            });
        }
    }
    out
}

/// Checks one backend for ever.
async fn run<C, F>(
    target: Target,
    mut health: Health,
    status: Arc<Mutex<BackendCheck>>,
    changes: mpsc::UnboundedSender<HealthChange>,
    connect: C,
) where
    C: Fn() -> F,
    F: Future<Output = std::io::Result<tokio::net::TcpStream>>,
{
    let HealthConfig { kind, interval, timeout, .. } = &target.health;
    let host = match kind {
        HealthKind::Http { .. } => target.socket.to_string(),
        HealthKind::Tcp => String::new(),
    };
    let mut random = seeded();
    // The first checks are spread over one interval.
    let mut next = Instant::now() + interval.mul_f64(random.random::<f64>());
    loop {
        tokio::time::sleep_until(next).await;
        next = Instant::now() + jittered(*interval, &mut random);
        let result = check(kind, &host, *timeout, connect()).await;
        let answered = result.as_ref().err().is_none_or(Bad::is_answer);
        let changed = health.handle_check(result.is_ok(), answered);
        {
            let mut status = lock(&status);
            status.healthy = health.is_healthy();
            match &result {
                Ok(()) => status.good += 1,
                Err(bad) => {
                    status.bad += 1;
                    status.last_bad = bad.to_string();
                }
            }
        }
        if let Some(healthy) = changed {
            let reason = result.map_or_else(|bad| bad.to_string(), |()| "checks succeed".to_owned());
            let (service, backend) = (target.service.clone(), target.backend);
            if changes.send(HealthChange { service, backend, healthy, reason }).is_err() {
                return;
            }
        }
    }
}

/// `interval`, up to a tenth shorter or longer, so that members do not check in step.
fn jittered(interval: Duration, random: &mut StdRng) -> Duration {
    interval.mul_f64(random.random_range(0.9..=1.1))
}

fn seeded() -> StdRng {
    let mut seed = [0; 32];
    // Without the kernel's generator jitter is merely the same everywhere.
    let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    StdRng::from_seed(seed)
}

/// Hands the packets of checks to the forwarder. Cancel-safe: a packet that was read is sent at once.
async fn carry(device: AsyncFd<File>, ports: Arc<Ports>, sender: Arc<dyn ProbeSender>) {
    let mut packet = [0; PACKET_BYTES];
    loop {
        let mut ready = match device.readable().await {
            Ok(ready) => ready,
            Err(error) => {
                tracing::error!(%error, "health checks stop: their device cannot be read any more");
                return;
            }
        };
        match ready.try_io(|device| device.get_ref().read(&mut packet)) {
            Ok(Ok(length)) => {
                let packet = packet.get(..length).unwrap_or_default();
                if let Some(backend) = path::source_port(packet).and_then(|port| ports.backend(port)) {
                    sender.send_probe(backend, packet);
                }
            }
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "health checks stop: their device cannot be read any more");
                return;
            }
            Err(_would_block) => {}
        }
    }
}

/// A lock that a panic elsewhere does not make useless: what it guards is valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
