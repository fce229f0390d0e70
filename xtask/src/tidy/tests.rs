//! Each rule, kept and broken.
use super::*;

fn source(path: &str, text: &str) -> Source {
    Source { path: path.into(), text: text.to_owned() }
}

fn workspace(texts: &[(&str, &str)]) -> Manifests {
    let sources: Vec<_> = texts.iter().map(|(path, text)| source(path, text)).collect();
    manifests(&sources).unwrap()
}

const FLOW: (&str, &str) = ("crates/flow/Cargo.toml", "[package]\nname = \"phalanx-flow\"\n");

#[test]
fn an_arrow_that_points_up_is_found_and_one_that_points_down_is_not() {
    let rebalancer = |dependency: &str| {
        let text =
            format!("[package]\nname = \"phalanx-rebalancer\"\n[dependencies]\n{dependency} = \"1\"\n");
        dependencies(&workspace(&[
            FLOW,
            ("crates/forwarder/Cargo.toml", "[package]\nname = \"phalanx-forwarder\"\n"),
            ("crates/rebalancer/Cargo.toml", &text),
        ]))
    };
    assert!(rebalancer("phalanx-flow").is_empty());
    assert!(rebalancer("serde").is_empty());
    assert_eq!(rebalancer("phalanx-forwarder").len(), 1);
    assert_eq!(rebalancer("tokio").len(), 2, "a core that names what lives in the program only");
    assert_eq!(rebalancer("libc").len(), 1);
}

#[test]
fn flow_has_no_dependencies_and_a_new_crate_needs_a_place() {
    let flow = "[package]\nname = \"phalanx-flow\"\n[target.'cfg(unix)'.dependencies]\nserde = \"1\"\n";
    assert_eq!(dependencies(&workspace(&[("crates/flow/Cargo.toml", flow)])).len(), 1);
    let dev = "[package]\nname = \"phalanx-flow\"\n[dev-dependencies]\nproptest = \"1\"\n";
    assert!(dependencies(&workspace(&[("crates/flow/Cargo.toml", dev)])).is_empty());
    assert_eq!(dependencies(&workspace(&[("x/Cargo.toml", "[package]\nname = \"phalanx-x\"\n")])).len(), 1);
    let own = "[package]\nname = \"fuzz\"\n[workspace]\n";
    assert!(dependencies(&workspace(&[("fuzz/Cargo.toml", own)])).is_empty());
}

#[test]
fn a_core_that_may_read_the_clock_is_found() {
    let manifest = "[package]\nname = \"phalanx-membership\"\n[lints]\nworkspace = true\n";
    let manifests = workspace(&[("crates/membership/Cargo.toml", manifest)]);
    let bans: Vec<_> = BANNED_IN_CORES.iter().map(|path| format!("{{ path = \"{path}\" }}")).collect();
    let clippy = format!("disallowed-methods = [{}]", bans.join(", "));
    assert!(lints(&manifests, &[source("crates/membership/clippy.toml", &clippy)]).is_empty());
    assert_eq!(lints(&manifests, &[]).len(), BANNED_IN_CORES.len());
}

#[test]
fn a_crate_without_the_workspaces_lints_is_found() {
    let manifests = workspace(&[("crates/netlink/Cargo.toml", "[package]\nname = \"phalanx-netlink\"\n")]);
    assert_eq!(lints(&manifests, &[]).len(), 1);
    let safe = source("crates/netlink/src/lib.rs", "#![forbid(unsafe_code)]\n");
    assert!(lints(&manifests, &[safe]).is_empty());
}

#[test]
fn an_ignored_test_is_found_and_a_word_is_not() {
    let attribute = format!("#[{}]\nfn f() {{}}", "ignore");
    assert_eq!(ignored(&[source("a.rs", &attribute)]).len(), 1);
    assert_eq!(ignored(&[source("a.rs", &attribute.replace(']', " = \"slow\"]"))]).len(), 1);
    assert!(ignored(&[source("a.rs", "// No `#[ignore]` here."), source("a.md", &attribute)]).is_empty());
}

#[test]
fn links_lead_somewhere() {
    let paths: BTreeSet<PathBuf> = ["docs", "docs/a.md", "docs/b.md", "README.md"].map(PathBuf::from).into();
    let found = |text: &str| {
        links::check(
            &[source("docs/a.md", text), source("docs/b.md", "# One, `two`\n```\n# Three\n```\n")],
            &paths,
        )
    };
    for good in [
        "[b](b.md)",
        "[r](../README.md)",
        "[d](../docs)",
        "[x](https://x.org/y)",
        "[h](b.md#one-two)",
        "`[c](c.md)`",
    ] {
        assert!(found(good).is_empty(), "{good}");
    }
    assert!(found("```\n[c](c.md)\n```\n").is_empty());
    for bad in [
        "[c](c.md)",
        "[out](../../x.md)",
        "[h](b.md#three)",
        "![i](i.svg)",
        "<img src=\"i.svg\">",
        "# A\n[s](#b)",
    ] {
        assert_eq!(found(bad).len(), 1, "{bad}");
    }
}

#[test]
fn a_claim_without_a_test_and_a_test_that_is_not_there_are_found() {
    let sources = [source("a/b.rs", "    #[test]\n    fn shown() {}\n\n\n\n\n\n\n\n    fn helper() {}\n")];
    let page: String = (1..=22).map(|claim| format!("## Claim {claim}: it\n- `a/b.rs::shown`\n")).collect();
    assert!(claims::check(&page, &sources).is_empty());
    assert_eq!(claims::check(&page.replacen("`a/b.rs::shown`", "", 1), &sources).len(), 1);
    assert_eq!(claims::check(&page.replacen("shown", "hidden", 1), &sources).len(), 1);
    assert_eq!(claims::check(&page.replacen("shown", "helper", 1), &sources).len(), 1, "no test");
    assert_eq!(claims::check(&page.replacen("a/b.rs", "a/c.rs", 1), &sources).len(), 1);
    assert_eq!(claims::check(&page.replacen("Claim 22", "Claim 23", 1), &sources).len(), 1);
    assert_eq!(claims::check(&format!("{page}`a/gone.rs`\n"), &sources).len(), 1);
}

#[test]
fn design_notes_have_no_gaps() {
    let note = |number: &str| source(&format!("docs/design/{number}-t.md"), &format!("# {number}: t\n"));
    assert!(numbering(&[note("0001"), note("0002")]).is_empty());
    assert_eq!(numbering(&[note("0001"), note("0003")]).len(), 1);
    assert_eq!(numbering(&[source("docs/design/0001-t.md", "# Title\n")]).len(), 1);
}

#[test]
fn a_reason_that_is_not_documented_is_found() {
    let everything = documented("");
    assert_eq!(
        everything.len(),
        phalanx_forwarder::Drop::ALL.len() + phalanx_forwarder::counters::OUTCOME_NAMES.len()
    );
    assert_eq!(documented("| `no_service` | x |\n").len(), everything.len() - 1);
}
