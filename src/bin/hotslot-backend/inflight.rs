//! Which requests are in flight, in memory that the front-end keeps when this process dies (vhost-user,
//! "Inflight I/O tracking"; GET_INFLIGHT_FD and SET_INFLIGHT_FD).
//!
//! Threads answer requests out of their order, so the index of the used ring alone does not tell which are
//! answered. The memory has the layout that the specification recommends for split virtqueues: for each
//! queue a header and an entry for each ring descriptor. Each store is ordered behind those before it, so
//! that a process that is killed between any two leaves what [`Record::recover`] expects. A batch of used
//! buffers is always one. Behind the queues is a byte for the device itself.
//!
//! Like the guest's memory this belongs to the front-end: one that makes the file shorter ends this process.
//! Called by [`super::session`] and [`super::ring`].

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::MemfdFlags;
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileMemory,
};

/// `QueueRegionSplit`: u64 features, u16 version, u16 desc_num, u16 last_batch_head, u16 used_idx; entries.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER: usize = 16;
/// `DescStateSplit`: u8 inflight, five bytes of padding, u16 next, u64 counter.
const NEXT: usize = 6;
const COUNTER: usize = 8;
const ENTRY: usize = 16;
/// The only version.
const VERSION_1: u16 = 1;
/// A cache line, so that no two queues share one.
const ALIGNMENT: usize = 64;

/// The memory of all queues.
#[derive(Clone)]
pub struct Inflight {
    memory: Arc<MmapRegion>,
    queues: usize,
    queue_size: u16,
}

impl Inflight {
    /// GET_INFLIGHT_FD: makes the memory, with nothing in flight. Returns its file and length.
    pub fn make(queues: u16, queue_size: u16) -> io::Result<(File, u64)> {
        let len = len(queues.into(), queue_size) as u64;
        let file = memory_file("inflight", len)?;
        Ok((file, len))
    }

    /// SET_INFLIGHT_FD.
    ///
    /// # Errors
    ///
    /// It is too short for what it should be, cannot be mapped, or has another layout.
    pub fn map(file: File, offset: u64, (queues, queue_size): (u16, u16)) -> io::Result<Self> {
        let len = len(queues.into(), queue_size);
        let has = file.metadata()?.len();
        if offset.checked_add(len as u64).is_none_or(|end| end > has) {
            return Err(io::Error::other(format!(
                "the memory for requests in flight has {has} bytes, less than {len} from {offset} on for {queues} \
                 queues of {queue_size}"
            )));
        }
        let memory = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(io::Error::other)?;
        let inflight = Inflight { memory: Arc::new(memory), queues: queues.into(), queue_size };
        for queue in 0..inflight.queues {
            inflight.record(queue).begin()?;
        }
        Ok(inflight)
    }

    /// That of one queue; none for a queue of which the front-end said nothing.
    pub fn of(&self, queue: usize) -> Option<Record> {
        (queue < self.queues).then(|| self.record(queue))
    }

    fn record(&self, queue: usize) -> Record {
        let at = queue * queue_len(self.queue_size);
        Record { memory: Arc::clone(&self.memory), at, entries: self.queue_size, counter: 0 }
    }

    /// What the device itself keeps there.
    pub fn kept(&self) -> Kept {
        Kept(Record { at: self.queues * queue_len(self.queue_size), ..self.record(0) })
    }

    /// RESET_DEVICE: nothing is in flight.
    pub fn clear(&self) {
        for queue in 0..self.queues {
            let record = self.record(queue);
            (0..self.queue_size).for_each(|head| record.store(record.entry(head), 0u8));
        }
    }
}

/// What one queue has in flight.
pub struct Record {
    memory: Arc<MmapRegion>,
    /// Where it begins.
    at: usize,
    entries: u16,
    /// Of the next request that is taken.
    counter: u64,
}

impl Record {
    fn begin(&self) -> io::Result<()> {
        if self.load::<u16>(VERSION) == 0 {
            self.store(DESC_NUM, self.entries);
            self.store(VERSION, VERSION_1);
        }
        match (self.load::<u16>(VERSION), self.load::<u16>(DESC_NUM)) {
            (VERSION_1, entries) if entries == self.entries => Ok(()),
            (version, entries) => Err(io::Error::other(format!(
                "the memory for requests in flight has version {version} and {entries} entries for a queue, not \
                 {VERSION_1} and {}",
                self.entries
            ))),
        }
    }

    /// A request is taken from the queue.
    pub fn take(&mut self, head: u16) {
        if head < self.entries {
            self.store(self.entry(head) + COUNTER, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.store(self.entry(head), 1u8);
        }
    }

    /// It is about to be handed back.
    pub fn hand_back(&self, head: u16) {
        if head < self.entries {
            self.store(self.entry(head) + NEXT, self.load::<u16>(LAST_BATCH_HEAD));
            self.store(LAST_BATCH_HEAD, head);
        }
    }

    /// The driver sees it in the used ring, whose index is `used` now.
    pub fn handed_back(&self, head: u16, used: u16) {
        if head < self.entries {
            self.store(self.entry(head), 0u8);
        }
        self.store(USED_IDX, used);
    }

    /// The requests that were taken and not handed back, in the order in which they were taken. `used`: the
    /// index of the used ring.
    pub fn recover(&mut self, used: u16) -> Vec<u16> {
        if self.load::<u16>(USED_IDX) != used {
            // The process died between the used ring and this: the last one is handed back.
            let last: u16 = self.load(LAST_BATCH_HEAD);
            if last < self.entries {
                self.store(self.entry(last), 0u8);
            }
            self.store(USED_IDX, used);
        }
        let is_in_flight = |head: &u16| self.load::<u8>(self.entry(*head)) == 1;
        let counter = |head: u16| self.load::<u64>(self.entry(head) + COUNTER);
        let mut heads: Vec<u16> = (0..self.entries).filter(is_in_flight).collect();
        heads.sort_by_key(|&head| counter(head));
        self.counter = heads.last().map_or(0, |&head| counter(head).wrapping_add(1));
        heads
    }

    fn entry(&self, head: u16) -> usize {
        HEADER + usize::from(head) * ENTRY
    }

    fn store<T: vm_memory::AtomicAccess>(&self, offset: usize, value: T) {
        let stored = self.memory.as_volatile_slice().store(value, self.at + offset, Ordering::Release);
        stored.expect("invariant: inside, and aligned")
    }

    fn load<T: vm_memory::AtomicAccess>(&self, offset: usize) -> T {
        let loaded = self.memory.as_volatile_slice().load(self.at + offset, Ordering::Acquire);
        loaded.expect("invariant: inside, and aligned")
    }
}

/// A byte of the device's own, which outlives this process; 0 at first.
pub struct Kept(Record);

impl Kept {
    pub fn get(&self) -> u8 {
        self.0.load(0)
    }

    pub fn set(&self, value: u8) {
        self.0.store(0, value);
    }
}

fn queue_len(queue_size: u16) -> usize {
    (HEADER + usize::from(queue_size) * ENTRY).next_multiple_of(ALIGNMENT)
}

fn len(queues: usize, queue_size: u16) -> usize {
    queues * queue_len(queue_size) + ALIGNMENT
}

fn memory_file(name: &str, len: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.set_len(len)?;
    Ok(file)
}

// A request is taken out of a queue by the available ring, which only the driver writes. So the requests that
// are taken again have an available ring of ours: in memory that looks like the guest's, behind all of it.

/// Where those rings are. No guest has as much memory.
pub const RINGS: GuestAddress = GuestAddress(1 << 62);
/// le16 flags, le16 index, then a le16 for each ring descriptor, and one more; a page.
const RING: u64 = 4096;
/// The most ring descriptors for which there is room.
pub const MAX_QUEUE_SIZE: u64 = (RING - 6) / 2;

/// Memory for the available rings of so many queues.
pub fn rings(queues: usize) -> io::Result<GuestRegionMmap> {
    let len = queues as u64 * RING;
    let file = FileOffset::new(memory_file("recorded", len)?, 0);
    let memory = MmapRegion::from_file(file, len as usize).map_err(io::Error::other)?;
    GuestRegionMmap::new(memory, RINGS).ok_or_else(|| io::Error::other("no address for the recorded rings"))
}

/// A queue with these requests of queue number `index`.
pub fn queue_of(
    index: usize,
    heads: &[u16],
    queue: &Queue,
    memory: &GuestMemoryMmap,
) -> Result<Queue, QueueError> {
    let ring = RINGS.unchecked_add(index as u64 * RING);
    for (place, &head) in heads.iter().enumerate() {
        let at = ring.unchecked_add(4 + 2 * place as u64);
        memory.write_obj(head.to_le(), at).map_err(QueueError::GuestMemory)?;
    }
    let count = (heads.len() as u16).to_le();
    memory.write_obj(count, ring.unchecked_add(2)).map_err(QueueError::GuestMemory)?;

    let mut recorded = Queue::new(queue.max_size())?;
    recorded.try_set_size(queue.size())?;
    recorded.try_set_desc_table_address(GuestAddress(queue.desc_table()))?;
    recorded.try_set_used_ring_address(GuestAddress(queue.used_ring()))?;
    recorded.try_set_avail_ring_address(ring)?;
    recorded.set_ready(true);
    Ok(recorded)
}
