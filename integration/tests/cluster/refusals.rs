//! What bad input gets: one clear sentence that names the field and what to do, and exit status 2.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};

use phalanx_integration::{NOBODY, open_directory, program};

const GOOD: &str = r#"[member]
id = 1
address = "127.0.0.1"
seeds = ["127.0.0.1", "2@127.0.0.2"]

[cluster]
name = "refusals"
key_file = "cluster.key"
hash_seed = "00112233445566778899aabbccddeeff"

[forwarder]
interfaces = ["lo"]

[[service]]
name = "web"
address = "192.0.2.1"
port = 80
method = "ipip"

[[service.backend]]
address = "127.0.0.3"
"#;

/// Runs the program with `text` as its configuration; it must end by itself.
fn start(directory: &Path, text: &str, verb: &[&str], prepare: impl FnOnce(&mut Command)) -> Output {
    let file = directory.join("phalanx.toml");
    std::fs::write(&file, text).expect("write");
    let key = directory.join("cluster.key");
    if !key.exists() {
        phalanx::keys::generate(&key).expect("a key");
    }
    // Should it run after all, it is ended, and the status is 124 (timeout(1)).
    let mut command = Command::new("timeout");
    command.arg("10s").arg(directory.join("phalanx")).args(verb).arg(&file);
    prepare(&mut command);
    command.output().expect("run")
}

fn directory() -> tempfile::TempDir {
    let directory = open_directory();
    std::fs::copy(program(), directory.path().join("phalanx")).expect("copy the program");
    directory
}

/// The sentence of the only mistake, as both `run` and `check` say it.
fn mistake(from: &str, to: &str) -> String {
    let directory = directory();
    assert!(GOOD.contains(from), "{from} is not in the good file");
    let text = GOOD.replacen(from, to, 1);
    let mut sentences = Vec::new();
    for verb in [&["run", "--config"][..], &["check"]] {
        let output = start(directory.path(), &text, verb, |_| ());
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(2), "{verb:?}: {said}");
        // `check` counts them in a line of its own.
        let lines: Vec<&str> = said.lines().filter(|line| !line.ends_with(": 1 error")).collect();
        assert_eq!(lines.len(), 1, "{verb:?} says one sentence: {said}");
        sentences.push(lines[0].to_owned());
    }
    assert_eq!(sentences[0], sentences[1], "run and check say the same");
    println!("{}", sentences[0]);
    sentences.remove(0)
}

#[test]
fn every_mistake_in_a_configuration_gets_a_sentence_and_status_2() {
    for (from, to, words) in [
        ("\"2@127.0.0.2\"", "\"1@127.0.0.2\"", &["member.seeds", "id 1 stands for", "unique"][..]),
        ("id = 1", "id = 1\nwieght = 5", &["member.wieght", "unknown field", "write weight"]),
        ("id = 1", "id = 1\nweight = -5", &["member.weight", "-5 is below 0", "from 0 to"]),
        (
            "\"127.0.0.3\"",
            "\"127.0.0.3\"\nweight = -1",
            &["service.backend.weight", "-1 is below 0", "from 0 to"],
        ),
        (
            "[[service.backend]]\naddress = \"127.0.0.3\"\n",
            "",
            &["service.backend", "service web has no backends", "[[service.backend]]"],
        ),
        ("\"lo\"", "\"nothere0\"", &["forwarder.interfaces", "no interface nothere0", "ip link"]),
        ("cluster.key", "nothere.key", &["cluster.key_file", "phalanx keygen"]),
    ] {
        let sentence = mistake(from, to);
        for word in words {
            assert!(sentence.contains(word), "{sentence:?} does not say {word:?}");
        }
    }
}

#[test]
fn without_permission_for_raw_sockets_a_member_says_so_and_ends_with_status_2() {
    let directory = directory();
    let run = |prepare: fn(&mut Command)| {
        start(directory.path(), GOOD, &["run", "--config"], |command| {
            // Only its owner may read the key.
            let key = directory.path().join("cluster.key");
            chown(&key, Some(NOBODY), Some(NOBODY)).expect("chown");
            std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).expect("chmod");
            prepare(command);
        })
    };
    let output = run(|command| {
        command.uid(NOBODY).gid(NOBODY);
    });
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    println!("{said}");
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "one sentence: {said}");
    for word in ["forwarder.kind", "no permission for raw sockets", "CAP_NET_RAW"] {
        assert!(said.contains(word), "{said:?} does not say {word:?}");
    }
}

/// The twin: the same file, checked by who may, is good.
#[test]
fn the_good_file_is_good() {
    let directory = directory();
    let output = start(directory.path(), GOOD, &["check"], |_| ());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
