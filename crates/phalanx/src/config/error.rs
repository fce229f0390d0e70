//! What can be wrong with a configuration.

use std::fmt;
use std::path::{Path, PathBuf};

/// One mistake: where it stands, and one sentence that says what to do.
///
/// Nothing was changed: a daemon that was told to reload keeps its old configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The configuration file.
    pub file: PathBuf,
    /// Line in it, from 1; 0 if the file could not be read.
    pub line: usize,
    /// The field, as `section.field`; empty if none is to blame.
    pub field: String,
    /// What sort of mistake.
    pub kind: ConfigErrorKind,
    /// One sentence: what is wrong and what to do.
    pub message: String,
}

/// Sorts of mistakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigErrorKind {
    /// The file could not be read: wrong path or permission.
    File,
    /// Not TOML.
    Syntax,
    /// No such field or section.
    Unknown,
    /// A required field or section is missing.
    Missing,
    /// The value has the wrong type or form.
    Value,
    /// The value is outside its range.
    Range,
    /// Two things that must differ are equal.
    Duplicate,
    /// Two fields contradict each other.
    Conflict,
    /// The machine does not have what the field names: an interface, a key file, a forwarder.
    Environment,
}

impl ConfigError {
    pub(super) fn file(path: &Path, error: &std::io::Error) -> Self {
        Self {
            file: path.to_owned(),
            line: 0,
            field: String::new(),
            kind: ConfigErrorKind::File,
            message: format!("the file cannot be read ({error}): check the path and its permissions"),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}.", self.message)
    }
}

impl std::error::Error for ConfigError {}
