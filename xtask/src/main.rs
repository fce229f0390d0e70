//! Checks, benchmarks and long runs that cargo cannot say.
fn main() {}
