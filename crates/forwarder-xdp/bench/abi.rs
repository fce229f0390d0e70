//! What the benchmark's programs and the benchmark share. Both compile this file.

/// Bytes of the headers of a plain frame that the harness writes: up to the TCP header's sixteenth byte.
pub(crate) const DIRECT: usize = 50;
/// The same of a frame that is handed off: the outer headers, 68 bytes, more.
pub(crate) const HANDED_OFF: usize = 122;

/// What the harness does.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Config {
    /// The frame's first bytes.
    pub(crate) head: [u64; 16],
    /// State of the random numbers; not zero.
    pub(crate) state: u64,
    /// Number of flows less one; the number is a power of two.
    pub(crate) mask: u32,
    /// Length of the frame in bytes.
    pub(crate) length: u32,
    /// The first flow's source address.
    pub(crate) source: u32,
    /// Which program to run.
    pub(crate) target: u32,
    /// Where generated frames leave.
    pub(crate) interface: u32,
    /// Zero.
    pub(crate) reserved: u32,
}

/// A flow of the minimal program, as it stands in the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Key {
    /// Source address.
    pub(crate) source: u32,
    /// Destination address.
    pub(crate) destination: u32,
    /// Source and destination port.
    pub(crate) ports: [u16; 2],
    /// Protocol.
    pub(crate) protocol: u32,
}

/// Where it goes, as it stands in the packet.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Value {
    /// Destination and source MAC.
    pub(crate) macs: [u16; 6],
    /// Outer source address.
    pub(crate) source: [u16; 2],
    /// Outer destination address.
    pub(crate) destination: [u16; 2],
    /// Zero.
    pub(crate) reserved: u32,
}

/// What reached the sink on one CPU.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Sunk {
    /// Frames.
    pub(crate) count: u64,
    /// When the first one came, in nanoseconds.
    pub(crate) first_ns: u64,
    /// When the last one came that found the clock looked at.
    pub(crate) last_ns: u64,
    /// Frames before that one.
    pub(crate) last_count: u64,
}
