//! The terminal on stdin: raw while a guest uses it, as it was before afterwards; and the escape key, Ctrl-a.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::sandbox::refusal;

/// The terminal's settings before it was raw. Written once, before [`IS_RAW`] is set for the first time.
static SAVED: OnceLock<Termios> = OnceLock::new();
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// Signals that end the process without running destructors; only a bug of ours raises them.
const FATAL: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

/// How wide the terminal on stdout is; `None` where there is none.
pub fn columns() -> Option<u16> {
    let told = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    told.or_else(|| tcgetwinsize(stdout()).ok().map(|size| size.ws_col)).filter(|&columns| columns > 0)
}

/// While it lives, the terminal on stdin is raw: each key goes to the guest at once, Ctrl-C too.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on stdin raw. Dropping the value, a panic and a fatal signal restore it.
    pub fn new() -> io::Result<RawTerminal> {
        let now = tcgetattr(stdin())?;
        let mut raw = SAVED
            .get_or_init(|| {
                restore_at_panic_and_fatal_signals();
                now
            })
            .clone();
        raw.make_raw();
        // Output keeps its processing: our own lines end with a line feed only.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        IS_RAW.store(true, Ordering::SeqCst);
        tcsetattr(stdin(), OptionalActions::Now, &raw)
            .inspect_err(|_| IS_RAW.store(false, Ordering::SeqCst))?;
        Ok(RawTerminal(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal if it is raw. Uses atomics and one system call only, so that a signal handler may
/// call it.
pub fn restore() {
    if IS_RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        let _nothing_left_to_do = tcsetattr(stdin(), OptionalActions::Now, saved);
    }
}

fn restore_at_panic_and_fatal_signals() {
    refusal::before_end(restore);
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        print(panic);
    }));
    for signal in FATAL {
        // SAFETY: a sigaction is plain data, for which all-zero is a value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = fatal as extern "C" fn(libc::c_int) as usize;
        // SA_RESETHAND: after the handler the default is back, and the instruction that failed, or the raise,
        // ends the process. SA_ONSTACK: the stack may have overflowed.
        action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
        // SAFETY: `action` lives through the call; `fatal` makes async-signal-safe calls only.
        let _restored_by_drop_at_least = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    }
}

extern "C" fn fatal(signal: libc::c_int) {
    restore();
    // SAFETY: raise is async-signal-safe; the default action, which SA_RESETHAND restored, ends the process.
    unsafe { libc::raise(signal) };
}

/// The keys after Ctrl-a.
pub const HELP: &str = "Ctrl-a x: quit    Ctrl-a Ctrl-a: send Ctrl-a    Ctrl-a h: this help";

const ESCAPE: u8 = 0x01;

/// A command to the VMM, by a key after Ctrl-a.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the machine.
    Quit,
    /// Print [`HELP`].
    Help,
}

/// Finds the escape key among typed bytes.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Takes one typed byte: for the guest (`Ok(Some)`), for the VMM (`Err`), or Ctrl-a, whose next key
    /// decides (`Ok(None)`). A key without a meaning after Ctrl-a is dropped together with it.
    pub fn key(&mut self, byte: u8) -> Result<Option<u8>, Command> {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                Ok(None)
            }
            (false, byte) => Ok(Some(byte)),
            (true, ESCAPE) => Ok(Some(ESCAPE)),
            (true, b'x' | b'X') => Err(Command::Quit),
            (true, b'h' | b'H' | b'?') => Err(Command::Help),
            (true, _) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_(keys: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let mut filter = EscapeFilter::default();
        let (mut sent, mut commands) = (Vec::new(), Vec::new());
        for key in keys {
            match filter.key(*key) {
                Ok(byte) => sent.extend(byte),
                Err(command) => commands.push(command),
            }
        }
        (sent, commands)
    }

    #[test]
    fn the_escape_key() {
        assert_eq!(type_(b"ls\r\x03"), (b"ls\r\x03".to_vec(), vec![]));
        assert_eq!(type_(b"a\x01xb"), (b"ab".to_vec(), vec![Command::Quit]));
        assert_eq!(type_(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(type_(b"\x01h\x01q!"), (b"!".to_vec(), vec![Command::Help]));
        assert_eq!(type_(b"x\x01"), (b"x".to_vec(), vec![]));
    }
}
