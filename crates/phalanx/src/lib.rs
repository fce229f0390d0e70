//! Phalanx: a clustered L4 load balancer that breaks no connection.
