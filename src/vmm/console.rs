//! The host's side of the serial port: output to stdout or a file, input from stdin, and the escape key on a
//! terminal. `Vmm::build` opens it; the main loop brings its input to the port.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::error::{VmmError, eventfd, failed_to, watch};
use super::exit_once::ExitOnce;
use crate::config::SerialLine;
use crate::devices::serial::{Output, SerialPort};
use crate::exit::Exit;
use crate::report::{create, say};
use crate::terminal::{self, Command, EscapeFilter, RawTerminal};

/// How many bytes from a terminal are kept for a guest that does not read: more than anybody pastes. What
/// comes then is dropped, which is said, so that the escape key is always read. A pipe or a file is read only
/// when the guest has room.
const TYPED_AHEAD: usize = 1 << 20;

/// The serial port with the host's end of its input.
pub(super) struct Console {
    pub port: Arc<SerialPort>,
    /// `None` once it has ended.
    input: Option<File>,
    /// Whether the main loop waits for input. It cannot wait for a regular file, which always has some.
    is_watched: bool,
    /// `Some` on a terminal.
    escape: Option<EscapeFilter>,
    pending: VecDeque<u8>,
    /// Whether input was dropped since the guest last took some.
    drops: bool,
    /// Signalled when the port may have room again.
    wants_input: Arc<EventFd>,
    exit: Arc<ExitOnce>,
}

impl Console {
    /// A port that signals `interrupt`. Its writes do not block once `stopping` is set. Ctrl-a x sets `exit`.
    pub fn open(
        line: &SerialLine,
        interrupt: EventFd,
        stopping: Arc<AtomicBool>,
        exit: Arc<ExitOnce>,
    ) -> Result<Console, VmmError> {
        // Duplicates, because std buffers its own stdin and stdout.
        let duplicate =
            |fd: &dyn AsFd, what| fd.as_fd().try_clone_to_owned().map(File::from).map_err(failed_to(what));
        let (input, output) = match line {
            SerialLine::Off => (None, None),
            SerialLine::File(path) => {
                let file = create(path).map_err(|error| VmmError::SerialFile(path.clone(), error))?;
                (None, Some(file))
            }
            SerialLine::Stdio => {
                (Some(duplicate(&io::stdin(), "use stdin")?), Some(duplicate(&io::stdout(), "use stdout")?))
            }
        };
        let wants_input = Arc::new(eventfd()?);
        let output = Output::new(output, stopping);
        let port = Arc::new(SerialPort::new(interrupt, output, Arc::clone(&wants_input)));
        let terminal = input.as_ref().is_some_and(File::is_terminal);
        Ok(Console {
            port,
            input,
            is_watched: false,
            escape: terminal.then(EscapeFilter::default),
            pending: VecDeque::new(),
            drops: false,
            wants_input,
            exit,
        })
    }

    /// Makes stdin raw, if the console uses it and it is a terminal.
    pub fn make_raw(&self) -> Result<Option<RawTerminal>, VmmError> {
        let raw = self.escape.as_ref().map(|_| RawTerminal::new());
        raw.transpose().map_err(failed_to("make the terminal raw"))
    }

    /// Gives the guest as much pending input as it has room for.
    fn feed(&mut self) {
        let room = self.port.room().min(self.pending.len());
        if room > 0 {
            let taken = self.port.enqueue(&self.pending.make_contiguous()[..room]);
            self.pending.drain(..taken);
            self.drops &= taken == 0;
        }
    }

    /// Reads input once.
    fn read(&mut self, ops: &mut EventOps) {
        let Some(mut input) = self.input.as_ref() else {
            return;
        };
        let mut buffer = [0; 256];
        match input.read(&mut buffer) {
            Ok(0) => self.end(ops),
            Ok(len) => buffer[..len].iter().for_each(|byte| self.take(*byte)),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => {
                log::info!("the serial port's input has failed and ends: {error}");
                self.end(ops);
            }
        }
    }

    fn take(&mut self, byte: u8) {
        let byte = match self.escape.as_mut().map_or(Ok(Some(byte)), |escape| escape.key(byte)) {
            Ok(byte) => byte,
            Err(Command::Quit) => return self.exit.set((&Exit::Quit).into()),
            Err(Command::Help) => {
                say(format_args!("\n{}", terminal::HELP));
                None
            }
        };
        if self.pending.len() < TYPED_AHEAD {
            self.pending.extend(byte);
        } else if byte.is_some() && !self.drops {
            self.drops = true;
            log::warn!(
                "input from the terminal is lost: the guest has {TYPED_AHEAD} bytes to read before it"
            );
        }
    }

    /// There is no more input.
    fn end(&mut self, ops: &mut EventOps) {
        if let Some(input) = self.input.take() {
            // Closing this duplicate of stdin would leave it in the epoll set, where its hang-up wakes the
            // main loop again and again.
            let _was_not_watched = ops.remove(Events::new(&input, EventSet::IN));
        }
    }

    /// Whether to read input: from a terminal always, for the escape key; else when the guest has room.
    fn wants_more(&self) -> bool {
        self.escape.is_some() || self.pending.is_empty() && self.port.room() > 0
    }

    /// Starts or stops waiting for input, as [`Console::wants_more`] says.
    fn watch(&mut self, ops: &mut EventOps) {
        while let Some(input) = &self.input
            && self.is_watched != self.wants_more()
        {
            let events = Events::new(input, EventSet::IN);
            let change = if self.is_watched { ops.remove(events) } else { ops.add(events) };
            if change.is_ok() {
                self.is_watched = !self.is_watched;
            } else if self.is_watched {
                return;
            } else {
                // epoll refuses a regular file: it is read until the guest has no more room.
                self.read(ops);
                self.feed();
            }
        }
    }
}

impl MutEventSubscriber for Console {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.wants_input.as_raw_fd() {
            // It means "look again", however often it was signalled.
            let _count = self.wants_input.read();
        } else {
            self.read(ops);
        }
        self.feed();
        self.watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &*self.wants_input);
        self.watch(ops);
    }
}
