//! What the main loop serves while the processors run: the end of the machine, signals, and input for the
//! serial port.
//!
//! Each is a subscriber of the event manager. `Vmm::run` puts them together.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{VmmError, eventfd, os};
use crate::bus::MachineEvent;
use crate::devices::serial::SerialPort;
use crate::exit::Exit;
use crate::kvm::vcpu::Outcome;
use crate::report::say;
use crate::terminal::{self, Command, EscapeFilter, RawTerminal};

/// How the machine ends: whoever says it first is right.
pub(super) struct End {
    /// Lock order: innermost, held for a moment only.
    result: Mutex<Option<Result<Exit, VmmError>>>,
    event: EventFd,
}

impl End {
    pub fn new() -> Result<End, VmmError> {
        Ok(End { result: Mutex::new(None), event: eventfd()? })
    }

    pub fn come(&self, exit: Exit) {
        self.set(Ok(exit));
    }

    pub fn fail(&self, error: VmmError) {
        self.set(Err(error));
    }

    fn set(&self, result: Result<Exit, VmmError>) {
        let mut first = self.lock();
        if first.is_none() {
            *first = Some(result);
        } else {
            log::debug!("too late to end the machine: {result:?}");
        }
        drop(first);
        // It fails only when 2^64 - 2 signals wait already.
        let _full = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Result<Exit, VmmError>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU's thread, last.
    pub fn tell(&self, outcome: Outcome) {
        match outcome {
            Outcome::Stopped => {}
            Outcome::Event(MachineEvent::PowerOff) => self.come(Exit::PowerOff),
            Outcome::Event(MachineEvent::Reset) => self.come(Exit::Reset),
            Outcome::Event(MachineEvent::Panicked) => self.come(Exit::Panicked),
            Outcome::Event(MachineEvent::DebugExit(status)) => self.come(Exit::DebugExit(status)),
            Outcome::Crash(crash) => self.come(Exit::Crash(crash.to_string())),
            Outcome::Failed(error) => self.fail(error.into()),
        }
    }

    /// How it ends, once.
    pub fn take(&self) -> Option<Result<Exit, VmmError>> {
        self.lock().take()
    }
}

/// Wakes the main loop when the end has come.
pub(super) struct EndWatch(pub Arc<End>);

impl MutEventSubscriber for EndWatch {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // The loop looks itself.
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&self.0.event, EventSet::IN));
    }
}

/// Adds a descriptor to the main loop; false where it cannot be waited for (a regular file is always ready).
fn watch(ops: &mut EventOps, events: Events) -> bool {
    ops.add(events).is_ok()
}

/// Those that end the machine.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// The one that prints the memory map.
const REPORT: libc::c_int = libc::SIGUSR1;

/// The signals of the process, read as data.
pub(super) struct Signals {
    file: File,
    end: Arc<End>,
    memory_map: Box<dyn Fn() -> Vec<String>>,
}

impl Signals {
    /// Takes the signals away from their default actions, on this thread and all that it starts later.
    /// Threads that it started before leave them alone too, see [`crate::thread`].
    pub fn new(end: Arc<End>, memory_map: Box<dyn Fn() -> Vec<String>>) -> Result<Signals, VmmError> {
        // SAFETY: a sigset_t is plain bits, for which all-zero is a value.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours and lives through the calls; signalfd makes a descriptor that is nobody
        // else's.
        let fd: RawFd = unsafe {
            libc::sigemptyset(&mut set);
            for signal in ENDING.into_iter().chain([REPORT]) {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(os("make a signalfd")(io::Error::last_os_error()));
        }
        Ok(Signals {
            // SAFETY: the descriptor is new and nobody else's.
            file: unsafe { File::from_raw_fd(fd) },
            end,
            memory_map,
        })
    }
}

impl MutEventSubscriber for Signals {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while let Ok(len) = self.file.read(&mut info) {
            if len < info.len() {
                break;
            }
            // The first field, ssi_signo.
            let [a, b, c, d, ..] = info;
            match i32::from_ne_bytes([a, b, c, d]) {
                REPORT => say(format_args!("guest physical memory:\n{}", (self.memory_map)().join("\n"))),
                signal => self.end.come(Exit::Signal(signal)),
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&self.file, EventSet::IN));
    }
}

/// The serial port with the host's end of its input line.
pub(super) struct Console {
    /// The guest's end.
    pub port: Arc<SerialPort>,
    /// The host's end, while it has not ended.
    pub input: Option<File>,
    /// Signalled when the port may have room again.
    pub wants_input: Arc<EventFd>,
}

impl Console {
    pub fn make_raw(&self) -> Result<Option<RawTerminal>, VmmError> {
        if self.input.is_none() {
            return Ok(None);
        }
        RawTerminal::new().map_err(os("make the terminal raw"))
    }
}

/// How much typed input is kept for a guest that does not read; the rest is dropped, as a terminal drops it.
/// Whoever types can always quit. A pipe or a file is not read further while the guest does not read.
const TYPED_AHEAD: usize = 4096;

/// Brings input to the serial port.
pub(super) struct ConsoleInput {
    console: Console,
    end: Arc<End>,
    pending: VecDeque<u8>,
    /// `Some` on a terminal.
    escape: Option<EscapeFilter>,
    line: Line,
}

/// The state of the input line.
#[derive(PartialEq, Eq)]
enum Line {
    /// The main loop tells when there is input.
    Watched,
    /// There is input as long as it has not ended (a regular file), or nobody wants it yet (a pipe).
    Unwatched,
    /// It has ended.
    Ended,
}

impl ConsoleInput {
    pub fn new(console: Console, end: Arc<End>) -> Self {
        let terminal = console.input.as_ref().is_some_and(|input| input.is_terminal());
        ConsoleInput {
            line: if console.input.is_some() { Line::Unwatched } else { Line::Ended },
            escape: terminal.then(EscapeFilter::default),
            pending: VecDeque::new(),
            console,
            end,
        }
    }

    /// Gives the guest what it can take of what is pending.
    fn feed(&mut self) {
        let room = self.console.port.room().min(self.pending.len());
        if room > 0 {
            let bytes: Vec<u8> = self.pending.iter().take(room).copied().collect();
            let taken = self.console.port.enqueue(&bytes);
            self.pending.drain(..taken);
        }
    }

    /// Reads once, a terminal's keys or what is next in a pipe or a file.
    fn read(&mut self) {
        let Some(mut input) = self.console.input.as_ref() else {
            return;
        };
        let mut buffer = [0; 256];
        match input.read(&mut buffer) {
            Ok(0) => self.line = Line::Ended,
            Ok(len) => buffer[..len].iter().for_each(|byte| self.take(*byte)),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => {
                log::info!("no more input: {error}");
                self.line = Line::Ended;
            }
        }
    }

    fn take(&mut self, byte: u8) {
        let byte = match self.escape.as_mut().map_or(Ok(Some(byte)), |escape| escape.key(byte)) {
            Ok(byte) => byte,
            Err(Command::Quit) => return self.end.come(Exit::Quit),
            Err(Command::Help) => {
                say(format_args!("\n{}", terminal::HELP));
                None
            }
        };
        if self.pending.len() < TYPED_AHEAD {
            self.pending.extend(byte);
        }
    }

    /// Whether input shall be read: a terminal always, for the escape key; anything else when the guest wants
    /// more.
    fn wants_more(&self) -> bool {
        self.escape.is_some() || self.pending.is_empty() && self.console.port.room() > 0
    }

    /// Brings the watching of the line in accord with what is wanted.
    fn watch_line(&mut self, ops: &mut EventOps) {
        let Some(input) = self.console.input.as_ref() else {
            return;
        };
        let events = Events::new(input, EventSet::IN);
        match self.line {
            Line::Ended => {
                // Not watched any more, if it was; its hang-up would wake us again and again.
                let _was_not_watched = ops.remove(events);
                self.console.input = None;
            }
            Line::Watched if !self.wants_more() && ops.remove(events).is_ok() => self.line = Line::Unwatched,
            Line::Unwatched if self.wants_more() => {
                if watch(ops, events) {
                    self.line = Line::Watched;
                } else {
                    self.read_file(ops);
                }
            }
            _ => {}
        }
    }

    /// A file cannot be waited for: it is read as far as the guest takes it.
    fn read_file(&mut self, ops: &mut EventOps) {
        while self.line == Line::Unwatched && self.wants_more() {
            self.read();
            self.feed();
        }
        if self.line == Line::Ended {
            self.watch_line(ops);
        }
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.console.wants_input.as_raw_fd() {
            // It says "look again"; how often it said so does not matter.
            let _count = self.console.wants_input.read();
        } else {
            self.read();
        }
        self.feed();
        self.watch_line(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&*self.console.wants_input, EventSet::IN));
        self.watch_line(ops);
    }
}
