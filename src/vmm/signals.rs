//! The signals of the process, read as data by the main loop.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::signal::{block_signal, create_sigset};

use super::error::{VmmError, failed_to, watch};
use super::exit_once::ExitOnce;
use super::memory_map::MemoryMap;
use crate::exit::Exit;
use crate::report::say;

/// The signals that end the machine, and the one that prints the memory map.
const SIGNALS: [libc::c_int; 5] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, PRINT_MEMORY_MAP];
const PRINT_MEMORY_MAP: libc::c_int = libc::SIGUSR1;

pub(super) struct Signals {
    file: File,
    exit: Arc<ExitOnce>,
    memory_map: MemoryMap,
}

impl Signals {
    /// Blocks the signals on this thread and all that it starts later, so that only the signalfd takes them.
    /// Threads that it started earlier block all signals, see [`crate::thread`].
    pub fn new(exit: Arc<ExitOnce>, memory_map: MemoryMap) -> Result<Signals, VmmError> {
        for signal in SIGNALS {
            let _already_blocked = block_signal(signal);
        }
        let failed = failed_to("make a signalfd");
        let set = create_sigset(&SIGNALS).map_err(|error| failed(error.into()))?;
        // SAFETY: the set is a local variable, which the call reads and keeps no pointer to.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the call has made the file descriptor, which has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Signals { file, exit, memory_map })
    }
}

impl MutEventSubscriber for Signals {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while self.file.read_exact(&mut info).is_ok() {
            // The first field, ssi_signo.
            let [a, b, c, d, ..] = info;
            match i32::from_ne_bytes([a, b, c, d]) {
                PRINT_MEMORY_MAP => say(format_args!("guest physical memory:\n{}", self.memory_map)),
                signal => self.exit.set(Ok(Exit::Signal(signal))),
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.file);
    }
}
