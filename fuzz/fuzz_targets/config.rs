//! Any text is a configuration or a list of mistakes, and a list is never empty.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use phalanx::config::{Config, Environment};
use phalanx::keys::{ClusterKey, KeyFileError};

/// A machine that has every interface and no key file.
struct Nowhere;

impl Environment for Nowhere {
    fn interface_exists(&self, _: &str) -> bool {
        true
    }

    fn read_keys(&self, _: &Path) -> Result<Vec<ClusterKey>, KeyFileError> {
        Ok(Vec::new())
    }
}

fuzz_target!(|text: &str| {
    if let Err(mistakes) = Config::parse(Path::new("phalanx.toml"), text, &Nowhere) {
        assert!(!mistakes.is_empty(), "refused without a reason");
        for mistake in mistakes {
            let _ = mistake.to_string();
        }
    }
});
