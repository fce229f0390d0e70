//! Network namespaces without names: held by a descriptor, gone with the process that holds it.

use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use phalanx_netlink::Netlink;

/// A network namespace of our own.
#[derive(Debug)]
pub struct Netns {
    name: String,
    fd: OwnedFd,
}

impl Netns {
    /// Makes a namespace; `name` is for messages only.
    pub fn new(name: &str) -> Result<Self> {
        let make = || -> io::Result<OwnedFd> {
            // SAFETY: unshare changes only the namespaces of this thread, which ends right after.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
        };
        let fd = thread::scope(|scope| scope.spawn(make).join())
            .map_err(|_| anyhow!("the thread that makes a network namespace panicked"))?
            .with_context(|| {
                format!("cannot make the network namespace {name}: run as root, or allow user namespaces")
            })?;
        let netns = Self { name: name.to_owned(), fd };
        let mut netlink = netns.netlink()?;
        let loopback = netlink.link("lo")?.index;
        netlink.set_up(loopback)?;
        Ok(netns)
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Another handle on the same namespace, for a thread of its own.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { name: self.name.clone(), fd: self.fd.try_clone()? })
    }

    /// Moves the calling thread in, for good.
    pub fn enter_for_good(&self) -> io::Result<()> {
        set_namespace(self.fd.as_raw_fd())
    }

    /// Runs `body` inside, on a thread of its own. What it opens there (sockets) stays there.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| scope.spawn(|| self.enter_for_good().map(|()| body())).join())
            .map_err(|_| anyhow!("a thread in the network namespace {} panicked", self.name))?
            .with_context(|| format!("cannot enter the network namespace {}", self.name))
    }

    /// Starts a thread inside.
    pub fn spawn_thread<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<io::Result<T>>> {
        let fd = self.fd.try_clone()?;
        Ok(thread::Builder::new().name(self.name.clone()).spawn(move || {
            set_namespace(fd.as_raw_fd())?;
            Ok(body())
        })?)
    }

    /// Starts a process inside that is killed when the calling *thread* ends, so call this from one that lives as long as the lab.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let fd = self.fd.as_raw_fd();
        let parent = std::process::id().cast_signed();
        // SAFETY: the closure makes system calls only, and allocates nothing: it is safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                set_namespace(fd)?;
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have died before the call above.
                if libc::getppid() != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                Ok(())
            });
        }
        command.spawn().with_context(|| {
            format!("cannot start {} in the namespace {}", command.get_program().display(), self.name)
        })
    }

    /// A conversation with the kernel about this namespace; usable from any thread.
    pub fn netlink(&self) -> Result<Netlink> {
        Ok(self.enter(Netlink::open)??)
    }

    /// Writes kernel settings, as paths under `/proc/sys`.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            settings.iter().try_for_each(|(path, value)| {
                fs::write(format!("/proc/sys/{path}"), value)
                    .with_context(|| format!("cannot set {path} to {value} in the namespace {}", self.name))
            })
        })?
    }

    /// A listening socket inside.
    pub fn listen(&self, address: SocketAddr, backlog: i32) -> Result<TcpListener> {
        self.enter(|| listen(address, backlog))?
            .with_context(|| format!("cannot listen on {address} in the namespace {}", self.name))
    }

    /// A TCP connection from inside.
    pub fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        Ok(self.enter(|| TcpStream::connect_timeout(&address, timeout))??)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set_namespace(fd: i32) -> io::Result<()> {
    // SAFETY: setns changes only the calling thread; a bad descriptor is an error.
    if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn listen(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// `SIOCETHTOOL` and the commands of include/uapi/linux/ethtool.h that switch an offload on (1) or off (0).
const SIOCETHTOOL: u64 = 0x8946;
const ETHTOOL_SRXCSUM: u32 = 0x15;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_SGSO: u32 = 0x24;
const ETHTOOL_SGRO: u32 = 0x2c;

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Switches segmentation, merging and checksum offload of an interface off, in the calling thread's namespace.
pub fn switch_offloads_off(interface: &str) -> io::Result<()> {
    // Segmentation first: without checksums it would be refused.
    let commands = [ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO, ETHTOOL_STXCSUM, ETHTOOL_SRXCSUM];
    switch_offloads(interface, &commands.map(|command| (command, 0)))
}

/// Makes a veth's end the peer of one with an XDP program: what it sends is whole, as it would come from a wire.
pub fn face_xdp(interface: &str) -> io::Result<()> {
    let commands = [ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_STXCSUM];
    switch_offloads(interface, &commands.map(|command| (command, 0)))
}

fn switch_offloads(interface: &str, commands: &[(u32, u32)]) -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    for (command, data) in commands.iter().copied() {
        let mut value = EthtoolValue { command, data };
        // SAFETY: ifreq is plain old data, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request names an interface and points to an ethtool_value that lives until the call returns.
        if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) } != 0 {
            let error = io::Error::last_os_error();
            // Not every driver has every switch.
            if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
                return Err(error);
            }
        }
    }
    Ok(())
}
