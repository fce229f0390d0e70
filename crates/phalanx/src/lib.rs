//! Phalanx: a clustered L4 load balancer that breaks no connection.

pub mod check;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod decap;
pub mod health;
pub mod http;
pub mod keys;
pub mod lab;
pub mod logging;
pub mod path_mtu;
mod query;
