//! How a command ends: the exit code, and what is said about a failure.

use std::process::ExitCode;

use serde_json::{Value, json};

/// Exit codes of every Farshore program. Callers must treat a code they do not know as failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, and all is well.
    Ok = 0,
    /// Could not be done.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Done; there are warnings and `--fail-on-warn` was given.
    Warnings = 3,
    /// Done; what was looked at is not ready, not healthy or not valid.
    NotReady = 4,
    /// A guard refused it; nothing was changed.
    Refused = 5,
    /// The person who was asked declined.
    Declined = 6,
    /// Timed out; nobody knows whether it was done.
    Unknown = 7,
    /// Stopped half-way; a person must look.
    HalfWay = 8,
    /// The agent or the caller does not accept the other's certificate, or its role may not do this.
    Unauthenticated = 9,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command that could not be done.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// How to exit.
    pub exit: Exit,
    /// What happened.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl Failure {
    /// A failure that exits with 1.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, message: message.into(), hint: hint.into() }
    }

    /// The same with another exit code.
    #[must_use]
    pub fn with(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// As lines for people.
    pub fn text(&self) -> String {
        let hint = if self.hint.is_empty() { String::new() } else { format!("  hint: {}\n", self.hint) };
        format!("error: {}\n{hint}", self.message)
    }

    /// As an object for programs.
    pub fn json(&self) -> Value {
        json!({"exitCode": self.exit as u8, "message": self.message, "hint": self.hint})
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        let message = status.message().to_owned();
        match status.code() {
            Code::Unauthenticated => {
                Self::new(message, "use a certificate of the fleet (--cert, --key)").with(Exit::Unauthenticated)
            }
            Code::PermissionDenied => {
                Self::new(message, "use a certificate with that role (--cert, --key)").with(Exit::Unauthenticated)
            }
            Code::Unimplemented => {
                Self::new("the agent does not know this command", "use the version of farshore that the agent runs")
            }
            Code::InvalidArgument => Self::new(message, "").with(Exit::Usage),
            Code::Cancelled => Self::new(format!("the connection to the agent was lost: {message}"), "try again"),
            Code::DeadlineExceeded => {
                Self::new("the agent did not answer in time", "try again, or allow more with --timeout")
            }
            _ => Self::new(message, ""),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(format!("cannot write the output: {error}"), "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_as_published() {
        let all = [
            Exit::Ok,
            Exit::Failed,
            Exit::Usage,
            Exit::Warnings,
            Exit::NotReady,
            Exit::Refused,
            Exit::Declined,
            Exit::Unknown,
            Exit::HalfWay,
            Exit::Unauthenticated,
        ];
        assert!(all.iter().enumerate().all(|(code, exit)| *exit as usize == code));
    }

    #[test]
    fn refusals_by_role_exit_with_9_and_say_what_is_needed() {
        let failure = Failure::from(tonic::Status::permission_denied("it needs the role operator"));
        assert_eq!(failure.exit, Exit::Unauthenticated);
        assert_eq!(
            failure.text(),
            "error: it needs the role operator\n  hint: use a certificate with that role (--cert, --key)\n"
        );
        assert_eq!(failure.json()["exitCode"], 9);
    }
}
