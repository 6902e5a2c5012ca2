//! A back-end for a running `hotslot`, made of raw bytes: it does what every back-end does, and maps what the
//! test says.

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::wire::{self, MAP, MMap, Message, NEED_REPLY, PATIENCE, REPLY, UNMAP, VERSION_1, Wire, message};

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// Requests of the front-end.
pub const SET_MEM_TABLE: u32 = 5;
pub const GET_VRING_BASE: u32 = 11;
const GET_FEATURES: u32 = 1;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_MAX_MEM_SLOTS: u32 = 36;
const GET_SHMEM_CONFIG: u32 = 44;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

/// Feature bits.
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_PROTOCOL: u64 = 1 << 30;

/// Protocol feature bits: MQ, REPLY_ACK, BACKEND_REQ, BACKEND_SEND_FD, RESET_DEVICE, STATUS, SHMEM.
pub const BACKEND_REQ: u64 = 1 << 5;
pub const SHMEM: u64 = 1 << 22;
pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
const PROTOCOL: u64 = 1 | 1 << 3 | BACKEND_REQ | 1 << 10 | 1 << 13 | 1 << 16 | SHMEM;

/// What a back-end offers.
#[derive(Clone)]
pub struct Offer {
    pub features: u64,
    pub protocol: u64,
    /// Id and size.
    pub regions: Vec<(u8, u64)>,
}

impl Default for Offer {
    fn default() -> Self {
        Offer {
            features: F_VERSION_1 | F_PROTOCOL,
            protocol: PROTOCOL,
            regions: vec![(0, 4 * MIB), (7, 2 * MIB)],
        }
    }
}

/// What a back-end has, of hotslot's.
#[derive(Default)]
pub struct Connection {
    main: Mutex<Option<Wire>>,
    channel: Mutex<Option<Wire>>,
    kick: Mutex<Option<File>>,
    call: Mutex<Option<File>>,
    seen: Mutex<Vec<u32>>,
}

/// A back-end that runs.
pub struct Backend {
    _dir: TempDir,
    socket: PathBuf,
    connection: Arc<Connection>,
}

impl Backend {
    /// The usual one.
    pub fn start() -> Backend {
        Backend::offering(Offer::default())
    }

    pub fn offering(offer: Offer) -> Backend {
        Backend::acting(offer, |_, _| {})
    }

    /// One that acts before it answers a request.
    pub fn acting(offer: Offer, mut act: impl FnMut(u32, &Connection) + Send + 'static) -> Backend {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let connection = Arc::new(Connection::default());
        let ours = Arc::clone(&connection);
        thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let main = Wire::new(socket);
            *ours.main.lock().unwrap() = Some(main.try_clone());
            while let Ok(mut request) = main.receive_within(None) {
                let id = request.request;
                ours.seen.lock().unwrap().push(id);
                if let Some(fd) = request.fds.pop() {
                    ours.keep(id, fd);
                }
                act(id, &ours);
                if let Some(payload) = answer_to(&offer, &request) {
                    // hotslot may be gone.
                    let _ = main.send_with(&message(id, VERSION_1 | REPLY, &payload), &[]);
                }
            }
        });
        Backend { _dir: dir, socket, connection }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The device string for hotslot.
    pub fn device(&self, name: &str) -> String {
        format!("{},type=rng,name={name}", self.socket.display())
    }
}

impl std::ops::Deref for Backend {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

fn answer_to(offer: &Offer, request: &Message) -> Option<Vec<u8>> {
    Some(match request.request {
        GET_FEATURES => wire::quads([offer.features]),
        GET_PROTOCOL_FEATURES => wire::quads([offer.protocol]),
        GET_QUEUE_NUM => wire::quads([1]),
        GET_MAX_MEM_SLOTS => wire::quads([32]),
        GET_SHMEM_CONFIG => wire::shmem_config(offer.regions.len() as u32, 0, &offer.regions),
        GET_VRING_BASE => request.payload.clone(),
        _ if request.flags & NEED_REPLY != 0 => wire::quads([0]),
        _ => return None,
    })
}

impl Connection {
    fn keep(&self, request: u32, fd: OwnedFd) {
        match request {
            SET_BACKEND_REQ_FD => *self.channel.lock().unwrap() = Some(Wire::new(fd.into())),
            SET_VRING_KICK => *self.kick.lock().unwrap() = Some(fd.into()),
            SET_VRING_CALL => *self.call.lock().unwrap() = Some(fd.into()),
            _ => {}
        }
    }

    /// The backend channel, as soon as it is there.
    pub fn channel(&self) -> Wire {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(channel) = &*self.channel.lock().unwrap() {
                return channel.try_clone();
            }
            assert!(Instant::now() < end, "no backend channel");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn send(&self, request: u32, payload: MMap, file: Option<&File>) {
        let bytes = message(request, VERSION_1 | NEED_REPLY, &payload.bytes());
        let fds: Vec<_> = file.iter().map(|file| file.as_raw_fd()).collect();
        self.channel().send_with(&bytes, &fds).unwrap();
    }

    /// The answer to a request: 0, or -errno.
    pub fn answer(&self, request: u32) -> i64 {
        let reply = self.channel().receive().unwrap();
        assert_eq!((reply.request, reply.flags), (request, 0x5));
        reply.quad(0) as i64
    }

    pub fn map(&self, payload: MMap, file: &File) -> i64 {
        self.send(MAP, payload, Some(file));
        self.answer(MAP)
    }

    pub fn unmap(&self, payload: MMap) -> i64 {
        self.send(UNMAP, payload, None);
        self.answer(UNMAP)
    }

    /// The end of both sockets, as when the process dies.
    pub fn hang_up(&self) {
        for wire in [&self.main, &self.channel] {
            if let Some(wire) = wire.lock().unwrap().take() {
                // hotslot may have been faster.
                let _ = wire.socket().shutdown(Shutdown::Both);
            }
        }
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<u32> {
        self.seen.lock().unwrap().clone()
    }

    /// Whether the guest kicked queue 0 since the last look.
    pub fn was_kicked(&self) -> bool {
        let kick = self.kick.lock().unwrap();
        let kick = kick.as_ref().expect("the device was started");
        let mut count = [0; 8];
        // hotslot makes it non-blocking.
        std::io::Read::read(&mut &*kick, &mut count).is_ok()
    }

    /// Used a buffer: interrupts the guest.
    pub fn call(&self) {
        let call = self.call.lock().unwrap();
        let mut call = call.as_ref().expect("the device was started");
        call.write_all(&1u64.to_ne_bytes()).unwrap();
    }
}

/// One page of region 0, read-only.
pub fn page(index: u64) -> MMap {
    MMap { shm_offset: index * PAGE, len: PAGE, ..MMap::default() }
}

pub fn writable(payload: MMap) -> MMap {
    MMap { flags: 1, ..payload }
}

/// A file in memory; its pages hold 8-byte words that tell their place: `seed` times 2^32, plus the offset.
pub fn file(seed: u64, pages: u64) -> File {
    // SAFETY: the name is a C string, and the new descriptor is nobody else's.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    let words = (0..pages * PAGE / 8).flat_map(|word| (content(seed, word * 8)).to_le_bytes());
    file.write_all(&words.collect::<Vec<u8>>()).unwrap();
    file
}

/// What [`file`] has at an offset.
pub fn content(seed: u64, offset: u64) -> u64 {
    seed << 32 | offset
}
