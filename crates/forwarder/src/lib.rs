//! The Forwarder trait, the plan it carries out, its counters and its conformance suite.
