//! A solution of the last lesson (`src/lessons.md`): a back-end of the same device as `counter.rs`, which
//! shows the time, in seconds since 1970, and needs no crate for the protocol. A message of vhost-user is
//! a header of three words (request, flags, length), then so many bytes; descriptors come with the
//! header.
//!
//!     clock SOCKET

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// VIRTIO_F_VERSION_1, and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// MQ, REPLY_ACK, BACKEND_REQ, BACKEND_SEND_FD, RESET_DEVICE, SHMEM.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 10 | 1 << 13 | 1 << 22;
/// Flags of a message: version 1, this is an answer, an answer is asked for.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// More than any message that these features allow.
const LONGEST: u32 = 4096;
const PAGE: u64 = 4096;
/// Bytes of region 0.
const REGION: u64 = 2 << 20;

// Requests of the front-end, and the one of ours.
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_SHMEM_CONFIG: u32 = 44;
const SHMEM_MAP: u32 = 9;

/// The words of a header.
fn words(header: &[u8; 12]) -> [u32; 3] {
    [0, 4, 8].map(|at| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]))
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        [request, flags, payload.len() as u32].into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.extend(payload);
    bytes
}

/// A message of the front-end.
struct Message {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// The next message; none where the front-end has hung up.
fn receive(socket: &mut UnixStream) -> io::Result<Option<Message>> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut header)];
    let read = recvmsg(&*socket, into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if read == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    socket.read_exact(&mut header[read..])?;
    let [request, flags, length] = words(&header);
    if length > LONGEST {
        return Err(io::Error::other(format!("request {request} has {length} bytes")));
    }
    let mut payload = vec![0; length as usize];
    socket.read_exact(&mut payload)?;
    Ok(Some(Message { request, flags, payload, descriptors }))
}

/// Has the front-end map the page at 0 of region 0. The answer is 0, or what went wrong as -errno.
fn map(channel: &mut UnixStream, page: &File) -> io::Result<i64> {
    // shmid and padding, offset in the file, offset in the region, length, flags (0: read-only).
    let payload: Vec<u8> = [0, 0, 0, PAGE, 0].into_iter().flat_map(u64::to_ne_bytes).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [page.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let request = message(SHMEM_MAP, VERSION | NEED_REPLY, &payload);
    // So few bytes are sent as a whole.
    sendmsg(&*channel, &[IoSlice::new(&request)], &mut ancillary, SendFlags::empty())?;
    let (mut header, mut answer) = ([0; 12], [0; 8]);
    channel.read_exact(&mut header)?;
    channel.read_exact(&mut answer)?;
    Ok(i64::from_ne_bytes(answer))
}

/// Serves one front-end until it hangs up.
fn serve(mut socket: UnixStream, page: &File) -> io::Result<()> {
    let mut channel = None;
    while let Some(Message { request, flags, payload, descriptors }) = receive(&mut socket)? {
        let answer = match request {
            GET_FEATURES => Some(FEATURES.to_ne_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => Some(PROTOCOL_FEATURES.to_ne_bytes().to_vec()),
            GET_QUEUE_NUM => Some(1_u64.to_ne_bytes().to_vec()),
            // The queue's number, as it was asked for, and how far it is: nothing is ever taken.
            GET_VRING_BASE => Some(payload.iter().take(4).copied().chain([0; 4]).collect()),
            GET_SHMEM_CONFIG => {
                let sizes = [1, REGION].into_iter().chain([0; 255]);
                Some(sizes.flat_map(u64::to_ne_bytes).collect())
            }
            SET_BACKEND_REQ_FD => {
                channel = descriptors.into_iter().next().map(UnixStream::from);
                None
            }
            SET_MEM_TABLE => {
                if let Some(channel) = &mut channel {
                    eprintln!("clock: SHMEM_MAP: {}", map(channel, page)?);
                }
                None
            }
            _ => None,
        };
        // Where the request has no answer of its own, 0 is one, for those who ask.
        let answer = answer.or_else(|| (flags & NEED_REPLY != 0).then(|| 0_u64.to_ne_bytes().to_vec()));
        if let Some(payload) = answer {
            socket.write_all(&message(request, VERSION | REPLY, &payload))?;
        }
    }
    Ok(())
}

fn run(path: &str) -> io::Result<()> {
    let page = File::from(memfd_create("clock", MemfdFlags::CLOEXEC)?);
    page.set_len(PAGE)?;
    let clock = page.try_clone()?;
    let listener = UnixListener::bind(path)?;
    thread::spawn(move || {
        while let Ok(since) = SystemTime::now().duration_since(UNIX_EPOCH) {
            if clock.write_all_at(&since.as_secs().to_ne_bytes(), 0).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    let (socket, _) = listener.accept()?;
    let result = serve(socket, &page);
    std::fs::remove_file(path)?;
    result
}

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("clock: usage: clock SOCKET");
        return ExitCode::from(2);
    };
    match run(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clock: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}
