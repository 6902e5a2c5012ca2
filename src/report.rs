//! Messages about errors: lines on stderr, errors with their causes, what an error means for the whole
//! program ([`Failure`]), and warnings that a guest or a back-end can provoke, at a limited rate.

pub mod lines;

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{self, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::error::{ContextKind, ContextValue};
use log::{Level, log, log_enabled};
use rustix::fs::{OFlags, fcntl_setfl};

/// Prints a line to stderr. Unlike `eprintln!` it does not panic when stderr is closed, and once
/// [`lines::start`] was called it does not wait.
pub fn say(line: impl fmt::Display) {
    lines::write(format!("{line}\n").into_bytes());
}

/// Creates or empties a file for output that the user names. Opening a pipe does not wait for its reader.
pub fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::new(error.kind(), "no process reads this pipe"),
        _ => error,
    })?;
    fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

/// Writes all of a text to stdout, or to what stands for it. That its reader closed it is no error: the
/// reader has seen enough.
///
/// # Errors
///
/// The text could not be written, or only in part: the disk may be full.
pub fn print(out: &mut impl Write, text: &[u8]) -> Result<(), NotPrinted> {
    printed(out.write_all(text).and_then(|()| out.flush()))
}

/// What came of writing to stdout, as [`print()`] has it.
///
/// # Errors
///
/// As for [`print()`].
pub fn printed(result: io::Result<()>) -> Result<(), NotPrinted> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(NotPrinted(error)),
        _ => Ok(()),
    }
}

/// What the arguments of a program say. Ends it where they are wrong, and where they ask for a text that clap
/// prints; with [`STATUS_ERROR`] if that cannot be written.
pub fn parsed<T>(arguments: Result<T, clap::Error>) -> T {
    arguments.unwrap_or_else(|answer| {
        let written = answer.print();
        if !answer.use_stderr()
            && let Err(failure) = printed(written)
        {
            say(failure_text(&failure));
            process::exit(STATUS_ERROR.into());
        }
        process::exit(answer.exit_code());
    })
}

/// Adds advice to the error about a word that clap takes for a subcommand: it says no more than that there is
/// none of that name, where most often an option is missing before a file's name.
pub fn with_advice(mut error: clap::Error, advice: &str) -> clap::Error {
    if error.get(ContextKind::InvalidSubcommand).is_some() {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![advice.to_owned().into()]));
    }
    error
}

/// Why the output is not complete.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to stdout; the output is not complete")]
pub struct NotPrinted(#[source] io::Error);

impl Failure for NotPrinted {}

/// The exit status of an error of the VMM itself.
pub const STATUS_ERROR: u8 = 1;
/// The exit status of a wrong command line, of files that cannot be used, of a host that lacks something.
pub const STATUS_USAGE: u8 = 2;

/// An error that ends a program, by [`fail`].
pub trait Failure: Error + Send + Sync {
    /// The exit status.
    fn status(&self) -> u8 {
        STATUS_ERROR
    }

    /// What the user could do about it.
    fn hint(&self) -> Option<String> {
        None
    }
}

impl<E: Failure + 'static> From<E> for Box<dyn Failure> {
    fn from(error: E) -> Self {
        Box::new(error)
    }
}

/// Prints an error with its causes, then its hint. The result is its status, for `main` to return.
pub fn fail(failure: &dyn Failure) -> ExitCode {
    say(failure_text(failure));
    ExitCode::from(failure.status())
}

/// An error with its causes; its hint, on a second line.
pub fn failure_text(failure: &dyn Failure) -> String {
    let hint = failure.hint().map_or(String::new(), |hint| format!("\nhint: {hint}"));
    format!("error: {}{hint}", with_causes(failure))
}

/// An error and its causes, each once, in one line without control characters: paths and files can have some.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    clean(&text)
}

/// Without what a terminal could take for a command.
pub fn clean(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

/// The name of an errno value that hotslot answers with, or its number.
pub fn errno_name(errno: i32) -> String {
    match errno {
        libc::EACCES => "EACCES",
        libc::EBADF => "EBADF",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::EINVAL => "EINVAL",
        libc::EIO => "EIO",
        libc::EMFILE => "EMFILE",
        libc::ENODEV => "ENODEV",
        libc::ENOENT => "ENOENT",
        libc::ENOMEM => "ENOMEM",
        libc::ENOSPC => "ENOSPC",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::EPERM => "EPERM",
        libc::EPROTO => "EPROTO",
        libc::ERANGE => "ERANGE",
        other => return other.to_string(),
    }
    .to_owned()
}

/// The most lines at once.
const BURST: u32 = 10;
/// Time that earns one more line. A device reset earns none: a guest can reset as often as it likes.
const REFILL: Duration = Duration::from_secs(1);

/// The lines about one device that its guest or its back-end can cause, at a limited rate.
pub struct MisuseLog {
    device: String,
    budget: LineBudget,
}

impl MisuseLog {
    /// Lines that start with the device's name.
    pub fn new(device: &str) -> Self {
        MisuseLog { device: device.to_owned(), budget: LineBudget::default() }
    }

    /// Logs a warning, if there is room for one.
    pub fn warn(&self, message: fmt::Arguments) {
        self.log(Level::Warn, message);
    }

    /// Logs a line of this level, if there is room for one.
    pub fn log(&self, level: Level, message: fmt::Arguments) {
        // A line that is not logged anyway takes no room from one that is.
        if !log_enabled!(level) {
            return;
        }
        match self.budget.take() {
            None => {}
            Some(0) => log!(level, "{}: {message}", self.device),
            Some(dropped) => {
                log!(level, "{}: {message} ({dropped} lines before this one left out)", self.device)
            }
        }
    }
}

/// How many lines a peer may cause: some at once, then one a second.
pub struct LineBudget(
    /// Lock order: innermost; held for a few comparisons.
    Mutex<Budget>,
);

impl Default for LineBudget {
    fn default() -> Self {
        LineBudget(Mutex::new(Budget { lines: BURST, since: Instant::now(), dropped: 0 }))
    }
}

impl LineBudget {
    /// Takes one line: how many were refused since the last one. `None` if this one is refused.
    pub fn take(&self) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
    }
}

struct Budget {
    lines: u32,
    /// When `lines` was last brought up to date.
    since: Instant,
    dropped: u64,
}

impl Budget {
    /// Takes one line: how many were refused since the last one. `None` if this one is refused.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_secs() / REFILL.as_secs();
        if earned > 0 {
            self.lines = BURST.min(self.lines.saturating_add(u32::try_from(earned).unwrap_or(BURST)));
            self.since = now;
        }
        match self.lines.checked_sub(1) {
            Some(left) => {
                self.lines = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped = self.dropped.saturating_add(1);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn causes_follow_their_error() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert_eq!(with_causes(&Outer(io::Error::other("inner"))), "outer: inner");
        assert_eq!(with_causes(&io::Error::other("alone")), "alone");
    }

    #[test]
    fn a_burst_then_one_line_a_second_that_counts_what_was_left_out() {
        let start = Instant::now();
        let mut budget = Budget { lines: BURST, since: start, dropped: 0 };
        for _ in 0..BURST {
            assert_eq!(budget.take(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(budget.take(start + REFILL / 2), None);
        }
        assert_eq!(budget.take(start + REFILL), Some(1000));
        assert_eq!(budget.take(start + REFILL), None);
        assert_eq!(budget.take(start + REFILL * 1000), Some(1));
        assert_eq!(budget.lines, BURST - 1, "never more than a burst");
    }
}
