//! Who is in the cluster: SWIM over foca, sans-io.
