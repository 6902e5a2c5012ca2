//! A directory of the host in the guest: a VIRTIO file system device (id 26) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.11. Requests are FUSE; with a window (shared memory region 0) the guest's DAX maps
//! files straight out of the host's page cache (vhost-user SHMEM_MAP), and reads and writes them there
//! without us. Called by `main`.
//!
//! Reading order: `requests` (bytes to bytes), `passthrough` (what each does), `inodes` (what the guest knows
//! and has open), `dax` (the window), `confine` (the fence), `queue` (where the bytes are).
//!
//! Each queue has a thread of its own: one that waits for a disk, or for the front-end's answer to SHMEM_MAP,
//! keeps no other waiting.

mod confine;
mod dax;
mod inodes;
mod passthrough;
mod queue;
mod requests;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::VhostUserShMemConfig;
use vhost::vhost_user::{Backend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use self::confine::Root;
use self::dax::Window;
use self::passthrough::{Cache, Directory};
use self::requests::Requester;
use crate::backing::parse_size;
use crate::requests::{Complaints, hand_back, lock, session_has_ended};
use crate::server::{self, Memory};
use hotslot::report::say;

const NAME: &str = "fs";

/// `struct virtio_fs_config { u8 tag[36]; le32 num_request_queues; le32 notify_buf_size; }`; the last is
/// there with VIRTIO_FS_F_NOTIFICATION.
const TAG_LEN: usize = 36;
/// Queue 0 is for what must not wait behind requests; the request queues follow.
const HIGH_PRIORITY_QUEUES: u16 = 1;
const MAX_REQUEST_QUEUES: i64 = 32;
/// A request of 1 MiB takes a descriptor a page, and a few.
const QUEUE_SIZE: usize = 1024;
/// Linux wants base and size of the window in units of its memory sections' parts (2 MiB, the sub-section).
const LINUX_UNIT: u64 = 2 << 20;

/// A directory of this machine in the guest (virtio-fs), mapped into it with DAX
///
/// The guest mounts it with `mount -t virtiofs -o dax=always TAG /mnt`; files are then read and written in
/// this machine's page cache, through a window into which parts of them are mapped. Without `-o dax` they are
/// sent back and forth.
///
/// As root, what a user of the guest creates belongs to that user. Otherwise all is done as the user who
/// started this, and the guest's root is that user here. Nothing outside the directory can be reached.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    /// Directory that the guest sees
    #[arg(long, value_name = "PATH")]
    dir: PathBuf,

    /// Name by which the guest mounts it, of 1 to 36 bytes
    #[arg(long, value_name = "TAG", default_value = "share", value_parser = parse_tag)]
    tag: Tag,

    /// Size of the DAX window, a multiple of 2M; 0 for none, and then no DAX. It costs the guest 1/64 of that
    /// in memory
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = parse_window)]
    window: u64,

    /// Let the guest read only
    #[arg(long)]
    read_only: bool,

    /// What the guest may cache of names, attributes and (without DAX) data
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    cache: Cache,

    /// Request queues, each served by a thread of its own; the front-end has to offer the guest one queue
    /// more
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_REQUEST_QUEUES))]
    queues: u16,
}

#[derive(Clone)]
struct Tag([u8; TAG_LEN]);

fn parse_tag(text: &str) -> Result<Tag, String> {
    let mut tag = [0; TAG_LEN];
    match tag.get_mut(..text.len()) {
        Some(bytes) if !text.is_empty() => bytes.copy_from_slice(text.as_bytes()),
        _ => return Err(format!("it has {} bytes", text.len())),
    }
    Ok(Tag(tag))
}

fn parse_window(text: &str) -> Result<u64, String> {
    let size = if text == "0" { 0 } else { parse_size(text).map_err(|e| e.to_string())? };
    if size % LINUX_UNIT != 0 {
        return Err("it is not a multiple of 2M".to_owned());
    }
    Ok(size)
}

/// Why there is no device, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot serve the directory {path:?}")]
    Directory { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Server(#[from] server::Error),
}

impl Error {
    /// The exit status: 2 where another command line would have helped.
    pub fn status(&self) -> u8 {
        match self {
            Error::Directory { .. } => 2,
            Error::Server(e) => e.status(),
        }
    }

    /// What the user could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Directory { .. } => None,
            Error::Server(e) => e.hint(),
        }
    }
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]: all but confinement, sessions and descriptors is found out before it listens.
pub fn run(args: &Args) -> Result<(), Error> {
    let dir =
        confine::open(&args.dir).map_err(|source| Error::Directory { path: args.dir.clone(), source })?;
    confine::raise_descriptor_limit();
    let listening = server::listen(&args.server)?;
    let access = if args.read_only { "read-only" } else { "read-write" };
    let window = match args.window {
        0 => "no DAX window".to_owned(),
        size => format!("a DAX window of {} MiB", size >> 20),
    };
    let text = String::from_utf8_lossy(&args.tag.0);
    let tag = text.trim_end_matches('\0');
    say(format_args!("{NAME}: {listening}: {:?} as {tag:?}, {access}, {window}", args.dir));

    let settings = Settings {
        tag: args.tag.clone(),
        window: args.window,
        read_only: args.read_only,
        cache: args.cache,
        queues: args.queues,
    };
    let mut root = None;
    server::serve(NAME, listening, move |_| {
        let root = match &root {
            Some(root) => Arc::clone(root),
            None => Arc::clone(root.insert(confine(&dir, settings.read_only)?)),
        };
        Fs::new(&settings, root).map_err(|source| server::Error::SetUp { what: "the directory", source })
    })?;
    Ok(())
}

/// Once, on the thread that serves.
fn confine(dir: &File, read_only: bool) -> Result<Arc<Root>, server::Error> {
    let root = confine::confine(dir, read_only)
        .map_err(|source| server::Error::SetUp { what: "the confinement to the directory", source })?;
    if let Some(note) = &root.note {
        say(format_args!("{NAME}: note: {note}"));
    }
    Ok(Arc::new(root))
}

/// What the command line says.
struct Settings {
    tag: Tag,
    window: u64,
    read_only: bool,
    cache: Cache,
    queues: u16,
}

/// The device, for one front-end.
///
/// The session's thread calls everything but `handle_event`, which runs on the queues' threads.
struct Fs {
    config: Vec<u8>,
    requester: Requester,
    window: Option<Arc<Window>>,
    /// The guest's memory for fuse-backend-rs, from the first SET_MEM_TABLE on. Held only to copy the handle.
    memory_for_fuse: Mutex<Option<queue::Memory>>,
    /// One for each queue. Held by its thread while it answers requests, and taken by whoever has to know
    /// that it is done; the outermost lock.
    answering: Vec<Mutex<()>>,
    was_asked: AtomicBool,
    complaints: Arc<Complaints>,
}

impl Fs {
    fn new(settings: &Settings, root: Arc<Root>) -> io::Result<Self> {
        let complaints = Arc::new(Complaints::of(NAME));
        let window =
            (settings.window != 0).then(|| Arc::new(Window::new(settings.window, Arc::clone(&complaints))));
        let directory = Directory::new(root, settings.read_only, settings.cache, window.clone())?;
        let mut config = settings.tag.0.to_vec();
        config.extend(u32::from(settings.queues).to_le_bytes());
        Ok(Fs {
            config,
            requester: Requester::new(directory, window.clone(), Arc::clone(&complaints)),
            window,
            memory_for_fuse: Mutex::new(None),
            answering: (0..HIGH_PRIORITY_QUEUES + settings.queues).map(|_| Mutex::new(())).collect(),
            was_asked: AtomicBool::new(false),
            complaints,
        })
    }

    /// Answers what is in a queue, and waits for nothing more.
    fn answer_requests(&self, vring: &VringMutex) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            // Copied for each request: a memory table may come between two.
            let Some(memory) = lock(&self.memory_for_fuse).clone() else {
                return Ok(());
            };
            let Some(request) = queue::next(vring, &memory)? else {
                return Ok(());
            };
            let head = request.head_index();
            let written = self.requester.answer(request, &memory);
            // The requests behind it may have come with the same kick.
            if let Err(e) = hand_back(vring, head, written) {
                self.complaints.say(format_args!("request {head} cannot be handed back: {e}"));
            }
        }
    }
}

impl server::Device for Fs {
    fn end_event(&self) -> u16 {
        // The crate has taken the number of queues for itself.
        self.answering.len() as u16 + 1
    }

    fn was_asked(&self) -> bool {
        self.was_asked.load(Ordering::Relaxed)
    }
}

impl VhostUserBackend for Fs {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.answering.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    /// Bit i of number n: thread n serves queue i.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.answering.len()).map(|queue| 1 << queue).collect()
    }

    fn features(&self) -> u64 {
        self.was_asked.store(true, Ordering::Relaxed);
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if self.window.is_some() {
            features |= VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::SHMEM;
        }
        features
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        let sizes: Vec<u64> = self.window.iter().map(|window| window.size()).collect();
        Ok(VhostUserShMemConfig::new(sizes.len() as u32, &sizes))
    }

    /// What lies behind the structure is zero.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let byte = |at: u32| self.config.get(at as usize).copied().unwrap_or(0);
        // The crate has limited both to 4 KiB.
        (offset..offset.saturating_add(size)).map(byte).collect()
    }

    fn set_backend_req_fd(&self, channel: Backend) {
        if let Some(window) = &self.window {
            window.connect(channel);
        }
    }

    /// Called at SET_MEM_TABLE: the device is started, or the guest's memory changed.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *lock(&self.memory_for_fuse) = Some(queue::map(&memory.memory())?);
        Ok(())
    }

    /// Called at GET_VRING_BASE, with the queue stopped: returns when nothing of it is in flight.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if let Some(answering) = self.answering.get(index as usize) {
            drop(lock(answering));
        }
        Ok(())
    }

    /// Called at RESET_DEVICE, with the queues disabled. The front-end removes the mappings.
    fn reset_device(&self) {
        for answering in &self.answering {
            drop(lock(answering));
        }
        self.requester.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate has told the queues.
    }

    /// Called by a queue's thread for a kick, and at the end of the session. An error ends the thread, which
    /// knows its queue as number 0.
    fn handle_event(&self, event: u16, _: EventSet, vrings: &[VringMutex], thread: usize) -> io::Result<()> {
        match (event, vrings.first(), self.answering.get(thread)) {
            (0, Some(vring), Some(answering)) => {
                let _answering = lock(answering);
                if let Err(e) = self.answer_requests(vring) {
                    self.complaints.say(format_args!("queue {thread} is broken: {e}"));
                }
                Ok(())
            }
            _ => Err(session_has_ended()),
        }
    }
}
