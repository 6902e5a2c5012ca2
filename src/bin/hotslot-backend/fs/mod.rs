//! A directory of the host in the guest: a VIRTIO file system device (id 26) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.11. Requests are FUSE. With a window (shared memory region 0), the guest's DAX has
//! parts of files mapped into it (vhost-user SHMEM_MAP), and reads and writes them in the host's page cache,
//! without a request. Called by `main`.
//!
//! Reading order: `requests` (bytes to bytes), `passthrough` (what each request does), `directory` (how a
//! file is found and opened), `inodes` (the files that the guest knows and has open), `dax` (the window),
//! `credentials` (as which user), `confine` (the threads' rights), `queue` (where the bytes are), `guest`
//! (which of the guest's memory is RAM), `copies` (what is not).
//!
//! Each queue has a thread of its own: while one waits for a disk, or for the front-end's answer to
//! SHMEM_MAP, the others go on.

mod confine;
mod copies;
mod credentials;
mod dax;
mod directory;
mod guest;
mod inodes;
mod passthrough;
mod queue;
mod refused;
mod requests;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{Backend, VhostUserProtocolFeatures};
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;

use hotslot::report::say;
use hotslot::size;

use self::confine::Root;
use self::dax::Window;
use self::directory::{Cache, Directory};
use self::guest::{Guest, Known};
use self::requests::Requester;
use crate::backing::LINUX_UNIT;
use crate::channel::SHMEM_ADDRESSES;
use crate::complaints::Complaints;
use crate::device::{Device, Memory, Taken};
use crate::error::Error;
use crate::lock::lock;
use crate::server;

const NAME: &str = "fs";

/// `struct virtio_fs_config { u8 tag[36]; le32 num_request_queues; le32 notify_buf_size; }`; the last is
/// there with VIRTIO_FS_F_NOTIFICATION.
const TAG_LEN: usize = 36;
/// Queue 0 is for FUSE_FORGET and FUSE_INTERRUPT; the request queues follow.
const HIGH_PRIORITY_QUEUES: u16 = 1;
const MAX_REQUEST_QUEUES: i64 = 32;

/// A directory of this machine in the guest (virtio-fs), mapped into it with DAX
///
/// The guest mounts it with `mount -t virtiofs -o dax=always TAG /mnt`; files are then read and written in
/// this machine's page cache, through a window into which parts of them are mapped. Without `-o dax` each
/// read and write is a request.
///
/// Started by root, files that a user of the guest creates belong to that user. Started by another user, all
/// is done as that user, who stands for the guest's root. Nothing outside the directory can be reached.
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

    /// Size of the DAX window, a multiple of 2M; 0 for no window and no DAX. It costs the guest 1/64 of its
    /// size in memory
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = parse_window)]
    window: u64,

    /// Let the guest read only
    #[arg(long)]
    read_only: bool,

    /// What the guest may cache of names, attributes and (without DAX) data
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    cache: Cache,

    /// Request queues, each served by a thread of its own; the front-end must offer the guest one queue more
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
    let size = size::parse(text).map_err(|e| e.to_string())?;
    if size % LINUX_UNIT != 0 {
        return Err("it is not a multiple of 2M".to_owned());
    }
    Ok(size)
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]; a wrong command line or directory is found before the socket exists.
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
    server::serve(NAME, listening, move |_, complaints| {
        let root = match &root {
            Some(root) => Arc::clone(root),
            None => Arc::clone(root.insert(confine(&dir, settings.read_only)?)),
        };
        Fs::new(&settings, root, complaints).map_err(Error::set_up("the directory"))
    })
}

/// Called once, on the thread that serves.
fn confine(dir: &File, read_only: bool) -> Result<Arc<Root>, Error> {
    let root = confine::confine(dir, read_only).map_err(Error::set_up("the confinement to the directory"))?;
    if let Some(note) = &root.note {
        say(format_args!("{NAME}: note: {note}"));
    }
    Ok(Arc::new(root))
}

/// From the command line.
struct Settings {
    tag: Tag,
    window: u64,
    read_only: bool,
    cache: Cache,
    queues: u16,
}

/// The device, for one front-end.
struct Fs {
    /// Request queues.
    queues: u16,
    tag: Tag,
    requester: Requester,
    window: Option<Arc<Window>>,
    /// The guest's memory for fuse-backend-rs, from the first SET_MEM_TABLE on. Lock order: innermost; held
    /// to copy the handle, and by the session's thread while it maps memory.
    memory: Mutex<Known>,
}

impl Fs {
    fn new(settings: &Settings, root: Arc<Root>, complaints: Arc<Complaints>) -> io::Result<Self> {
        let window =
            (settings.window != 0).then(|| Arc::new(Window::new(settings.window, Arc::clone(&complaints))));
        let directory = Directory::new(root, settings.read_only, settings.cache, window.clone())?;
        Ok(Fs {
            queues: settings.queues,
            tag: settings.tag.clone(),
            requester: Requester::new(directory, window.clone(), complaints),
            window,
            memory: Mutex::default(),
        })
    }
}

impl Device for Fs {
    type Request = (queue::Chain, Arc<Guest>);

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        match self.window {
            Some(_) => {
                VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                    | VhostUserProtocolFeatures::from_bits_retain(SHMEM_ADDRESSES)
            }
            None => VhostUserProtocolFeatures::empty(),
        }
    }

    fn queues(&self) -> u16 {
        HIGH_PRIORITY_QUEUES + self.queues
    }

    fn config(&self) -> Vec<u8> {
        [&self.tag.0[..], &u32::from(self.queues).to_le_bytes()].concat()
    }

    fn shared_memory(&self) -> Option<u64> {
        self.window.as_ref().map(|window| window.size())
    }

    fn connect(&self, backend: Backend) {
        if let Some(window) = &self.window {
            window.connect(backend);
        }
    }

    fn memory_changed(&self, memory: &Memory) -> io::Result<()> {
        lock(&self.memory).change(&memory.memory(), self.shared_memory())
    }

    fn reset(&self) {
        self.requester.reset();
    }

    fn take(&self, queue: &mut Queue) -> Taken<Self::Request> {
        // Copied for each request: a SET_MEM_TABLE may come between two.
        let Some(guest) = lock(&self.memory).guest() else {
            return Ok(None);
        };
        let chain = queue::take(queue, &guest.ram)?;
        Ok(chain.map(|chain| (chain.head_index(), (chain, guest))))
    }

    fn answer(&self, _thread: usize, (chain, guest): Self::Request) -> u32 {
        self.requester.answer(chain, &guest)
    }
}
