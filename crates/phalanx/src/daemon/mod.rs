//! A member of the cluster: the drivers that connect the sans-io cores to sockets, clocks and the kernel.

pub mod next_hops;
pub mod peers;
