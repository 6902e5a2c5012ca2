//! How a machine ends, and the exit status that says so. An error of ours has its own: [`crate::report`].

use std::fmt;

/// How a machine ends. Devices on a bus and vCPUs return it; the main loop acts on the first one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest reset itself (ACPI reset register, keyboard controller).
    Reset,
    /// The guest cannot go on, for this reason.
    Crash(String),
    /// The guest's kernel panicked and said so (pvpanic).
    Panicked,
    /// The host cannot provide a page of a mapping, and the user asked for an end then; the reason.
    PageUnavailable(String),
    /// A device has lost its back-end permanently, and the user asked for an end then: the device, and why.
    BackendLost(String),
    /// The guest wrote this to the debug-exit port.
    DebugExit(u8),
    /// The user typed Ctrl-a x.
    Quit,
    /// The user typed `kill` in gdb.
    Killed,
    /// This process received this signal.
    Signal(i32),
}

impl From<&Exit> for u8 {
    fn from(exit: &Exit) -> u8 {
        match exit {
            Exit::PowerOff => 0,
            Exit::Reset => 32,
            Exit::Crash(_) => 33,
            Exit::Panicked => 34,
            Exit::PageUnavailable(_) => 35,
            Exit::BackendLost(_) => 40,
            Exit::DebugExit(status) => *status,
            // As Ctrl-C ends other programs; on a raw terminal that key goes to the guest.
            Exit::Quit => 128 + libc::SIGINT as u8,
            // As gdb ends other programs.
            Exit::Killed => 128 + libc::SIGKILL as u8,
            // As a shell reports it.
            Exit::Signal(signal) => 128_u8.saturating_add(u8::try_from(*signal).unwrap_or(u8::MAX)),
        }
    }
}

/// The last line on stderr.
impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::PowerOff => write!(f, "the guest switched itself off"),
            Exit::Reset => write!(f, "the guest reset itself"),
            Exit::Crash(why) => write!(f, "the guest crashed: {why}"),
            Exit::Panicked => write!(f, "the guest's kernel panicked"),
            Exit::PageUnavailable(why) => write!(f, "{why}"),
            Exit::BackendLost(why) => write!(f, "a device lost its back-end: {why}"),
            Exit::DebugExit(status) => write!(f, "the guest ended with status {status} (debug exit)"),
            Exit::Quit => write!(f, "ended by Ctrl-a x"),
            Exit::Killed => write!(f, "killed by gdb"),
            Exit::Signal(libc::SIGHUP) => write!(f, "ended by SIGHUP"),
            Exit::Signal(libc::SIGINT) => write!(f, "ended by SIGINT"),
            Exit::Signal(libc::SIGQUIT) => write!(f, "ended by SIGQUIT"),
            Exit::Signal(libc::SIGTERM) => write!(f, "ended by SIGTERM"),
            Exit::Signal(other) => write!(f, "ended by signal {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_as_documented() {
        let crash = Exit::Crash("triple fault".into());
        for (exit, status) in [
            (Exit::PowerOff, 0),
            (Exit::Reset, 32),
            (crash, 33),
            (Exit::Panicked, 34),
            (Exit::PageUnavailable("a page".into()), 35),
            (Exit::BackendLost("disk".into()), 40),
            (Exit::DebugExit(77), 77),
            (Exit::Signal(libc::SIGTERM), 143),
            (Exit::Signal(libc::SIGINT), 130),
            (Exit::Quit, 130),
            (Exit::Killed, 137),
        ] {
            assert_eq!(u8::from(&exit), status, "{exit}");
        }
    }
}
