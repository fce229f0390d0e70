//! Takes fields out of a TOML document and remembers every mistake with its line.
//!
//! `serde` stops at the first mistake; an operator wants all of them. So the document is walked by hand: each field is taken by
//! name, and what nobody took is unknown.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, ConfigErrorKind};

/// The file as a whole, and the mistakes found in it.
pub(super) struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    errors: RefCell<Vec<ConfigError>>,
    known: RefCell<BTreeSet<String>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, text, errors: RefCell::default(), known: RefCell::default() }
    }

    /// Line of a byte offset, from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        let head = self.text.as_bytes().get(..offset).unwrap_or(self.text.as_bytes());
        1 + head.iter().filter(|byte| **byte == b'\n').count()
    }

    pub(super) fn fail(&self, line: usize, field: &str, kind: ConfigErrorKind, message: impl Into<String>) {
        self.errors.borrow_mut().push(ConfigError {
            file: self.file.to_owned(),
            line,
            field: field.to_owned(),
            kind,
            message: message.into(),
        });
    }

    /// The mistakes in the order of the lines, and every field that was asked for.
    pub(super) fn finish(self) -> (Vec<ConfigError>, BTreeSet<String>) {
        let mut errors = self.errors.into_inner();
        errors.sort_by_key(|error| error.line);
        (errors, self.known.into_inner())
    }
}

/// One table of the document.
pub(super) struct Section<'a, 'i> {
    source: &'a Source<'a>,
    name: String,
    line: usize,
    /// One of several: `[[name]]`.
    repeats: bool,
    table: Option<&'a DeTable<'i>>,
    asked: BTreeSet<&'static str>,
}

/// A value taken out of the document, with where it stood.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) line: usize,
}

impl<'a, 'i> Section<'a, 'i> {
    pub(super) fn root(source: &'a Source<'a>, table: &'a DeTable<'i>) -> Self {
        Self {
            source,
            name: String::new(),
            line: 1,
            repeats: false,
            table: Some(table),
            asked: BTreeSet::new(),
        }
    }

    /// Whether the section is not there.
    pub(super) fn is_missing(&self) -> bool {
        self.table.is_none()
    }

    /// Line of the section's head.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// Full name of a field.
    pub(super) fn field(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    pub(super) fn fail(&self, line: usize, key: &str, kind: ConfigErrorKind, message: impl Into<String>) {
        self.source.fail(line, &self.field(key), kind, message);
    }

    fn ask(&mut self, key: &'static str) -> Option<(&'a DeValue<'i>, usize)> {
        self.asked.insert(key);
        self.source.known.borrow_mut().insert(self.field(key));
        let (at, value) = self.table?.iter().find(|(name, _)| name.get_ref() == key)?;
        Some((value.get_ref(), self.source.line(at.span().start)))
    }

    /// Says that `key` is missing.
    fn missing(&self, key: &str, example: &str) {
        if self.table.is_none() {
            // The section itself is missing, and that was said once.
            return;
        }
        let section = match (self.name.as_str(), self.repeats) {
            ("", _) => "the file".to_owned(),
            (name, false) => format!("section [{name}]"),
            (name, true) => format!("this [[{name}]]"),
        };
        self.fail(
            self.line,
            key,
            ConfigErrorKind::Missing,
            format!("{section} lacks this field: add for example {key} = {example}"),
        );
    }

    /// A field of any type: `read` makes it out of the value or says in what form it should be.
    pub(super) fn take<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&'a DeValue<'i>) -> Result<T, (ConfigErrorKind, String)>,
    ) -> Option<At<T>> {
        let (value, line) = self.ask(key)?;
        match read(value) {
            Ok(value) => Some(At { value, line }),
            Err((kind, message)) => {
                self.fail(line, key, kind, message);
                None
            }
        }
    }

    /// A field that must be there.
    pub(super) fn require<T>(
        &mut self,
        key: &'static str,
        example: &str,
        read: impl FnOnce(&'a DeValue<'i>) -> Result<T, (ConfigErrorKind, String)>,
    ) -> Option<At<T>> {
        if self.ask(key).is_none() {
            self.missing(key, example);
            return None;
        }
        self.take(key, read)
    }

    pub(super) fn integer(&mut self, key: &'static str, range: RangeInclusive<u32>, default: u32) -> u32 {
        self.take(key, |value| integer(value, range)).map_or(default, |at| at.value)
    }

    pub(super) fn port(&mut self, key: &'static str, default: u16) -> At<u16> {
        self.take(key, port).unwrap_or(At { value: default, line: self.line })
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.take(key, |value| {
            value.as_bool().ok_or_else(|| wrong("true or false, without quotes".to_owned(), value))
        })
        .map_or(default, |at| at.value)
    }

    pub(super) fn duration(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
        default: Duration,
    ) -> At<Duration> {
        self.take(key, |value| duration(value, range)).unwrap_or(At { value: default, line: self.line })
    }

    /// One of several words.
    pub(super) fn choice<T: Copy + Default>(&mut self, key: &'static str, choices: &[(&str, T)]) -> T {
        self.take(key, |value| choice(value, choices)).map(|at| at.value).unwrap_or_default()
    }

    /// A list of strings that must be there, each made into something by `read`.
    pub(super) fn require_list<T>(
        &mut self,
        key: &'static str,
        example: &str,
        read: impl FnMut(&str) -> Result<T, String>,
    ) -> Option<Vec<At<T>>> {
        if self.ask(key).is_none() {
            self.missing(key, example);
            return None;
        }
        self.list(key, read)
    }

    /// A list of strings, each made into something by `read`.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&str) -> Result<T, String>,
    ) -> Option<Vec<At<T>>> {
        let (value, line) = self.ask(key)?;
        let Some(array) = value.as_array() else {
            let (kind, message) = wrong("a list of strings: [\"..\", \"..\"]".to_owned(), value);
            self.fail(line, key, kind, message);
            return None;
        };
        let mut out = Vec::new();
        for item in array.iter() {
            let line = self.source.line(item.span().start);
            match item.get_ref().as_str() {
                Some(text) => match read(text) {
                    Ok(value) => out.push(At { value, line }),
                    Err(message) => self.fail(line, key, ConfigErrorKind::Value, message),
                },
                None => {
                    let (kind, message) = wrong("a list of strings".to_owned(), item.get_ref());
                    self.fail(line, key, kind, message);
                }
            }
        }
        Some(out)
    }

    fn child(&self, key: &str, line: usize, table: Option<&'a DeTable<'i>>) -> Self {
        Self {
            source: self.source,
            name: self.field(key),
            line,
            repeats: false,
            table,
            asked: BTreeSet::new(),
        }
    }

    /// A section, if it is there.
    pub(super) fn section(&mut self, key: &'static str) -> Option<Self> {
        let (value, line) = self.ask(key)?;
        let table = value.as_table();
        if table.is_none() {
            let head = self.field(key);
            self.fail(line, key, ConfigErrorKind::Value, format!("this is a section: write [{head}]"));
        }
        table.map(|table| self.child(key, line, Some(table)))
    }

    /// A section of which every field has a default.
    pub(super) fn section_or_empty(&mut self, key: &'static str) -> Self {
        self.section(key).unwrap_or_else(|| self.child(key, self.line, None))
    }

    /// The elements of an array of sections, none if there is none.
    pub(super) fn sections(&mut self, key: &'static str) -> Vec<Self> {
        let Some((value, line)) = self.ask(key) else { return Vec::new() };
        let head = self.field(key);
        let Some(array) = value.as_array() else {
            let message = format!("there may be several of these: write [[{head}]]");
            self.fail(line, key, ConfigErrorKind::Value, message);
            return Vec::new();
        };
        let mut out = Vec::new();
        for item in array.iter() {
            let line = self.source.line(start(item));
            match item.get_ref().as_table() {
                Some(table) => out.push(Self { repeats: true, ..self.child(key, line, Some(table)) }),
                None => self.fail(
                    line,
                    key,
                    ConfigErrorKind::Value,
                    format!("this is a section: write [[{head}]]"),
                ),
            }
        }
        out
    }

    /// Says which fields nobody asked for.
    pub(super) fn finish(self) {
        for (key, _) in self.table.into_iter().flat_map(DeTable::iter) {
            let name: &str = key.get_ref();
            if self.asked.contains(name) {
                continue;
            }
            let near = self
                .asked
                .iter()
                .map(|known| (strsim::jaro_winkler(name, known), *known))
                .filter(|(likeness, _)| *likeness > 0.8)
                .max_by(|a, b| a.0.total_cmp(&b.0));
            let advice = match near {
                Some((_, known)) => format!("write {known} if that is meant, or remove it"),
                None => {
                    let known: Vec<&str> = self.asked.iter().copied().collect();
                    format!("remove it, or use one of {}", known.join(", "))
                }
            };
            let message = format!("unknown field; {advice}");
            self.fail(self.source.line(key.span().start), name, ConfigErrorKind::Unknown, message);
        }
    }
}

/// Where an element of an array of tables starts.
fn start(item: &Spanned<DeValue<'_>>) -> usize {
    item.span().start
}

type Read<T> = Result<T, (ConfigErrorKind, String)>;

/// The value has the wrong type.
pub(super) fn wrong(expected: String, value: &DeValue<'_>) -> (ConfigErrorKind, String) {
    (ConfigErrorKind::Value, format!("give {expected}, not {}", show(value)))
}

/// A short form of the value for a message.
pub(super) fn show(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("\"{text}\""),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(value) => value.to_string(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a section".to_owned(),
    }
}

pub(super) fn string<'a>(value: &'a DeValue<'_>) -> Read<&'a str> {
    value.as_str().ok_or_else(|| wrong("text in quotes".to_owned(), value))
}

pub(super) fn integer(value: &DeValue<'_>, range: RangeInclusive<u32>) -> Read<u32> {
    let (low, high) = (*range.start(), *range.end());
    let expected = format!("a whole number from {low} to {high}");
    let number = value.as_integer().ok_or_else(|| wrong(format!("{expected}, without quotes"), value))?;
    let number = i64::from_str_radix(number.as_str(), number.radix());
    match number {
        Ok(number) if number < i64::from(low) => {
            Err((ConfigErrorKind::Range, format!("{number} is below {low}: give {expected}")))
        }
        Ok(number) if number > i64::from(high) => {
            Err((ConfigErrorKind::Range, format!("{number} is above {high}: give {expected}")))
        }
        Ok(number) => Ok(u32::try_from(number).unwrap_or(low)),
        Err(_) => Err((ConfigErrorKind::Range, format!("{} is too large: give {expected}", show(value)))),
    }
}

pub(super) fn port(value: &DeValue<'_>) -> Read<u16> {
    Ok(u16::try_from(integer(value, 1..=65_535)?).unwrap_or(1))
}

pub(super) fn address(value: &DeValue<'_>) -> Read<IpAddr> {
    let text = string(value)?;
    text.parse().map_err(|_| wrong("an IP address like \"10.0.1.11\" or \"2001:db8::11\"".to_owned(), value))
}

pub(super) fn socket(value: &DeValue<'_>) -> Read<SocketAddr> {
    let text = string(value)?;
    text.parse().map_err(|_| wrong("an address with a port like \"127.0.0.1:7980\"".to_owned(), value))
}

fn duration(value: &DeValue<'_>, range: RangeInclusive<Duration>) -> Read<Duration> {
    let (low, high) = (humantime::format_duration(*range.start()), humantime::format_duration(*range.end()));
    let expected = format!("a time from \"{low}\" to \"{high}\", with its unit, like \"500ms\" or \"15m\"");
    let text = value.as_str().ok_or_else(|| wrong(expected.clone(), value))?;
    let time = humantime::parse_duration(text).map_err(|_| wrong(expected.clone(), value))?;
    if range.contains(&time) {
        Ok(time)
    } else {
        let side = if time < *range.start() { format!("below {low}") } else { format!("above {high}") };
        Err((ConfigErrorKind::Range, format!("{text} is {side}: give {expected}")))
    }
}

pub(super) fn choice<T: Copy>(value: &DeValue<'_>, choices: &[(&str, T)]) -> Read<T> {
    let found = value.as_str().and_then(|text| choices.iter().find(|(word, _)| *word == text));
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<String> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        wrong(words.join(" or "), value)
    })
}

/// A name of 1 to 64 letters, digits, `-`, `_` and `.`: it stands in metrics and file names.
pub(super) fn name(value: &DeValue<'_>) -> Read<String> {
    let text = string(value)?;
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if plain && (1..=64).contains(&text.len()) {
        Ok(text.to_owned())
    } else {
        Err(wrong("1 to 64 letters, digits, '-', '_' or '.'".to_owned(), value))
    }
}
