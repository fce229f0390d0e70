//! The raw-socket forwarder over real sockets and real interfaces, in network namespaces.

mod bulk;
mod conformance;
mod drop_on_ingress;
mod start;
