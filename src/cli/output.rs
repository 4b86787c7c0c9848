//! Data on stdout, talk on stderr; tables, colour and the versioned JSON envelope.
//!
//! Colour never carries meaning alone: there is always a word or sign beside it.

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use serde_json::{Value, json};

use super::exit::Failure;

/// Version of every JSON document this program writes.
pub const API_VERSION: &str = "farshore/v1";

/// `-o` of verbs that show a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For people, with more columns.
    Wide,
    /// For programs.
    Json,
}

/// `-o` of verbs whose text has one width.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Plain {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// `--color`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// On a terminal, unless `NO_COLOR` is set or `TERM` is dumb.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What a cell or sign stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// No colour.
    Plain,
    /// Green.
    Good,
    /// Yellow.
    Doubt,
    /// Red.
    Bad,
    /// For headers.
    Faint,
}

/// How text may look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// Escape sequences allowed.
    pub color: bool,
    /// Nothing but ASCII.
    pub ascii: bool,
}

impl Style {
    /// From the flags and the environment of this process.
    pub fn detect(color: When, ascii: bool) -> Self {
        let allowed = || {
            let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
            let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
            std::io::stdout().is_terminal() && !no_color && !dumb
        };
        let color = match color {
            When::Auto => allowed(),
            When::Always => true,
            When::Never => false,
        };
        Self { color, ascii }
    }

    /// Text in a tone.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            _ if !self.color || text.is_empty() => return text.to_owned(),
            Tone::Good => "32",
            Tone::Doubt => "33",
            Tone::Bad => "31",
            Tone::Faint => "2",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }

    /// A sign for a tone.
    pub fn sign(self, tone: Tone) -> &'static str {
        match (tone, self.ascii) {
            (Tone::Good, false) => "√",
            (Tone::Doubt, false) => "‼",
            (Tone::Bad, false) => "×",
            (Tone::Good, true) => "ok",
            (Tone::Doubt, true) => "!!",
            (Tone::Bad, true) => "xx",
            (Tone::Plain | Tone::Faint, _) => "-",
        }
    }
}

/// One cell of a table.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// Text in a tone. Control characters are shown escaped: a name must not drive the terminal.
    pub fn new(text: impl AsRef<str>, tone: Tone) -> Self {
        let text = printable(text.as_ref());
        Self { text: if text.is_empty() { "-".to_owned() } else { text }, tone }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// Text of another machine with its control characters escaped.
pub fn printable(text: &str) -> String {
    let escape = |c: char| -> String { if c.is_control() { c.escape_default().collect() } else { c.into() } };
    text.chars().map(escape).collect()
}

/// Left-aligned columns with two spaces between them.
pub fn table(style: Style, header: &[&str], rows: Vec<Vec<Cell>>) -> String {
    let head = header.iter().map(|text| Cell::new(text, Tone::Faint)).collect();
    let rows: Vec<Vec<Cell>> = std::iter::once(head).chain(rows).collect();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.text.chars().count()).max();
    let widths: Vec<usize> = (0..header.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            text.push_str(&style.paint(cell.tone, &cell.text));
            if column + 1 < row.len() {
                let used = cell.text.chars().count();
                text.push_str(&" ".repeat(widths[column] - used + 2));
            }
        }
        text.push('\n');
    }
    text
}

/// A document in the versioned envelope, over several lines.
pub fn document(kind: &str, body: Value) -> String {
    let mut text = serde_json::to_string_pretty(&envelope(kind, body)).expect("a value can be written");
    text.push('\n');
    text
}

/// A document in the versioned envelope, on one line.
pub fn line(kind: &str, body: Value) -> String {
    format!("{}\n", envelope(kind, body))
}

fn envelope(kind: &str, body: Value) -> Value {
    let mut document = json!({"apiVersion": API_VERSION, "kind": kind});
    if let (Value::Object(document), Value::Object(body)) = (&mut document, body) {
        document.extend(body);
    }
    document
}

/// Writes data. A reader that went away is no failure: it had enough.
///
/// # Errors
/// The output cannot be written.
pub fn print(text: &str) -> Result<Reader, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::Listening),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error.into()),
    }
}

/// Whether somebody still reads what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Go on.
    Listening,
    /// Stop.
    Gone,
}

/// Says what failed, on stderr.
pub fn complain(failure: &Failure, json: bool) {
    let text = if json { line("Error", json!({"error": failure.json()})) } else { failure.text() };
    // With stderr gone there is nobody left to tell.
    drop(std::io::stderr().lock().write_all(text.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_with_and_without_colour() {
        let rows = || vec![vec![Cell::new("streaming", Tone::Good), "1".into()], vec!["x\u{1b}[2J".into(), "".into()]];
        let plain = table(Style::default(), &["STATE", "N"], rows());
        assert_eq!(plain, "STATE       N\nstreaming   1\nx\\u{1b}[2J  -\n");
        let colored = table(Style { color: true, ascii: false }, &["STATE", "N"], rows());
        assert!(colored.contains("\u{1b}[32mstreaming\u{1b}[0m   1\n"), "{colored}");
    }

    #[test]
    fn json_is_versioned() {
        assert_eq!(line("X", json!({"a": 1})), "{\"a\":1,\"apiVersion\":\"farshore/v1\",\"kind\":\"X\"}\n");
    }
}
