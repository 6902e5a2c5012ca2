//! `hotslot trace FILE`: reads a trace, names the lines that are no records, and prints the others in the
//! form that was asked for.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use thiserror::Error;

use super::read::{Problem, each_line, records_at};
use super::record::Record;
use super::{mermaid, sequence, text, timeline};
use crate::report::{
    Failure, NotPrinted, STATUS_ERROR, STATUS_USAGE, clean, print, printed, say, with_causes,
};

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

/// Writes the records that begin in these nanoseconds in this form to `out`. For text the
/// file is read twice, so that only the times and offsets of its records are kept in memory.
///
/// # Errors
///
/// It cannot be read, `out` does not take all of it, or, after the rest was written, some lines were no
/// records.
pub fn show(
    path: &Path,
    form: Form,
    when: RangeInclusive<u64>,
    out: &mut impl Write,
) -> Result<(), ShowError> {
    let failed = |error| ShowError::File(path.to_owned(), error);
    let file = File::open(path).map_err(failed)?;
    // Another kind of file, such as a pipe, cannot be read again.
    let rereads = form == Form::Text && file.metadata().is_ok_and(|file| file.is_file());
    let mut file = BufReader::new(file);
    let (mut times, mut lines) = (None, text::Lines::default());
    let (mut places, mut records, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    let each = |offset, line: Result<Record, Problem>| match line {
        Ok(record) => {
            let at = record.time_ns;
            let (first, last) = times.unwrap_or((at, at));
            times = Some((first.min(at), last.max(at)));
            if when.contains(&at) {
                lines.make_room(&record);
                if rereads { places.push((at, offset)) } else { records.push(record) }
            }
        }
        Err(problem) => problems.push(problem),
    };
    each_line(&mut file, each).map_err(failed)?;
    let Some((first, last)) = times else { return Err(ShowError::NoTrace(path.to_owned())) };
    if places.is_empty() && records.is_empty() {
        let [first, last] = [first, last].map(text::seconds);
        return Err(ShowError::NothingThere { path: path.to_owned(), first, last });
    }
    // Both are stable: of two records that began at once, the one that ended first stays first.
    places.sort_by_key(|(at, _)| *at);
    records.sort_by_key(|record| record.time_ns);
    let shown = match form {
        Form::Text if rereads => {
            let places = places.into_iter().map(|(_, offset)| offset);
            print_text(records_at(file, places), lines, out).map_err(failed)?
        }
        Form::Text => print_text(records.into_iter().map(Ok), lines, out).map_err(failed)?,
        Form::Sequence(Sequence::Svg) => print(out, sequence::draw(&records).as_bytes()),
        Form::Sequence(Sequence::Mermaid) => print(out, mermaid::draw(&records).as_bytes()),
        Form::Timeline => print(out, timeline::draw(&records).as_bytes()),
    };
    for problem in &problems {
        let path = clean(&path.display().to_string());
        say(format_args!("hotslot: warn: {path}: {}", with_causes(problem)));
    }
    shown?;
    let count = problems.iter().filter(|problem| matches!(problem, Problem::NoRecord { .. })).count();
    match count {
        0 => Ok(()),
        _ => Err(ShowError::BadLines { path: path.to_owned(), count }),
    }
}

/// The outer error: a record could not be read.
fn print_text(
    records: impl Iterator<Item = io::Result<Record>>,
    mut lines: text::Lines,
    out: &mut impl Write,
) -> io::Result<Result<(), NotPrinted>> {
    let mut out = BufWriter::new(out);
    for record in records {
        let line = lines.line(&record?);
        if let Err(error) = out.write_all(line.as_bytes()) {
            return Ok(printed(Err(error)));
        }
    }
    Ok(printed(out.flush()))
}
