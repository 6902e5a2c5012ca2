//! Reads a trace, line by line: its records, and the lines that are none.

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

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

/// Calls `each` with each record in the order of the file, in which a request comes after those that it
/// caused, and with each problem; and with the offset of its line.
///
/// # Errors
///
/// The file cannot be read.
pub fn each_line(
    mut file: impl BufRead,
    mut each: impl FnMut(u64, Result<Record, Problem>),
) -> io::Result<()> {
    let (mut text, mut offset) = (Vec::new(), 0);
    for line in 1.. {
        text.clear();
        let len = file.read_until(b'\n', &mut text)? as u64;
        if len == 0 {
            break;
        }
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) => {
                if let What::Trace { format, .. } = record.what
                    && format != FORMAT
                {
                    each(offset, Err(Problem::Format { line, format }));
                }
                each(offset, Ok(record));
            }
            Err(_) if !text.ends_with(b"\n") => each(offset, Err(Problem::Cut { line })),
            Err(source) => each(offset, Err(Problem::NoRecord { line, source })),
        }
        offset += len;
    }
    Ok(())
}

/// The records whose lines are at these offsets, in their order.
pub fn records_at(
    mut file: BufReader<impl Read + Seek>,
    offsets: impl Iterator<Item = u64>,
) -> impl Iterator<Item = io::Result<Record>> {
    let (mut text, mut at) = (Vec::new(), None);
    offsets.map(move |offset| {
        // Relative: what the buffer has already is not read again.
        match at {
            Some(at) => file.seek_relative(offset as i64 - at as i64)?,
            None => file.seek(SeekFrom::Start(offset)).map(drop)?,
        }
        text.clear();
        at = Some(offset + file.read_until(b'\n', &mut text)? as u64);
        Ok(serde_json::from_slice(&text)?)
    })
}
