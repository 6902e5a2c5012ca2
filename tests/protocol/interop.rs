//! A back-end made of the crates that others make theirs of: `vhost` and `vhost-user-backend`.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::wire::{MMap, PATIENCE};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{
    Backend as Channel, Listener, VhostUserFrontendReqHandler, VhostUserProtocolFeatures,
};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::sharing::{Devices, address};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Maps page 0 of region 0 each time that it is started, and tells what came of it.
struct Maps {
    channel: Option<Channel>,
    tell: mpsc::Sender<(&'static str, bool)>,
}

impl Maps {
    fn map(&self, page: u64) -> bool {
        let Some(channel) = &self.channel else {
            return false;
        };
        channel.shmem_map(&request(page), &file_of(1, 0x42)).is_ok()
    }
}

fn request(page: u64) -> VhostUserMMap {
    VhostUserMMap {
        shmid: 0,
        padding: [0; 7],
        fd_offset: 0,
        shm_offset: page * PAGE,
        len: PAGE,
        flags: VhostUserMMapFlags::default().bits(),
    }
}

impl VhostUserBackendMut for Maps {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::from_bits_truncate(
            PROTOCOL_F_MQ
                | PROTOCOL_F_REPLY_ACK
                | PROTOCOL_F_BACKEND_REQ
                | PROTOCOL_F_BACKEND_SEND_FD
                | PROTOCOL_F_RESET_DEVICE
                | PROTOCOL_F_SHMEM
                | PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        )
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, _memory: Memory) -> io::Result<()> {
        // On the thread that serves the main socket, which waits here for the answer.
        let mapped = self.map(0);
        self.tell.send(("started", mapped)).unwrap();
        Ok(())
    }

    fn reset_device(&mut self) {
        let mapped = self.map(1);
        self.tell.send(("reset", mapped)).unwrap();
    }

    fn set_backend_req_fd(&mut self, channel: Channel) {
        self.channel = Some(channel);
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[REGION]))
    }

    fn handle_event(&mut self, _: u16, _: EventSet, _: &[VringRwLock], _: usize) -> io::Result<()> {
        Ok(())
    }
}

type Told = mpsc::Receiver<(&'static str, bool)>;
type End = mpsc::Receiver<Result<(), String>>;

/// A device with such a back-end, the back-end's view of guest memory, what it tells, and how it ends.
fn start(setup: Setup) -> (Bench, Memory, Told, End) {
    let (tell, told) = mpsc::channel();
    let backend = Arc::new(Mutex::new(Maps { channel: None, tell }));
    let memory = Memory::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("test".to_string(), backend, memory.clone()).unwrap();
    let (ended, end) = mpsc::channel();
    let bench = setup.foreign(move |socket| {
        let mut listener = Listener::new(socket, true).unwrap();
        thread::spawn(move || {
            daemon.start(&mut listener).unwrap();
            let result = daemon.wait().map_err(|error| format!("{error:?}"));
            ended.send(result).unwrap();
        });
    });
    (bench, memory, told, end)
}

#[test]
fn a_back_end_made_of_the_usual_crates_reads_and_writes_what_another_device_shares() {
    // SHM-80
    let mut devices = Devices::new();
    let owner = devices.owner(Setup::default()).start();
    let (other, memory, _told, end) = start(devices.recipient(Setup::default()));
    let file = file_of(3, 0x11);
    let request = MMap { fd_offset: PAGE, len: 2 * PAGE, ..writable(page_at(4)) };
    let byte_at = |page| memory.memory().read_obj::<u8>(GuestAddress(address(&owner, page)));
    other.start().unwrap();
    for _ in 0..3 {
        assert_eq!(owner.map(request, &file), 0);
        assert_eq!(byte_at(4).unwrap(), 0x11);
        let second = GuestAddress(address(&owner, 5));
        memory.memory().write_obj(0x22u8, second).unwrap();
        assert_eq!(owner.reads(0, 5 * PAGE), Some(0x22));
        assert!(owner.writes(0, 5 * PAGE, 0x33));
        assert_eq!(byte_at(5).unwrap(), 0x33);
        // It is the same after a start, which makes the back-end forget.
        other.reset();
        other.start().unwrap();
        assert_eq!(byte_at(5).unwrap(), 0x33);
        assert_eq!(owner.unmap(request), 0);
        byte_at(4).unwrap_err();
    }
    // More than fits into the file, which then grows (Linux' DAX).
    let short = memfd(1);
    let long = MMap { len: 8 * PAGE, ..writable(page_at(8)) };
    assert_eq!(owner.map(long, &short), 0);
    short.set_len(8 * PAGE).unwrap();
    short.write_all_at(&[0x44], 7 * PAGE).unwrap();
    assert_eq!(byte_at(15).unwrap(), 0x44);
    owner.reset();
    byte_at(15).unwrap_err();
    assert!(end.try_recv().is_err() && !other.needs_reset());
}

#[test]
fn a_back_end_made_of_the_usual_crates_maps_when_it_is_started_and_not_when_it_is_reset() {
    // SHM-67, SHM-69, SHM-71, SHM-75
    let (bench, _, told, end) = start(Setup::default());
    for _ in 0..3 {
        bench.start().unwrap();
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), ("started", true));
        assert_eq!((bench.reads(0, 0), bench.guest().count()), (Some(0x42), 1));
        bench.device().stop_queue(1).unwrap();
        bench.device().start_queue(bench.queue(1)).unwrap();
        bench.reset();
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), ("reset", false));
        assert_eq!((bench.guest().count(), bench.needs_reset()), (0, false));
    }
    drop(bench.end());
    // That is how the crate calls a hang-up between two messages.
    let end = end.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(end.contains("Disconnected"), "{end}");
}
