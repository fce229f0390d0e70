//! The `phalanx` program.
fn main() {}
