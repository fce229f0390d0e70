//! The traffic: real TCP connections whose every byte is checked at both ends, and the ledger of how they fared.
//!
//! ```text
//!   client namespace                         backends' namespaces
//!  ┌───────────────────┐   through the      ┌──────────────────┐
//!  │ thread lab-client │ ─ members ───────► │ thread lab-server│  one thread, sockets made inside
//!  │ a task a          │ ◄───────────────── │ a task a         │
//!  │ connection        │   straight back    │ connection       │
//!  └────────┬──────────┘                    └────────┬─────────┘
//!           └────────────► Ledger ◄──────────────────┘
//! ```
//! *Broken* means: a connect that fails, any error, a wrong byte, or 30 s without progress. Clients never retry.

mod client;
mod ledger;
mod pattern;
mod server;
mod wire;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tokio::sync::watch;

pub use ledger::{Broken, Counts, Kind, Ledger, Live, Second, Window, percentile};

use super::netns::Netns;

/// What traffic to make.
#[derive(Clone, Copy, Debug)]
pub struct TrafficOptions {
    /// The service.
    pub target: SocketAddr,
    /// Long-lived connections.
    pub connections: u32,
    /// Connections that upload full-size segments, beside those.
    pub uploads: u32,
    /// Connections that say something only now and then, beside those.
    pub idle: u32,
    /// Connections at a time whose client has ended its side and still receives, beside those; each lasts some seconds.
    pub half_closed: u32,
    /// Short connections per second.
    pub short_rate: u32,
    /// Mean time between an answer and the next request of a connection.
    pub interval: Duration,
    /// Connections opened per second at the start.
    pub ramp: u32,
}

/// Running clients and servers.
#[derive(Debug)]
pub struct Traffic {
    ledger: Arc<Ledger>,
    ill: server::Ill,
    stop_clients: watch::Sender<bool>,
    stop_servers: watch::Sender<bool>,
    client: Option<JoinHandle<std::io::Result<std::io::Result<()>>>>,
    server: Option<JoinHandle<std::io::Result<()>>>,
}

impl Traffic {
    /// Starts the servers on sockets made in their namespaces (each with its backend's number), and nothing else yet.
    pub fn new(listeners: Vec<(u32, TcpListener)>) -> Result<Self> {
        let ledger = Arc::new(Ledger::new());
        let (stop_clients, _) = watch::channel(false);
        let (stop_servers, stopped) = watch::channel(false);
        let ill = server::Ill::default();
        let (book, sick) = (ledger.clone(), ill.clone());
        let server = thread::Builder::new()
            .name("lab-server".to_owned())
            .spawn(move || server::serve(listeners, book, sick, stopped))?;
        Ok(Self { ledger, ill, stop_clients, stop_servers, client: None, server: Some(server) })
    }

    /// Starts the clients.
    pub fn start_clients(&mut self, client: &Netns, options: TrafficOptions) -> Result<()> {
        let (ledger, stop) = (self.ledger.clone(), self.stop_clients.subscribe());
        self.client = Some(client.spawn_thread(move || client::run(options, ledger, stop))?);
        Ok(())
    }

    /// Has a backend fail its health checks, or pass them again; it serves on all the same.
    pub fn set_ill(&self, backend: u32, ill: bool) {
        let mut set = self.ill.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if ill {
            set.insert(backend)
        } else {
            set.remove(&backend)
        };
    }

    /// How the connections fare.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Has the clients end their connections after one more exchange.
    pub fn stop(&self) {
        self.stop_clients.send_replace(true);
    }

    /// Whether all connections have ended after [`Traffic::stop`].
    pub fn is_finished(&self) -> bool {
        self.client.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the clients to end and stops the servers.
    pub fn join(mut self) -> Result<Arc<Ledger>> {
        self.stop();
        if let Some(client) = self.client.take() {
            client
                .join()
                .map_err(|_| anyhow!("the clients' thread panicked"))?
                .context("cannot enter the client's namespace")?
                .context("the clients could not run")?;
        }
        self.stop_servers.send_replace(true);
        if let Some(server) = self.server.take() {
            server
                .join()
                .map_err(|_| anyhow!("the servers' thread panicked"))?
                .context("the servers could not run")?;
        }
        Ok(self.ledger.clone())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        // Not joined: after an error or Ctrl-C nobody waits 30 s for connections that hang.
        self.stop_clients.send_replace(true);
        self.stop_servers.send_replace(true);
    }
}
