//! Clusters of real processes in network namespaces: what is done to them, and what breaks. See the library for what they need.

mod changes;
mod datagrams;
mod deaths;
mod failures;
mod forming;
mod http;
mod limits;
mod packets;
mod refusals;
mod rootless;
