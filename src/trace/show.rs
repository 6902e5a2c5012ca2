//! `hotslot trace FILE`: reads a trace, says what is wrong with it, and gives it in the form that the user
//! wants.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use thiserror::Error;

use super::read::{Problem, read};
use super::{mermaid, text};
use crate::report::{Failure, STATUS_ERROR, STATUS_USAGE, say, with_causes};

/// The languages of sequence diagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sequence {
    /// Text for Mermaid, as in Markdown on many sites
    Mermaid,
}

/// A form of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A line for each record.
    Text,
    /// A diagram with the guest, hotslot and the back-ends.
    Sequence(Sequence),
}

/// Why a trace is not shown.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ShowError {
    #[error("cannot read the trace {path}", path = .0.display())]
    File(PathBuf, #[source] io::Error),
    #[error("{path} has no record of a trace", path = .0.display())]
    NoTrace(PathBuf),
    /// The rest was shown.
    #[error("{count} lines of {path} are no records", path = .path.display())]
    BadLines { path: PathBuf, count: usize },
}

impl Failure for ShowError {
    fn status(&self) -> u8 {
        match self {
            ShowError::BadLines { .. } => STATUS_ERROR,
            _ => STATUS_USAGE,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = "a trace is the file that hotslot --trace-vhost-user FILE writes";
        matches!(self, ShowError::NoTrace(_)).then(|| hint.to_owned())
    }
}

/// Writes the trace in this form to `out`.
///
/// # Errors
///
/// It cannot be read, or, after the rest was written, some lines were no records.
pub fn show(path: &Path, form: Form, out: &mut impl io::Write) -> Result<(), ShowError> {
    let failed = |error| ShowError::File(path.to_owned(), error);
    let trace = File::open(path).and_then(|file| read(BufReader::new(file))).map_err(failed)?;
    if trace.records.is_empty() {
        return Err(ShowError::NoTrace(path.to_owned()));
    }
    let shown = match form {
        Form::Text => text::print(&trace.records),
        Form::Sequence(Sequence::Mermaid) => mermaid::draw(&trace.records),
    };
    // Unlike `print!`, this does not panic when the output is closed.
    let _closed = out.write_all(shown.as_bytes());
    for problem in &trace.problems {
        say(format_args!("hotslot: warn: {}: {}", path.display(), with_causes(problem)));
    }
    let count = trace.problems.iter().filter(|problem| matches!(problem, Problem::NoRecord { .. })).count();
    match count {
        0 => Ok(()),
        _ => Err(ShowError::BadLines { path: path.to_owned(), count }),
    }
}
