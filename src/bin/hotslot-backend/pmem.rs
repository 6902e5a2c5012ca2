//! Persistent memory whose contents are a file: a VIRTIO pmem device (id 27) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.19, with VIRTIO_PMEM_F_SHMEM_REGION: the memory is shared memory region 0, into
//! which the front-end maps the file (vhost-user SHMEM_MAP). So loads and stores of the guest reach the
//! file's page cache without us; what is left to do here is to map it at each start of the device, and to
//! flush. Called by `main`.
//!
//! The mapping is asked for inside SET_MEM_TABLE, the one message of a start that the `vhost-user-backend`
//! crate passes on, so that it exists before the driver sees the device run. A front-end drops it at a device
//! reset.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{
    Backend, VhostUserFrontendReqHandler, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringMutex};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, Le32};
use vmm_sys_util::epoll::EventSet;

use crate::backing::{self, Backing};
use crate::requests::{Request, Requests, lock, refusal, session_has_ended};
use crate::server::{self, Memory};
use hotslot::report::say;

const NAME: &str = "pmem";

/// Feature bit: the memory is shared memory region 0, and not a range named in the configuration space.
const VIRTIO_PMEM_F_SHMEM_REGION: u32 = 0;
const VIRTIO_PMEM_SHMEM_REGION_ID: u8 = 0;
/// The only request type. Its answer is 0 for success and -1 for failure (section 5.19.6).
const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;
const RET_OK: u32 = 0;
const RET_FAILED: u32 = -1i32 as u32;

/// Queue 0 is the request queue, and there is no other; 1 is the crate's, for events of its own.
const REQUEST_QUEUE: u16 = 0;
const NUM_QUEUES: u16 = 1;
const END_EVENT: u16 = NUM_QUEUES + 1;
/// Linux keeps one request per flushing thread in flight; 64 is plenty.
const QUEUE_SIZE: usize = 1024;

/// How long SET_MEM_TABLE waits for the answer to SHMEM_MAP. A front-end that serves our requests only once
/// it has the answer to its own gets that answer after this time, and the mapping a moment later.
const MAP_PATIENCE: Duration = Duration::from_secs(2);

/// Persistent memory whose contents are a regular file (VIRTIO pmem)
///
/// The guest sees the file as /dev/pmemN (Linux 6.9 or later) and can mount it with DAX. The memory has the
/// size of the file, rounded up to 2 MiB because Linux takes no other; what lies past the end of the file
/// reads as zero, and what is written there is lost.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    #[command(flatten)]
    backing: backing::Args,
}

/// Why there is no device, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Backing(#[from] backing::Error),
    #[error(transparent)]
    Server(#[from] server::Error),
}

impl Error {
    /// The exit status: 2 where another command line would have helped.
    pub fn status(&self) -> u8 {
        match self {
            Error::Backing(_) => 2,
            Error::Server(e) => e.status(),
        }
    }

    /// What the user could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Backing(e) => e.hint(),
            Error::Server(e) => e.hint(),
        }
    }
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]: all but sessions and descriptors is found out before it listens.
pub fn run(args: &Args) -> Result<(), Error> {
    let backing = Backing::open(&args.backing)?;
    let listening = server::listen(&args.server)?;
    say(format_args!("{NAME}: {listening}: {backing}"));
    for note in backing.notes() {
        say(format_args!("{NAME}: note: {note}"));
    }
    server::serve(NAME, listening, move |memory| Ok(Pmem::new(backing.clone(), memory)))?;
    Ok(())
}

/// The device, for one front-end.
///
/// The session's thread calls everything but `handle_event`, which runs on the crate's worker thread.
struct Pmem {
    backing: Backing,
    memory: Memory,
    requests: Requests,
    /// Our requests to the front-end. Held only to copy the handle, never while an answer is awaited.
    channel: Mutex<Option<Backend>>,
    /// Whether the mapping was made and no reset was told since.
    mapped: Arc<AtomicBool>,
    was_asked: AtomicBool,
}

impl Pmem {
    fn new(backing: Backing, memory: Memory) -> Self {
        Pmem {
            backing,
            requests: Requests::new(NAME, memory.clone()),
            memory,
            channel: Mutex::new(None),
            mapped: Arc::default(),
            was_asked: AtomicBool::new(false),
        }
    }

    /// Has the front-end map the file into region 0.
    ///
    /// Where it is mapped already, because SET_MEM_TABLE came again without a reset, the front-end refuses,
    /// and all is well: it is the same file at the same place. To unmap first would open a hole under a
    /// running guest.
    fn map(&self) {
        let Some(channel) = lock(&self.channel).clone() else {
            say(format_args!("{NAME}: cannot map: the front-end gave no back-end channel"));
            return;
        };
        let (done, answered) = mpsc::channel();
        let mapped = Arc::clone(&self.mapped);
        let backing = self.backing.clone();
        // A thread of its own, so that what waits here can stop waiting: the crate cannot.
        let spawned = thread::Builder::new().name("shmem-map".to_owned()).spawn(move || {
            let flags = if backing.read_only {
                VhostUserMMapFlags::empty()
            } else {
                VhostUserMMapFlags::WRITABLE
            };
            let request = VhostUserMMap {
                shmid: VIRTIO_PMEM_SHMEM_REGION_ID,
                fd_offset: 0,
                shm_offset: 0,
                len: backing.size,
                flags: flags.bits(),
                ..Default::default()
            };
            match channel.shmem_map(&request, backing.file.as_ref()) {
                Ok(_) => mapped.store(true, Ordering::Release),
                Err(e) => say(format_args!(
                    "{NAME}: SHMEM_MAP of region {VIRTIO_PMEM_SHMEM_REGION_ID}, offset 0, {} bytes, {}, failed: {}{}",
                    backing.size,
                    backing.access(),
                    refusal(&e),
                    if mapped.load(Ordering::Acquire) {
                        " (it was mapped before, and no reset was told since: all is well if it still is)"
                    } else {
                        ""
                    }
                )),
            }
            // Nobody listens any more if it took too long.
            let _ = done.send(());
        });
        match spawned.map(|_| answered.recv_timeout(MAP_PATIENCE)) {
            Ok(Err(mpsc::RecvTimeoutError::Timeout)) => {
                say(format_args!("{NAME}: no answer to SHMEM_MAP within {MAP_PATIENCE:?}; going on without"));
            }
            Ok(_) => {}
            Err(e) => say(format_args!("{NAME}: cannot map: no thread to wait for the answer: {e}")),
        }
    }

    /// Executes a request. Returns how many bytes of its buffers were written.
    ///
    /// `struct virtio_pmem_req { le32 type; }`, readable, then `struct virtio_pmem_resp { le32 ret; }`,
    /// writable, in as many descriptors as the driver likes. Without room for the answer there is none, and
    /// nothing is done.
    fn answer(&self, request: Request) -> u32 {
        let memory = self.memory.memory();
        let mut answer = match request.clone().writer(&memory) {
            Ok(answer) if answer.available_bytes() >= size_of::<Le32>() => answer,
            Ok(_) => {
                self.requests.complain("a request has no room for its answer");
                return 0;
            }
            Err(e) => {
                self.requests.complain(format_args!("the answer of a request has no valid place: {e}"));
                return 0;
            }
        };
        let ret = match request.reader(&memory).map(|mut request| request.read_obj::<Le32>()) {
            Ok(Ok(kind)) if kind.to_native() == VIRTIO_PMEM_REQ_TYPE_FLUSH => self.flush(),
            Ok(Ok(kind)) => {
                self.requests.complain(format_args!("a request has the unknown type {}", kind.to_native()));
                RET_FAILED
            }
            Ok(Err(e)) => {
                self.requests.complain(format_args!("a request is too short: {e}"));
                RET_FAILED
            }
            Err(e) => {
                self.requests.complain(format_args!("a request is not in the guest's memory: {e}"));
                RET_FAILED
            }
        };
        match answer.write_obj(Le32::from(ret)) {
            Ok(()) => size_of::<Le32>() as u32,
            Err(e) => {
                self.requests.complain(format_args!("cannot write an answer: {e}"));
                0
            }
        }
    }

    /// Makes what the guest wrote durable.
    fn flush(&self) -> u32 {
        if self.backing.read_only {
            return RET_OK;
        }
        match self.backing.file.sync_data() {
            Ok(()) => RET_OK,
            Err(e) => {
                self.requests.complain(format_args!("cannot flush {:?}: {e}", self.backing.path));
                RET_FAILED
            }
        }
    }
}

impl server::Device for Pmem {
    fn end_event(&self) -> u16 {
        END_EVENT
    }

    fn was_asked(&self) -> bool {
        self.was_asked.load(Ordering::Relaxed)
    }
}

impl VhostUserBackend for Pmem {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        NUM_QUEUES.into()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.was_asked.store(true, Ordering::Relaxed);
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_PMEM_F_SHMEM_REGION)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Called at SET_FEATURES, with what the driver accepted.
    fn acked_features(&self, features: u64) {
        let driver_is_there = features & (1 << VIRTIO_F_VERSION_1) != 0;
        if driver_is_there && features & (1 << VIRTIO_PMEM_F_SHMEM_REGION) == 0 {
            say(format_args!(
                "{NAME}: the driver did not accept VIRTIO_PMEM_F_SHMEM_REGION, so it cannot find the memory; Linux \
                 does since 6.9"
            ));
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::SHMEM
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[self.backing.size]))
    }

    /// `start` and `size` are zero, and so is all else: where the memory is, only the front-end knows
    /// (section 5.19.4).
    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        // The crate has limited the size to 4 KiB.
        vec![0; size as usize]
    }

    fn set_backend_req_fd(&self, channel: Backend) {
        *lock(&self.channel) = Some(channel);
    }

    /// Called at SET_MEM_TABLE: the device is started, or the guest's memory changed.
    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // An error would end the session; a device without its memory can still say what is wrong.
        self.map();
        Ok(())
    }

    /// Called at GET_VRING_BASE, with the queue stopped: returns when nothing of it is in flight.
    fn stop_vring(&self, _index: u32) -> io::Result<()> {
        self.requests.wait();
        Ok(())
    }

    /// Called at RESET_DEVICE, with the queue disabled. The front-end removes the mapping.
    fn reset_device(&self) {
        self.requests.wait();
        self.mapped.store(false, Ordering::Release);
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate has told the queue.
    }

    /// Called by the worker for a kick, and at the end of the session. An error ends the worker.
    fn handle_event(&self, event: u16, _: EventSet, vrings: &[VringMutex], _: usize) -> io::Result<()> {
        match (event, vrings.first()) {
            (REQUEST_QUEUE, Some(vring)) => {
                self.requests.answer(vring, |request| self.answer(request));
                Ok(())
            }
            _ => Err(session_has_ended()),
        }
    }
}
