//! Reads a trace: its records in the order in which they began, and which lines are none.

use std::io::{self, BufRead};

use thiserror::Error;

use super::record::{FORMAT, Record, What};

/// What is wrong with a line. The others are read.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum Problem {
    #[error("line {line} is no record of a trace, and is left out")]
    NoRecord { line: usize, source: serde_json::Error },
    /// hotslot or its disk ended while it was written.
    #[error("line {line}, the last one, is cut off: the trace ends before it")]
    Cut { line: usize },
    #[error(
        "line {line} begins a trace of format {format}; this hotslot reads format {FORMAT}, and may miss something"
    )]
    Format { line: usize, format: u32 },
}

/// A trace.
#[derive(Debug, Default)]
pub struct Trace {
    /// Sorted by when they began: a request comes before those that it caused.
    pub records: Vec<Record>,
    /// By their lines.
    pub problems: Vec<Problem>,
}

/// Reads all of it.
///
/// # Errors
///
/// The file cannot be read.
pub fn read(mut file: impl BufRead) -> io::Result<Trace> {
    let mut trace = Trace::default();
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        if file.read_until(b'\n', &mut text)? == 0 {
            break;
        }
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) => {
                if let What::Trace { format, .. } = record.what
                    && format != FORMAT
                {
                    trace.problems.push(Problem::Format { line, format });
                }
                trace.records.push(record);
            }
            Err(_) if !text.ends_with(b"\n") => trace.problems.push(Problem::Cut { line }),
            Err(source) => trace.problems.push(Problem::NoRecord { line, source }),
        }
    }
    // Stable: of two that began at once, the one that ended first stays first.
    trace.records.sort_by_key(|record| record.time_ns);
    Ok(trace)
}
