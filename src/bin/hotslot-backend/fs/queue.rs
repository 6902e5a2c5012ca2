//! Requests out of the virtqueues of [`crate::ring`], in the types of fuse-backend-rs.
//!
//! fuse-backend-rs takes a request as a chain of ring descriptors of an older virtio-queue, in the memory of
//! an older vm-memory. So the guest's memory is mapped a second time, from the same file descriptors. An
//! older queue, made for each request, takes the next chain at the newer one's index; the newer one does the
//! rest. No byte is copied. Called by [`super`].

use std::io;
use std::sync::Arc;

use fuse_virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueState, QueueT as _};
use fuse_vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryRegion};

/// The guest's memory, mapped for fuse-backend-rs.
pub type Memory = Arc<GuestMemoryMmap>;
pub type Chain = DescriptorChain<Memory>;

/// Maps some of the guest's memory for fuse-backend-rs.
///
/// # Errors
///
/// A region that cannot be mapped again.
pub fn map<'a>(regions: impl IntoIterator<Item = &'a vm_memory::GuestRegionMmap>) -> io::Result<Memory> {
    let mut ranges = Vec::new();
    for region in regions {
        let file = region.file_offset().ok_or_else(|| io::Error::other("a region without a file"))?;
        let len = usize::try_from(region.len()).map_err(io::Error::other)?;
        let file = FileOffset::from_arc(Arc::clone(file.arc()), file.start());
        ranges.push((GuestAddress(region.start_addr().raw_value()), len, Some(file)));
    }
    GuestMemoryMmap::from_ranges_with_files(ranges).map(Arc::new).map_err(io::Error::other)
}

/// The next request of a queue, if there is one.
///
/// # Errors
///
/// A ring that is not in the guest's memory, or makes no sense.
pub fn take(queue: &mut virtio_queue::Queue, memory: &Memory) -> Result<Option<Chain>, Error> {
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
    Ok(chain)
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

/// Reads the first bytes of an answer; `None` where they are not in the guest's memory.
pub fn read_answer(chain: Chain, memory: &Memory, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    for buffer in chain.writable() {
        let here = (len - done).min(buffer.len() as usize);
        memory.read_slice(&mut bytes[done..done + here], buffer.addr()).ok()?;
        done += here;
    }
    (done == len).then_some(bytes)
}

/// Writes the first bytes of an answer, all or none: whether there is room for them, in the guest's memory.
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
