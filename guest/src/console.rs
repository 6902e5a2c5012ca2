//! Runs a command on the kernel's console, in the foreground of a session with the console as its terminal,
//! so that Ctrl-C and job control work. The session's leader is PID 1, which outlives the command: what the
//! command wrote last is not thrown away. Called by [`crate::boot`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::outcome::Outcome;
use crate::sys;

/// The command's status where it could not be started, as a shell gives it.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Runs `command` to its end, reaping every orphan meanwhile, and returns its status as a shell would.
pub fn run(command: &[String]) -> u8 {
    let Some((program, arguments)) = command.split_first() else {
        return NOT_FOUND;
    };
    let mut process = Command::new(program);
    process.args(arguments);
    let terminal = open();
    match &terminal {
        Ok(terminal) => {
            sys::lead_session(terminal);
            if let Err(sentence) = give(&mut process, terminal, sys::take_foreground) {
                eprintln!("init: {sentence}");
            }
        }
        // A machine without a console can still run a command.
        Err(_) => {
            process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    let status = match process.spawn() {
        Ok(child) => reap_until(child.id()),
        Err(error) => {
            let (sentence, status) = cannot_start(program, &error);
            eprintln!("init: {sentence}");
            status
        }
    };
    if let Ok(terminal) = terminal {
        // What was written must be out before the power goes. A terminal that failed has nothing left to
        // write.
        let _ = rustix::termios::tcdrain(&terminal);
    }
    status
}

/// What to say, and with which status to end, when a command could not be started.
pub fn cannot_start(program: &str, error: &io::Error) -> (String, u8) {
    match error.kind() {
        io::ErrorKind::NotFound => (format!("{program}: not found in this image"), NOT_FOUND),
        _ => (format!("cannot run {program}: {error}"), NOT_EXECUTABLE),
    }
}

/// Reaps children until `process` ends; its status.
pub fn reap_until(process: u32) -> u8 {
    loop {
        match sys::wait_for_any_child() {
            Some((child, status)) if child == process => return status,
            Some(_) => {}
            None => return NOT_EXECUTABLE,
        }
    }
}

/// Makes `terminal` the standard files of a process about to start, which then calls `take` to have it as its
/// terminal.
pub fn give(process: &mut Command, terminal: &File, take: fn() -> io::Result<()>) -> Outcome<()> {
    let copy = || terminal.try_clone().map_err(|error| format!("cannot duplicate the terminal: {error}"));
    process.stdin(copy()?).stdout(copy()?).stderr(copy()?);
    // SAFETY: between fork and exec, `take` makes a few system calls and allocates nothing.
    unsafe { process.pre_exec(take) };
    Ok(())
}

/// The terminal behind `/dev/console`, which itself can control no session: the last name in the kernel's
/// list.
fn open() -> io::Result<File> {
    let list = std::fs::read_to_string("/sys/class/tty/console/active")?;
    let name = list.split_whitespace().last().unwrap_or("console");
    OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"))
}
