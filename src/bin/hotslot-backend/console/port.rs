//! The port: the requests of its queues, and the thread that moves bytes between them and the socket.
//!
//! Called by [`super`]: the threads of the queues bring requests, the session's thread takes them away when
//! the device stops. The socket never blocks, so that neither waits for its other end.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::control::{Control, MESSAGE};
use crate::complaints::Complaints;
use crate::device::{Later, Request};
use crate::lock::lock;

/// The queues, by their numbers (VIRTIO 1.2, section 5.3.2). "Receive" and "transmit" are the driver's words.
pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;
pub const CONTROL_RECEIVE: usize = 2;
pub const CONTROL_TRANSMIT: usize = 3;

/// Bytes that are moved at once.
const PIECE: usize = 64 << 10;

/// Pieces between two looks at whether the device is to stop.
const PIECES: usize = 16;

/// Requests of a queue that may wait: more than a queue can hold come only from a driver that makes one
/// available again before it has it back.
const MOST_WAITING: usize = 1024;

pub struct Port {
    stream: Arc<OwnedFd>,
    complaints: Arc<Complaints>,
    wake: OwnedFd,
    /// Held while bytes are moved: a thread that holds it knows that no buffer is being touched. Lock order:
    /// the crate's lock of a queue is inside.
    state: Mutex<State>,
}

struct State {
    control: Control,
    /// The driver knows of control queues. For one that does not, the port is always open.
    multiport: bool,
    /// Requests, the oldest first, and how many bytes of each were moved; by the queue's number.
    waiting: [VecDeque<(Request, Later, usize)>; 3],
    host_closed: bool,
    ended: bool,
}

impl Port {
    pub fn new(name: &str, stream: Arc<OwnedFd>, complaints: Arc<Complaints>) -> io::Result<Self> {
        let state = State {
            control: Control::new(name),
            multiport: true,
            waiting: Default::default(),
            host_closed: false,
            ended: false,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Port { stream, complaints, wake, state: Mutex::new(state) })
    }

    /// The thread, until [`Port::end`].
    pub fn run(&self) {
        let mut piece = vec![0; PIECE];
        loop {
            let wanted = {
                let mut state = lock(&self.state);
                if state.ended {
                    return;
                }
                state.pump(self, &mut piece)
            };
            let mut entries = [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&*self.stream, wanted)];
            // poll(2) reports a hang-up even where it was asked for no event, and would return at once.
            let entries = if wanted.is_empty() { &mut entries[..1] } else { &mut entries[..] };
            // The result is not needed: the loop looks at the socket itself.
            let _ = poll(entries, None);
            // It does not block; what counts is that it is read.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
    }

    pub fn end(&self) {
        lock(&self.state).ended = true;
        self.wake();
    }

    /// SET_FEATURES.
    pub fn use_control_queues(&self, multiport: bool) {
        lock(&self.state).multiport = multiport;
    }

    /// A request of a queue. Its answer, or none if it waits.
    pub fn take(&self, queue: usize, request: Request, later: Later) -> Option<u32> {
        let state = &mut *lock(&self.state);
        if queue == CONTROL_TRANSMIT {
            let mut message = [0; MESSAGE];
            let read = reader(&request, 0).and_then(|mut reader| reader.read_exact(&mut message));
            let host_open = !state.host_closed;
            let understood = read
                .map_err(|e| format!("a control message is too short or in no memory: {e}"))
                .and_then(|()| state.control.receive(message, host_open));
            self.complain(understood);
            state.send_control(self);
            self.wake();
            return Some(0);
        }
        let waiting = &mut state.waiting[queue];
        if waiting.len() == MOST_WAITING {
            self.complaints.say(format_args!("queue {queue} has more than {MOST_WAITING} requests"));
            return Some(0);
        }
        waiting.push_back((request, later, 0));
        match queue {
            CONTROL_RECEIVE => state.send_control(self),
            _ => self.wake(),
        }
        None
    }

    /// The device stops: all requests go back.
    pub fn stop(&self) {
        let state = &mut *lock(&self.state);
        for (_, later, _) in state.waiting.iter_mut().flat_map(|waiting| waiting.drain(..)) {
            later.hand_back(0);
        }
    }

    /// The driver begins anew.
    pub fn reset(&self, name: &str) {
        lock(&self.state).control = Control::new(name);
    }

    fn wake(&self) {
        // It fails only when it is full, which wakes, too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn complain(&self, outcome: Result<(), String>) {
        if let Err(sentence) = outcome {
            self.complaints.say(sentence);
        }
    }
}

impl State {
    /// Moves what can be moved now. Returns what to wait for.
    fn pump(&mut self, port: &Port, piece: &mut [u8]) -> PollFlags {
        for _ in 0..PIECES {
            let sent = self.send(port, piece);
            let received = self.receive(port, piece);
            if !sent && !received {
                break;
            }
        }
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::OUT, !self.waiting[TRANSMIT].is_empty());
        wanted.set(PollFlags::IN, self.can_receive());
        wanted
    }

    fn can_receive(&self) -> bool {
        let open = self.control.guest_open() || !self.multiport;
        open && !self.host_closed && !self.waiting[RECEIVE].is_empty()
    }

    /// A piece from the guest to the socket. Returns whether something was done.
    fn send(&mut self, port: &Port, piece: &mut [u8]) -> bool {
        let Some((request, _, moved)) = self.waiting[TRANSMIT].front_mut() else {
            return false;
        };
        let length = match reader(request, *moved).and_then(|mut reader| reader.read(piece)) {
            Ok(length) => length,
            Err(e) => {
                port.complaints.say(format_args!("bytes of the guest's are in no memory: {e}"));
                0
            }
        };
        // Without its other end the port takes everything, as a serial line does.
        let written = if self.host_closed || length == 0 {
            Ok(length)
        } else {
            rustix::io::write(&*port.stream, &piece[..length])
        };
        match written {
            Ok(written) => {
                *moved += written;
                // Also when all was moved before: an empty request.
                if length == 0 {
                    self.hand_back(TRANSMIT, 0);
                }
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(_) => self.close(port),
        }
    }

    /// A piece from the socket to the guest. Returns whether something was done.
    fn receive(&mut self, port: &Port, piece: &mut [u8]) -> bool {
        if !self.can_receive() {
            return false;
        }
        let Some((request, ..)) = self.waiting[RECEIVE].front() else {
            return false;
        };
        let room = match room(request) {
            Ok(room) if room > 0 => room.min(piece.len()),
            _ => {
                port.complaints.say("a buffer for bytes from the port has no room, or is in no memory");
                self.hand_back(RECEIVE, 0);
                return true;
            }
        };
        match rustix::io::read(&*port.stream, &mut piece[..room]) {
            Ok(0) => self.close(port),
            Ok(length) => {
                let written = put(request, &piece[..length]);
                self.hand_back(RECEIVE, written);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(_) => self.close(port),
        }
    }

    /// The other end has closed.
    fn close(&mut self, port: &Port) -> bool {
        self.host_closed = true;
        port.complain(self.control.host_closed());
        self.send_control(port);
        true
    }

    /// Control messages into the driver's buffers, while there are both.
    fn send_control(&mut self, port: &Port) {
        while let Some((request, ..)) = self.waiting[CONTROL_RECEIVE].front()
            && let Some(message) = self.control.waiting.front()
        {
            match room(request) {
                Ok(room) if room >= message.len() => {
                    let written = put(request, message);
                    self.control.waiting.pop_front();
                    self.hand_back(CONTROL_RECEIVE, written);
                }
                _ => {
                    port.complaints.say(format_args!(
                        "a buffer for control messages has no room for {} bytes, or is in no memory",
                        message.len()
                    ));
                    self.hand_back(CONTROL_RECEIVE, 0);
                }
            }
        }
    }

    /// The oldest request of a queue goes back.
    fn hand_back(&mut self, queue: usize, written: u32) {
        if let Some((_, later, _)) = self.waiting[queue].pop_front() {
            later.hand_back(written);
        }
    }
}

/// What the driver gave, from the byte `from` on.
fn reader(request: &Request, from: usize) -> io::Result<virtio_queue::Reader<'_>> {
    let mut reader = request.clone().reader(request.memory()).map_err(io::Error::other)?;
    reader.split_at(from).map_err(io::Error::other)
}

/// How many bytes the driver has room for.
fn room(request: &Request) -> io::Result<usize> {
    let writer = request.clone().writer(request.memory()).map_err(io::Error::other)?;
    Ok(writer.available_bytes())
}

/// Copies bytes to the driver; returns how many.
fn put(request: &Request, bytes: &[u8]) -> u32 {
    let writer = request.clone().writer(request.memory());
    // [`room`] has found the same memory.
    writer.ok().and_then(|mut writer| writer.write(bytes).ok()).unwrap_or_default() as u32
}
