//! The back-end of the lessons (`src/lessons.md`): a device with one shared memory region and one file,
//! which has a single page and a number in it that grows. Each time that the driver starts the device,
//! the back-end has the front-end map that page into the region: vhost-user's SHMEM_MAP.
//!
//!     counter SOCKET [OFFSET...]
//!
//! maps the page at each OFFSET of the region, at 0 where none is given. `probe counter`
//! (`guest/src/counter.rs`) is the driver. The crate `vhost-user-backend` speaks the protocol; what is
//! left to do is in this file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{Backend, Listener, VhostUserFrontendReqHandler, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const PAGE: u64 = 4096;
/// Bytes of region 0. A window is reserved for it in the guest's physical addresses, and no memory.
const REGION: u64 = 2 << 20;
/// VIRTIO 1.3, section 6: the device is not one of before VIRTIO 1.0.
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// vhost-user: the two sides negotiate protocol features.
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

struct Counter {
    /// The page with the number. It is shared memory: the guest sees each write at once.
    page: Arc<File>,
    /// Where in the region it is to be.
    offsets: Vec<u64>,
    /// The second socket, on which the back-end asks and the front-end answers.
    channel: Option<Backend>,
}

impl Counter {
    fn map(&self, offset: u64) {
        let Some(channel) = &self.channel else { return };
        let flags = VhostUserMMapFlags::default().bits(); // Not writable.
        let request =
            VhostUserMMap { shmid: 0, padding: [0; 7], fd_offset: 0, shm_offset: offset, len: PAGE, flags };
        match channel.shmem_map(&request, &*self.page) {
            Ok(_) => eprintln!("counter: SHMEM_MAP at {offset:#x}: done"),
            Err(error) => eprintln!("counter: SHMEM_MAP at {offset:#x}: refused: {error}"),
        }
    }
}

impl VhostUserBackendMut for Counter {
    type Bitmap = ();
    type Vring = VringRwLock;

    // What the device is. It has a queue because a driver expects one, and never looks at it.

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::SHMEM
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[REGION]))
    }

    // What happens to it.

    fn set_backend_req_fd(&mut self, channel: Backend) {
        self.channel = Some(channel);
    }

    /// SET_MEM_TABLE, with which each start of the device begins.
    fn update_memory(&mut self, _: Memory) -> io::Result<()> {
        self.offsets.iter().for_each(|offset| self.map(*offset));
        Ok(())
    }

    fn reset_device(&mut self) {
        eprintln!("counter: RESET_DEVICE");
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn handle_event(&mut self, _: u16, _: EventSet, _: &[VringRwLock], _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// A number such as 4096 or 0x1000.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("the offset {text}: {error}"))
}

fn run() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("usage: counter SOCKET [OFFSET...]")?;
    let mut offsets = arguments.map(|text| number(&text)).collect::<Result<Vec<_>, _>>()?;
    if offsets.is_empty() {
        offsets.push(0);
    }
    let page = memfd_create("counter", MemfdFlags::CLOEXEC).map_err(|error| format!("no memfd: {error}"))?;
    let page = Arc::new(File::from(page));
    page.set_len(PAGE).map_err(|error| format!("cannot size the memfd: {error}"))?;
    let mut listener = Listener::new(&socket, false).map_err(|error| {
        format!("cannot listen on {socket}: {error}. Remove it where nothing listens there")
    })?;

    let counted = Arc::clone(&page);
    thread::spawn(move || {
        for count in 1_u64.. {
            thread::sleep(Duration::from_millis(100));
            if counted.write_all_at(&count.to_le_bytes(), 0).is_err() {
                break;
            }
        }
    });
    let counter = Arc::new(Mutex::new(Counter { page, offsets, channel: None }));
    let failed = |error| format!("{socket}: {error:?}");
    let mut daemon = VhostUserDaemon::new("counter".to_owned(), counter, Memory::new(GuestMemoryMmap::new()))
        .map_err(failed)?;
    daemon.start(&mut listener).map_err(failed)?;
    // It ends with the connection: the crate has an error for that, too.
    let _ = daemon.wait();
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("counter: {sentence}");
            ExitCode::from(2)
        }
    }
}
