//! Requests out of the virtqueues of `vhost-user-backend`, in the terms of fuse-backend-rs.
//!
//! fuse-backend-rs takes a request as a descriptor chain of an older virtio-queue, in the memory of an older
//! vm-memory. So the guest's memory is mapped a second time, by the same descriptors, and the older queue
//! takes the next chain from where the newer one is; the newer one does all the rest. No byte is copied.
//! Called by [`super`].

use std::io;
use std::sync::Arc;

use fuse_virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueState, QueueT as _};
use fuse_vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// The guest's memory, mapped for fuse-backend-rs.
pub type Memory = Arc<GuestMemoryMmap>;
pub type Chain = DescriptorChain<Memory>;

/// Maps the guest's memory for fuse-backend-rs.
///
/// # Errors
///
/// A region that cannot be mapped again.
pub fn map(memory: &vm_memory::GuestMemoryMmap) -> io::Result<Memory> {
    let mut ranges = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or_else(|| io::Error::other("a region without a file"))?;
        let len = usize::try_from(region.len()).map_err(io::Error::other)?;
        let file = FileOffset::from_arc(Arc::clone(file.arc()), file.start());
        ranges.push((GuestAddress(region.start_addr().raw_value()), len, Some(file)));
    }
    GuestMemoryMmap::from_ranges_with_files(ranges).map(Arc::new).map_err(io::Error::other)
}

/// The next request, unless the queue is stopped or empty. When it is empty, the driver notifies us of the
/// next.
///
/// # Errors
///
/// A ring that is not in the guest's memory, or makes no sense.
pub fn next(vring: &VringMutex, memory: &Memory) -> Result<Option<Chain>, Box<dyn std::error::Error>> {
    let mut state = vring.get_mut();
    if !state.is_enabled() || !state.get_queue().ready() {
        return Ok(None);
    }
    // Twice, because a request may arrive before notifications are on. A third time would find nothing new,
    // and a guest whose ring lies half outside its memory would keep us here for ever.
    for _ in 0..2 {
        let queue = state.get_queue_mut();
        let mut older = Queue::try_from(QueueState {
            max_size: queue.max_size(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            event_idx_enabled: queue.event_idx_enabled(),
            size: queue.size(),
            ready: true,
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
        })?;
        let chain = older.iter(Arc::clone(memory))?.next();
        queue.set_next_avail(older.next_avail());
        if chain.is_some() {
            return Ok(chain);
        }
        if !state.enable_notification()? {
            return Ok(None);
        }
    }
    Err(Error::InvalidAvailRingIndex.into())
}

/// Reads the first bytes of a request, up to the first that is not in the guest's memory. Returns how many.
pub fn read_start(chain: Chain, memory: &Memory, bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for buffer in chain.readable() {
        let wanted = (bytes.len() - done).min(buffer.len() as usize);
        let read = memory.read(&mut bytes[done..done + wanted], buffer.addr()).unwrap_or(0);
        done += read;
        if read < wanted || done == bytes.len() {
            break;
        }
    }
    done
}

/// Writes the first bytes of an answer, or none: says whether it has room for them that is in the guest's
/// memory.
pub fn write_start(chain: Chain, memory: &Memory, bytes: &[u8]) -> bool {
    let mut parts = Vec::new();
    let mut rest = bytes;
    for buffer in chain.writable() {
        let (part, behind) = rest.split_at(rest.len().min(buffer.len() as usize));
        if !memory.check_range(buffer.addr(), part.len()) {
            return false;
        }
        parts.push((buffer.addr(), part));
        rest = behind;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty() && parts.iter().all(|&(address, part)| memory.write_slice(part, address).is_ok())
}
