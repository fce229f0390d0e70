//! The `phalanx` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    phalanx::cli::main()
}
