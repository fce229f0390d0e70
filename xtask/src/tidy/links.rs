//! Relative links in Markdown lead to files that exist, and to headings that exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Problems, Source, normalize};

pub(super) fn check(sources: &[Source], paths: &BTreeSet<PathBuf>) -> Problems {
    let mut problems = Problems::new();
    for source in sources.iter().filter(|source| source.has_extension("md")) {
        for (number, target) in links(&source.text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, heading) = target.split_once('#').unwrap_or((&target, ""));
            let directory = source.path.parent().unwrap_or(Path::new(""));
            let file =
                if path.is_empty() { Some(source.path.clone()) } else { normalize(&directory.join(path)) };
            let at = format!("{}:{number}", source.path.display());
            let Some(file) = file.filter(|file| paths.contains(file) || *file == Path::new("")) else {
                problems.push(format!("{at}: {target} does not exist"));
                continue;
            };
            let page = sources.iter().find(|other| other.path == file && other.has_extension("md"));
            if let Some(page) = page
                && !heading.is_empty()
                && !headings(&page.text).contains(heading)
            {
                problems.push(format!("{at}: {} has no heading #{heading}", file.display()));
            }
        }
    }
    problems
}

/// The lines that are not in a block of code, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            return None;
        }
        (!in_code).then_some((index + 1, line))
    })
}

/// The targets of `[..](..)` and `src=".."`, with the numbers of their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        // Within backticks nothing is a link.
        let plain: String = line.split('`').step_by(2).collect::<Vec<_>>().join("``");
        for (opening, closing) in [("](", ')'), ("src=\"", '"')] {
            for rest in plain.split(opening).skip(1) {
                if let Some((target, _)) = rest.split_once(closing) {
                    found.push((number, target.split(' ').next().unwrap_or(target).to_owned()));
                }
            }
        }
    }
    found
}

/// The anchors that a forge makes of the headings.
fn headings(text: &str) -> BTreeSet<String> {
    prose(text)
        .filter(|(_, line)| line.starts_with('#'))
        .map(|(_, line)| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|letter| letter.is_alphanumeric() || [' ', '-', '_'].contains(letter))
                .map(|letter| if letter == ' ' { '-' } else { letter })
                .collect()
        })
        .collect()
}
