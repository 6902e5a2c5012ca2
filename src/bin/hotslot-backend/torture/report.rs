//! What is printed: a line for each action and the front-end's answer, and verdicts, which are counted.

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What was tried so far, and the verdicts, of all front-ends.
#[derive(Default)]
pub struct Report {
    tried: AtomicBool,
    as_specified: AtomicU32,
    left_open: AtomicU32,
    wrong: AtomicU32,
}

/// What a case says about a front-end.
pub enum Verdict {
    AsSpecified,
    /// The specification does not say what is correct.
    LeftOpen,
    /// What the front-end did instead.
    Wrong(String),
    /// Why there is no verdict.
    None(&'static str),
}

impl Report {
    /// Prints a line.
    pub fn line(&self, line: impl Display) {
        // Unlike `println!`, this does not panic when stdout is closed. A newline flushes Rust's stdout.
        let _closed = writeln!(io::stdout(), "{line}");
    }

    /// A `--do` was done.
    pub fn tried(&self) {
        self.tried.store(true, Ordering::Relaxed);
    }

    /// Whether any `--do` was done.
    pub fn has_tried(&self) -> bool {
        self.tried.load(Ordering::Relaxed)
    }

    /// Prints a verdict, and counts it. `duty` is what the specification says.
    pub fn verdict(&self, case: &str, verdict: &Verdict, duty: &str) {
        let count = |counter: &AtomicU32| {
            counter.fetch_add(1, Ordering::Relaxed);
            self.tried();
        };
        match verdict {
            Verdict::AsSpecified => {
                count(&self.as_specified);
                self.line(format_args!("{case}: as specified"));
            }
            Verdict::LeftOpen => {
                count(&self.left_open);
                self.line(format_args!("{case}: left open by the specification: {duty}"));
            }
            Verdict::Wrong(what) => {
                count(&self.wrong);
                self.line(format_args!("{case}: NOT as specified: {what}; a correct front-end: {duty}"));
            }
            Verdict::None(why) => self.line(format_args!("{case}: no verdict: {why}")),
        }
    }

    /// The number of cases that did not go as specified.
    pub fn wrong(&self) -> u32 {
        self.wrong.load(Ordering::Relaxed)
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [fine, open, wrong] =
            [&self.as_specified, &self.left_open, &self.wrong].map(|count| count.load(Ordering::Relaxed));
        write!(f, "{fine} as specified, {open} left open by the specification, {wrong} NOT as specified")
    }
}

/// The answer to a request of the back-end, for the report.
pub struct Answer(pub u64);

impl Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Any value but 0 is a failure; most front-ends send -errno.
        match (self.0, i32::try_from((self.0 as i64).wrapping_neg())) {
            (0, _) => f.write_str("done"),
            (_, Ok(errno @ 1..=4095)) => match errno_name(errno) {
                Some(name) => write!(f, "refused, -{name} (-{errno})"),
                None => write!(f, "refused, -{errno}"),
            },
            (value, _) => write!(f, "refused, {value:#x}"),
        }
    }
}

fn errno_name(errno: i32) -> Option<&'static str> {
    macro_rules! names {
        ($($name:ident)*) => {
            &[$((libc::$name, stringify!($name))),*]
        };
    }
    let names: &[(i32, &str)] = names! {
        EPERM ENOENT EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST ENODEV EISDIR EINVAL
        ENFILE EMFILE ETXTBSY EFBIG ENOSPC ESPIPE EROFS EDOM ERANGE ENOSYS EPROTO EBADMSG EOVERFLOW EBADFD
        EMSGSIZE EOPNOTSUPP EADDRINUSE ENOBUFS ETIMEDOUT EALREADY ECANCELED
    };
    let known = names.iter().find(|(number, _)| *number == errno);
    known.map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_error_by_its_name_where_it_can_be_one() {
        for (value, text) in [
            (0, "done"),
            (-17i64 as u64, "refused, -EEXIST (-17)"),
            (-4000i64 as u64, "refused, -4000"),
            (1, "refused, 0x1"),
            (1 << 63, "refused, 0x8000000000000000"),
        ] {
            assert_eq!(Answer(value).to_string(), text);
        }
    }
}
