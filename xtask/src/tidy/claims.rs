//! `docs/claims.md` names, for each of the founding document's claims, tests that exist.

use std::path::Path;

use super::{Problems, Source};

/// Claims of the founding document.
const CLAIMS: usize = 22;

/// How far above a test's function its attribute may stand, in lines.
const REACH: usize = 6;

pub(super) fn check(page: &str, sources: &[Source]) -> Problems {
    let mut problems = Problems::new();
    for claim in 1..=CLAIMS {
        let heading = format!("## Claim {claim}:");
        let Some(start) = page.lines().position(|line| line.starts_with(&heading)) else {
            problems.push(format!("docs/claims.md: a section \"{heading} ..\" is missing"));
            continue;
        };
        let section = page.lines().skip(start + 1).take_while(|line| !line.starts_with("## "));
        if section.flat_map(tests_named).count() == 0 {
            problems.push(format!("docs/claims.md: claim {claim} names no test"));
        }
    }
    for (index, line) in page.lines().enumerate() {
        for (path, name) in tests_named(line) {
            if !exists(path, name, sources) {
                problems.push(format!("docs/claims.md:{}: there is no test {path}::{name}", index + 1));
            }
        }
        for path in line.split('`').skip(1).step_by(2) {
            let is_file = path.ends_with(".rs") && path.contains('/');
            if is_file && !sources.iter().any(|source| source.path == Path::new(path)) {
                problems.push(format!("docs/claims.md:{}: there is no {path}", index + 1));
            }
        }
    }
    problems
}

/// Every `path.rs::name` between backticks.
fn tests_named(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split('`').skip(1).step_by(2).filter_map(|code| {
        let (path, name) = code.rsplit_once("::")?;
        path.ends_with(".rs").then_some((path, name))
    })
}

fn exists(path: &str, name: &str, sources: &[Source]) -> bool {
    let Some(source) = sources.iter().find(|source| source.path == Path::new(path)) else { return false };
    let lines: Vec<_> = source.text.lines().collect();
    lines.iter().enumerate().any(|(index, line)| {
        line.contains(&format!("fn {name}("))
            && lines
                .iter()
                .take(index)
                .skip(index.saturating_sub(REACH))
                .any(|above| above.trim() == "#[test]" || above.trim().starts_with("#[tokio::test"))
    })
}
