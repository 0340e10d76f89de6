//! Errors that are the asker's to mend, told apart from those that are not.

use std::fmt;

/// What kind of refusal, for the status code of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense as it stands.
    Invalid,
    /// It names something that is not there.
    NotFound,
    /// It cannot be done now because of something else that is there.
    Conflict,
}

/// A request refused, with the one line the user reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// See [`Kind`].
    pub kind: Kind,
    /// What is refused, why, and what to do.
    pub line: String,
}

impl Refusal {
    /// A request that makes no sense.
    pub fn invalid(line: impl Into<String>) -> anyhow::Error {
        Self { kind: Kind::Invalid, line: line.into() }.into()
    }

    /// Something that is not there.
    pub fn not_found(line: impl Into<String>) -> anyhow::Error {
        Self { kind: Kind::NotFound, line: line.into() }.into()
    }

    /// Something that is in the way.
    pub fn conflict(line: impl Into<String>) -> anyhow::Error {
        Self { kind: Kind::Conflict, line: line.into() }.into()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl std::error::Error for Refusal {}

/// The kind of the refusal anywhere in the error's chain.
pub fn kind_of(error: &anyhow::Error) -> Option<Kind> {
    error.chain().find_map(|cause| cause.downcast_ref::<Refusal>()).map(|refusal| refusal.kind)
}

/// The whole chain of an error as one line, whatever the causes contain.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for word in format!("{error:#}").split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    with_advice(line)
}

/// The line, with what to do where something of the whole process ran out.
pub fn with_advice(mut line: String) -> String {
    /// What the system says, and what helps.
    const ADVICE: [(&str, &str); 2] = [
        ("Too many open files", "raise LimitNOFILE= of the unit, or detach something"),
        (
            "Cannot allocate memory",
            "free some memory, or raise MemoryMax= of the unit if it has one",
        ),
    ];
    for (said, advice) in ADVICE {
        if line.contains(said) && !line.contains(advice) {
            line.push_str(": ");
            line.push_str(advice);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn a_refusal_keeps_its_kind_under_context() {
        let refused: anyhow::Result<()> = Err(Refusal::conflict("taken"));
        let error = refused.context("attach t1").unwrap_err();
        assert_eq!(kind_of(&error), Some(Kind::Conflict));
        assert_eq!(one_line(&error), "attach t1: taken");
        assert_eq!(kind_of(&anyhow!("other")), None);
    }

    #[test]
    fn a_cause_of_several_lines_is_told_on_one() {
        let error = anyhow!("first\n  second\r\nthird").context("read");
        assert_eq!(one_line(&error), "read: first second third");
    }
}
