//! The command line.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError};
use crate::{check, daemon, decap, keys, lab, logging, query};

/// Exit status for a configuration or a machine that must be put right first.
pub const EXIT_USAGE: u8 = 2;

/// A clustered L4 load balancer that breaks no connection.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a member of the cluster until SIGTERM; SIGHUP reloads services, backends and the member's weight.
    Run {
        /// The configuration file.
        #[arg(long, value_name = "FILE", default_value = "/etc/phalanx/phalanx.toml")]
        config: PathBuf,
        /// With forwarder.kind xdp: load this object, whatever forwarder.bpf_object says.
        #[arg(long, value_name = "PATH")]
        bpf_object: Option<PathBuf>,
    },
    /// Remove the XDP programs and tables that a dead daemon left pinned. Refused while it runs.
    Detach {
        /// The daemon's configuration file.
        #[arg(long, value_name = "FILE", default_value = "/etc/phalanx/phalanx.toml")]
        config: PathBuf,
        /// The directory of pins, instead of that of a configuration.
        #[arg(long, value_name = "DIR", conflicts_with = "config")]
        pin_dir: Option<PathBuf>,
    },
    /// Check a configuration file: say every error with its line, then the warnings.
    Check {
        /// The configuration file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Write a new key file with one new key, and print a new hash seed.
    Keygen {
        /// The key file; must not exist yet.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Show the members as the local daemon sees them.
    Members(Query),
    /// Show the services and their backends as the local daemon sees them.
    Services(Query),
    /// Explain what happens to a flow: row, ranking, owner, backup, backend, and who holds its state.
    Explain {
        /// The client's address and port.
        #[arg(value_name = "SRC")]
        source: SocketAddr,
        /// The service's address and port.
        #[arg(value_name = "DST")]
        destination: SocketAddr,
        /// tcp or udp.
        #[arg(long, default_value = "tcp", value_parser = ["tcp", "udp"])]
        protocol: String,
        /// Whom to ask, and how to print.
        #[command(flatten)]
        query: Query,
    },
    /// Build a site in network namespaces, run real connections through real members, do things to them, and count what breaks.
    Lab(Box<lab::LabArgs>),
    /// Take IP-in-IP and GUE apart on a backend whose kernel cannot.
    Decap(decap::DecapArgs),
}

/// A question to the local daemon.
#[derive(Clone, Debug, clap::Args)]
pub struct Query {
    /// Where the daemon's admin API listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7980", env = "PHALANX_ADMIN")]
    pub admin: SocketAddr,
    /// Print the API's JSON.
    #[arg(long)]
    pub json: bool,
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Command::Run { config, bpf_object } => run(&config, bpf_object),
        Command::Detach { config, pin_dir } => detach(&config, pin_dir),
        Command::Check { file } => check::check(&file),
        Command::Keygen { file } => keygen(&file),
        Command::Members(Query { admin, json }) => {
            answer(query::ask(admin, "/v1/members", json, query::members))
        }
        Command::Services(Query { admin, json }) => {
            answer(query::ask(admin, "/v1/services", json, query::services))
        }
        Command::Explain { source, destination, protocol, query: Query { admin, json } } => {
            let path = format!("/v1/explain?src={source}&dst={destination}&protocol={protocol}");
            answer(query::ask(admin, &path, json, query::explain))
        }
        Command::Lab(args) => lab::command(&args),
        Command::Decap(args) => match decap::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("{error:#}")),
        },
    }
}

/// Starts the daemon. A configuration with mistakes, or a machine that does not allow raw sockets, ends it at once with status 2.
fn run(file: &Path, bpf_object: Option<PathBuf>) -> ExitCode {
    daemon::hold_reloads();
    let mut config = match Config::load(file) {
        Ok(config) => config,
        Err(errors) => return refuse(&errors),
    };
    if let Err(sentence) = check::permission(&config) {
        eprintln!("{}: forwarder.kind: {sentence}", file.display());
        return ExitCode::from(EXIT_USAGE);
    }
    if bpf_object.is_some() {
        config.forwarder.bpf_object = bpf_object;
    }
    let _logging = logging::start(&config.log);
    match daemon::run(config) {
        Ok(daemon::Ended::Left) => ExitCode::SUCCESS,
        Ok(daemon::Ended::Refused(sentence)) => {
            tracing::error!("{sentence}");
            ExitCode::from(EXIT_USAGE)
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// Removes what a dead daemon left pinned.
fn detach(file: &Path, pin_dir: Option<PathBuf>) -> ExitCode {
    let directory = match pin_dir {
        Some(directory) => Some(directory),
        None => match Config::load(file) {
            Ok(config) => daemon::pin_directory(&config),
            Err(errors) => return refuse(&errors),
        },
    };
    let Some(directory) = directory else {
        println!("nothing to detach: this configuration pins nothing");
        return ExitCode::SUCCESS;
    };
    let shown = directory.display();
    match daemon::detach(&directory) {
        Ok(true) => println!("detached: programs and tables of {shown} are gone"),
        Ok(false) => println!("nothing to detach: {shown} is not there"),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            eprintln!("phalanx: {shown}: its daemon runs: stop it first (SIGTERM), which detaches by itself");
            return ExitCode::from(EXIT_USAGE);
        }
        Err(error) => {
            eprintln!("phalanx: {shown}: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    }
    ExitCode::SUCCESS
}

fn keygen(file: &Path) -> ExitCode {
    match keys::generate(file).and_then(|()| Ok(keys::hash_seed()?)) {
        Ok(seed) => {
            println!("wrote {}: copy it to every member, readable by its owner only", file.display());
            println!("hash_seed = \"{seed}\"");
            ExitCode::SUCCESS
        }
        Err(keys::KeyFileError::Io(error)) => {
            let file = file.display();
            eprintln!("{file}: the key file cannot be written ({error}): choose another path");
            ExitCode::from(EXIT_USAGE)
        }
        Err(error) => fail(&error.to_string()),
    }
}

/// Prints every mistake on a line of its own.
pub(crate) fn refuse(errors: &[ConfigError]) -> ExitCode {
    for error in errors {
        eprintln!("{error}");
    }
    ExitCode::from(EXIT_USAGE)
}

/// Prints what a daemon answered.
fn answer(answer: anyhow::Result<String>) -> ExitCode {
    match answer {
        Ok(text) => {
            // A reader that has left (`| head`) is no failure.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => fail(&format!("{error:#}")),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("phalanx: {message}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn explain_wants_addresses_with_ports() {
        let parse = |words: &[&str]| Cli::try_parse_from(["phalanx", "explain"].iter().chain(words));
        assert!(parse(&["198.51.100.7:1234", "192.0.2.1:80"]).is_ok());
        assert!(parse(&["[2001:db8::7]:1234", "[2001:db8::1]:80", "--protocol", "udp", "--json"]).is_ok());
        assert!(parse(&["198.51.100.7", "192.0.2.1:80"]).is_err());
        assert!(parse(&["198.51.100.7:1", "192.0.2.1:80", "--protocol", "sctp"]).is_err());
    }
}
