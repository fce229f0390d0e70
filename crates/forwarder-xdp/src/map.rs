//! Maps by `bpf(2)`: single elements, and batches, which `aya` has not.

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use aya::maps::{Map as AyaMap, MapData};
use phalanx_flow::{FlowEntry, FlowKey, Row};

use crate::abi::{
    Backend, CpuCounters, FailedKey, FrontService, Header, Key4, Member, MemberKey, Ports, ServiceKey,
    ServiceValue,
};

/// Commands of `bpf(2)` (`include/uapi/linux/bpf.h`).
const MAP_CREATE: libc::c_int = 0;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;
const LOOKUP: libc::c_int = 1;
const UPDATE: libc::c_int = 2;
const DELETE: libc::c_int = 3;
const LOOKUP_BATCH: libc::c_int = 24;
const UPDATE_BATCH: libc::c_int = 26;

/// Elements asked for by one batched look-up; a bucket of a hash map is never split, and has far fewer.
const BATCH: usize = 4096;

/// A key or value of a map: plain bytes.
///
/// # Safety
/// `#[repr(C)]` or a number, without padding that is not written, and every bit pattern is a value.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}

macro_rules! plain {
    ($($name:ident)*) => {
        $(
            // SAFETY: `#[repr(C)]` structures of numbers and arrays of them, padding explicit.
            unsafe impl Plain for $name {}
        )*
    };
}
plain!(FlowKey FlowEntry Row Backend CpuCounters FailedKey FrontService Header Key4 Member MemberKey Ports ServiceKey ServiceValue);

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// A map by its descriptor.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    fd: OwnedFd,
    types: PhantomData<fn() -> (K, V)>,
}

/// A command that returns nothing.
pub(crate) fn bpf<T>(command: libc::c_int, attribute: &mut T) -> io::Result<()> {
    call(command, attribute).map(drop)
}

fn call<T>(command: libc::c_int, attribute: &mut T) -> io::Result<RawFd> {
    // SAFETY: the attribute lives through the call, and what it points to is the callers' to answer for.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// A command that returns a descriptor.
pub(crate) fn open<T>(command: libc::c_int, attribute: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel made the descriptor for us.
    call(command, attribute).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an array.
pub(crate) fn create_array(key_size: u32, value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut attribute = [ARRAY, key_size, value_size, entries, 0];
    open(MAP_CREATE, &mut attribute)
}

#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at a path.
pub(crate) fn open_pin(path: &CStr) -> io::Result<OwnedFd> {
    open(OBJ_GET, &mut ObjectAttr { path: address(path.as_ptr()), ..ObjectAttr::default() })
}

/// Pins a map.
pub(crate) fn pin(fd: &OwnedFd, path: &CStr) -> io::Result<()> {
    let fd = fd.as_raw_fd().cast_unsigned();
    bpf(OBJ_PIN, &mut ObjectAttr { path: address(path.as_ptr()), fd, flags: 0 })
}

fn address<T>(pointer: *const T) -> u64 {
    pointer as usize as u64
}

/// The data of a map of any of the kinds that we have.
pub(crate) fn data(map: &AyaMap) -> io::Result<&MapData> {
    match map {
        AyaMap::Array(data)
        | AyaMap::HashMap(data)
        | AyaMap::LruHashMap(data)
        | AyaMap::PerCpuArray(data)
        | AyaMap::ProgramArray(data)
        | AyaMap::RingBuf(data) => Ok(data),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a map of a kind that the program does not use")),
    }
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// Opens a map once more; its key and value must have the sizes of `K` and `V`.
    pub(crate) fn new(map: &MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        if info.key_size() as usize != size_of::<K>() || info.value_size() as usize != size_of::<V>() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "keys or values of another size"));
        }
        Ok(Self { fd: map.fd().as_fd().try_clone_to_owned()?, types: PhantomData })
    }

    /// A map whose key and value the caller knows to have the sizes of `K` and `V`.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, types: PhantomData }
    }

    /// The same as [`Self::get`] for a value that is too large for the stack.
    pub(crate) fn get_boxed(&self, key: &K) -> io::Result<Option<Box<V>>> {
        let mut value = Box::<V>::new_uninit();
        let mut attribute = ElementAttr {
            map: self.number(),
            key: address(key),
            value: address(value.as_mut_ptr()),
            ..ElementAttr::default()
        };
        match bpf(LOOKUP, &mut attribute) {
            // SAFETY: the kernel wrote the whole value.
            Ok(()) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn number(&self) -> u32 {
        self.fd.as_raw_fd().cast_unsigned()
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = MaybeUninit::<V>::uninit();
        let mut attribute = ElementAttr {
            map: self.number(),
            key: address(key),
            value: address(value.as_mut_ptr()),
            ..ElementAttr::default()
        };
        match bpf(LOOKUP, &mut attribute) {
            // SAFETY: the kernel wrote as many bytes as `new` compared.
            Ok(()) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a value, whatever is there.
    pub(crate) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attribute = ElementAttr {
            map: self.number(),
            key: address(key),
            value: address(value),
            ..ElementAttr::default()
        };
        bpf(UPDATE, &mut attribute)
    }

    /// Deletes a key; whether it was there.
    pub(crate) fn delete(&self, key: &K) -> io::Result<bool> {
        let mut attribute = ElementAttr { map: self.number(), key: address(key), ..ElementAttr::default() };
        match bpf(DELETE, &mut attribute) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes many elements.
    pub(crate) fn put_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        let mut done = 0;
        while done < keys.len().min(values.len()) {
            let count = (keys.len().min(values.len()) - done).min(BATCH);
            let mut attribute = BatchAttr {
                keys: address(keys[done..].as_ptr()),
                values: address(values[done..].as_ptr()),
                count: count as u32,
                map: self.number(),
                ..BatchAttr::default()
            };
            bpf(UPDATE_BATCH, &mut attribute)?;
            done += count;
        }
        Ok(())
    }

    /// Reads a share of a hash map, from `cursor` on (`None`: from the start), and says where the next one begins (`None`: at the end).
    /// What is inserted meanwhile may be missed, and what is moved may be seen twice.
    pub(crate) fn batch(&self, cursor: Option<u32>, show: &mut dyn FnMut(&K, &V)) -> io::Result<Option<u32>> {
        let mut room = BATCH;
        loop {
            let mut keys = Vec::<K>::with_capacity(room);
            let mut values = Vec::<V>::with_capacity(room);
            let from = cursor.unwrap_or(0);
            let mut next = 0_u32;
            let mut attribute = BatchAttr {
                in_batch: if cursor.is_some() { address(&raw const from) } else { 0 },
                out_batch: address(&raw mut next),
                keys: address(keys.as_mut_ptr()),
                values: address(values.as_mut_ptr()),
                count: room as u32,
                map: self.number(),
                ..BatchAttr::default()
            };
            let ended = match bpf(LOOKUP_BATCH, &mut attribute) {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < BATCH << 8 => {
                    room *= 4;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let count = (attribute.count as usize).min(room);
            // SAFETY: the kernel wrote that many elements of the sizes that `new` compared.
            unsafe {
                keys.set_len(count);
                values.set_len(count);
            }
            for (key, value) in keys.iter().zip(&values) {
                show(key, value);
            }
            return Ok((!ended).then_some(next));
        }
    }

    /// Reads a hash map.
    pub(crate) fn each(&self, show: &mut dyn FnMut(&K, &V)) -> io::Result<()> {
        let mut cursor = None;
        loop {
            cursor = self.batch(cursor, show)?;
            if cursor.is_none() {
                return Ok(());
            }
        }
    }
}

impl Map<u32, CpuCounters> {
    /// What all CPUs counted, of a map with a value for each.
    pub(crate) fn per_cpu(&self, cpus: usize) -> io::Result<Vec<CpuCounters>> {
        let mut values = vec![CpuCounters::default(); cpus];
        let key = 0_u32;
        let mut attribute = ElementAttr {
            map: self.number(),
            key: address(&raw const key),
            value: address(values.as_mut_ptr()),
            ..ElementAttr::default()
        };
        bpf(LOOKUP, &mut attribute)?;
        Ok(values)
    }
}

const _: () =
    assert!(size_of::<CpuCounters>().is_multiple_of(8), "the kernel rounds a CPU's value up to that");
