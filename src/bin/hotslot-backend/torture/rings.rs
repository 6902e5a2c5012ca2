//! The device's queues: an entropy device (VIRTIO 5.4), which fills the driver's buffers with random bytes.
//!
//! vhost-user, "Starting and stopping rings" and "Multiple queue support". Called by `session`, on its
//! thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::wire::Message;

/// VIRTIO 2.7: the largest queue.
const MAX_SIZE: u16 = 32768;
/// In the payload of SET_VRING_KICK and SET_VRING_CALL: no descriptor comes with it.
const NO_FD: u64 = 1 << 8;

/// A part of the guest's memory, from SET_MEM_TABLE.
struct Area {
    guest: u64,
    len: u64,
    user: u64,
}

/// One queue.
struct Ring {
    queue: Queue,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
}

/// All queues.
pub struct Rings {
    rings: Vec<Ring>,
    memory: Option<GuestMemoryMmap>,
    areas: Vec<Area>,
    /// Whether a ring must be enabled to run: if VHOST_USER_F_PROTOCOL_FEATURES was negotiated.
    needs_enable: bool,
}

/// What the front-end or its guest did wrong.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("its payload or its descriptors are not those of the message")]
    Payload,
    #[error("address {0:#x} is in no memory region")]
    Address(u64),
    #[error("the memory cannot be mapped: {0}")]
    Memory(String),
    #[error("the queue is broken: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("a queue's event failed: {0}")]
    Event(#[from] io::Error),
}

impl Rings {
    pub fn new(count: u16) -> Result<Self, RingError> {
        let ring = || Ok(Ring { queue: Queue::new(MAX_SIZE)?, kick: None, call: None, enabled: false });
        Ok(Rings {
            rings: (0..count).map(|_| ring()).collect::<Result<_, RingError>>()?,
            memory: None,
            areas: Vec::new(),
            needs_enable: false,
        })
    }

    /// Forgets all of the device's state.
    pub fn reset(&mut self) {
        for ring in &mut self.rings {
            ring.stop();
            ring.queue.reset();
            ring.enabled = false;
        }
    }

    /// SET_FEATURES: whether rings start disabled.
    pub fn set_needs_enable(&mut self, needed: bool) {
        self.needs_enable = needed;
    }

    /// Whether any ring is started.
    pub fn are_started(&self) -> bool {
        self.rings.iter().any(|ring| ring.kick.is_some())
    }

    /// The index and the kick descriptor of each started ring.
    pub fn kicks(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let rings = self.rings.iter().enumerate();
        rings.filter_map(|(index, ring)| Some((index, ring.kick.as_ref()?.as_fd())))
    }

    /// SET_MEM_TABLE: u32 count, u32 padding; each u64 guest address, size, user address, offset in its
    /// descriptor.
    pub fn set_memory(&mut self, message: &mut Message) -> Result<(), RingError> {
        let count = message.word(0) as usize;
        if message.fds.len() != count || message.payload.len() != 8 + 32 * count {
            return Err(RingError::Payload);
        }
        let (mut areas, mut ranges) = (Vec::new(), Vec::new());
        for (index, fd) in std::mem::take(&mut message.fds).into_iter().enumerate() {
            let [guest, len, user, offset] = [0, 8, 16, 24].map(|at| message.quad(8 + 32 * index + at));
            areas.push(Area { guest, len, user });
            let file = FileOffset::new(File::from(fd), offset);
            ranges.push((GuestAddress(guest), len as usize, Some(file)));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges);
        self.memory = Some(memory.map_err(|error| RingError::Memory(error.to_string()))?);
        self.areas = areas;
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring, RingError> {
        let ring = self.rings.get_mut(index as usize);
        ring.ok_or(RingError::NoQueue(index))
    }

    /// SET_VRING_NUM.
    pub fn set_size(&mut self, message: &Message) -> Result<(), RingError> {
        let size = u16::try_from(message.word(4)).map_err(|_| RingError::Payload)?;
        Ok(self.ring(message.word(0))?.queue.try_set_size(size)?)
    }

    /// SET_VRING_BASE.
    pub fn set_base(&mut self, message: &Message) -> Result<(), RingError> {
        self.ring(message.word(0))?.queue.set_next_avail(message.word(4) as u16);
        Ok(())
    }

    /// SET_VRING_ADDR: u32 index, u32 flags; u64 descriptor table, used ring, available ring, log.
    pub fn set_addresses(&mut self, message: &Message) -> Result<(), RingError> {
        let [descriptors, used, available] = [8, 16, 24].map(|at| self.guest_address(message.quad(at)));
        let queue = &mut self.ring(message.word(0))?.queue;
        queue.try_set_desc_table_address(descriptors?)?;
        queue.try_set_used_ring_address(used?)?;
        queue.try_set_avail_ring_address(available?)?;
        Ok(())
    }

    fn guest_address(&self, user: u64) -> Result<GuestAddress, RingError> {
        let offset_in = |area: &Area| user.checked_sub(area.user).filter(|offset| *offset < area.len);
        let mut addresses = self.areas.iter().filter_map(|area| area.guest.checked_add(offset_in(area)?));
        addresses.next().map(GuestAddress).ok_or(RingError::Address(user))
    }

    /// SET_VRING_CALL.
    pub fn set_call(&mut self, message: &mut Message) -> Result<(), RingError> {
        let (index, fd) = event(message)?;
        self.ring(index)?.call = fd.map(File::from);
        Ok(())
    }

    /// SET_VRING_KICK: starts the ring.
    pub fn set_kick(&mut self, message: &mut Message) -> Result<(), RingError> {
        let (index, fd) = event(message)?;
        let memory = self.memory.clone();
        let ring = self.ring(index)?;
        ring.kick = fd.map(File::from);
        if let Some(memory) = memory {
            let used = ring.queue.used_idx(&memory, std::sync::atomic::Ordering::Acquire)?;
            ring.queue.set_next_used(used.0);
        }
        ring.queue.set_ready(true);
        Ok(())
    }

    /// SET_VRING_ENABLE.
    pub fn set_enabled(&mut self, message: &Message) -> Result<(), RingError> {
        self.ring(message.word(0))?.enabled = message.word(4) == 1;
        Ok(())
    }

    /// GET_VRING_BASE: stops the ring. Returns the index of the next request that it would have taken.
    pub fn stop(&mut self, index: u32) -> Result<u16, RingError> {
        let ring = self.ring(index)?;
        ring.stop();
        Ok(ring.queue.next_avail())
    }

    /// Reads the kick.
    pub fn take_kick(&mut self, index: usize) -> Result<(), RingError> {
        let Some(ring) = self.rings.get_mut(index) else {
            return Ok(());
        };
        let kick = ring.kick.as_mut().map(|kick| kick.read_exact(&mut [0; 8]));
        match kick {
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                // It would be ready to read for ever.
                ring.kick = None;
                Err(error.into())
            }
            _ => Ok(()),
        }
    }

    /// Completes all requests in the rings that run.
    pub fn complete(&mut self) -> Result<(), RingError> {
        let Some(memory) = &self.memory else { return Ok(()) };
        for ring in &mut self.rings {
            if ring.kick.is_some() && (ring.enabled || !self.needs_enable) {
                ring.complete(memory)?;
            }
        }
        Ok(())
    }
}

impl Ring {
    fn stop(&mut self) {
        self.kick = None;
        self.call = None;
        self.queue.set_ready(false);
    }

    fn complete(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        let mut any = false;
        let random = File::open("/dev/urandom")?;
        while let Some(request) = self.queue.pop_descriptor_chain(memory) {
            let head = request.head_index();
            let mut writer = request.writer(memory)?;
            let len = writer.available_bytes() as u64;
            let filled = io::copy(&mut (&random).take(len), &mut writer)?;
            self.queue.add_used(memory, head, filled as u32)?;
            any = true;
        }
        match &mut self.call {
            Some(call) if any && self.queue.needs_notification(memory)? => {
                Ok(call.write_all(&1u64.to_ne_bytes())?)
            }
            _ => Ok(()),
        }
    }
}

/// The queue and the file descriptor of SET_VRING_KICK or SET_VRING_CALL.
fn event(message: &mut Message) -> Result<(u32, Option<OwnedFd>), RingError> {
    let value = message.quad(0);
    let (index, fd) = ((value & 0xff) as u32, message.fds.pop());
    match fd.is_some() == (value & NO_FD == 0) {
        true => Ok((index, fd)),
        false => Err(RingError::Payload),
    }
}
