//! vhost-user as bytes on a socket (vhost-user, "Communication", "Message Specification"), in the machine's
//! byte order.
//!
//! Without a crate, since a crate keeps the rules that are to be broken here. Any bytes can be sent, and
//! received messages are not checked. `session` and `channel` use it.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Bytes of a header: u32 request, u32 flags, u32 size of the payload.
pub const HEADER_LEN: usize = 12;
/// The largest payload that is received: more than any message of the protocol has.
const MAX_PAYLOAD: u32 = 64 << 10;
/// The most descriptors that Linux puts into one message (SCM_MAX_FD).
const MAX_FDS: usize = 253;

/// Bits of a header's flags.
pub mod flags {
    /// The version, in bits 0 and 1.
    pub const VERSION_1: u32 = 0x1;
    pub const VERSION_2: u32 = 0x2;
    pub const VERSION_MASK: u32 = 0x3;
    pub const REPLY: u32 = 1 << 2;
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// Protocol feature bits (VHOST_USER_PROTOCOL_F_...), as masks.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const STATUS: u64 = 1 << 16;
    /// SHMEM's bit in the specification; drafts had 20 and 21.
    pub const SHMEM_BIT: u32 = 22;
}

/// VHOST_USER_F_PROTOCOL_FEATURES, among the virtio feature bits.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// The front-end's requests, without VHOST_USER_: id and name.
const FRONTEND_REQUESTS: &[(u32, &str)] = &[
    (GET_FEATURES, "GET_FEATURES"),
    (SET_FEATURES, "SET_FEATURES"),
    (SET_OWNER, "SET_OWNER"),
    (4, "RESET_OWNER"),
    (SET_MEM_TABLE, "SET_MEM_TABLE"),
    (SET_VRING_NUM, "SET_VRING_NUM"),
    (SET_VRING_ADDR, "SET_VRING_ADDR"),
    (SET_VRING_BASE, "SET_VRING_BASE"),
    (GET_VRING_BASE, "GET_VRING_BASE"),
    (SET_VRING_KICK, "SET_VRING_KICK"),
    (SET_VRING_CALL, "SET_VRING_CALL"),
    (14, "SET_VRING_ERR"),
    (GET_PROTOCOL_FEATURES, "GET_PROTOCOL_FEATURES"),
    (SET_PROTOCOL_FEATURES, "SET_PROTOCOL_FEATURES"),
    (GET_QUEUE_NUM, "GET_QUEUE_NUM"),
    (SET_VRING_ENABLE, "SET_VRING_ENABLE"),
    (SET_BACKEND_REQ_FD, "SET_BACKEND_REQ_FD"),
    (GET_CONFIG, "GET_CONFIG"),
    (SET_CONFIG, "SET_CONFIG"),
    (RESET_DEVICE, "RESET_DEVICE"),
    (SET_STATUS, "SET_STATUS"),
    (GET_STATUS, "GET_STATUS"),
    (GET_SHMEM_CONFIG, "GET_SHMEM_CONFIG"),
];

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const RESET_DEVICE: u32 = 34;
pub const SET_STATUS: u32 = 39;
pub const GET_STATUS: u32 = 40;
pub const GET_SHMEM_CONFIG: u32 = 44;

/// Requests of the back-end: BACKEND_SHMEM_MAP and BACKEND_SHMEM_UNMAP.
pub const MAP: u32 = 9;
pub const UNMAP: u32 = 10;

/// The id of the front-end's request of this name.
pub fn frontend_request(name: &str) -> Option<u32> {
    let name = name.strip_prefix("VHOST_USER_").unwrap_or(name);
    let known = FRONTEND_REQUESTS.iter().find(|(_, known)| *known == name);
    known.map(|(id, _)| *id)
}

/// Names of the front-end's requests.
pub fn frontend_request_names() -> impl Iterator<Item = &'static str> {
    FRONTEND_REQUESTS.iter().map(|(_, name)| *name)
}

/// The name of a request of the front-end, for the report.
pub struct Name(pub u32);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match FRONTEND_REQUESTS.iter().find(|(id, _)| *id == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "request {}", self.0),
        }
    }
}

/// A message's bytes.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    [&words([request, flags, payload.len() as u32]), payload].concat()
}

/// u32 fields.
pub fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// u64 fields.
pub fn quads<const N: usize>(quads: [u64; N]) -> Vec<u8> {
    quads.iter().flat_map(|quad| quad.to_ne_bytes()).collect()
}

/// The payload of MAP and UNMAP, 40 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct MMap {
    pub shmid: u8,
    pub padding: [u8; 7],
    pub fd_offset: u64,
    pub shm_offset: u64,
    pub len: u64,
    pub flags: u64,
}

impl MMap {
    /// The flag of a mapping that the guest can write to.
    pub const READ_WRITE: u64 = 1;

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.shmid];
        bytes.extend(self.padding);
        bytes.extend(quads([self.fd_offset, self.shm_offset, self.len, self.flags]));
        bytes
    }
}

/// The payload of a GET_SHMEM_CONFIG reply: u32 nregions, u32 padding, 256 sizes of u64.
pub fn shmem_config(nregions: u32, regions: &[(u8, u64)]) -> Vec<u8> {
    let mut sizes = [0; 256];
    for &(shmid, size) in regions {
        sizes[usize::from(shmid)] = size;
    }
    [words([nregions, 0]), quads(sizes)].concat()
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn needs_reply(&self) -> bool {
        self.flags & flags::NEED_REPLY != 0
    }

    /// The u32 at a byte offset of the payload; 0 beyond its end.
    pub fn word(&self, offset: usize) -> u32 {
        let bytes = self.payload.get(offset..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    /// The u64 at a byte offset of the payload; 0 beyond its end.
    pub fn quad(&self, offset: usize) -> u64 {
        let bytes = self.payload.get(offset..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }
}

/// Why nothing was received or sent.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("nothing within {0:?}")]
    Timeout(Duration),
    #[error("the front-end closed the connection")]
    Closed,
    #[error("the front-end announced a payload of {0} bytes")]
    Oversized(u32),
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
                WireError::Closed
            }
            _ => WireError::Io(error),
        }
    }
}

impl From<rustix::io::Errno> for WireError {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// A socket.
#[derive(Debug)]
pub struct Wire(UnixStream);

impl Wire {
    pub fn new(socket: UnixStream) -> Self {
        Wire(socket)
    }

    /// Sends bytes, with file descriptors at the first of them; waits for room no longer than `timeout`.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], timeout: Duration) -> Result<(), WireError> {
        self.0.set_write_timeout(Some(timeout))?;
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent =
            retry_on_intr(|| sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL));
        let result = sent.map_err(io::Error::from).and_then(|sent| (&self.0).write_all(&bytes[sent..]));
        result.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => WireError::Timeout(timeout),
            _ => error.into(),
        })
    }

    /// The next message. Waits for all of it no longer than `timeout`, if one is given.
    pub fn receive(&self, timeout: Option<Duration>) -> Result<Message, WireError> {
        let deadline = timeout.map(|timeout| (Instant::now() + timeout, timeout));
        let mut header = [0; HEADER_LEN];
        let mut fds = Vec::new();
        let mut count = 0;
        while count < HEADER_LEN {
            self.wait(deadline)?;
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut header[count..])];
            let received = match recvmsg(&self.0, &mut rest, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => continue,
                received => received?,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if received.bytes == 0 {
                return Err(WireError::Closed);
            }
            count += received.bytes;
        }
        let mut message = Message { request: 0, flags: 0, payload: header.to_vec(), fds };
        let size = message.word(8);
        (message.request, message.flags) = (message.word(0), message.word(4));
        if size > MAX_PAYLOAD {
            return Err(WireError::Oversized(size));
        }
        message.payload = vec![0; size as usize];
        let mut count = 0;
        while count < message.payload.len() {
            self.wait(deadline)?;
            match (&self.0).read(&mut message.payload[count..])? {
                0 => return Err(WireError::Closed),
                read => count += read,
            }
        }
        Ok(message)
    }

    /// Waits until there is something to read, or the peer has hung up.
    fn wait(&self, deadline: Option<(Instant, Duration)>) -> Result<(), WireError> {
        loop {
            let left = deadline.map(|(deadline, _)| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match (poll(&mut [PollFd::new(&self.0, PollFlags::IN)], left.as_ref()), deadline) {
                (Err(rustix::io::Errno::INTR), _) => {}
                (Ok(0), Some((_, timeout))) => return Err(WireError::Timeout(timeout)),
                (ready, _) => return Ok(ready.map(drop)?),
            }
        }
    }

    /// Ends the connection.
    pub fn hang_up(&self) {
        // It fails only if the peer hung up first.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
