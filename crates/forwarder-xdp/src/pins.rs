//! What outlives the process: links and maps in a directory of a BPF file system.
//!
//! ```text
//!  PINS/link-eth0      the attachment: as long as it stands, the kernel forwards
//!  PINS/stages         the table of tail calls of the programs that are attached
//!  PINS/v1/FLOWS, …    the maps, by the version of their layout
//! ```

use std::ffi::CString;
use std::io;
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
        let entries =
            |path: PathBuf| MapData::from_pin(path).ok()?.info().ok().map(|info| info.max_entries());
        // The table of slots may be larger than the services need now.
        entries(directory.join(name)).is_some_and(|entries| {
            wanted.is_none_or(|wanted| entries == wanted || name == "SLOT_TABLE" && entries > wanted)
        })
    };
    if KEPT.iter().all(|name| fits(name)) {
        return Ok(true);
    }
    let left: Vec<&str> = KEPT.into_iter().filter(|name| directory.join(name).exists()).collect();
    if !left.is_empty() {
        tracing::warn!(directory = %directory.display(), "pinned tables of another size are not adopted: their flows are forgotten");
    }
    for name in left {
        std::fs::remove_file(directory.join(name)).map_err(failed)?;
    }
    Ok(false)
}

/// Programs that are attached.
pub(crate) struct Attached {
    ebpf: Ebpf,
    #[expect(dead_code, reason = "it forgets its programs with its last descriptor")]
    stages: ProgramArray<MapData>,
    #[expect(dead_code, reason = "an attachment that is not pinned ends with its descriptor")]
    links: Vec<PinnedLink>,
    pins: Option<PathBuf>,
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
            && let Err(error) = detach(pins)
        {
            tracing::warn!(%error, directory = %pins.display(), "pins stay");
        }
    }
}

/// Removes what a daemon left pinned in `pins`: the kernel stops forwarding, and forgets the flows. Whether there was something.
pub fn detach(pins: &Path) -> io::Result<bool> {
    let entries = match std::fs::read_dir(pins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut rest = Vec::new();
    for entry in entries {
        let path = entry?.path();
        // Links first: from then on nothing reads what is removed next.
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link-")) {
            std::fs::remove_file(path)?;
        } else {
            rest.push(path);
        }
    }
    for path in rest {
        if path.is_dir() { std::fs::remove_dir_all(path)? } else { std::fs::remove_file(path)? }
    }
    std::fs::remove_dir(pins)?;
    Ok(true)
}

/// Attaches the entry to the interfaces; where an earlier process's link is, the program in it is replaced atomically.
pub(crate) fn attach(config: &Config, loaded: Loaded) -> Result<Attached, StartError> {
    let Loaded { mut ebpf, stages, .. } = loaded;
    let mut links = Vec::new();
    let entry: &mut Xdp = match ebpf.program_mut(ENTRY).map(TryInto::try_into) {
        Some(Ok(entry)) => entry,
        _ => return Err(StartError::system("find the program", io::Error::from(io::ErrorKind::NotFound))),
    };
    for name in &config.interfaces {
        let c_name = CString::new(name.as_str()).map_err(|_| StartError::NoInterface(name.clone()))?;
        // SAFETY: a string that ends with a zero.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if index == 0 {
            return Err(StartError::NoInterface(name.clone()));
        }
        let pin = config.pins.as_ref().map(|pins| pins.join(format!("link-{name}")));
        if let Some(pin) = &pin
            && pin.exists()
        {
            if replace(entry, pin).is_ok() {
                continue;
            }
            // Of an interface that is gone.
            std::fs::remove_file(pin).map_err(|source| StartError::Pin { path: pin.clone(), source })?;
        }
        let link = attach_one(entry, name, index)?;
        if let Some(pin) = pin {
            let link = entry.take_link(link).map_err(|error| attach_error(name, error))?;
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
        let path = pins.join("stages");
        std::fs::rename(new_stages(pins), &path).map_err(|source| StartError::Pin { path, source })?;
    }
    Ok(Attached { ebpf, stages, links, pins: config.pins.clone() })
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
            entry.attach_to_if_index(index, XdpMode::Skb).map_err(|error| attach_error(name, error))
        }
        Err(error) => Err(attach_error(name, error)),
    }
}

fn os_error(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn attach_error(name: &str, error: ProgramError) -> StartError {
    match os_error(&error) {
        Some(libc::EPERM | libc::EACCES) => StartError::Permission(chain(&error)),
        Some(libc::EBUSY | libc::EEXIST) => StartError::Occupied {
            name: name.to_owned(),
            other: format!("see `ip -details link show {name}`"),
        },
        Some(number) => {
            StartError::Attach { name: name.to_owned(), source: io::Error::from_raw_os_error(number) }
        }
        None => StartError::Attach { name: name.to_owned(), source: io::Error::other(chain(&error)) },
    }
}
