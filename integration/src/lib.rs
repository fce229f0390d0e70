//! Clusters in network namespaces: real processes, real clients and servers.
