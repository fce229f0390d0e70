//! What a configuration names on the machine it is read on.

use std::path::Path;

use crate::keys::{self, ClusterKey, KeyFileError};

/// The machine, as far as a configuration names parts of it.
pub trait Environment {
    /// Whether there is a network interface of this name in the current network namespace.
    fn interface_exists(&self, name: &str) -> bool;
    /// The keys in a key file.
    fn read_keys(&self, path: &Path) -> Result<Vec<ClusterKey>, KeyFileError>;
}

/// This machine.
#[derive(Clone, Copy, Debug)]
pub struct System;

impl Environment for System {
    fn interface_exists(&self, name: &str) -> bool {
        interface_index(name).is_some()
    }

    fn read_keys(&self, path: &Path) -> Result<Vec<ClusterKey>, KeyFileError> {
        keys::read(path)
    }
}

/// The kernel's index of the interface in the current network namespace.
fn interface_index(name: &str) -> Option<u32> {
    let socket = any_socket()?;
    rustix::net::netdevice::name_to_index(socket, name).ok()
}

fn any_socket() -> Option<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketType, socket};
    socket(AddressFamily::INET, SocketType::DGRAM, None).ok()
}
