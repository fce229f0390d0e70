//! What outlives the process: links and maps in a directory of a BPF file system.
//!
//! ```text
//!  PINS/link-eth0      the attachment: as long as it stands, the kernel forwards
//!  PINS/stages         the table of tail calls of the programs that are attached
//!  PINS/v6/FLOWS4, …   the maps, by the version of their layout
//!  PINS/v6/NOTE        what the daemon remembers with them
//! ```
//! A running daemon holds a lock on the directory, so that nobody else takes over or removes what is in it.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{MapData, ProgramArray};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{ProgramError, Xdp};

use crate::abi::{ENTRY, VERSION};
use crate::maps::KEPT;
use crate::object::{Loaded, chain};
use crate::{Config, StartError};
use crate::{note, occupant};

/// Where Linux distributions have the BPF file system.
const BPF_FS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` (`include/uapi/linux/magic.h`).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Where a member pins if nobody says otherwise: a directory of its own below `/sys/fs/bpf`, where the BPF file system is mounted if it is
/// not there yet. `None`: there is none, and none can be mounted.
pub fn usual_directory(name: &str) -> Option<PathBuf> {
    let root = Path::new(BPF_FS);
    if !is_bpf_fs(root) {
        // SAFETY: strings that end with a zero, and no data.
        let mounted = unsafe {
            libc::mount(c"bpf".as_ptr(), c"/sys/fs/bpf".as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null())
        };
        if mounted != 0 || !is_bpf_fs(root) {
            return None;
        }
    }
    Some(root.join("phalanx").join(file_name(name)))
}

/// A name as the BPF file system takes it: without dots (`bpf_lookup` in `kernel/bpf/inode.c`).
fn file_name(name: &str) -> String {
    name.replace(['.', '/'], ":")
}

fn is_bpf_fs(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: `statfs` is plain old data, for which zero is a value.
    let mut status: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers live through the call.
    let done = unsafe { libc::statfs(path.as_ptr(), &raw mut status) };
    done == 0 && status.f_type as i64 == BPF_FS_MAGIC
}

/// Held by whoever may change what is in a directory; given back when it is dropped, or with the process.
#[derive(Debug)]
pub(crate) struct Lock {
    _directory: File,
}

impl Lock {
    /// Takes it; `WouldBlock` if another process has it.
    fn take(pins: &Path) -> io::Result<Self> {
        let directory = File::open(pins)?;
        // SAFETY: the descriptor lives through the call.
        if unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { _directory: directory })
    }
}

/// Makes a member's directory and takes its lock; whether something is attached by links in it.
pub(crate) fn claim(pins: &Path) -> Result<(Lock, bool), StartError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock => StartError::PinsInUse(pins.to_owned()),
        _ => StartError::Pin { path: pins.to_owned(), source },
    };
    std::fs::create_dir_all(pins).map_err(failed)?;
    if !is_bpf_fs(pins) {
        // Only if it was made just now, and is empty.
        let _ = std::fs::remove_dir(pins);
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not on a BPF file system");
        return Err(StartError::Pin { path: pins.to_owned(), source });
    }
    let lock = Lock::take(pins).map_err(failed)?;
    let linked = !pinned_links(pins).map_err(failed)?.is_empty();
    Ok((lock, linked))
}

/// The pinned attachments.
fn pinned_links(pins: &Path) -> io::Result<Vec<PathBuf>> {
    let mut links = Vec::new();
    for entry in std::fs::read_dir(pins)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link-")) {
            links.push(path);
        }
    }
    Ok(links)
}

fn link_pin(pins: &Path, interface: &str) -> PathBuf {
    pins.join(format!("link-{}", file_name(interface)))
}

/// Where the maps of this version are.
pub(crate) fn tables(pins: &Path) -> PathBuf {
    pins.join(format!("v{VERSION}"))
}

/// Where the table of stages is until its programs are attached.
pub(crate) fn new_stages(pins: &Path) -> PathBuf {
    pins.join("stages-new")
}

/// Makes the directory; whether maps are in it that can be adopted. What cannot is removed.
pub(crate) fn prepare(directory: &Path, sizes: &[(&str, u32)]) -> Result<bool, StartError> {
    let failed = |source| StartError::Pin { path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let fits = |name: &str| {
        let wanted = sizes.iter().find(|(sized, _)| *sized == name).map(|(_, size)| *size);
        // The table of slots may be larger than the services need now.
        max_entries(&directory.join(name)).is_some_and(|entries| {
            wanted.is_none_or(|wanted| entries == wanted || name == "SLOT_TABLE" && entries > wanted)
        })
    };
    if KEPT.iter().all(|name| fits(name)) {
        return Ok(true);
    }
    let left: Vec<&str> =
        KEPT.into_iter().chain([note::NAME]).filter(|name| directory.join(name).exists()).collect();
    if !left.is_empty() {
        tracing::warn!(directory = %directory.display(), "pinned tables of another size are not adopted: their flows are forgotten");
    }
    for name in left {
        std::fs::remove_file(directory.join(name)).map_err(failed)?;
    }
    Ok(false)
}

/// For how many entries the kernel made the map that is pinned there.
fn max_entries(pin: &Path) -> Option<u32> {
    MapData::from_pin(pin).ok()?.info().ok().map(|info| info.max_entries())
}

/// For how many entries the kernel made a map of the forwarder that pins in `pins`; `None`: it has none of that name there.
pub fn pinned_entries(pins: &Path, map: &str) -> Option<u32> {
    max_entries(&tables(pins).join(map))
}

/// Programs that are attached.
pub(crate) struct Attached {
    ebpf: Ebpf,
    #[expect(dead_code, reason = "it forgets its programs with its last descriptor")]
    stages: ProgramArray<MapData>,
    #[expect(dead_code, reason = "an attachment that is not pinned ends with its descriptor")]
    links: Vec<PinnedLink>,
    pins: Option<PathBuf>,
    _lock: Option<Lock>,
}

impl Attached {
    pub(crate) fn program(&self, name: &str) -> io::Result<&Xdp> {
        let program = self.ebpf.program(name).ok_or(io::ErrorKind::NotFound)?;
        program.try_into().map_err(io::Error::other)
    }

    /// Lets go; what is pinned stays.
    pub(crate) fn keep(self) {}

    /// Detaches, and removes what is pinned.
    pub(crate) fn remove(self) {
        if let Some(pins) = &self.pins
            && let Err(error) = remove(pins)
        {
            tracing::warn!(%error, directory = %pins.display(), "pins stay");
        }
    }
}

/// Removes what a dead daemon left pinned in `pins`: the kernel stops forwarding, and forgets the flows. Whether there was something.
///
/// Refused with [`io::ErrorKind::WouldBlock`] while a daemon runs that uses them.
pub fn detach(pins: &Path) -> io::Result<bool> {
    let _lock = match Lock::take(pins) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if !is_bpf_fs(pins) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not on a BPF file system"));
    }
    remove(pins)?;
    Ok(true)
}

/// Removes a directory of pins.
pub(crate) fn remove(pins: &Path) -> io::Result<()> {
    // Links first: from then on nothing reads what is removed next.
    for link in pinned_links(pins)? {
        std::fs::remove_file(link)?;
    }
    std::fs::remove_dir_all(pins)
}

/// Attaches the entry to the interfaces; where an earlier process's link is, the program in it is replaced atomically.
pub(crate) fn attach(config: &Config, loaded: Loaded) -> Result<Attached, StartError> {
    let Loaded { mut ebpf, stages, lock, .. } = loaded;
    let mut links = Vec::new();
    let entry: &mut Xdp = match ebpf.program_mut(ENTRY).map(TryInto::try_into) {
        Some(Ok(entry)) => entry,
        _ => return Err(StartError::system("find the program", io::Error::from(io::ErrorKind::NotFound))),
    };
    // First of all whether each of them can be had: a start that one of them refuses leaves the others to the program before.
    let mut free = Vec::new();
    for name in &config.interfaces {
        let c_name = CString::new(name.as_str()).map_err(|_| StartError::NoInterface(name.clone()))?;
        // SAFETY: a string that ends with a zero.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if index == 0 {
            return Err(StartError::NoInterface(name.clone()));
        }
        let pin = config.pins.as_ref().map(|pins| link_pin(pins, name));
        if pin.as_deref().is_none_or(|pin| !pin.exists())
            && let Some(other) = occupant::of(index)
        {
            return Err(StartError::Occupied { name: name.clone(), other });
        }
        free.push((name, index, pin));
    }
    for (name, index, pin) in free {
        if let Some(pin) = &pin
            && pin.exists()
        {
            if replace(entry, pin).is_ok() {
                tracing::info!(interface = name, "this program is attached in the place of the one before");
                continue;
            }
            // Of an interface that is gone.
            std::fs::remove_file(pin).map_err(|source| StartError::Pin { path: pin.clone(), source })?;
            if let Some(other) = occupant::of(index) {
                return Err(StartError::Occupied { name: name.clone(), other });
            }
        }
        let link = attach_one(entry, name, index)?;
        if let Some(pin) = pin {
            let link = entry.take_link(link).map_err(|error| attach_error(name, index, error))?;
            let link: FdLink = link.try_into().map_err(|error| {
                StartError::system(
                    format!("pin the attachment to {name}"),
                    io::Error::other(format!("{error}")),
                )
            })?;
            let pinned = link.pin(&pin).map_err(|error| StartError::Pin {
                path: pin.clone(),
                source: io::Error::other(chain(&error)),
            })?;
            links.push(pinned);
        }
    }
    if let Some(pins) = &config.pins {
        // Only now: until here the programs that were attached used the old one.
        let failed = |path: PathBuf| move |source| StartError::Pin { path, source };
        let path = pins.join("stages");
        std::fs::rename(new_stages(pins), &path).map_err(failed(path))?;
        // Tables of other versions, and interfaces that are not in the configuration any more.
        for entry in std::fs::read_dir(pins).map_err(failed(pins.clone()))?.flatten() {
            let path = entry.path();
            if path.is_dir() && path != tables(pins) {
                std::fs::remove_dir_all(&path).map_err(failed(path))?;
            }
        }
        let wanted: Vec<PathBuf> = config.interfaces.iter().map(|name| link_pin(pins, name)).collect();
        let linked = pinned_links(pins).map_err(failed(pins.clone()))?;
        for old in linked.into_iter().filter(|link| !wanted.contains(link)) {
            std::fs::remove_file(&old).map_err(failed(old))?;
        }
    }
    Ok(Attached { ebpf, stages, links, pins: config.pins.clone(), _lock: lock })
}

/// Puts the program in the place of the one that is attached.
fn replace(entry: &mut Xdp, pin: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let link: FdLink = PinnedLink::from_pin(pin)?.into();
    entry.attach_to_link(XdpLink::try_from(link)?)?;
    Ok(())
}

fn attach_one(entry: &mut Xdp, name: &str, index: u32) -> Result<aya::programs::xdp::XdpLinkId, StartError> {
    match entry.attach_to_if_index(index, XdpMode::Driver) {
        Ok(link) => Ok(link),
        Err(error) if os_error(&error) == Some(libc::EOPNOTSUPP) => {
            tracing::warn!(
                interface = name,
                "the driver has no native XDP: generic mode, which is several times slower"
            );
            entry.attach_to_if_index(index, XdpMode::Skb).map_err(|error| attach_error(name, index, error))
        }
        Err(error) => Err(attach_error(name, index, error)),
    }
}

fn os_error(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn attach_error(name: &str, index: u32, error: ProgramError) -> StartError {
    match os_error(&error) {
        Some(libc::EPERM | libc::EACCES) => StartError::Permission(chain(&error)),
        Some(libc::EBUSY | libc::EEXIST) => StartError::Occupied {
            name: name.to_owned(),
            other: occupant::of(index).unwrap_or_else(|| "by its network card".to_owned()),
        },
        // Native XDP wants a frame to fit a page; veth says ERANGE, most drivers EINVAL or EOPNOTSUPP.
        Some(number @ (libc::ERANGE | libc::EINVAL)) => StartError::Attach {
            name: name.to_owned(),
            source: io::Error::other(format!(
                "{}; is its MTU, or that of its peer, too large for native XDP (about 3,500 bytes)?",
                io::Error::from_raw_os_error(number)
            )),
        },
        Some(number) => {
            StartError::Attach { name: name.to_owned(), source: io::Error::from_raw_os_error(number) }
        }
        None => StartError::Attach { name: name.to_owned(), source: io::Error::other(chain(&error)) },
    }
}
