//! One vhost-user socket: whole messages in and out, with their file descriptors, never blocking past a
//! deadline.
//!
//! Both channels use it: `frontend` for the main socket, `backend_channel` for the other one. A message of
//! the usual size is one recvmsg(2), whatever its sender's writes were (SHM-65).
//!
//! # Which message a descriptor belongs to
//!
//! The kernel ends a recvmsg(2) after data that came with descriptors, so descriptors belong to the message
//! that holds the last byte of the read they came with. That stays true when a read ends in the middle of the
//! next message.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::message::{HEADER_LEN, Header, MAX_FDS, MAX_PAYLOAD};

/// Why a socket cannot be used any more. After any of these the stream is out of step: it must be closed.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The peer closed the socket between two messages: no error by itself.
    #[error("the back-end hung up")]
    HungUp,
    /// The peer closed the socket inside a message (SHM-64).
    #[error("the back-end hung up inside a message, after {0} bytes of it")]
    HungUpInside(usize),
    /// The peer sent a version that we do not speak (SHM-64).
    #[error("the back-end sent message {request} in version {version} of the protocol, not 1")]
    Version {
        /// The message's id.
        request: u32,
        /// Its version.
        version: u32,
    },
    /// The peer announced a payload larger than any message has (SHM-64).
    #[error(
        "the back-end announced {size} bytes of payload for message {request}: the limit is {MAX_PAYLOAD}"
    )]
    Oversized {
        /// The message's id.
        request: u32,
        /// The announced size in bytes.
        size: u32,
    },
    /// The peer did not send, or did not take, what it should have in time (SHM-66).
    #[error("the back-end did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[source] io::Error),
}

/// A moment until which to wait, which knows how long that was.
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

    /// Whether it is over.
    pub fn has_passed(&self) -> bool {
        Instant::now() >= self.at
    }

    /// The milliseconds until then, for poll(2): rounded up, so that it is over when they are.
    pub fn poll_timeout(&self) -> i32 {
        let left = self.at.saturating_duration_since(Instant::now());
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    }

    fn timed_out(&self) -> ConnectionError {
        ConnectionError::TimedOut(self.limit)
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header; the version is 1.
    pub header: Header,
    /// Its payload, of the size that the header says.
    pub payload: Vec<u8>,
    /// The file descriptors that came with it, close-on-exec (SHM-28), closed when dropped (SHM-27).
    pub fds: Vec<OwnedFd>,
    /// Whether more descriptors came than this process could take (SHM-48), or than one sendmsg(2) carries.
    pub fds_lost: bool,
}

/// A connected socket and what was read from it ahead of its time.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// How much to ask for when nothing is known of the next message.
    usual: usize,
    buffer: Vec<u8>,
    /// Position in the stream of `buffer`'s first byte.
    position: u64,
    /// What arrived with a read, by the stream position at which that read ended.
    descriptors: VecDeque<Descriptors>,
}

#[derive(Debug)]
struct Descriptors {
    position: u64,
    fds: Vec<OwnedFd>,
    lost: bool,
}

impl Connection {
    /// Takes a connected socket over. Most of its messages to us have `usual_payload` bytes of payload.
    pub fn new(socket: UnixStream, usual_payload: usize) -> Self {
        Connection {
            socket,
            usual: HEADER_LEN + usual_payload,
            buffer: Vec::new(),
            position: 0,
            descriptors: VecDeque::new(),
        }
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
            // Descriptors go with the first byte, once.
            let fds = if sent == 0 { fds } else { &[] };
            match send_some(&self.socket, &bytes[sent..], fds) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(self.socket.as_fd(), libc::POLLOUT, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_hang_up(&error) => return Err(ConnectionError::HungUp),
                Err(error) => return Err(ConnectionError::Io(error)),
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
            wait(self.socket.as_fd(), libc::POLLIN, deadline)?;
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
        let mut queued: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int, ours.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONREAD, &mut queued) } != 0 {
            return Err(ConnectionError::Io(io::Error::last_os_error()));
        }
        Ok(self.position + self.buffer.len() as u64 + u64::from(queued.unsigned_abs()))
    }

    /// Whether the next call of [`Self::try_receive`] need not read.
    pub fn has_message(&self) -> bool {
        // What is wrong with a message is for `try_receive` to say.
        self.buffer.len() >= HEADER_LEN && self.needed().map_or(true, |needed| needed <= self.buffer.len())
    }

    /// Bytes that the next message has, as far as known.
    fn needed(&self) -> Result<usize, ConnectionError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_LEN>() else {
            return Ok(HEADER_LEN);
        };
        let header = Header::decode(header);
        let (request, size, version) = (header.request, header.size, header.version());
        if version != 1 {
            return Err(ConnectionError::Version { request, version });
        }
        match usize::try_from(size) {
            Ok(payload) if payload <= MAX_PAYLOAD => Ok(HEADER_LEN + payload),
            _ => Err(ConnectionError::Oversized { request, size }),
        }
    }

    fn take_message(&mut self) -> Result<Option<Message>, ConnectionError> {
        let needed = self.needed()?;
        let Some(bytes) = self.buffer.get(..needed) else {
            return Ok(None);
        };
        let Some((head, payload)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        let mut message = Message {
            header: Header::decode(head),
            payload: payload.to_vec(),
            fds: Vec::new(),
            fds_lost: false,
        };
        self.buffer.drain(..needed);
        self.position += needed as u64;
        let ours = self.descriptors.iter().take_while(|arrived| arrived.position <= self.position).count();
        for arrived in self.descriptors.drain(..ours) {
            message.fds.extend(arrived.fds);
            message.fds_lost |= arrived.lost;
        }
        Ok(Some(message))
    }

    /// One recvmsg(2). False where nothing is there now.
    fn read_more(&mut self) -> Result<bool, ConnectionError> {
        let want = self.needed()?.max(self.usual) - self.buffer.len();
        let received = match receive_some(&self.socket, &mut self.buffer, want) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) if is_hang_up(&error) => return Err(self.hung_up()),
            Err(error) => return Err(ConnectionError::Io(error)),
        };
        if received.count == 0 {
            return Err(self.hung_up());
        }
        if !received.fds.is_empty() || received.fds_lost {
            let position = self.position + self.buffer.len() as u64;
            let mut arrived = Descriptors { position, fds: received.fds, lost: received.fds_lost };
            // Each byte of a message can bring as many, and the whole process would soon have none left for
            // others.
            let waiting: usize = self.descriptors.iter().map(|waiting| waiting.fds.len()).sum();
            if waiting + arrived.fds.len() > MAX_FDS {
                arrived.fds.clear();
                arrived.lost = true;
            }
            self.descriptors.push_back(arrived);
        }
        Ok(true)
    }

    fn hung_up(&self) -> ConnectionError {
        match self.buffer.len() {
            0 => ConnectionError::HungUp,
            count => ConnectionError::HungUpInside(count),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Waits until the socket is ready for `events`, or the deadline.
fn wait(socket: BorrowedFd<'_>, events: i16, deadline: Deadline) -> Result<(), ConnectionError> {
    loop {
        if deadline.has_passed() {
            return Err(deadline.timed_out());
        }
        let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
        // SAFETY: one pollfd, on our stack.
        match unsafe { libc::poll(&mut poll, 1, deadline.poll_timeout()) } {
            0 => return Err(deadline.timed_out()),
            1.. => return Ok(()),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(ConnectionError::Io(error));
                }
            }
        }
    }
}

/// Room for a control message with `MAX_FDS` descriptors, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; CONTROL_LEN]);

// SAFETY: arithmetic only.
const CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;

fn send_some(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([MaybeUninit::zeroed(); CONTROL_LEN]);
    // SAFETY: a msghdr of zeroes is an empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        if fds.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = size_of_val(fds) as u32;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: arithmetic only.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
        // SAFETY: `control` has room for MAX_FDS descriptors and its header, and outlives the call below.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            // A BorrowedFd is a RawFd in memory (`repr(transparent)`).
            let data = libc::CMSG_DATA(header).cast::<BorrowedFd<'_>>();
            std::ptr::copy_nonoverlapping(fds.as_ptr(), data, fds.len());
        }
    }
    // SAFETY: everything that `message` points to lives until the call returns.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

struct Received {
    count: usize,
    fds: Vec<OwnedFd>,
    fds_lost: bool,
}

/// Appends up to `want` bytes to `buffer`.
fn receive_some(socket: &UnixStream, buffer: &mut Vec<u8>, want: usize) -> io::Result<Received> {
    buffer.reserve(want);
    let room = buffer.spare_capacity_mut();
    let mut vector = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: want };
    let mut control = Control([MaybeUninit::uninit(); CONTROL_LEN]);
    // SAFETY: a msghdr of zeroes is an empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_LEN;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: everything that `message` points to lives until the call returns; `want` bytes are reserved.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel wrote `count` bytes there.
    unsafe { buffer.set_len(buffer.len() + count) };

    let mut fds = Vec::new();
    // SAFETY: the kernel wrote `msg_controllen` bytes of control messages to `control`, and the macros stay
    // inside them. The descriptors are new, and nobody else's.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    Ok(Received { count, fds, fds_lost: message.msg_flags & libc::MSG_CTRUNC != 0 })
}

#[cfg(test)]
mod tests;
