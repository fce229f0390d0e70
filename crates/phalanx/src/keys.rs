//! Key files: the secret that makes datagrams ours.
//!
//! One key a line, 32 bytes in base64 or hexadecimal; empty lines and what follows `#` do not count.
//! The first key seals, all of them open, so that keys rotate in three steps without downtime: add the new key as the last one
//! everywhere, then move it to the front everywhere, then remove the old one everywhere.

use std::fmt;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};

/// Bytes of a key: AES-256.
pub const KEY_BYTES: usize = 32;

/// Keys in one file at most: a rotation needs two, and every one costs an attempt per foreign datagram.
pub const MAX_KEYS: usize = 8;

/// One key of the cluster. Its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(pub [u8; KEY_BYTES]);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

/// Why a key file cannot be used. Each message says what to do and stands after the name of the file.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read, or written.
    #[error("cannot be opened ({0}): make one with `phalanx keygen` and copy it to every member")]
    Io(#[from] std::io::Error),
    /// Others than its owner may read it.
    #[error("may be read by others than its owner (mode {0:o}): run chmod 600 on it")]
    TooOpen(u32),
    /// A line is not a key.
    #[error("line {0} is not a key of 32 bytes in base64 or hexadecimal: make one with `phalanx keygen`")]
    Line(usize),
    /// A key stands there twice.
    #[error("line {0} repeats a key: remove it")]
    Repeated(usize),
    /// There is no key in it.
    #[error("holds no key: make one with `phalanx keygen`")]
    Empty,
    /// There are too many.
    #[error("holds more than {MAX_KEYS} keys: remove the old ones")]
    TooMany,
}

/// The keys in the file, which only its owner may read.
pub fn read(path: &Path) -> Result<Vec<ClusterKey>, KeyFileError> {
    let mode = std::fs::metadata(path)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::TooOpen(mode));
    }
    parse(&std::fs::read_to_string(path)?)
}

/// The keys in the text of a key file.
pub fn parse(text: &str) -> Result<Vec<ClusterKey>, KeyFileError> {
    let mut keys: Vec<ClusterKey> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let word = line.split('#').next().unwrap_or_default().trim();
        if word.is_empty() {
            continue;
        }
        let bytes = if word.len() == 2 * KEY_BYTES {
            HEXLOWER_PERMISSIVE.decode(word.as_bytes())
        } else {
            BASE64.decode(word.as_bytes())
        };
        let key = bytes.ok().and_then(|bytes| bytes.try_into().ok()).ok_or(KeyFileError::Line(number))?;
        let key = ClusterKey(key);
        if keys.contains(&key) {
            return Err(KeyFileError::Repeated(number));
        }
        keys.push(key);
    }
    match keys.len() {
        0 => Err(KeyFileError::Empty),
        1..=MAX_KEYS => Ok(keys),
        _ => Err(KeyFileError::TooMany),
    }
}

/// Writes a new file with one new key that only its owner may read. Never overwrites one.
pub fn generate(path: &Path) -> Result<(), KeyFileError> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let key: [u8; KEY_BYTES] = random()?;
    writeln!(file, "# Phalanx cluster key: the first one seals, all of them open.\n{}", BASE64.encode(&key))?;
    file.sync_all()?;
    Ok(())
}

/// A new value for `cluster.hash_seed`.
pub fn hash_seed() -> std::io::Result<String> {
    random::<16>().map(|seed| HEXLOWER_PERMISSIVE.encode(&seed))
}

/// Bytes from the kernel's generator.
fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    const { assert!(N <= 256, "getrandom(2) fills up to 256 bytes whole") };
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const B64: &str = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=";

    #[test]
    fn keys_stand_in_hex_or_base64_one_a_line() {
        let keys = parse(&format!("# first\n{HEX}\n\n  {B64} # second\n")).unwrap();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[0].0[31], 0x1f);
        assert_eq!(keys[1].0[0], 0x20);
    }

    #[test]
    fn a_line_that_is_no_key_is_named() {
        assert!(matches!(parse(&format!("{HEX}\nhello\n")), Err(KeyFileError::Line(2))));
        assert!(matches!(parse(&HEX[2..]), Err(KeyFileError::Line(1))));
        assert!(matches!(parse(&format!("{HEX}\n{HEX}")), Err(KeyFileError::Repeated(2))));
        assert!(matches!(parse("# nothing\n"), Err(KeyFileError::Empty)));
    }

    #[test]
    fn a_key_does_not_show_itself() {
        assert!(!format!("{:?}", parse(HEX).unwrap()).contains("31"));
    }

    #[test]
    fn keygen_writes_a_file_that_reads_and_never_overwrites_one() {
        let directory = std::env::temp_dir().join(format!("phalanx-keys-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("cluster.key");
        let _ = std::fs::remove_file(&path);
        generate(&path).unwrap();
        let first = read(&path).unwrap();
        assert!(matches!(generate(&path), Err(KeyFileError::Io(_))));
        assert_eq!(read(&path).unwrap(), first);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(read(&path), Err(KeyFileError::TooOpen(0o640))));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
