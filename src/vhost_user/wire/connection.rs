//! One vhost-user socket: whole messages in and out, with their file descriptors, never blocking past a
//! deadline.
//!
//! `frontend` uses it for the main socket, `channel` for the backend channel. A message of the usual size
//! that has arrived whole is one recvmsg(2); it may arrive in any number of pieces (SHM-65).
//!
//! # Which message a descriptor belongs to
//!
//! The kernel ends a recvmsg(2) after data that came with descriptors, so descriptors belong to the message
//! that holds the last byte of the read they came with. That stays true when a read ends in the middle of the
//! next message.
//!
//! # How many descriptors are taken
//!
//! A message of the backend channel may carry one. recvmsg(2) has room for one; the kernel drops the others
//! before they are this process's. A message of the main socket may carry none. Where the kernel drops the
//! last descriptor of a file, the reading thread closes the file: for a socket that may wait for its peer
//! (SO_LINGER). A vCPU reads the main socket. So it looks first (MSG_PEEK), and never reads a message that
//! has descriptors.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::message::{Header, Layout, MAX_FDS, MAX_PAYLOAD};

/// Why a socket cannot be used any more. After any of these the stream is out of step: it must be closed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ConnectionError {
    /// The peer closed the socket between two messages: no error by itself.
    #[error("the back-end hung up")]
    HungUp,
    /// The peer closed the socket inside a message (SHM-64).
    #[error("the back-end hung up inside a message, after {0} bytes of it")]
    HungUpInside(usize),
    /// SHM-64.
    #[error("the back-end sent message {request} in version {version} of the protocol, not 1")]
    Version { request: u32, version: u32 },
    /// SHM-64.
    #[error(
        "the back-end announced {size} bytes of payload for message {request}: the limit is {MAX_PAYLOAD}"
    )]
    Oversized { request: u32, size: u32 },
    /// A message of the main socket has descriptors.
    #[error("the back-end attached file descriptors to an answer, which has none")]
    Descriptors,
    /// The peer did not send, or did not take, what it should have in time (SHM-66).
    #[error("the back-end did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    #[error("the socket failed")]
    Io(#[source] io::Error),
}

impl ConnectionError {
    /// Whether the peer closed the socket, at whatever moment.
    pub fn is_hang_up(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        match self {
            ConnectionError::HungUp | ConnectionError::HungUpInside(_) => true,
            ConnectionError::Io(error) => matches!(error.kind(), BrokenPipe | ConnectionReset),
            _ => false,
        }
    }
}

/// A moment until which to wait, and the time limit that it came from.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Deadline { at: Instant::now() + limit, limit }
    }

    /// The time until then, for poll(2); `None` once it has passed.
    pub fn time_left(&self) -> Option<Timespec> {
        let left = self.at.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok().filter(|_| !left.is_zero())
    }

    /// Whether it has passed.
    pub fn has_passed(&self) -> bool {
        self.time_left().is_none()
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header; the version is 1.
    pub header: Header,
    /// Its payload, of the size that the header says.
    pub payload: Vec<u8>,
    /// The file descriptor that came with it, close-on-exec (SHM-28), closed when dropped (SHM-27).
    pub file: Option<OwnedFd>,
    /// Whether more came with it. Without a `file` this process had no room for one (SHM-48).
    pub files_lost: bool,
}

/// How many descriptors a message may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptors {
    /// None: one that does is an error.
    None,
    /// At most one.
    One,
}

/// A connected socket, and what was read from it beyond the messages given out.
#[derive(Debug)]
pub struct Connection {
    socket: Arc<UnixStream>,
    /// How much to ask for when nothing is known of the next message.
    usual: usize,
    allowed: Descriptors,
    buffer: Vec<u8>,
    /// Position in the stream of `buffer`'s first byte.
    position: u64,
    /// Of each read with descriptors: the stream position at which it ended, the descriptor, whether any were
    /// lost. At most one has a descriptor.
    descriptors: VecDeque<(u64, Option<OwnedFd>, bool)>,
}

impl Connection {
    /// Takes a connected socket over. Most of its messages to us have `usual_payload` bytes of payload; none
    /// may have more descriptors than `allowed`.
    pub fn new(socket: impl Into<Arc<UnixStream>>, usual_payload: usize, allowed: Descriptors) -> Self {
        Connection {
            socket: socket.into(),
            usual: Header::LEN + usual_payload,
            allowed,
            buffer: Vec::new(),
            position: 0,
            descriptors: VecDeque::new(),
        }
    }

    /// From now on a message may have these descriptors.
    pub fn allow(&mut self, allowed: Descriptors) {
        self.allowed = allowed;
    }

    /// The socket, to wait on and to shut down.
    pub fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    /// Sends a whole message, or fails at the deadline.
    pub fn send(
        &self,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), ConnectionError> {
        debug_assert_eq!(header.size as usize, payload.len());
        let bytes = [&header.encode(), payload].concat();
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); CONTROL_LEN];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // Descriptors go with the first byte, once.
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(ConnectionError::Io(io::ErrorKind::InvalidInput.into()));
            }
            let rest = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.socket, &rest, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => wait(self.socket.as_fd(), PollFlags::OUT, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnectionError::HungUp),
                Err(error) => return Err(ConnectionError::Io(error.into())),
            }
        }
        Ok(())
    }

    /// Waits for a whole message, until the deadline.
    pub fn receive(&mut self, deadline: Deadline) -> Result<Message, ConnectionError> {
        loop {
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            wait(self.socket.as_fd(), PollFlags::IN, deadline)?;
        }
    }

    /// The next message, if all of it is there; never waits.
    pub fn try_receive(&mut self) -> Result<Option<Message>, ConnectionError> {
        loop {
            if let Some(message) = self.take_message()? {
                return Ok(Some(message));
            }
            if !self.read_more()? {
                return Ok(None);
            }
        }
    }

    /// Where the next message starts: bytes of the stream that were given out as messages.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Where what the peer has sent so far ends, in the same count.
    pub fn end_of_queue(&self) -> Result<u64, ConnectionError> {
        let queued = ioctl_fionread(&self.socket).map_err(|error| ConnectionError::Io(error.into()))?;
        Ok(self.position + self.buffer.len() as u64 + queued)
    }

    /// What was read and is not given out as a message: its beginning, or noise.
    pub fn unread(&self) -> &[u8] {
        &self.buffer
    }

    /// Whether the next call of [`Self::try_receive`] need not read.
    pub fn has_message(&self) -> bool {
        // An error in the header is for `try_receive` to report.
        self.buffer.len() >= Header::LEN && self.needed().map_or(true, |needed| needed <= self.buffer.len())
    }

    /// Bytes that the next message has, as far as known.
    fn needed(&self) -> Result<usize, ConnectionError> {
        let Some(header) = Header::take(&mut &self.buffer[..]) else {
            return Ok(Header::LEN);
        };
        let Header { request, size, .. } = header;
        if header.version() != 1 {
            return Err(ConnectionError::Version { request, version: header.version() });
        }
        match usize::try_from(size) {
            Ok(payload) if payload <= MAX_PAYLOAD => Ok(Header::LEN + payload),
            _ => Err(ConnectionError::Oversized { request, size }),
        }
    }

    fn take_message(&mut self) -> Result<Option<Message>, ConnectionError> {
        let needed = self.needed()?;
        let Some(mut payload) = self.buffer.get(..needed) else {
            return Ok(None);
        };
        let Some(header) = Header::take(&mut payload) else {
            return Ok(None);
        };
        let mut message = Message { header, payload: payload.to_vec(), file: None, files_lost: false };
        self.buffer.drain(..needed);
        self.position += needed as u64;
        let ours = self.descriptors.iter().take_while(|(end, ..)| *end <= self.position).count();
        for (_, file, lost) in self.descriptors.drain(..ours) {
            message.file = message.file.or(file);
            message.files_lost |= lost;
        }
        Ok(Some(message))
    }

    /// One recvmsg(2). False where nothing is there now.
    fn read_more(&mut self) -> Result<bool, ConnectionError> {
        let start = self.buffer.len();
        let needed = self.needed()?;
        // Each byte of a message can bring descriptors: the message that has one gets no other, and only it
        // is read.
        let has_one = self.descriptors.iter().any(|(_, file, _)| file.is_some());
        self.buffer.resize(if has_one { needed } else { needed.max(self.usual) }, 0);
        let bytes = &mut self.buffer[start..];
        let received = match self.allowed {
            Descriptors::None => receive_without_descriptors(&self.socket, bytes),
            Descriptors::One => receive_some(&self.socket, bytes, !has_one).map_err(From::from),
        };
        self.buffer.truncate(start + received.as_ref().map_or(0, |(count, ..)| *count));
        let (file, lost) = match received {
            Ok((0, ..)) | Err(Failed::Os(Errno::PIPE | Errno::CONNRESET)) => {
                return Err(match start {
                    0 => ConnectionError::HungUp,
                    count => ConnectionError::HungUpInside(count),
                });
            }
            Ok((_, file, lost)) => (file, lost),
            Err(Failed::Os(Errno::AGAIN)) => return Ok(false),
            Err(Failed::Os(Errno::INTR)) => return Ok(true),
            Err(Failed::Os(error)) => return Err(ConnectionError::Io(error.into())),
            Err(Failed::Descriptors) => return Err(ConnectionError::Descriptors),
        };
        if file.is_some() || lost {
            let end = self.position + self.buffer.len() as u64;
            self.descriptors.push_back((end, file, lost));
        }
        Ok(true)
    }
}

/// Reads what a socket that was shut down still has, and throws it away: its descriptors would keep their
/// files open. May wait where it closes them: only the device's own thread may call it.
pub fn discard(socket: &UnixStream) {
    while receive_some(socket, &mut [0; 4096], false).is_ok_and(|(count, ..)| count > 0) {}
}

/// As [`discard`], but stops at the first message without descriptors: another thread may wait for that
/// answer.
pub fn discard_descriptors(socket: &UnixStream) {
    let mut bytes = [0; 4096];
    while look(socket, &mut bytes).is_ok_and(|(_, has_some)| has_some) {
        // It ends: what is read is gone.
        let _ = receive_some(socket, &mut bytes, false);
    }
}

/// Waits until the socket is ready for `events`, or the deadline.
fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Deadline) -> Result<(), ConnectionError> {
    while let Some(left) = deadline.time_left() {
        match poll(&mut [PollFd::from_borrowed_fd(socket, events)], Some(&left)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(ConnectionError::Io(error.into())),
        }
    }
    Err(ConnectionError::TimedOut(deadline.limit))
}

/// Room for `MAX_FDS` descriptors as a control message.
const CONTROL_LEN: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// Room for one, and for what its alignment adds.
const ROOM_FOR_ONE: usize = rustix::cmsg_space!(ScmRights(1));

/// How many bytes were read, a descriptor that came with them, and whether any were lost.
type Received = (usize, Option<OwnedFd>, bool);

/// Why nothing was read.
enum Failed {
    Os(Errno),
    Descriptors,
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Failed::Os(errno)
    }
}

/// Fills the beginning of `bytes`. `takes_one`: a descriptor that comes with them is taken.
fn receive_some(socket: &UnixStream, bytes: &mut [u8], takes_one: bool) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); ROOM_FOR_ONE];
    let mut control = RecvAncillaryBuffer::new(if takes_one { &mut space } else { &mut [] });
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let mut files = rights.flatten();
    let file = files.next();
    // MSG_CTRUNC: the kernel dropped descriptors for which there was no room, here or in this process.
    let lost = files.count() > 0 || received.flags.contains(ReturnFlags::CTRUNC);
    Ok((received.bytes, file, lost))
}

/// The same, but bytes that have descriptors stay in the socket.
fn receive_without_descriptors(socket: &UnixStream, bytes: &mut [u8]) -> Result<Received, Failed> {
    let (count, has_descriptors) = look(socket, bytes)?;
    if has_descriptors {
        return Err(Failed::Descriptors);
    }
    // No more than was seen: what came since may have some.
    Ok(receive_some(socket, &mut bytes[..count], false)?)
}

/// How many bytes the socket has next, and whether descriptors came with them; all stays where it is.
fn look(socket: &UnixStream, bytes: &mut [u8]) -> Result<(usize, bool), Errno> {
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let seen = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut RecvAncillaryBuffer::default(), flags)?;
    Ok((seen.bytes, seen.flags.contains(ReturnFlags::CTRUNC)))
}

#[cfg(test)]
mod tests;
