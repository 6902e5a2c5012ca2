//! The terminal: raw while a guest uses it, itself again afterwards, and the escape key in between.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

const STDIN: libc::c_int = libc::STDIN_FILENO;

/// How the terminal was. Written once, before [`IS_RAW`] is set for the first time.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// What ends a process without its destructors, if it is a bug of ours.
const FATAL: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

/// While it lives, the terminal on stdin is raw: each key goes to the guest at once, Ctrl-C too.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on stdin raw; `None` if stdin is none. A panic and a fatal signal restore it too.
    pub fn new() -> io::Result<Option<RawTerminal>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        // SAFETY: a termios is plain data, for which all-zero is a value.
        let mut now: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the struct is ours and lives through the call, which fills it.
        if unsafe { libc::tcgetattr(STDIN, &mut now) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut raw = *SAVED.get_or_init(|| {
            restore_at_panic_and_fatal_signals();
            now
        });
        // SAFETY: the struct is ours and lives through the call.
        unsafe { libc::cfmakeraw(&mut raw) };
        // Output stays cooked: what we say ourselves ends its lines with a line feed only.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        IS_RAW.store(true, Ordering::SeqCst);
        // SAFETY: as above.
        if unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, &raw) } != 0 {
            let error = io::Error::last_os_error();
            IS_RAW.store(false, Ordering::SeqCst);
            return Err(error);
        }
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal if it is raw. Only atomics and one async-signal-safe call: a signal handler may do
/// it.
fn restore() {
    if IS_RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        // SAFETY: the struct is a static's, never written again.
        let _nothing_left_to_do = unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, saved) };
    }
}

fn restore_at_panic_and_fatal_signals() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        print(panic);
    }));
    for signal in FATAL {
        // SAFETY: a sigaction is plain data, for which all-zero is a value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = fatal as extern "C" fn(libc::c_int) as usize;
        // After the handler the default is back, and the instruction that failed, or the raise, ends the
        // process.
        action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
        // SAFETY: the handler does only what a handler may do.
        let _restored_by_drop_at_least = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    }
}

extern "C" fn fatal(signal: libc::c_int) {
    restore();
    // SAFETY: raise is async-signal-safe; the default action, which is back, ends the process.
    unsafe { libc::raise(signal) };
}

/// What the keys after Ctrl-a do.
pub const HELP: &str = "Ctrl-a x: quit    Ctrl-a Ctrl-a: send Ctrl-a    Ctrl-a h: this help";

const ESCAPE: u8 = 0x01;

/// What the user wants of us, and not of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the machine.
    Quit,
    /// Print [`HELP`].
    Help,
}

/// Finds the escape key in what the user types.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Takes one typed byte: for the guest (`Ok(Some)`), for us (`Err`), or not complete yet (`Ok(None)`). A
    /// key after Ctrl-a that means nothing is dropped together with it.
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
