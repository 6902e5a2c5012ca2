//! Bytes on a socket, written and read here by hand: nothing of hotslot's codec, so that an error in it
//! cannot hide.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::files::PAGE;
pub use crate::names::backend_request::{SHMEM_MAP, SHMEM_UNMAP};
pub use crate::wait::PATIENCE;

/// Header flags.
pub const VERSION_1: u32 = 1;
pub const REPLY: u32 = 4;
pub const NEED_REPLY: u32 = 8;

/// A message's bytes.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    [&words([request, flags, size]), payload].concat()
}

/// u32 fields.
pub fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// u64 fields.
pub fn quads<const N: usize>(quads: [u64; N]) -> Vec<u8> {
    quads.iter().flat_map(|quad| quad.to_ne_bytes()).collect()
}

/// The payload of SHMEM_MAP and SHMEM_UNMAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MMap {
    pub shmid: u8,
    pub padding: [u8; 7],
    pub fd_offset: u64,
    pub shm_offset: u64,
    pub len: u64,
    pub flags: u64,
}

/// One page of region 0, for reading.
pub fn page_at(page: u64) -> MMap {
    MMap { shm_offset: page * PAGE, len: PAGE, ..MMap::default() }
}

/// The same mapping, for reading and writing.
pub fn writable(request: MMap) -> MMap {
    MMap { flags: 1, ..request }
}

impl MMap {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.shmid];
        bytes.extend(self.padding);
        bytes.extend(quads([self.fd_offset, self.shm_offset, self.len, self.flags]));
        assert_eq!(bytes.len(), 40);
        bytes
    }
}

/// The payload of a GET_SHMEM_CONFIG reply.
pub fn shmem_config(nregions: u32, padding: u32, sizes: &[(u8, u64)]) -> Vec<u8> {
    let mut table = [0; 256];
    for &(shmid, size) in sizes {
        table[usize::from(shmid)] = size;
    }
    let bytes = [words([nregions, padding]), quads(table)].concat();
    assert_eq!(bytes.len(), 2056);
    bytes
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The u64 at `offset` of the payload.
    pub fn quad(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.payload[offset..offset + 8].try_into().unwrap())
    }

    /// The payload of SHMEM_MAP or SHMEM_UNMAP.
    pub fn mmap(&self) -> MMap {
        assert_eq!(self.payload.len(), 40);
        let [fd_offset, shm_offset, len, flags] = [8, 16, 24, 32].map(|at| self.quad(at));
        let padding = self.payload[1..8].try_into().unwrap();
        MMap { shmid: self.payload[0], padding, fd_offset, shm_offset, len, flags }
    }

    /// The file that came with it.
    pub fn file(&self) -> File {
        File::from(self.fds[0].try_clone().unwrap())
    }
}

/// A socket.
#[derive(Debug)]
pub struct Wire(UnixStream);

impl Wire {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Wire(socket)
    }

    pub fn try_clone(&self) -> Self {
        Wire(self.0.try_clone().unwrap())
    }

    pub fn socket(&self) -> &UnixStream {
        &self.0
    }

    /// Sends bytes in one sendmsg(2), with descriptors.
    pub fn send_with(&self, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
        if fds.is_empty() {
            return io::Write::write_all(&mut &self.0, bytes);
        }
        let sent = self.0.send_with_fds(&[bytes], fds)?;
        assert_eq!(sent, bytes.len());
        Ok(())
    }

    pub fn send(&self, bytes: &[u8]) {
        self.send_with(bytes, &[]).unwrap();
    }

    /// The next message; fails at the end of the stream, or where none comes within `patience` (`None`:
    /// forever).
    pub fn receive_within(&self, patience: Option<Duration>) -> io::Result<Message> {
        self.0.set_read_timeout(patience)?;
        let mut header = [0; 12];
        // With a time limit, a process that was stopped and goes on is interrupted.
        let (count, file) = loop {
            match self.0.recv_with_fd(&mut header[..]) {
                Err(error) if error.errno() == libc::EINTR => {}
                received => break received?,
            }
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let fds: Vec<OwnedFd> = file.map(Into::into).into_iter().collect();
        (&self.0).read_exact(&mut header[count..])?;
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; field(8) as usize];
        (&self.0).read_exact(&mut payload)?;
        Ok(Message { request: field(0), flags: field(4), payload, fds })
    }

    pub fn receive(&self) -> io::Result<Message> {
        self.receive_within(Some(PATIENCE))
    }

    /// Sends a request with NEED_REPLY, and these descriptors.
    pub fn ask(&self, id: u32, request: MMap, fds: &[RawFd]) {
        self.send_with(&message(id, VERSION_1 | NEED_REPLY, &request.bytes()), fds).unwrap();
    }

    /// The answer to a request, which must be well formed (SHM-57): 0, or -errno.
    pub fn answer(&self, id: u32) -> i64 {
        let reply = self.receive().unwrap();
        assert_eq!((reply.request, reply.flags), (id, VERSION_1 | REPLY));
        assert_eq!((reply.payload.len(), reply.fds.len()), (8, 0));
        let value = reply.quad(0) as i64;
        assert!((-4095..=0).contains(&value), "{value} is neither 0 nor -errno");
        value
    }

    /// Answers a request: 0, or -errno.
    pub fn reply(&self, request: &Message, value: i64) {
        self.send(&message(request.request, VERSION_1 | REPLY, &value.to_ne_bytes()));
    }

    pub fn map(&self, request: MMap, file: &impl AsRawFd) -> i64 {
        self.ask(SHMEM_MAP, request, &[file.as_raw_fd()]);
        self.answer(SHMEM_MAP)
    }

    pub fn unmap(&self, request: MMap) -> i64 {
        self.ask(SHMEM_UNMAP, request, &[]);
        self.answer(SHMEM_UNMAP)
    }

    /// Waits for the other side to hang up. What comes before is thrown away.
    pub fn wait_for_end(&self) {
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = [0; 4096];
        loop {
            match (&self.0).read(&mut bytes) {
                Ok(0) => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
                result => result.map(drop).unwrap(),
            }
        }
    }

    /// Whether nothing is there to be read now.
    pub fn is_silent(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let result = (&self.0).read(&mut [0]);
        self.0.set_nonblocking(false).unwrap();
        result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Tells when every copy of a descriptor is closed: the other end of the pipe that it is of.
pub struct Leash(io::PipeReader);

impl Leash {
    /// The descriptor to give away, and the leash.
    pub fn new() -> (OwnedFd, Leash) {
        let (reader, writer) = io::pipe().unwrap();
        (writer.into(), Leash(reader))
    }

    /// Waits until no process has the descriptor open any more.
    pub fn wait_until_closed(&self) {
        let mut poll = [PollFd::new(&self.0, PollFlags::empty())];
        let ready = rustix::event::poll(&mut poll, Some(&PATIENCE.try_into().unwrap())).unwrap();
        assert_eq!(ready, 1, "a descriptor was kept");
    }
}
