//! A directory of the host in the guest: a VIRTIO file system device (id 26) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.11. Requests are FUSE. With a window (shared memory region 0), the guest's DAX has
//! parts of files mapped into it (vhost-user SHMEM_MAP), and reads and writes them in the host's page cache,
//! without a request. Called by `main`.
//!
//! Reading order: `policy` (the options), `requests` (bytes to bytes), `init` (what the guest may ask for),
//! `passthrough`, `xattr`, `ioctl`, `statx` and `locks` (what each request does), `waiters` (requests that
//! wait for a lock), `ids` (users and groups), `directory` (how a file is found and opened), `inodes` (the
//! files that the guest knows, found again when they are no longer held), `records` and `identity` (what is
//! recorded of them), `handles` (the host's names for them), `opens` (those that the guest has open), `lent`
//! (one of these for a read or write), `dax` (the window), `credentials` (as which user), `confine` (the
//! threads' rights), `descriptors` (how many files may be held), `queue` (where the bytes are), `guest`
//! (which of the guest's memory is RAM), `copies` (what is not); and `journal`, `change` and `kept`: what is
//! known of the guest in a file, so that it outlives this process (`--state`).
//!
//! Each queue has a thread of its own: while one waits for a disk, or for the front-end's answer to
//! SHMEM_MAP, the others go on.

mod change;
mod confine;
mod copies;
mod credentials;
mod dax;
mod descriptors;
mod directory;
mod guest;
mod handles;
mod identity;
mod ids;
mod init;
mod inodes;
mod ioctl;
mod journal;
mod kept;
mod lent;
mod locks;
mod opens;
mod passthrough;
mod policy;
mod queue;
mod records;
mod refused;
mod requests;
mod statx;
mod waiters;
mod xattr;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use rustix::thread::CapabilitySet;
use vhost::vhost_user::{Backend, VhostUserProtocolFeatures};
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;

use hotslot::report::say;
use hotslot::size;

use self::change::Mapping;
use self::confine::{Rights, Root};
use self::dax::Window;
use self::descriptors::Descriptors;
use self::directory::Directory;
use self::guest::{Guest, Known};
use self::handles::Handles;
use self::ids::{Ids, Map, Range};
use self::journal::{Journal, Keeper};
use self::kept::Kept;
use self::policy::{Cache, LocksOf, Policy, Xattrs};
use self::requests::Requester;
use crate::backing::LINUX_UNIT;
use crate::channel::SHMEM_ADDRESSES;
use crate::complaints::Complaints;
use crate::device::{Device, Later};
use crate::error::Error;
use crate::lock::lock;
use crate::ring::{Memory, Taken};
use crate::{sandbox, server};

const NAME: &str = "fs";

/// For mapping again what the guest has mapped, during SET_MEM_TABLE. Some front-ends serve the backend
/// channel only once they have the answer to that: they get it after this time. hotslot waits for 10 s.
const MAP_TIMEOUT: Duration = Duration::from_secs(4);

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

    /// Which extended attributes the guest has
    #[arg(long, value_name = "WHICH", default_value = "host")]
    xattr: Xattrs,

    /// Users of the guest from INSIDE on stand for users of this machine from OUTSIDE on, COUNT of them. May
    /// be given several times. Others of this machine are 65534 to the guest; others of the guest create no
    /// files
    #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT")]
    uid_map: Vec<Range>,

    /// The same for groups
    #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT")]
    gid_map: Vec<Range>,

    /// Give file systems that are mounted below the directory device numbers of their own in the guest, so
    /// that no two files of it have one number. Linux (up to 6.12 at least) enforces no ACLs on them then
    #[arg(long)]
    announce_submounts: bool,

    /// Let the guest make block and character devices, which are this machine's if others here open them.
    /// Needs root
    #[arg(long)]
    device_nodes: bool,

    /// Which processes see the locks (fcntl and flock) of the guest's processes
    #[arg(long, value_name = "WHO", default_value = "guest")]
    locks: LocksOf,

    /// Whether to find files by handles of the host's file system where names no longer lead to them. Needs
    /// CAP_DAC_READ_SEARCH, with which a back-end that was taken over could reach all files of that file
    /// system
    #[arg(long, value_name = "WHEN", default_value = "never")]
    inode_file_handles: handles::Use,

    /// Keep what the guest knows in this file: its files, those that are open, mapped and locked. When this
    /// program is killed and started again with the same command line, a guest whose front-end connects again
    /// goes on. The file is made if it does not exist; no guest may reach it
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,

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
    let map = |option, ranges: &[Range]| Map::new(ranges).map_err(|why| Error::Ids { option, why });
    let ids = Ids { users: map("--uid-map", &args.uid_map)?, groups: map("--gid-map", &args.gid_map)? };
    check_rights(args)?;
    let dir =
        confine::open(&args.dir).map_err(|source| Error::Directory { path: args.dir.clone(), source })?;
    let descriptors = Descriptors::raise_limit();
    let mut handles = handles(args, &dir)?;
    let keeper = keeper(args, &dir)?;
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
        queues: args.queues,
        keeper,
        policy: Arc::new(Policy {
            read_only: args.read_only,
            cache: args.cache,
            xattrs: args.xattr,
            announce_submounts: args.announce_submounts,
            device_nodes: args.device_nodes,
            locks: args.locks,
            ids,
        }),
    };
    let mut root = None;
    server::serve(NAME, listening, sandbox::not_yet, move |_, complaints| {
        let root = match &root {
            Some(root) => Arc::clone(root),
            None => Arc::clone(root.insert(confine(&dir, &settings.policy, descriptors, handles.take())?)),
        };
        Fs::new(&settings, root, complaints).map_err(Error::set_up("the directory"))
    })
}

/// What keeps the state, if the command line asks for that.
fn keeper(args: &Args, dir: &File) -> Result<Keeper, Error> {
    let Some(path) = &args.state else {
        return Ok(Keeper::default());
    };
    let metadata = dir.metadata().map_err(Error::set_up("the directory"))?;
    match Journal::open(path, &metadata) {
        Ok(journal) => Ok(Keeper(Some(Arc::new(journal)))),
        Err(source) => Err(Error::State { path: path.clone(), source: Box::new(source) }),
    }
}

/// What opens file handles, if the command line asks for that and it can be done.
fn handles(args: &Args, dir: &File) -> Result<Option<Handles>, Error> {
    if args.inode_file_handles == handles::Use::Never {
        return Ok(None);
    }
    match Handles::on_mount_of(dir) {
        Ok(handles) => Ok(Some(handles)),
        Err(source) if args.inode_file_handles == handles::Use::Mandatory => {
            Err(Error::NoHandles { path: args.dir.clone(), source })
        }
        Err(e) => {
            let path = &args.dir;
            say(format_args!("{NAME}: note: files of {path:?} cannot be opened by handles: {e}"));
            Ok(None)
        }
    }
}

/// Refuses what this user cannot do: the guest would find it out file by file.
fn check_rights(args: &Args) -> Result<(), Error> {
    let has = rustix::thread::capabilities(None)
        .map_err(|e| Error::set_up("the user's rights")(e.into()))?
        .effective;
    let ids = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN;
    let options = [
        ("--uid-map", !args.uid_map.is_empty(), ids),
        ("--gid-map", !args.gid_map.is_empty(), ids),
        ("--device-nodes", args.device_nodes, CapabilitySet::MKNOD),
    ];
    match options.iter().find(|(_, is_given, needed)| *is_given && !has.contains(*needed)) {
        Some(&(option, ..)) => Err(Error::NeedsRoot(option)),
        None => Ok(()),
    }
}

/// Called once, on the thread that serves.
fn confine(
    dir: &File,
    policy: &Policy,
    descriptors: Descriptors,
    handles: Option<Handles>,
) -> Result<Arc<Root>, Error> {
    let rights = Rights { read_only: policy.read_only, device_nodes: policy.device_nodes };
    let root = confine::confine(dir, rights, descriptors, handles)
        .map_err(Error::set_up("the confinement to the directory"))?;
    sandbox::fs();
    if let Some(note) = &root.note {
        say(format_args!("{NAME}: note: {note}"));
    }
    Ok(Arc::new(root))
}

/// From the command line.
struct Settings {
    tag: Tag,
    window: u64,
    queues: u16,
    keeper: Keeper,
    policy: Arc<Policy>,
}

/// The device, for one front-end.
struct Fs {
    /// Request queues.
    queues: u16,
    tag: Tag,
    requester: Requester,
    directory: Arc<Directory>,
    window: Option<Arc<Window>>,
    /// What the guest of the last session has mapped, until the front-end can map it again.
    mapped: Mutex<BTreeMap<u64, Mapping>>,
    /// The guest's memory for fuse-backend-rs, from the first SET_MEM_TABLE on. Lock order: innermost; held
    /// to copy the handle, and by the session's thread while it maps memory.
    memory: Mutex<Known>,
}

impl Fs {
    fn new(settings: &Settings, root: Arc<Root>, complaints: Arc<Complaints>) -> io::Result<Self> {
        let keeper = settings.keeper.clone();
        let window = (settings.window != 0)
            .then(|| Arc::new(Window::new(settings.window, keeper.clone(), Arc::clone(&complaints))));
        let policy = Arc::clone(&settings.policy);
        let directory =
            Directory::new(root, policy, window.clone(), keeper.clone(), Arc::clone(&complaints))?;
        let directory = Arc::new(directory);
        let requester = Requester::new(Arc::clone(&directory), window.clone(), complaints);
        let kept = keeper.0.map(|journal| journal.begin()).unwrap_or_default();
        let Kept { nodes, opens, .. } = &kept;
        if !nodes.is_empty() || !opens.is_empty() {
            let lost = directory.restore(&kept);
            say(format_args!(
                "{NAME}: a guest that goes on knows {} files and has {} open; {lost} of these and of its locks are lost",
                nodes.len(),
                opens.len()
            ));
        }
        requester.restore(kept.agreed);
        Ok(Fs {
            queues: settings.queues,
            tag: settings.tag.clone(),
            requester,
            directory,
            window,
            mapped: Mutex::new(kept.mappings),
            memory: Mutex::default(),
        })
    }

    /// At the start of a session: has the front-end map what the guest has mapped. Requests for the window
    /// wait for that. So does the front-end: it takes old mappings away once it has the answers of the start
    /// and the channel is quiet, and a mapping that came later would leave a hole until then.
    fn map_again(&self) -> io::Result<()> {
        let mapped = std::mem::take(&mut *lock(&self.mapped));
        let Some(window) = self.window.clone().filter(|_| !mapped.is_empty()) else {
            return Ok(());
        };
        let directory = Arc::clone(&self.directory);
        let (progress, made) = mpsc::channel();
        thread::Builder::new().name("map-again".to_owned()).spawn(move || {
            let tell = || {
                let _waits = progress.send(());
            };
            window.restore(&mapped, tell, |mapping| directory.open_mapped(mapping));
            tell();
        })?;
        // It has begun. (An error: the thread has panicked.)
        let _ = made.recv();
        if made.recv_timeout(MAP_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            say(format_args!(
                "{NAME}: what the guest has mapped is not all mapped again after {MAP_TIMEOUT:?}; going on meanwhile"
            ));
        }
        Ok(())
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
        lock(&self.memory).change(&memory.memory(), self.shared_memory())?;
        self.map_again()
    }

    fn reset(&self) {
        lock(&self.mapped).clear();
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

    fn answer(&self, thread: usize, (chain, guest): Self::Request) -> u32 {
        self.requester.answer(thread, chain, &guest)
    }

    fn answer_or_wait(&self, thread: usize, (chain, guest): Self::Request, later: Later) -> Option<u32> {
        self.requester.answer_or_wait(thread, chain, &guest, later)
    }

    fn stop_waiting(&self) {
        self.requester.stop_waiting();
    }
}
