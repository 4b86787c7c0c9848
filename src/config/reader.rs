//! Walks a parsed TOML document field by field and notes every problem instead of stopping at the first.
//!
//! A [`Section`] remembers which keys it was asked for; what is left over when it is finished is unknown. A field that
//! is missing or wrong yields `None` after its problem was noted, so a section is complete exactly when all fields are.

use std::cell::RefCell;
use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problem, Severity, nearest};
use super::units::{ByteSize, format_duration, parse_duration};
use crate::model::{ClusterTime, SiteName};

/// What a file that the configuration names must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    Certificates,
    PrivateKey,
    Password,
    EncryptionKey,
    /// A directory the agent may make.
    Directory,
}

/// A file that the configuration names, to be looked at after parsing.
#[derive(Debug)]
pub(super) struct FileRef {
    pub(super) key: String,
    pub(super) line: Option<usize>,
    pub(super) path: PathBuf,
    pub(super) kind: FileKind,
}

/// Where problems and named files are collected.
pub(super) struct Report<'t> {
    text: &'t str,
    base: &'t Path,
    problems: RefCell<Vec<Problem>>,
    files: RefCell<Vec<FileRef>>,
}

impl<'t> Report<'t> {
    pub(super) fn new(text: &'t str, base: &'t Path) -> Self {
        Self { text, base, problems: RefCell::default(), files: RefCell::default() }
    }

    pub(super) fn note(&self, severity: Severity, key: String, line: Option<usize>, what: String, mend: String) {
        self.problems.borrow_mut().push(Problem { severity, key, line, what, mend });
    }

    /// The line of a byte offset, from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        1 + self.text.bytes().take(offset).filter(|b| *b == b'\n').count()
    }

    pub(super) fn into_parts(self) -> (Vec<Problem>, Vec<FileRef>) {
        (self.problems.into_inner(), self.files.into_inner())
    }
}

/// What is wrong with a value, and the mend.
pub(super) struct Fault {
    what: String,
    mend: String,
}

impl Fault {
    pub(super) fn invalid(mend: impl Display) -> Self {
        Self { what: "has an invalid value".to_owned(), mend: mend.to_string() }
    }

    fn wrong_type(value: &DeValue<'_>, expected: &str, example: &str) -> Self {
        let what = format!("is {} where {expected} is expected", article(value.type_str()));
        Self { what, mend: format!("for example {example}") }
    }
}

fn article(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

/// A type that a field can have.
pub(super) trait Field: Sized {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault>;
}

fn text<'v>(value: &'v DeValue<'_>, expected: &str, example: &str) -> Result<&'v str, Fault> {
    value.as_str().ok_or_else(|| Fault::wrong_type(value, expected, example))
}

impl Field for String {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let text = text(value, "a text", "\"a text in quotes\"")?;
        if text.trim().is_empty() {
            Err(Fault::invalid("it is empty; give it a value or leave the key out"))
        } else {
            Ok(text.to_owned())
        }
    }
}

impl Field for SiteName {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        Self::try_from(text(value, "the name of a site", "\"north\"")?).map_err(Fault::invalid)
    }
}

impl Field for ClusterTime {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        text(value, "a cluster time", "\"1763669100:1\"")?.parse().map_err(Fault::invalid)
    }
}

impl Field for Duration {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        parse_duration(text(value, "a duration", "\"10s\"")?).map_err(Fault::invalid)
    }
}

impl Field for ByteSize {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        text(value, "a size", "\"64MiB\"")?.parse().map_err(Fault::invalid)
    }
}

impl Field for SocketAddr {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let text = text(value, "an address", "\"127.0.0.1:7443\"")?;
        text.parse().map_err(|_| {
            Fault::invalid("write an IP address and a port, for example \"0.0.0.0:7443\" or \"[::]:7443\"")
        })
    }
}

impl Field for bool {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        value.as_bool().ok_or_else(|| Fault::wrong_type(value, "true or false", "true"))
    }
}

impl Field for u64 {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let integer = value.as_integer().ok_or_else(|| Fault::wrong_type(value, "a whole number", "4"))?;
        Self::from_str_radix(integer.as_str(), integer.radix())
            .map_err(|_| Fault::invalid("write a whole number, not negative"))
    }
}

impl Field for Vec<String> {
    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let wrong = |v: &DeValue<'_>| Fault::wrong_type(v, "a list of texts", "[\"south-1:7443\", \"south-2:7443\"]");
        let items = value.as_array().ok_or_else(|| wrong(value))?;
        items
            .iter()
            .map(|item| item.get_ref().as_str().map(str::to_owned).ok_or_else(|| wrong(item.get_ref())))
            .collect()
    }
}

/// One table of the document.
pub(super) struct Section<'t> {
    report: &'t Report<'t>,
    path: String,
    line: Option<usize>,
    table: Option<&'t DeTable<'t>>,
    asked: Vec<&'static str>,
}

impl<'t> Section<'t> {
    pub(super) fn root(report: &'t Report<'t>, table: &'t DeTable<'t>) -> Self {
        Self { report, path: String::new(), line: None, table: Some(table), asked: Vec::new() }
    }

    /// Notes an error about `key`.
    pub(super) fn error(&self, key: &str, what: impl Into<String>, mend: impl Into<String>) {
        self.report.note(Severity::Error, self.key(key), self.line_of(key), what.into(), mend.into());
    }

    /// Notes a warning about `key`.
    pub(super) fn warn(&self, key: &str, what: impl Into<String>, mend: impl Into<String>) {
        self.report.note(Severity::Warning, self.key(key), self.line_of(key), what.into(), mend.into());
    }

    pub(super) fn required<T: Field>(&mut self, key: &'static str) -> Option<T> {
        let found = self.optional(key)?;
        // A missing section was noted as a whole.
        if found.is_none() && self.table.is_some() {
            self.error(key, "is missing", "it has no default; add it");
        }
        found
    }

    pub(super) fn or<T: Field>(&mut self, key: &'static str, default: T) -> Option<T> {
        Some(self.optional(key)?.unwrap_or(default))
    }

    /// `None`: wrong (and noted). `Some(None)`: not there.
    pub(super) fn optional<T: Field>(&mut self, key: &'static str) -> Option<Option<T>> {
        self.asked.push(key);
        let Some((_, value)) = self.entry(key) else { return Some(None) };
        match T::read(value.get_ref()) {
            Ok(value) => Some(Some(value)),
            Err(fault) => {
                self.error(key, fault.what, fault.mend);
                None
            }
        }
    }

    /// A value within bounds, else noted.
    pub(super) fn within<T: Field + PartialOrd + Bound>(
        &mut self,
        key: &'static str,
        default: T,
        range: RangeInclusive<T>,
    ) -> Option<T> {
        let value = self.or(key, default)?;
        if range.contains(&value) {
            return Some(value);
        }
        let (low, high) = (range.start().show(), range.end().show());
        self.error(
            key,
            format!("is {}, outside of {low} to {high}", value.show()),
            format!("choose a value from {low} to {high}"),
        );
        None
    }

    /// A file's path, taken from the configuration's folder when relative, and to be looked at later.
    pub(super) fn file(&mut self, key: &'static str, kind: FileKind) -> Option<Option<PathBuf>> {
        let Some(text) = self.optional::<String>(key)? else { return Some(None) };
        let path = self.report.base.join(text);
        let reference = FileRef { key: self.key(key), line: self.line_of(key), path: path.clone(), kind };
        self.report.files.borrow_mut().push(reference);
        Some(Some(path))
    }

    /// A directory's path, taken from the configuration's folder when relative.
    pub(super) fn required_directory(&mut self, key: &'static str) -> Option<PathBuf> {
        let found = self.file(key, FileKind::Directory)?;
        if found.is_none() && self.table.is_some() {
            self.error(key, "is missing", "name a directory of the agent's own, on a disk that survives restarts");
        }
        found
    }

    pub(super) fn required_file(&mut self, key: &'static str, kind: FileKind) -> Option<PathBuf> {
        let found = self.file(key, kind)?;
        if found.is_none() && self.table.is_some() {
            self.error(key, "is missing", "name the file; every connection between sites is mutual TLS");
        }
        found
    }

    /// A table below this one. `minimum`: what it must at least hold, when it must be there.
    pub(super) fn section(&mut self, key: &'static str, minimum: Option<&str>) -> Section<'t> {
        self.asked.push(key);
        let mut section =
            Section { report: self.report, path: self.key(key), line: None, table: None, asked: Vec::new() };
        match (self.entry(key), minimum) {
            (None, Some(minimum)) => self.error(key, "the section is missing", format!("add [{key}] with {minimum}")),
            (None, None) => {}
            (Some((line, value)), _) => {
                section.line = Some(line);
                section.table = value.get_ref().as_table();
                if section.table.is_none() {
                    let fault = Fault::wrong_type(value.get_ref(), "a section", &format!("[{key}]"));
                    self.error(key, fault.what, fault.mend);
                }
            }
        }
        section
    }

    /// The tables of an array of tables.
    pub(super) fn sections(&mut self, key: &'static str) -> Vec<Section<'t>> {
        self.asked.push(key);
        let Some((line, value)) = self.entry(key) else { return Vec::new() };
        let Some(items) = value.get_ref().as_array() else {
            self.error(key, "is not a list of sections", format!("write [[{key}]] (two brackets) above each"));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let path = format!("{}[{index}]", self.key(key));
            let line = self.report.line(item.span().start).max(line);
            let table = item.get_ref().as_table();
            if table.is_none() {
                let mend = format!("write [[{key}]] (two brackets) above each");
                self.report.note(Severity::Error, path.clone(), Some(line), "is not a section".to_owned(), mend);
            }
            sections.push(Section { report: self.report, path, line: Some(line), table, asked: Vec::new() });
        }
        sections
    }

    /// Whether the table is there at all.
    pub(super) fn present(&self) -> bool {
        self.table.is_some()
    }

    /// Whether the file gives this key a value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// Notes every key that nobody asked for.
    pub(super) fn finish(self) {
        let Some(table) = self.table else { return };
        for (key, value) in table.iter() {
            let name: &str = key.get_ref();
            if self.asked.contains(&name) {
                continue;
            }
            let noun = if value.get_ref().is_table() { "section" } else { "key" };
            let mend = match nearest(name, &self.asked) {
                Some(known) => format!("did you mean {}?", self.key(known)),
                None => format!("known here: {}", self.asked.join(", ")),
            };
            let line = Some(self.report.line(key.span().start));
            self.report.note(Severity::Error, self.key(&printable(name)), line, format!("unknown {noun}"), mend);
        }
    }

    fn entry(&self, key: &str) -> Option<(usize, &'t Spanned<DeValue<'t>>)> {
        let (name, value) = self.table?.iter().find(|(name, _)| name.get_ref() == key)?;
        Some((self.report.line(name.span().start), value))
    }

    /// The line of a key of this table, or of a path below it as `peers[0].site`.
    fn line_of(&self, key: &str) -> Option<usize> {
        let mut table = self.table;
        let mut line = self.line;
        for part in key.split('.') {
            let (name, index) = match part.strip_suffix(']').and_then(|part| part.split_once('[')) {
                Some((name, index)) => (name, index.parse::<usize>().ok()),
                None => (part, None),
            };
            let Some((key, value)) = table.and_then(|t| t.iter().find(|(key, _)| key.get_ref() == name)) else { break };
            line = Some(self.report.line(key.span().start));
            let value = match index {
                Some(index) => value.get_ref().as_array().and_then(|items| items.get(index)),
                None => Some(value),
            };
            table = value.and_then(|value| value.get_ref().as_table());
        }
        line
    }

    fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// A key as it may be shown: no control characters, not endless.
fn printable(name: &str) -> String {
    name.chars().take(64).flat_map(char::escape_debug).collect()
}

/// A bound that can be shown.
pub(super) trait Bound {
    fn show(&self) -> String;
}

impl Bound for u64 {
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Bound for ByteSize {
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Bound for Duration {
    fn show(&self) -> String {
        format_duration(*self)
    }
}
