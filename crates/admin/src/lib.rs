//! Admin REST routes, types and metrics.
