//! The thread that takes the process's signals, and ends the process when the main loop cannot.
//!
//! It waits for no other thread and takes no lock that is held for longer than a moment, so that SIGTERM ends
//! the machine whatever the main loop and the vCPUs' threads are stuck in.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::signal::{block_signal, create_sigset};

use super::dump;
use super::error::{VmmError, failed_to};
use super::exit_once::{Ending, ExitOnce};
use super::memory_map::MemoryMap;
use super::stats::Stats;
use super::writer::Writer;
use crate::exit::Exit;
use crate::report::{lines, say};
use crate::sandbox::vmm::Kind;
use crate::{terminal, thread};

/// The signals that end the machine, the one that prints memory map and statistics, and the one for a dump.
/// Those of the last lines would end the process, too, and leave the terminal raw.
const SIGNALS: [libc::c_int; 12] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    PRINT,
    WRITE_DUMP,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];
const PRINT: libc::c_int = libc::SIGUSR1;
const WRITE_DUMP: libc::c_int = libc::SIGUSR2;

/// How long the main loop has to stop the machine, once its end is set. With [`lines::end`]'s second the
/// process is gone within 5 seconds.
const STOP_WITHIN: Duration = Duration::from_secs(4);
/// Time between two looks for another signal while a dump is written.
const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(100);

/// Blocks the signals on this thread and all that it starts later, so that only the new thread takes them.
/// Threads that were started earlier block all signals, see [`crate::thread`].
pub(super) fn watch(
    exit: Arc<ExitOnce>,
    memory_map: Arc<MemoryMap>,
    stats: Arc<Stats>,
    writers: Writers,
) -> Result<(), VmmError> {
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
    let signals = Signals { file, exit, memory_map, stats, writers, printer: None };
    thread::spawn("signals".into(), Kind::Helper, || signals.run())
        .map_err(failed_to("start the thread for signals"))?;
    Ok(())
}

/// The threads that signals set to work, where the user asked for what they write.
#[derive(Clone)]
pub(super) struct Writers {
    /// Draws what SIGUSR1 prints.
    pub painter: Option<Arc<Writer>>,
    pub dumper: Option<Arc<Writer>>,
    /// Adds a line of statistics to their file.
    pub stats_writer: Option<Arc<Writer>>,
}

struct Signals {
    file: File,
    exit: Arc<ExitOnce>,
    memory_map: Arc<MemoryMap>,
    stats: Arc<Stats>,
    writers: Writers,
    /// Prints memory map and statistics, or did so. At most one at a time.
    printer: Option<JoinHandle<()>>,
}

impl Signals {
    fn run(mut self) {
        loop {
            if let Some(Ending { last, status, .. }) = self.exit.get() {
                self.wait_for_end();
                // The main thread has not ended the process: it is stuck.
                terminal::restore();
                lines::end(&last, status);
            }
            let mut polled = [
                PollFd::new(&self.file, PollFlags::IN),
                PollFd::from_borrowed_fd(self.exit.event(), PollFlags::IN),
            ];
            // It fails only with EINTR.
            let _ = poll(&mut polled, None);
            self.take();
        }
    }

    fn take(&mut self) {
        while let Some(signal) = self.next() {
            match (signal, &self.writers.dumper) {
                (PRINT, _) => self.print(),
                (WRITE_DUMP, Some(dumper)) => dumper.order(),
                _ => self.exit.set((&Exit::Signal(signal)).into()),
            }
        }
    }

    /// A signal that has arrived.
    fn next(&mut self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.file.read_exact(&mut info).ok()?;
        // The first field, ssi_signo.
        let [a, b, c, d, ..] = info;
        Some(i32::from_ne_bytes([a, b, c, d]))
    }

    /// Gives the main loop its time. A dump that is being written has more, until another signal.
    fn wait_for_end(&mut self) {
        sleep(STOP_WITHIN);
        let Some(dumper) = self.writers.dumper.clone() else { return };
        let start = Instant::now();
        while !dumper.wait(LOOK_FOR_SIGNALS) {
            let is_ended = self.next().is_some_and(|signal| ![PRINT, WRITE_DUMP].contains(&signal));
            if is_ended || start.elapsed() >= dump::AT_MOST {
                return dump::say_incomplete();
            }
        }
    }

    /// On a thread of its own, which may wait for the locks of all devices.
    fn print(&mut self) {
        let Writers { painter, stats_writer, .. } = &self.writers;
        [painter, stats_writer].into_iter().flatten().for_each(|writer| writer.order());
        if self.printer.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let (map, stats) = (Arc::clone(&self.memory_map), Arc::clone(&self.stats));
        let print = move || {
            say(format_args!("guest physical memory:\n{map}"));
            say(stats.snapshot());
        };
        self.printer = thread::spawn("memory-map".into(), Kind::Helper, print)
            .inspect_err(|error| log::error!("cannot print memory map and statistics: {error}"))
            .ok();
    }
}
