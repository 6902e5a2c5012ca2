//! A device with virtqueues: what `pmem`, `blk`, `fs` and `console` differ in.
//!
//! What they share is in `session`, the front-end's requests, and in `queues`, the driver's. One value serves
//! one front-end.

use std::io;
use std::sync::Arc;

use vhost::vhost_user::{Backend, VhostUserProtocolFeatures};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};

use crate::complaints::Complaints;
use crate::inflight::Kept;
use crate::ring::{Memory, Ring, Taken};

/// A request: its buffers, and the guest's memory when it was taken out of the queue.
pub type Request = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// A type of device. The session's thread calls all methods but [`Device::take`], [`Device::answer`] and
/// [`Device::answer_or_wait`], which the threads of the queues call.
pub trait Device: Send + Sync + 'static {
    type Request;

    /// Feature bits of the device type.
    fn features(&self) -> u64 {
        0
    }

    /// SET_FEATURES: what the driver accepted, of the bits above and of those of the queues.
    fn acked_features(&self, _features: u64) {}

    /// Protocol features besides those that all devices have and those that shared memory needs.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    fn queues(&self) -> u16 {
        1
    }

    /// Threads that answer requests of a queue. With several, a request may be
    /// answered before those that came before it.
    fn threads(&self) -> usize {
        1
    }

    /// The configuration space; the bytes behind it read as zero.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// SET_CONFIG: the driver writes to the configuration space. The driver is told of no error.
    fn write_config(&self, _offset: u32, _bytes: &[u8]) {}

    /// SET_INFLIGHT_FD: the front-end keeps this byte when this process dies, and gives it to the next.
    fn keep(&self, _kept: Kept) {}

    /// Size of shared memory region 0, if there is one.
    fn shared_memory(&self) -> Option<u64> {
        None
    }

    /// SET_BACKEND_REQ_FD, which comes only where the protocol feature BACKEND_REQ is offered.
    fn connect(&self, _backend: Backend) {}

    /// SET_MEM_TABLE, ADD_MEM_REG or REM_MEM_REG: the device is started, or the guest's memory changed. Must
    /// not wait for a request that waits for the front-end. An error ends the session.
    fn memory_changed(&self, _memory: &Memory) -> io::Result<()> {
        Ok(())
    }

    /// RESET_DEVICE: no request is being answered, and the front-end removes all mappings.
    fn reset(&self) {}

    /// The next request of a queue.
    fn take(&self, queue: &mut Queue) -> Taken<Self::Request>;

    /// Executes a request, on one of the threads of all queues, which are numbered from 0 on. Returns how
    /// many bytes of its buffers were written.
    fn answer(&self, thread: usize, request: Self::Request) -> u32;

    /// Called in place of [`Device::answer`]. `None` for a request that waits for something: `later` hands it
    /// back when it is answered.
    fn answer_or_wait(&self, thread: usize, request: Self::Request, _later: Later) -> Option<u32> {
        Some(self.answer(thread, request))
    }

    /// A queue is stopped: hands back all requests that wait. Their buffers may not be touched afterwards.
    fn stop_waiting(&self) {}
}

/// Hands a request back to the driver that is answered later.
pub struct Later {
    pub ring: Arc<Ring>,
    pub memory: Memory,
    pub head: u16,
    pub complaints: Arc<Complaints>,
}

impl Later {
    /// With `written` bytes of answer.
    pub fn hand_back(&self, written: u32) {
        if let Err(e) = self.ring.lock().hand_back(&self.memory, self.head, written) {
            self.complaints.say(format_args!("request {} cannot be handed back: {e}", self.head));
        }
    }
}

/// [`Device::take`] for the devices whose requests are [`Request`]s.
pub fn take(queue: &mut Queue, memory: &Memory) -> Taken<Request> {
    let request = queue.iter(memory.memory())?.next();
    Ok(request.map(|request| (request.head_index(), request)))
}
