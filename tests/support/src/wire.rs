//! Bytes on a socket, written and read here by hand: nothing of hotslot's codec, so that an error in it
//! cannot hide.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long any wait of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const MAP: u32 = 9;
pub const UNMAP: u32 = 10;

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

/// The payload of MAP and UNMAP.
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
        let (count, file) = self.0.recv_with_fd(&mut header[..])?;
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
pub struct Leash(File);

impl Leash {
    /// The descriptor to give away, and the leash.
    pub fn new() -> (OwnedFd, Leash) {
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors, which are nobody else's.
        unsafe {
            assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
            (OwnedFd::from_raw_fd(fds[1]), Leash(File::from_raw_fd(fds[0])))
        }
    }

    /// Waits until nobody has the descriptor any more.
    pub fn wait_until_closed(&self) {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one pollfd, on our stack.
        let ready = unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as i32) };
        assert_eq!(ready, 1, "a descriptor was kept");
    }
}
