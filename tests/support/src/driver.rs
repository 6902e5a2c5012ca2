//! A front-end of the `vhost` crate, and the guest behind it: its memory, its driver with a queue, made by
//! hand; and, where a device has several, a driver of each other queue.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::files::MIB;
use crate::names::*;
use crate::program::Backend;
use crate::wait::eventually;

/// Where the front-end claims to have the guest's memory; only the differences matter.
pub const USER_ADDRESS: u64 = 0x7000_0000_0000;
pub const RAM: u64 = MIB;
pub const QUEUE_SIZE: u16 = 8;
pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAIL: u64 = 0x2000;
pub const USED: u64 = 0x3000;
pub const INDIRECT: u64 = 0x4000;

/// As many as the front-end takes.
const MAX_QUEUES: u64 = 256;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE: u16 = 4;

/// A front-end and the guest behind it.
pub struct Driver {
    pub front_end: Frontend,
    pub features: u64,
    protocol_features: u64,
    pub ram_file: File,
    pub ram: GuestMemoryMmap,
    pub kick: EventFd,
    pub call: EventFd,
    pub avail: u16,
    /// Where the available ring is.
    pub avail_ring: u64,
    /// The queue, and where it is: the addresses above are from there on.
    pub queue: usize,
    pub base: u64,
}

impl Driver {
    /// Negotiates as a front-end does before there is a driver.
    pub fn connect(backend: &Backend, features: u64, protocol_features: u64) -> Self {
        let front_end = negotiate(backend, protocol_features);
        let ram_file = tempfile::tempfile().unwrap();
        ram_file.set_len(RAM).unwrap();
        let range = (GuestAddress(0), RAM as usize, Some(FileOffset::new(ram_file.try_clone().unwrap(), 0)));
        Driver {
            front_end,
            features: features | VHOST_USER_F_PROTOCOL_FEATURES,
            protocol_features,
            ram_file,
            ram: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            avail: 0,
            avail_ring: AVAIL,
            queue: 0,
            base: 0,
        }
    }

    /// The driver of another queue of the same device, which is at this address; it is not started.
    pub fn other_queue(&self, queue: usize, base: u64) -> Self {
        Driver {
            front_end: self.front_end.clone(),
            ram_file: self.ram_file.try_clone().unwrap(),
            ram: self.ram.clone(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            avail: 0,
            queue,
            base,
            ..*self
        }
    }

    /// The back-end has died, and this one has taken its place: makes a connection to it, and tells it of the
    /// driver's features and memory. The queue is not started.
    pub fn reconnect(&mut self, backend: &Backend) {
        self.front_end = negotiate(backend, self.protocol_features);
        self.front_end.set_features(self.features).unwrap();
        self.front_end.set_mem_table(&[self.ram_region()]).unwrap();
    }

    /// GET_INFLIGHT_FD, for so many queues.
    pub fn inflight(&mut self, num_queues: u16) -> (VhostUserInflight, File) {
        let wanted = VhostUserInflight { num_queues, queue_size: QUEUE_SIZE, ..Default::default() };
        self.front_end.get_inflight_fd(&wanted).unwrap()
    }

    /// Starts the queue, from which so many requests were taken.
    pub fn start_queue_from(&mut self, base: u16) {
        let avail = std::mem::replace(&mut self.avail, base);
        self.start_queue();
        self.avail = avail;
    }

    /// What the memory table says of the guest's memory.
    pub fn ram_region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.ram_file.as_raw_fd(),
        }
    }

    /// The rest of the start.
    pub fn start_queue(&mut self) {
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: USER_ADDRESS + self.base + DESCRIPTORS,
            used_ring_addr: USER_ADDRESS + self.base + USED,
            avail_ring_addr: USER_ADDRESS + self.base + self.avail_ring,
            log_addr: None,
        };
        self.front_end.set_vring_num(self.queue, QUEUE_SIZE).unwrap();
        self.front_end.set_vring_addr(self.queue, &config).unwrap();
        self.front_end.set_vring_base(self.queue, self.avail).unwrap();
        self.front_end.set_vring_call(self.queue, &self.call).unwrap();
        self.front_end.set_vring_kick(self.queue, &self.kick).unwrap();
        self.front_end.set_vring_enable(self.queue, true).unwrap();
    }

    /// The status is zeroed: the rings are stopped and the device is reset.
    pub fn reset(&mut self) {
        self.front_end.get_vring_base(0).unwrap();
        self.front_end.reset_device().unwrap();
        self.ram.write_slice(&[0; 0x6000], GuestAddress(DESCRIPTORS)).unwrap();
        self.avail = 0;
    }

    pub fn descriptor_at(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    pub fn descriptor(&self, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.descriptor_at(self.base + DESCRIPTORS, index, descriptor);
    }

    pub fn used_index(&self) -> u16 {
        self.ram.read_obj(GuestAddress(self.base + USED + 2)).unwrap()
    }

    fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.avail % QUEUE_SIZE);
        self.ram.write_obj(head, GuestAddress(self.base + self.avail_ring + 4 + 2 * slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
    }

    fn notify(&self) {
        self.ram.write_obj(self.avail, GuestAddress(self.base + self.avail_ring + 2)).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Makes the chain that starts at descriptor `head` available, and notifies.
    pub fn offer(&mut self, head: u16) {
        self.make_available(head);
        self.notify();
    }

    /// Makes the chains that start at the first `count` descriptors available at once.
    pub fn offer_all(&mut self, count: u16) {
        (0..count).for_each(|head| self.make_available(head));
        self.notify();
    }

    /// Which chain came back, by its place in the used ring.
    pub fn used(&self, place: u16) -> u32 {
        let at = self.base + USED + 4 + 8 * u64::from(place % QUEUE_SIZE);
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// The chain at `head` comes back: how many bytes were written.
    pub fn await_used(&mut self, head: u16) -> u32 {
        eventually("a used buffer", || self.used_index() == self.avail);
        eventually("a call", || self.call.read().is_ok());
        let slot = u64::from((self.avail - 1) % QUEUE_SIZE);
        let [id, written]: [u32; 2] =
            self.ram.read_obj(GuestAddress(self.base + USED + 4 + 8 * slot)).unwrap();
        assert_eq!(id, u32::from(head));
        written
    }
}

fn negotiate(backend: &Backend, protocol_features: u64) -> Frontend {
    let mut front_end = Frontend::from_stream(backend.connect(), MAX_QUEUES);
    front_end.set_owner().unwrap();
    front_end.get_features().unwrap();
    front_end.get_protocol_features().unwrap();
    front_end
        .set_protocol_features(VhostUserProtocolFeatures::from_bits(protocol_features).unwrap())
        .unwrap();
    if protocol_features & PROTOCOL_F_REPLY_ACK != 0 {
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    front_end
}
