//! A back-end made of raw bytes, on a thread of the test: it answers as every back-end does, but for what its
//! script says, and maps what the test tells it to.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use tempfile::TempDir;

use crate::files::{MIB, PAGE};
use crate::names::*;
use crate::wait::eventually;
use crate::wire::{self, MMap, Message, NEED_REPLY, REPLY, VERSION_1, Wire, message};

/// The size of regions 0 and 7, unless the test says otherwise.
pub const REGION: u64 = 64 * PAGE;

/// What a back-end offers.
#[derive(Clone)]
pub struct Offer {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    /// How many ranges of memory it can be told of.
    pub slots: u64,
    /// Id and size of each shared memory region.
    pub regions: Vec<(u8, u64)>,
}

impl Default for Offer {
    fn default() -> Self {
        Offer {
            features: VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES,
            protocol: PROTOCOL_F_MQ
                | PROTOCOL_F_REPLY_ACK
                | PROTOCOL_F_BACKEND_REQ
                | PROTOCOL_F_BACKEND_SEND_FD
                | PROTOCOL_F_RESET_DEVICE
                | PROTOCOL_F_STATUS
                | PROTOCOL_F_SHMEM,
            queues: 2,
            slots: 509,
            regions: vec![(0, REGION), (7, REGION)],
        }
    }
}

/// What a back-end does with a request.
pub enum Answer {
    /// What every back-end does.
    Usual,
    /// These bytes, and a descriptor.
    Bytes(Vec<u8>, Option<File>),
    /// Nothing.
    Silence,
    /// The end of both sockets.
    HangUp,
}

/// A request of the front-end, as the back-end saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: usize,
}

/// The back-end's ends of everything, for its script and for the test.
#[derive(Default)]
pub struct Connection {
    main: Mutex<Option<Wire>>,
    channel: Mutex<Option<Wire>>,
    /// Of queue 0.
    kick: Mutex<Option<File>>,
    call: Mutex<Option<File>>,
    error: Mutex<Option<File>>,
    seen: Mutex<Vec<Seen>>,
}

pub type Script = Box<dyn FnMut(&Message, &Connection) -> Answer + Send>;

/// A running back-end for one front-end at a time.
pub struct Backend {
    _dir: TempDir,
    socket: PathBuf,
    connection: Arc<Connection>,
    script: Arc<Mutex<Script>>,
    process: Mutex<Option<JoinHandle<()>>>,
}

impl Backend {
    /// One with regions of some MiB, for a guest with pages of 2 MiB.
    pub fn start() -> Backend {
        Backend::offering(Offer { regions: vec![(0, 4 * MIB), (7, 2 * MIB)], ..Offer::default() })
    }

    pub fn offering(offer: Offer) -> Backend {
        let script = |request: &Message, connection: &Connection| {
            connection.keep_eventfds(request);
            Answer::Usual
        };
        Backend::scripted(offer, Box::new(script))
    }

    /// One that acts before it answers request `id`.
    pub fn acting(id: u32, mut act: impl FnMut(&Connection) + Send + 'static) -> Backend {
        let script = move |request: &Message, connection: &Connection| {
            if request.request == id {
                act(connection);
            }
            Answer::Usual
        };
        Backend::scripted(Offer::default(), Box::new(script))
    }

    pub fn scripted(offer: Offer, script: Script) -> Backend {
        let backend = Backend::silent();
        *backend.script.lock().unwrap() = script;
        backend.run(offer);
        backend
    }

    /// Another process takes the place of the one that died, or that the front-end hung up on: on the same
    /// socket, with the same script. What it is asked is added to what its predecessor was.
    pub fn come_back(&self, offer: Offer) {
        self.hang_up();
        if let Some(process) = self.process.lock().unwrap().take() {
            process.join().unwrap();
        }
        std::fs::remove_file(&self.socket).unwrap();
        self.run(offer);
    }

    fn run(&self, offer: Offer) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let (connection, script) = (Arc::clone(&self.connection), Arc::clone(&self.script));
        let process = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            // Who connects after it died is refused.
            drop(listener);
            let main = Wire::new(socket);
            *connection.main.lock().unwrap() = Some(main.try_clone());
            connection.serve(&main, &offer, &script);
            for end in [&connection.main, &connection.channel] {
                *end.lock().unwrap() = None;
            }
            for end in [&connection.kick, &connection.call, &connection.error] {
                *end.lock().unwrap() = None;
            }
        });
        *self.process.lock().unwrap() = Some(process);
    }

    /// Only the place of a socket: the test brings a back-end of its own.
    pub fn silent() -> Backend {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let script: Script = Box::new(|_, _| Answer::Usual);
        Backend {
            _dir: dir,
            socket,
            connection: Arc::default(),
            script: Arc::new(Mutex::new(script)),
            process: Mutex::default(),
        }
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

impl Connection {
    fn serve(&self, main: &Wire, offer: &Offer, script: &Mutex<Script>) {
        while let Ok(mut request) = main.receive_within(None) {
            self.seen.lock().unwrap().push(Seen {
                request: request.request,
                flags: request.flags,
                payload: request.payload.clone(),
                fds: request.fds.len(),
            });
            self.keep_channel(&mut request);
            let answer = match script.lock().unwrap()(&request, self) {
                Answer::Usual => usual(offer, &request)
                    .map(|payload| (message(request.request, VERSION_1 | REPLY, &payload), None)),
                Answer::Bytes(bytes, file) => Some((bytes, file)),
                Answer::Silence => None,
                Answer::HangUp => return self.hang_up(),
            };
            if let Some((bytes, file)) = answer {
                let fds: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
                // The front-end may be gone.
                let _ = main.send_with(&bytes, &fds);
            }
        }
    }

    /// Keeps the backend channel.
    fn keep_channel(&self, message: &mut Message) {
        if message.request == request::SET_BACKEND_REQ_FD {
            let channel = Wire::new(message.fds.pop().unwrap().into());
            *self.channel.lock().unwrap() = Some(channel);
        }
    }

    /// For [`Self::was_kicked`] and [`Self::call`]. A test that counts descriptors does without.
    fn keep_eventfds(&self, message: &Message) {
        let is_of_queue_0 = message.payload.first() == Some(&0);
        let place = match message.request {
            request::SET_VRING_KICK if is_of_queue_0 => &self.kick,
            request::SET_VRING_CALL if is_of_queue_0 => &self.call,
            request::SET_VRING_ERR if is_of_queue_0 => &self.error,
            _ => return,
        };
        *place.lock().unwrap() = Some(message.file());
    }

    /// Says that queue 0 makes no sense.
    pub fn report_error(&self) {
        let error = self.error.lock().unwrap();
        error.as_ref().unwrap().write_all(&1u64.to_ne_bytes()).unwrap();
    }

    /// The main socket.
    pub fn main(&self) -> Wire {
        self.main.lock().unwrap().as_ref().unwrap().try_clone()
    }

    /// The backend channel, as soon as it is there.
    pub fn channel(&self) -> Wire {
        let mut channel = None;
        eventually("there is a backend channel", || {
            channel = self.channel.lock().unwrap().as_ref().map(Wire::try_clone);
            channel.is_some()
        });
        channel.unwrap()
    }

    /// SHMEM_MAP with one descriptor and NEED_REPLY: the answer.
    pub fn map(&self, request: MMap, file: &impl AsRawFd) -> i64 {
        self.channel().map(request, file)
    }

    /// SHMEM_UNMAP with NEED_REPLY: the answer.
    pub fn unmap(&self, request: MMap) -> i64 {
        self.channel().unmap(request)
    }

    /// The end of both sockets, as when the back-end's process dies.
    pub fn hang_up(&self) {
        for wire in [&self.main, &self.channel] {
            if let Some(wire) = &*wire.lock().unwrap() {
                // The front-end may have been faster.
                let _ = wire.socket().shutdown(Shutdown::Both);
            }
        }
    }

    /// What it was asked so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The ids of what it was asked.
    pub fn ids(&self) -> Vec<u32> {
        ids(&self.seen())
    }

    /// Whether the guest notified queue 0 since the last look.
    pub fn was_kicked(&self) -> bool {
        let kick = self.kick.lock().unwrap();
        let mut kick = kick.as_ref().expect("the device was started");
        // The front-end makes it non-blocking.
        kick.read(&mut [0; 8]).is_ok()
    }

    /// Used a buffer of queue 0: interrupts the guest.
    pub fn call(&self) {
        let call = self.call.lock().unwrap();
        let mut call = call.as_ref().expect("the device was started");
        call.write_all(&1u64.to_ne_bytes()).unwrap();
    }
}

/// The ids of requests.
pub fn ids(seen: &[Seen]) -> Vec<u32> {
    seen.iter().map(|seen| seen.request).collect()
}

/// What every back-end answers.
fn usual(offer: &Offer, asked: &Message) -> Option<Vec<u8>> {
    Some(match asked.request {
        request::GET_FEATURES => wire::quads([offer.features]),
        request::GET_PROTOCOL_FEATURES => wire::quads([offer.protocol]),
        request::GET_QUEUE_NUM => wire::quads([offer.queues]),
        request::GET_MAX_MEM_SLOTS => wire::quads([offer.slots]),
        // ACKNOWLEDGE, DRIVER, FEATURES_OK.
        request::GET_STATUS => wire::quads([0xb]),
        request::GET_SHMEM_CONFIG => wire::shmem_config(offer.regions.len() as u32, 0, &offer.regions),
        request::GET_CONFIG | request::GET_VRING_BASE => asked.payload.clone(),
        _ if asked.flags & NEED_REPLY != 0 => wire::quads([0]),
        _ => return None,
    })
}
