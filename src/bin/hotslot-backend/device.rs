//! A device with virtqueues, and its adapter to the `vhost-user-backend` crate.
//!
//! [`Device`] is what `pmem`, `blk` and `fs` differ in; [`Adapter`] is what they share: the features of the
//! queues, the threads, the requests (VIRTIO 1.2, section 2.7), and the waits at a stop, a reset and a change
//! of memory. One value of each serves one front-end. Called by `server`.

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserShMemConfig;
use vhost::vhost_user::{Backend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::complaints::Complaints;
use crate::helpers::Helpers;
use crate::lock::lock;

/// The guest's memory as the front-end describes it; empty until its first SET_MEM_TABLE.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A request: its buffers, and the guest's memory when it was taken out of the queue.
pub type Request = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// A request, or none, and the index of its first ring descriptor. An error is a ring that makes no sense.
pub type Taken<R> = Result<Option<(u16, R)>, Box<dyn Error>>;

/// A request of 1 MiB takes a ring descriptor a page, and a few.
const QUEUE_SIZE: usize = 1024;

/// A request that takes longer waited for a disk, or moved some hundred KiB. A page out of the page cache
/// takes about 2 us, and there a second thread would only be in the way.
const SLOW: Duration = Duration::from_micros(20);

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

    /// Threads that answer requests of a queue, the crate's among them. With several, a request may be
    /// answered before those that came before it.
    fn threads(&self) -> usize {
        1
    }

    /// The configuration space; the bytes behind it read as zero.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// SET_CONFIG: the driver writes to the configuration space. The driver is told of no error; the crate
    /// would end the session.
    fn write_config(&self, _offset: u32, _bytes: &[u8]) {}

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
    vring: VringMutex,
    head: u16,
    complaints: Arc<Complaints>,
}

impl Later {
    /// With `written` bytes of answer.
    pub fn hand_back(&self, written: u32) {
        if let Err(e) = hand_back(&self.vring, self.head, written) {
            self.complaints.say(format_args!("request {} cannot be handed back: {e}", self.head));
        }
    }
}

/// [`Device::take`] for the devices whose requests are [`Request`]s.
pub fn take(queue: &mut Queue, memory: &Memory) -> Taken<Request> {
    let request = queue.iter(memory.memory())?.next();
    Ok(request.map(|request| (request.head_index(), request)))
}

/// A device, as the `vhost-user-backend` crate calls it.
pub struct Adapter<D> {
    device: D,
    memory: Memory,
    complaints: Arc<Complaints>,
    queues: Vec<ServedQueue>,
    /// Not taken by the threads themselves.
    helpers: Mutex<Vec<JoinHandle<()>>>,
    was_asked: AtomicBool,
}

struct ServedQueue {
    /// One for each thread: held while it answers a request, and taken to wait for that. Lock order:
    /// outermost; the crate's lock of the queue is inside.
    answering: Vec<Mutex<()>>,
    helpers: Helpers,
}

impl<D: Device> Adapter<D> {
    pub fn new(device: D, memory: Memory, complaints: Arc<Complaints>) -> Self {
        let answering = || (0..device.threads()).map(|_| Mutex::new(())).collect();
        let queues = (0..device.queues())
            .map(|_| ServedQueue { answering: answering(), helpers: Helpers::default() })
            .collect();
        Adapter {
            device,
            memory,
            complaints,
            queues,
            helpers: Mutex::default(),
            was_asked: AtomicBool::new(false),
        }
    }

    /// Starts the threads besides those of the crate. [`Self::end`] ends them, also those that were started
    /// before an error.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        for (queue, served) in self.queues.iter().enumerate() {
            for thread in 1..served.answering.len() {
                let adapter = Arc::clone(self);
                let helper = thread::Builder::new().name("helper".to_owned()).spawn(move || {
                    let helpers = &adapter.queues[queue].helpers;
                    // Called because a request was slow, so it need not find that out.
                    while let Some(vring) = helpers.wait() {
                        adapter.serve(queue, thread, &vring, true);
                    }
                })?;
                lock(&self.helpers).push(helper);
            }
        }
        Ok(())
    }

    /// The session has ended. Returns when those threads have: the next session's have the same numbers.
    pub fn end(&self) {
        for queue in &self.queues {
            queue.helpers.end();
        }
        for helper in lock(&self.helpers).drain(..) {
            // One that panicked has ended, too.
            let _ = helper.join();
        }
    }

    /// The event that ends the threads of the queues, whose `handle_event` then fails. The crate uses 0 to
    /// the number of queues.
    pub fn end_event(&self) -> u64 {
        self.queues.len() as u64 + 1
    }

    /// Whether the front-end asked for anything. One that did not only tried whether a back-end listens.
    pub fn was_asked(&self) -> bool {
        self.was_asked.load(Ordering::Relaxed)
    }

    /// Answers the requests of a queue until it is empty; `slow` says whether they are known to be.
    fn serve(&self, queue: usize, thread: usize, vring: &VringMutex, slow: bool) {
        if let Err(e) = self.answer(queue, thread, vring, slow) {
            self.complaints.say(format_args!("queue {queue} is broken: {e}"));
        }
    }

    fn answer(
        &self,
        queue: usize,
        thread: usize,
        vring: &VringMutex,
        mut slow: bool,
    ) -> Result<(), Box<dyn Error>> {
        let ServedQueue { answering, helpers } = &self.queues[queue];
        let number = queue * answering.len() + thread;
        loop {
            // Anew for each request: a thread that waits must not wait for all requests of a busy guest.
            let _answering = lock(&answering[thread]);
            let Some((head, request)) = self.next(vring)? else {
                return Ok(());
            };
            if slow && answering.len() > 1 && self.has_more(vring) {
                helpers.call(vring);
            }
            let begun = Instant::now();
            let later = || Later { vring: vring.clone(), head, complaints: Arc::clone(&self.complaints) };
            let written = self.device.answer_or_wait(number, request, later());
            slow = begun.elapsed() >= SLOW;
            // The requests behind it may have come with the same kick, whatever becomes of this one.
            if let Some(written) = written {
                later().hand_back(written);
            }
        }
    }

    /// The next request, unless the queue is stopped or empty. If it is empty, the driver will notify us of
    /// the next.
    fn next(&self, vring: &VringMutex) -> Taken<D::Request> {
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return Ok(None);
        }
        // Twice, because a request may arrive before notifications are on. A third time would find nothing
        // new, and a guest whose ring lies half outside its memory would keep us here for ever.
        for _ in 0..2 {
            let request = self.device.take(state.get_queue_mut())?;
            if request.is_some() || !state.enable_notification()? {
                return Ok(request);
            }
        }
        Err(QueueError::InvalidAvailRingIndex.into())
    }

    /// Whether the driver has made more requests available. If the ring makes no sense, [`Self::next`] will
    /// find that.
    fn has_more(&self, vring: &VringMutex) -> bool {
        let state = vring.get_ref();
        let queue = state.get_queue();
        let available = queue.avail_idx(&*self.memory.memory(), Ordering::Acquire);
        available.is_ok_and(|available| available.0 != queue.next_avail())
    }

    /// Returns when the requests that are being answered have their answers. Later ones see the queues and
    /// the memory as they are now.
    fn wait(&self) {
        for answering in self.queues.iter().flat_map(|queue| &queue.answering) {
            drop(lock(answering));
        }
    }
}

/// Hands a request back to the driver, with `written` bytes of answer.
fn hand_back(vring: &VringMutex, head: u16, written: u32) -> Result<(), Box<dyn Error>> {
    let mut state = vring.get_mut();
    state.add_used(head, written)?;
    if state.needs_notification()? {
        state.signal_used_queue()?;
    }
    Ok(())
}

impl<D: Device> VhostUserBackend for Adapter<D> {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    /// Bit i of number n: thread n serves queue i.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|queue| 1 << queue).collect()
    }

    fn features(&self) -> u64 {
        self.was_asked.store(true, Ordering::Relaxed);
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | self.device.features()
    }

    fn acked_features(&self, features: u64) {
        self.device.acked_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | self.device.protocol_features();
        if self.device.shared_memory().is_some() {
            features |= VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::SHMEM;
        }
        features
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        let sizes: Vec<u64> = self.device.shared_memory().into_iter().collect();
        Ok(VhostUserShMemConfig::new(sizes.len() as u32, &sizes))
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // The crate has limited both to 4 KiB.
        let rest = self.device.config().into_iter().skip(offset as usize);
        rest.chain(std::iter::repeat(0)).take(size as usize).collect()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.device.write_config(offset, bytes);
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: Backend) {
        self.device.connect(backend);
    }

    /// Returns when nothing is being done in the memory of before. But requests of a device with shared
    /// memory may be waiting for the front-end, which waits for this: they keep their memory until they are
    /// done.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.device.memory_changed(&memory)?;
        if self.device.shared_memory().is_none() {
            self.wait();
        }
        Ok(())
    }

    /// Called at GET_VRING_BASE, with the queue stopped.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        for answering in self.queues.get(index as usize).iter().flat_map(|queue| &queue.answering) {
            drop(lock(answering));
        }
        self.device.stop_waiting();
        Ok(())
    }

    /// Called with the queues disabled.
    fn reset_device(&self) {
        self.wait();
        self.device.stop_waiting();
        self.device.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate has told the queues.
    }

    /// Called by a queue's thread, which knows its queue as number 0, for a kick and at the end of the
    /// session. An error ends the thread.
    fn handle_event(&self, event: u16, _: EventSet, vrings: &[VringMutex], thread: usize) -> io::Result<()> {
        match (event, vrings.first()) {
            (0, Some(vring)) => {
                self.serve(thread, 0, vring, false);
                Ok(())
            }
            _ => Err(io::Error::other("the session has ended")),
        }
    }
}
