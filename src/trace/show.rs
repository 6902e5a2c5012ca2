//! `hotslot trace FILE`: reads a trace, says what is wrong with it, and gives it in the form that the user
//! wants.

use std::fs::File;
use std::io::{self, BufReader};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use thiserror::Error;

use super::read::{Problem, read};
use super::{mermaid, sequence, text, timeline};
use crate::report::{Failure, NotPrinted, STATUS_ERROR, STATUS_USAGE, clean, print, say, with_causes};

/// The languages of sequence diagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sequence {
    /// A picture
    Svg,
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
    /// A picture of the mappings of each region, over time.
    Timeline,
}

/// A time of a trace on the command line: seconds, as they are in its text; in nanoseconds.
pub fn parse_seconds(text: &str) -> Result<u64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
    seconds
        .map(|seconds| (seconds * 1e9) as u64)
        .ok_or_else(|| "it is a number of seconds, as in 1.5".to_owned())
}

/// Why a trace is not shown.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ShowError {
    #[error("cannot read the trace {path}", path = .0.display())]
    File(PathBuf, #[source] io::Error),
    #[error("{path} has no record of a trace", path = .0.display())]
    NoTrace(PathBuf),
    #[error("{path} has no record in the times of --from and --to: it goes from {first} s to {last} s", path = .path.display())]
    NothingThere { path: PathBuf, first: String, last: String },
    /// The rest was shown.
    #[error("{count} lines of {path} are no records", path = .path.display())]
    BadLines { path: PathBuf, count: usize },
    #[error(transparent)]
    NotPrinted(#[from] NotPrinted),
}

impl Failure for ShowError {
    fn status(&self) -> u8 {
        match self {
            ShowError::BadLines { .. } | ShowError::NotPrinted(_) => STATUS_ERROR,
            _ => STATUS_USAGE,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = "a trace is the file that hotslot --trace-vhost-user FILE writes";
        matches!(self, ShowError::NoTrace(_)).then(|| hint.to_owned())
    }
}

/// Writes the records that begin in these nanoseconds in this form to `out`.
///
/// # Errors
///
/// It cannot be read, `out` does not take all of it, or, after the rest was written, some lines were no
/// records.
pub fn show(
    path: &Path,
    form: Form,
    when: RangeInclusive<u64>,
    out: &mut impl io::Write,
) -> Result<(), ShowError> {
    let failed = |error| ShowError::File(path.to_owned(), error);
    let mut trace = File::open(path).and_then(|file| read(BufReader::new(file))).map_err(failed)?;
    let (Some(first), Some(last)) = (trace.records.first(), trace.records.last()) else {
        return Err(ShowError::NoTrace(path.to_owned()));
    };
    let [first, last] = [first, last].map(|record| text::seconds(record.time_ns));
    trace.records.retain(|record| when.contains(&record.time_ns));
    if trace.records.is_empty() {
        return Err(ShowError::NothingThere { path: path.to_owned(), first, last });
    }
    let shown = match form {
        Form::Text => text::print(&trace.records),
        Form::Sequence(Sequence::Svg) => sequence::draw(&trace.records),
        Form::Timeline => timeline::draw(&trace.records),
        Form::Sequence(Sequence::Mermaid) => mermaid::draw(&trace.records),
    };
    let printed = print(out, shown.as_bytes());
    for problem in &trace.problems {
        let path = clean(&path.display().to_string());
        say(format_args!("hotslot: warn: {path}: {}", with_causes(problem)));
    }
    printed?;
    let count = trace.problems.iter().filter(|problem| matches!(problem, Problem::NoRecord { .. })).count();
    match count {
        0 => Ok(()),
        _ => Err(ShowError::BadLines { path: path.to_owned(), count }),
    }
}
