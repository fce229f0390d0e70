//! `cargo xtask sim`: the simulator's own program, with what it is given.

use std::path::Path;

use anyhow::Result;

use crate::{cargo, execute};

pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<()> {
    execute(cargo(root, &["run", "--quiet", "-p", "phalanx-sim", "--"]).args(arguments))
}
