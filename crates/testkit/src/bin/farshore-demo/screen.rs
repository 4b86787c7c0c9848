//! What the demo looks like: headings, sentences, one line a second. Colour only on a terminal, and never alone.

use std::fmt::Display;
use std::io::IsTerminal;
use std::time::Duration;

/// Widest bar.
const BAR: u64 = 24;

#[derive(Clone, Copy)]
pub(crate) enum Tone {
    Heading,
    Faint,
    Good,
    Doubt,
    Bad,
}

/// Standard output.
#[derive(Clone, Copy)]
pub(crate) struct Screen {
    color: bool,
}

/// One line of the live table.
pub(crate) struct Line {
    pub(crate) elapsed: Duration,
    pub(crate) north: u64,
    pub(crate) south: u64,
    /// What the agents' control service says; none while nobody can say it.
    pub(crate) lag: Option<Duration>,
    /// Whether the agents of north and south run.
    pub(crate) agents: [bool; 2],
}

impl Screen {
    pub(crate) fn detect() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value: std::ffi::OsString| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { color: std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb }
    }

    pub(crate) fn paint(self, tone: Tone, text: impl Display) -> String {
        let code = match tone {
            _ if !self.color => return text.to_string(),
            Tone::Heading => "1",
            Tone::Faint => "2",
            Tone::Good => "32",
            Tone::Doubt => "33",
            Tone::Bad => "31",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }

    /// The beginning of a part.
    pub(crate) fn heading(self, text: impl Display) {
        println!("\n{}", self.paint(Tone::Heading, text));
    }

    pub(crate) fn say(self, text: impl Display) {
        println!("  {text}");
    }

    /// Something that happens between two lines of the table.
    pub(crate) fn happens(self, tone: Tone, text: impl Display) {
        println!("  {}", self.paint(tone, format!(">> {text}")));
    }

    /// A figure of the result.
    pub(crate) fn figure(self, name: &str, value: impl Display) {
        println!("  {name:<18} {value}");
    }

    pub(crate) fn table_head(self) {
        let head =
            format!("{:>6}  {:>9}  {:>9}  {:>8}  {:>7}  agents", "time", "at north", "at south", "behind", "lag");
        println!("  {}", self.paint(Tone::Faint, head));
    }

    pub(crate) fn line(self, line: &Line) {
        let behind = line.north.saturating_sub(line.south);
        let lag = line.lag.map_or_else(|| "?".to_owned(), |lag| format!("{:.1} s", lag.as_secs_f64()));
        let agents = ["north", "south"].iter().zip(line.agents).map(|(name, up)| match up {
            true => format!("{name} up  "),
            false => self.paint(Tone::Bad, format!("{name} DOWN")),
        });
        let agents: Vec<String> = agents.collect();
        let text = format!(
            "  {:>4} s  {:>9}  {:>9}  {:>8}  {lag:>7}  {}  {}",
            line.elapsed.as_secs(),
            grouped(line.north),
            grouped(line.south),
            grouped(behind),
            agents.join("  "),
            self.paint(Tone::Doubt, "#".repeat(bar(behind))),
        );
        println!("{}", text.trim_end());
    }
}

/// Grows with the root: 100 behind and 2,000 behind are both visible, and growth is too.
fn bar(behind: u64) -> usize {
    usize::try_from((behind.isqrt() / 2).min(BAR)).unwrap_or(0)
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes for people.
pub(crate) fn bytes(number: u64) -> String {
    match number {
        0..1_000 => format!("{number} B"),
        1_000..1_000_000 => format!("{:.1} kB", number as f64 / 1e3),
        _ => format!("{:.1} MB", number as f64 / 1e6),
    }
}

/// A span in seconds with one decimal.
pub(crate) fn seconds(span: Duration) -> String {
    format!("{:.1} s", span.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        let numbers = [0, 12, 999, 1_000, 1_234_567].map(grouped);
        assert_eq!(numbers, ["0", "12", "999", "1,000", "1,234,567"]);
        assert_eq!([bytes(999), bytes(1_500), bytes(2_340_000)], ["999 B", "1.5 kB", "2.3 MB"]);
    }

    #[test]
    fn a_bar_grows_and_ends() {
        let lengths = [0, 3, 100, 1_000, u64::MAX].map(bar);
        assert_eq!(lengths, [0, 0, 5, 15, 24]);
    }

    #[test]
    fn without_colour_nothing_but_text_is_written() {
        let plain = Screen { color: false };
        assert_eq!(plain.paint(Tone::Bad, "down"), "down");
        assert_eq!(Screen { color: true }.paint(Tone::Bad, "down"), "\u{1b}[31mdown\u{1b}[0m");
    }
}
