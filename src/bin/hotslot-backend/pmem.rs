//! Persistent memory whose contents are a file: a VIRTIO pmem device (id 27) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.19, with VIRTIO_PMEM_F_SHMEM_REGION: the memory is shared memory region 0, into
//! which the front-end maps the file (vhost-user SHMEM_MAP). So loads and stores of the guest reach the
//! file's page cache directly. This back-end only has it mapped at each start of the device, and flushes it.
//! Called by `main`.
//!
//! SHMEM_MAP is sent at SET_MEM_TABLE, which each start of the device begins with, so that the mapping exists
//! before the driver sees the device run. A front-end removes it at a device reset.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::Backend;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;
use vm_memory::{GuestAddressSpace, Le32};

use hotslot::report::say;

use crate::backing::{self, Backing};
use crate::channel::Channel;
use crate::complaints::Complaints;
use crate::device::{self, Device, Request};
use crate::error::Error;
use crate::ring::{Memory, Taken};
use crate::{sandbox, server};

const NAME: &str = "pmem";

/// Feature bit: the memory is shared memory region 0, not a range named in the configuration space (whose
/// fields `start` and `size` are then 0, section 5.19.4).
const VIRTIO_PMEM_F_SHMEM_REGION: u32 = 0;
/// The only request type. Its answer is 0 for success and -1 for failure (section 5.19.6).
const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;
const RET_OK: u32 = 0;
const RET_FAILED: u32 = -1i32 as u32;

/// For the answer to SHMEM_MAP, during SET_MEM_TABLE. Some front-ends serve the backend channel only once
/// they have the answer to SET_MEM_TABLE: they get it after this time, and SHMEM_MAP succeeds a moment later.
const MAP_TIMEOUT: Duration = Duration::from_secs(2);

/// Persistent memory whose contents are a regular file (VIRTIO pmem)
///
/// The guest sees the file as /dev/pmemN (Linux 6.9 or later) and can mount it with DAX. The memory has the
/// size of the file, rounded up to 2 MiB because Linux takes no other. Bytes past the end of the file read as
/// zero, and writes to them are lost.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    #[command(flatten)]
    backing: backing::Args,
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]; a wrong command line or file is found before the socket exists.
pub fn run(args: &Args) -> Result<(), Error> {
    // First, because the next line may create the file.
    let listening = server::listen(&args.server)?;
    let backing = Backing::open(&args.backing)?;
    say(format_args!("{NAME}: {listening}: {backing}"));
    for note in backing.notes() {
        say(format_args!("{NAME}: note: {note}"));
    }
    server::serve(NAME, listening, sandbox::pmem, move |memory, complaints| {
        Ok(Pmem {
            backing: backing.clone(),
            memory,
            complaints,
            channel: Arc::default(),
            mapped: Arc::default(),
        })
    })
}

/// The device, for one front-end.
struct Pmem {
    backing: Backing,
    memory: Memory,
    complaints: Arc<Complaints>,
    channel: Arc<Channel>,
    /// Whether SHMEM_MAP succeeded since the last reset.
    mapped: Arc<AtomicBool>,
}

impl Pmem {
    /// Has the front-end map the file into region 0.
    ///
    /// If SET_MEM_TABLE came again without a reset, the file is mapped already: the front-end refuses, and
    /// nothing is wrong. An UNMAP first would open a hole under a running guest.
    fn map(&self) {
        let (done, answered) = mpsc::channel();
        let (channel, mapped, backing) =
            (Arc::clone(&self.channel), Arc::clone(&self.mapped), self.backing.clone());
        // On a thread of its own, because the crate cannot wait with a time limit.
        let spawned = thread::Builder::new().name("shmem-map".to_owned()).spawn(move || {
            match channel.map(0, backing.size, (&backing.image.file, 0), !backing.image.read_only) {
                Ok(()) => mapped.store(true, Ordering::Release),
                Err(e) => say(format_args!(
                    "{NAME}: {e}{}",
                    if mapped.load(Ordering::Acquire) {
                        " (it was mapped before, and there was no reset since, so it should still be mapped)"
                    } else {
                        ""
                    }
                )),
            }
            // After a timeout the receiver is gone.
            let _ = done.send(());
        });
        match spawned.map(|_| answered.recv_timeout(MAP_TIMEOUT)) {
            Ok(Err(mpsc::RecvTimeoutError::Timeout)) => {
                say(format_args!("{NAME}: no answer to SHMEM_MAP within {MAP_TIMEOUT:?}; going on without"));
            }
            Ok(_) => {}
            Err(e) => say(format_args!("{NAME}: cannot start the thread for SHMEM_MAP: {e}")),
        }
    }

    /// Makes the guest's writes durable.
    fn flush(&self) -> u32 {
        match self.backing.image.flush() {
            Ok(()) => RET_OK,
            Err(e) => {
                self.complaints.say(format_args!("cannot flush {:?}: {e}", self.backing.image.path));
                RET_FAILED
            }
        }
    }
}

impl Device for Pmem {
    type Request = Request;

    fn features(&self) -> u64 {
        1 << VIRTIO_PMEM_F_SHMEM_REGION
    }

    fn acked_features(&self, features: u64) {
        let driver_is_there = features & (1 << VIRTIO_F_VERSION_1) != 0;
        if driver_is_there && features & (1 << VIRTIO_PMEM_F_SHMEM_REGION) == 0 {
            say(format_args!(
                "{NAME}: the driver did not accept VIRTIO_PMEM_F_SHMEM_REGION, so it cannot find the memory; Linux \
                 does since 6.9"
            ));
        }
    }

    fn shared_memory(&self) -> Option<u64> {
        Some(self.backing.size)
    }

    fn connect(&self, backend: Backend) {
        self.channel.connect(backend);
    }

    /// Never fails: that would end the session, while a device without its memory can still tell the driver.
    fn memory_changed(&self, _memory: &Memory) -> io::Result<()> {
        self.map();
        Ok(())
    }

    fn reset(&self) {
        self.mapped.store(false, Ordering::Release);
    }

    fn take(&self, queue: &mut Queue) -> Taken<Request> {
        device::take(queue, &self.memory)
    }

    /// `struct virtio_pmem_req { le32 type; }`, readable, then `struct virtio_pmem_resp { le32 ret; }`,
    /// writable, in as many buffers as the driver likes. A request without room for the answer is not
    /// executed.
    fn answer(&self, _thread: usize, request: Request) -> u32 {
        let memory = self.memory.memory();
        let mut answer = match request.clone().writer(&memory) {
            Ok(answer) if answer.available_bytes() >= size_of::<Le32>() => answer,
            Ok(_) => {
                self.complaints.say("a request has no room for its answer");
                return 0;
            }
            Err(e) => {
                self.complaints.say(format_args!("the answer of a request has no valid place: {e}"));
                return 0;
            }
        };
        let ret = match request.reader(&memory).map(|mut request| request.read_obj::<Le32>()) {
            Ok(Ok(kind)) if kind.to_native() == VIRTIO_PMEM_REQ_TYPE_FLUSH => self.flush(),
            Ok(Ok(kind)) => {
                self.complaints.say(format_args!("a request has the unknown type {}", kind.to_native()));
                RET_FAILED
            }
            Ok(Err(e)) => {
                self.complaints.say(format_args!("a request is too short: {e}"));
                RET_FAILED
            }
            Err(e) => {
                self.complaints.say(format_args!("a request is not in the guest's memory: {e}"));
                RET_FAILED
            }
        };
        match answer.write_obj(Le32::from(ret)) {
            Ok(()) => size_of::<Le32>() as u32,
            Err(e) => {
                self.complaints.say(format_args!("cannot write an answer: {e}"));
                0
            }
        }
    }
}
