//! `farshore config check`: every problem of a configuration file at once, without starting anything.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::output::{self, Plain, Style, Tone};
use crate::config::{Config, Problem, Severity};

/// `farshore config ...`
#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Check a configuration file and the files it names
    #[command(after_help = "Exit codes: 0 valid, 3 warnings with --fail-on-warn, 4 invalid")]
    Check(CheckArgs),
}

/// Flags of `config check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// File to check
    #[arg(value_name = "FILE", required_unless_present = "config", conflicts_with = "config")]
    pub file: Option<PathBuf>,
    /// The same, as the agent takes it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Plain,
    /// Exit with 3 when there are warnings
    #[arg(long)]
    pub fail_on_warn: bool,
}

pub(super) fn run(args: &CheckArgs, style: Style) -> Result<Exit, Failure> {
    let file = args.file.as_ref().or(args.config.as_ref()).expect("clap requires one of them");
    let (problems, valid) = match Config::load(file) {
        Ok(config) => (config.warnings, true),
        Err(problems) => (problems.list().to_vec(), false),
    };
    let text = match args.output {
        Plain::Table => render(style, file, &problems),
        Plain::Json => output::document("ConfigCheck", to_json(file, valid, &problems)),
    };
    output::print(&text)?;
    Ok(match (valid, problems.is_empty()) {
        (false, _) => Exit::NotReady,
        (true, false) if args.fail_on_warn => Exit::Warnings,
        (true, _) => Exit::Ok,
    })
}

fn render(style: Style, file: &Path, problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        let tone = match problem.severity {
            Severity::Error => Tone::Bad,
            Severity::Warning => Tone::Doubt,
        };
        text.push_str(&format!("{} {problem}\n", style.paint(tone, style.sign(tone))));
    }
    let errors = problems.iter().filter(|problem| problem.severity == Severity::Error).count();
    let warnings = problems.len() - errors;
    let verdict = match (errors, warnings) {
        (0, 0) => format!("{} valid", style.paint(Tone::Good, style.sign(Tone::Good))),
        (0, n) => format!("{} valid, {n} warning{}", style.paint(Tone::Doubt, style.sign(Tone::Doubt)), plural(n)),
        (n, m) => format!(
            "{} {n} error{}, {m} warning{}",
            style.paint(Tone::Bad, style.sign(Tone::Bad)),
            plural(n),
            plural(m)
        ),
    };
    text.push_str(&format!("{verdict}: {}\n", file.display()));
    text
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn to_json(file: &Path, valid: bool, problems: &[Problem]) -> Value {
    let problem = |p: &Problem| json!({"severity": p.severity.as_str(), "key": p.key, "line": p.line, "message": p.what, "hint": p.mend});
    json!({"file": file.display().to_string(), "valid": valid, "problems": problems.iter().map(problem).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_come_with_signs_and_a_verdict() {
        let problem = |severity, key: &str| Problem {
            severity,
            key: key.into(),
            line: Some(3),
            what: "is wrong".into(),
            mend: "mend it".into(),
        };
        let problems = [problem(Severity::Error, "a.b"), problem(Severity::Warning, "c.d")];
        let style = Style { color: false, ascii: true };
        let text = render(style, Path::new("f.toml"), &problems);
        assert_eq!(
            text,
            "xx error: a.b: is wrong (line 3)\n    mend it\n!! warning: c.d: is wrong (line 3)\n    mend it\nxx 1 error, 1 warning: f.toml\n"
        );
        assert_eq!(render(style, Path::new("f.toml"), &[]), "ok valid: f.toml\n");
        let document = to_json(Path::new("f.toml"), false, &problems);
        assert_eq!(document["problems"][0]["key"], "a.b");
    }
}
