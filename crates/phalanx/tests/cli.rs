//! The program as an operator meets it: what it prints and its exit status. Needs no root and no network.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("phalanx-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    /// A good configuration on the loopback interface, with `from` replaced by `to`.
    fn config(&self, from: &str, to: &str) -> PathBuf {
        let text = include_str!("../../../docs/operating/phalanx.toml").replace("\"eth0\"", "\"lo\"");
        assert!(text.contains(from), "{from} is not in the example");
        let file = self.0.join("phalanx.toml");
        std::fs::write(&file, text.replacen(from, to, 1)).expect("write");
        file
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn phalanx(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_phalanx")).args(words).env_remove("PHALANX_ADMIN").output().expect("run")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn show(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_new_key_and_the_example_make_a_good_configuration() {
    let directory = Directory::new("good");
    let key = directory.0.join("cluster.key");
    let made = phalanx(&["keygen", show(&key)]);
    assert!(made.status.success(), "{made:?}");
    assert!(text(&made.stdout).contains("hash_seed = \""));
    let checked = phalanx(&["check", show(&directory.config("[member]", "[member]"))]);
    assert!(checked.status.success(), "{checked:?}");
    assert!(text(&checked.stdout).contains("OK: member 1 of cluster example, 2 services"));
    // The key is not overwritten.
    assert_eq!(phalanx(&["keygen", show(&key)]).status.code(), Some(2));
}

#[test]
fn mistakes_end_check_and_run_with_status_2_and_a_line_each() {
    let directory = Directory::new("bad");
    let file = directory.config("weight = 100", "weight = -1\nwieght = 1");
    for words in [&["check", show(&file)][..], &["run", "--config", show(&file)]] {
        let refused = phalanx(words);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        let said = text(&refused.stderr);
        let file = show(&file);
        for line in [
            format!("{file}:7: member.weight: -1 is below 0"),
            format!("{file}:8: member.wieght: unknown field"),
            // No key was made.
            format!("{file}:16: cluster.key_file: {}", directory.0.join("cluster.key").display()),
        ] {
            assert!(said.contains(&line), "{line} is missing in\n{said}");
        }
    }
    let missing = phalanx(&["run", "--config", "/nonexistent/phalanx.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("check the path"));
}

#[test]
fn a_question_that_nobody_answers_ends_with_status_1() {
    // A listener that is dropped at once leaves a port where nobody listens.
    let address = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
    let asked = phalanx(&["members", "--admin", &address.to_string()]);
    assert_eq!(asked.status.code(), Some(1));
    assert!(text(&asked.stderr).contains("is it running"), "{asked:?}");
}
