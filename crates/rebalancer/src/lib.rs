//! What moves between members: replication and transfer tables, sans-io.
