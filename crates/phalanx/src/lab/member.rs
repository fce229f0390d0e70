//! Member processes: their configuration files, their lives and their deaths.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::config::ForwarderKind;

use super::metrics::ADMIN;
use super::netns::Netns;
use super::world::{INTERFACE, SERVICE_PORT};

/// What all members are told.
#[derive(Clone, Debug)]
pub struct ClusterFile {
    /// Addresses of the members to find the cluster by.
    pub seeds: Vec<IpAddr>,
    /// Whether owners tell backups of their flows.
    pub replication: bool,
    /// "rendezvous" or one of the CRCs.
    pub scoring: String,
    /// "off" or "all".
    pub cache: String,
    /// Whether members fragment packets that are too large for the way between them.
    pub handoff_fragment: bool,
    /// "l2", "ipip" or "gue".
    pub method: String,
    /// The service's address.
    pub service: IpAddr,
    /// The backends.
    pub backends: Vec<BackendLine>,
    /// Lines to add to the service's section.
    pub service_lines: String,
    /// Lines to add to the cluster's section.
    pub cluster_lines: String,
    /// Which forwarder.
    pub forwarder: ForwarderKind,
    /// Lines to add to the forwarder's section.
    pub forwarder_lines: String,
    /// Where this member pins its programs and tables.
    pub pin_dir: Option<PathBuf>,
    /// "tcp" or "udp".
    pub protocol: &'static str,
    /// The log's level, as in `[log] level`.
    pub log_level: String,
}

/// One backend in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendLine {
    /// Its number in the lab.
    pub number: u32,
    /// Where it is.
    pub address: IpAddr,
    /// Its weight.
    pub weight: u32,
    /// Whether it gets no new flows.
    pub drain: bool,
}

/// The seed of the lab's flow hash: the same in every run, so that runs compare.
pub const HASH_SEED: &str = "00112233445566778899aabbccddeeff";

impl ClusterFile {
    /// The configuration file of one member.
    pub fn to_toml(&self, id: u32, address: IpAddr, weight: u32, key_file: &Path) -> String {
        let pin_dir = self
            .pin_dir
            .as_ref()
            .filter(|_| !self.forwarder_lines.contains("pin_dir"))
            .map(|directory| format!("pin_dir = \"{}\"\n", directory.display()))
            .unwrap_or_default();
        let seeds: Vec<String> = self.seeds.iter().map(|seed| format!("\"{seed}\"")).collect();
        let mut text = format!(
            "[member]\nid = {id}\naddress = \"{address}\"\nweight = {weight}\nsite = \"lab\"\ncache = \"{}\"\n\
             seeds = [{}]\n\n",
            self.cache,
            seeds.join(", ")
        );
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "[cluster]\nname = \"lab\"\nkey_file = \"{}\"\nhash_seed = \"{HASH_SEED}\"\nscoring = \"{}\"\n\
             profile = \"lan\"\nreplication = {}\nhandoff_fragment = {}\n{}\n\n\
             [forwarder]\nkind = \"{}\"\ninterfaces = [\"{INTERFACE}\"]\n{pin_dir}{}\n\n\
             [admin]\nlisten = \"{ADMIN}\"\n\n[log]\nlevel = \"{}\"\n\n\
             [[service]]\nname = \"web\"\naddress = \"{}\"\nport = {SERVICE_PORT}\nprotocol = \"{}\"\n\
             method = \"{}\"\n{}\n",
            key_file.display(),
            self.scoring,
            self.replication,
            self.handoff_fragment,
            self.cluster_lines,
            self.forwarder.as_str(),
            self.forwarder_lines,
            self.log_level,
            self.service,
            self.protocol,
            self.method,
            self.service_lines,
        );
        for BackendLine { address, weight, drain, .. } in &self.backends {
            let _ = write!(
                text,
                "\n[[service.backend]]\naddress = \"{address}\"\nweight = {weight}\ndrain = {drain}\n"
            );
        }
        text
    }
}

/// How a member's process is.
#[derive(Debug)]
pub enum Life {
    /// Not started, or dead.
    Down,
    /// Running.
    Running(Child),
    /// Stopped by SIGSTOP.
    Paused(Child),
    /// Told to leave.
    Leaving(Child),
}

/// One member: its host and its process.
#[derive(Debug)]
pub struct Member {
    /// Its id.
    pub id: u32,
    /// How its process is.
    pub life: Life,
    netns: Arc<Netns>,
    program: PathBuf,
    config: PathBuf,
    log: PathBuf,
    started: Option<Instant>,
}

/// Until a process that was just started has come to its first instructions, a signal that it will handle ends it.
const BEGINS_WITHIN: Duration = Duration::from_millis(100);

impl Member {
    /// A member that is down; its files are in `directory`.
    pub fn new(id: u32, netns: Arc<Netns>, program: &Path, directory: &Path) -> Self {
        Self {
            id,
            life: Life::Down,
            netns,
            program: program.to_owned(),
            config: directory.join(format!("member{id}.toml")),
            log: directory.join(format!("member{id}.log")),
            started: None,
        }
    }

    /// Writes its configuration, in one step.
    pub fn configure(&self, text: &str) -> Result<()> {
        let draft = self.config.with_extension("new");
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &self.config))
            .with_context(|| format!("cannot write {}", self.config.display()))
    }

    /// Starts its process. Call this from a thread that lives as long as the lab.
    pub fn start(&mut self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.program);
        command.arg("run").arg("--config").arg(&self.config);
        // The log is a file: colours would be in the way of who reads it, the lab's messages included.
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.life = Life::Running(self.netns.spawn(&mut command)?);
        self.started = Some(Instant::now());
        Ok(())
    }

    /// Whether its process runs and is not stopped.
    pub const fn is_running(&self) -> bool {
        matches!(self.life, Life::Running(_))
    }

    /// Whether it has a process at all.
    pub const fn has_process(&self) -> bool {
        !matches!(self.life, Life::Down)
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        if let Life::Running(mut child) | Life::Paused(mut child) | Life::Leaving(mut child) =
            std::mem::replace(&mut self.life, Life::Down)
        {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGSTOP.
    pub fn pause(&mut self) -> Result<()> {
        self.signal(libc::SIGSTOP)?;
        self.life = match std::mem::replace(&mut self.life, Life::Down) {
            Life::Running(child) => Life::Paused(child),
            other => other,
        };
        Ok(())
    }

    /// SIGCONT.
    pub fn resume(&mut self) -> Result<()> {
        self.signal(libc::SIGCONT)?;
        self.life = match std::mem::replace(&mut self.life, Life::Down) {
            Life::Paused(child) => Life::Running(child),
            other => other,
        };
        Ok(())
    }

    /// SIGTERM: it leaves in its own time.
    pub fn leave(&mut self) -> Result<()> {
        self.signal(libc::SIGTERM)?;
        self.life = match std::mem::replace(&mut self.life, Life::Down) {
            Life::Running(child) | Life::Paused(child) => Life::Leaving(child),
            other => other,
        };
        Ok(())
    }

    /// SIGHUP: it reads its configuration again. One that has just been started is given the time to begin.
    pub fn reload(&self) -> Result<()> {
        let begins = self.started.map(|at| BEGINS_WITHIN.saturating_sub(at.elapsed()));
        std::thread::sleep(begins.unwrap_or_default());
        self.signal(libc::SIGHUP)
    }

    fn signal(&self, signal: i32) -> Result<()> {
        let (Life::Running(child) | Life::Paused(child) | Life::Leaving(child)) = &self.life else {
            return Ok(());
        };
        // SAFETY: the process is our child and not yet waited for, so its number is still its own.
        if unsafe { libc::kill(child.id().cast_signed(), signal) } == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
                .with_context(|| format!("cannot send signal {signal} to member {}", self.id))
        }
    }

    /// Notices a process that ended by itself. `Some` says how, unless it was told to leave and did so in good order.
    pub fn poll_exit(&mut self) -> Result<Option<String>> {
        let (child, leaving) = match &mut self.life {
            Life::Running(child) | Life::Paused(child) => (child, false),
            Life::Leaving(child) => (child, true),
            Life::Down => return Ok(None),
        };
        let Some(status) = child.try_wait()? else { return Ok(None) };
        self.life = Life::Down;
        if leaving && status.success() {
            return Ok(None);
        }
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "an unknown end".to_owned(),
        };
        Ok(Some(format!("member {} ended with {how}{}", self.id, self.last_words())))
    }

    /// The last lines of its log, to go into a message.
    pub fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        lines.iter().rev().fold(String::new(), |text, line| text + "\n    " + line)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Nothing more can be done about a process that cannot be killed; it dies with the lab's thread.
        let _ = self.kill();
    }
}

/// Writes a new cluster key that only its owner may read.
pub fn write_key(path: &Path) -> Result<()> {
    let mut key = [0; 32];
    File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut key))?;
    let text = key.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    writeln!(file, "{text}").with_context(|| format!("cannot write the cluster key {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> ClusterFile {
        ClusterFile {
            seeds: vec!["10.0.1.11".parse().unwrap(), "10.0.1.12".parse().unwrap()],
            replication: false,
            scoring: "rendezvous".to_owned(),
            cache: "off".to_owned(),
            handoff_fragment: false,
            method: "l2".to_owned(),
            service: "192.0.2.1".parse().unwrap(),
            backends: vec![BackendLine {
                number: 1,
                address: "10.0.1.101".parse().unwrap(),
                weight: 100,
                drain: true,
            }],
            service_lines: "idle_timeout = \"10s\"".to_owned(),
            cluster_lines: String::new(),
            forwarder: ForwarderKind::Rawsock,
            forwarder_lines: "max_flows = 100".to_owned(),
            pin_dir: None,
            protocol: "udp",
            log_level: "info".to_owned(),
        }
    }

    #[test]
    fn a_members_file_is_toml_and_says_what_it_was_told() {
        let text = example().to_toml(2, "10.0.1.12".parse().unwrap(), 50, Path::new("/tmp/key"));
        let file: toml::Table = text.parse().unwrap();
        assert_eq!(file["member"]["id"].as_integer(), Some(2));
        assert_eq!(file["member"]["seeds"].as_array().map(Vec::len), Some(2));
        assert_eq!(file["cluster"]["replication"].as_bool(), Some(false));
        assert_eq!(file["forwarder"]["max_flows"].as_integer(), Some(100));
        assert_eq!(file["service"][0]["protocol"].as_str(), Some("udp"));
        assert_eq!(file["service"][0]["idle_timeout"].as_str(), Some("10s"));
        assert_eq!(file["service"][0]["backend"][0]["drain"].as_bool(), Some(true));
    }
}
