//! The lab's command line, as a user without any rights runs it.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

use phalanx_integration::{NOBODY, open_directory, program};
use serde_json::Value;

fn lab(words: &[&str]) -> Output {
    let directory = open_directory();
    let copy = directory.path().join("phalanx");
    fs::copy(program(), &copy).expect("copy the program");
    let mut command = Command::new(&copy);
    command.args(["lab", "--quiet", "--json", "--connections", "300", "--duration", "8s"]).args(words);
    command.env("TMPDIR", directory.path()).current_dir(directory.path());
    command.uid(NOBODY).gid(NOBODY);
    let output = command.output().expect("run");
    // Nothing is left behind but the program.
    let left: Vec<_> =
        fs::read_dir(directory.path()).expect("read").map(|entry| entry.expect("entry").path()).collect();
    assert_eq!(left, [copy], "the lab cleans up");
    output
}

const STORY: &[&str] =
    &["--add-backend", "300ms", "--add-backend", "500ms", "--drain-backend", "1@800ms", "--kill", "2@2s"];

fn report(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).expect("a report in JSON; does this kernel allow user namespaces?")
}

#[test]
fn without_root_the_lab_runs_in_a_user_namespace_and_breaks_nothing() {
    let output = lab(STORY);
    let report = report(&output);
    assert_eq!(report["broken"], 0);
    assert!(report["opened"].as_u64().expect("a number") >= 300);
    assert!(report["deviating_share"].as_f64().expect("a share") >= 1.0 / 3.0);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn without_root_and_without_replication_the_lab_says_what_broke_by_its_exit_status() {
    let output = lab(&[STORY, &["--no-replication"]].concat());
    let report = report(&output);
    assert!(report["broken"].as_u64().expect("a number") > 0);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn without_root_the_lab_says_in_one_sentence_that_xdp_needs_it() {
    let output = lab(&["--forwarder", "xdp"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    assert!(said.contains("XDP") && said.contains("as root"), "{said}");
    assert_ne!(output.status.code(), Some(0));
}
