//! A back-end made of the crates that others make theirs of: `vhost` and `vhost-user-backend`.

use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use hotslot::virtio::device::VirtioDevice;
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{
    Backend as Channel, Listener, VhostUserFrontendReqHandler, VhostUserProtocolFeatures,
};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::bench::*;
use crate::wire::PATIENCE;

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
        F_VERSION_1 | F_PROTOCOL
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::from_bits_truncate(
            MQ | REPLY_ACK | BACKEND_REQ | SEND_FD | RESET_DEVICE | SHMEM,
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

#[test]
fn a_back_end_made_of_the_usual_crates_maps_when_it_is_started_and_not_when_it_is_reset() {
    // SHM-67, SHM-69, SHM-71, SHM-75
    let (tell, told) = mpsc::channel();
    let backend = Arc::new(Mutex::new(Maps { channel: None, tell }));
    let memory = Memory::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("test".to_string(), backend, memory).unwrap();
    let (ended, end) = mpsc::channel();
    let bench = Setup::new().foreign(move |socket| {
        let mut listener = Listener::new(socket, true).unwrap();
        thread::spawn(move || {
            daemon.start(&mut listener).unwrap();
            let result = daemon.wait().map_err(|error| format!("{error:?}"));
            ended.send(result).unwrap();
        });
    });
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
