//! What is wrong with a configuration, told in a form that can be acted on.
//!
//! Every problem names the key, the line, what is wrong and the mend. Values of the file are never repeated where they
//! could hold a secret.

use std::fmt;
use std::path::{Path, PathBuf};

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The agent refuses to start.
    Error,
    /// The agent starts; somebody should look.
    Warning,
}

impl Severity {
    /// The word used in text and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One problem of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Whether it stops the agent.
    pub severity: Severity,
    /// Path of the key, for example `mongodb.uri`; empty for the file as a whole.
    pub key: String,
    /// Line of the file, from 1.
    pub line: Option<usize>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub mend: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.severity.as_str())?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)?;
        if let Some(line) = self.line {
            write!(f, " (line {line})")?;
        }
        if !self.mend.is_empty() {
            write!(f, "\n    {}", self.mend)?;
        }
        Ok(())
    }
}

/// All problems of one file; at least one of them is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    file: PathBuf,
    list: Vec<Problem>,
}

impl Problems {
    pub(super) fn new(file: &Path, mut list: Vec<Problem>) -> Self {
        list.sort_by_key(|p| (p.severity, p.line.unwrap_or(usize::MAX)));
        Self { file: file.to_owned(), list }
    }

    /// Errors first, then by line.
    pub fn list(&self) -> &[Problem] {
        &self.list
    }

    /// The file they are about.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.list.len();
        write!(f, "{}: {count} problem{}", self.file.display(), if count == 1 { "" } else { "s" })?;
        for problem in &self.list {
            write!(f, "\n  {}", problem.to_string().replace('\n', "\n  "))?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The known name that `name` was probably meant to be.
pub(super) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    // Two letters swapped are two edits.
    let limit = match name.chars().count() {
        ..4 => 1,
        4..9 => 2,
        _ => 3,
    };
    let by_distance = known.iter().map(|k| (distance(name, k), *k)).min_by_key(|(d, _)| *d);
    let contained = || known.iter().copied().find(|k| name.len() >= 4 && (k.contains(name) || name.contains(k)));
    by_distance.filter(|(d, _)| *d <= limit).map(|(_, k)| k).or_else(contained)
}

/// Edit distance (Levenshtein). Only the first 64 characters count, so a hostile file cannot make it slow.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_are_recognised_and_other_words_are_not() {
        let known = ["uri", "username", "password_file", "auth_source"];
        assert_eq!(nearest("usrname", &known), Some("username"));
        assert_eq!(nearest("password", &known), Some("password_file"));
        assert_eq!(nearest("auth-source", &known), Some("auth_source"));
        assert_eq!(nearest("url", &known), Some("uri"));
        assert_eq!(nearest("nmae", &["name", "domain"]), Some("name"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
