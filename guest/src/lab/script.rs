//! A machine that a script starts and ends: a guest of hotslot, with its back-ends (`scripts/run/host.sh`).
//!
//! The script's standard input is the link's socket. Its standard output is the log's, from which it can also
//! read: at the end of that stream it ends what it started, and removes its files. That end comes with this
//! process, even by SIGKILL, so that nothing is left behind. For that the script is in a process group of its
//! own.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::signals::unblock_in;
use crate::outcome::{Outcome, failed};

/// How long the script may take to end everything.
const END_TIME: Duration = Duration::from_secs(5);

/// A running script. It ends when this value is dropped, or when this process does.
pub struct Script {
    process: Child,
    log: UnixStream,
}

/// Starts it with its ends of the link and of the log; `log` is ours. Its errors are shown, not logged, where
/// `errors_shown`.
pub fn start(
    path: &Path,
    link: UnixStream,
    its_log: UnixStream,
    log: &UnixStream,
    errors_shown: bool,
) -> Outcome<Script> {
    let spawn = || -> io::Result<Script> {
        let errors = if errors_shown { Stdio::inherit() } else { OwnedFd::from(its_log.try_clone()?).into() };
        let mut command = Command::new("/bin/sh");
        command.arg(path).stdin(OwnedFd::from(link)).stdout(OwnedFd::from(its_log)).stderr(errors);
        unblock_in(&mut command);
        Ok(Script { process: command.process_group(0).spawn()?, log: log.try_clone()? })
    };
    spawn().map_err(failed("run", path))
}

impl Script {
    /// Returns when everything has ended.
    pub fn stop(&mut self) {
        // It fails only when the script has ended already.
        let _ = self.log.shutdown(Shutdown::Write);
        let end = Instant::now() + END_TIME;
        while Instant::now() < end && matches!(self.process.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(5));
        }
        if matches!(self.process.try_wait(), Ok(None)) {
            let _ = kill_process_group(Pid::from_child(&self.process), Signal::KILL);
            let _ = self.process.wait();
        }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.stop();
    }
}
