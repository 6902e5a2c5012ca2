//! A virtqueue, as the front-end describes it: where its rings are, its eventfds, whether it runs; and which
//! requests are taken from it and handed back to it.
//!
//! vhost-user, "Ring states"; VIRTIO 1.2, section 2.7. Called by [`super::session`] on the thread that serves
//! the front-end, and by [`super::queues`] on the threads that answer requests.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::inflight::{self, Record};
use crate::lock::lock;

/// The guest's memory as the front-end describes it; empty until its first SET_MEM_TABLE.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A request, or none, and the index of its first ring descriptor. An error is a ring that makes no sense.
pub type Taken<R> = Result<Option<(u16, R)>, Box<dyn Error>>;

/// A request of 1 MiB takes a ring descriptor a page, and a few.
pub const MAX_SIZE: u16 = 1024;
const _: () = assert!(MAX_SIZE as u64 <= inflight::MAX_QUEUE_SIZE);

/// A virtqueue. Lock order: inside the locks of [`super::queues`]; held for one step on the rings.
pub struct Ring(Mutex<State>);

/// What [`Ring::lock`] gives.
pub struct State {
    pub queue: Queue,
    pub enabled: bool,
    pub kick: Option<Arc<File>>,
    call: Option<File>,
    /// The last back-end may have died before it told the driver of a used buffer.
    owes_call: bool,
    /// Where the requests in flight are recorded, if the front-end keeps such memory.
    pub record: Option<Record>,
    /// Those that were in flight when the last back-end died, as a queue of their own.
    recorded: Option<Queue>,
}

impl Ring {
    /// One that was never started.
    pub fn stopped() -> Self {
        Ring(Mutex::new(State {
            queue: Queue::new(MAX_SIZE).expect("invariant: a power of two"),
            enabled: false,
            kick: None,
            call: None,
            owes_call: false,
            record: None,
            recorded: None,
        }))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

impl State {
    pub fn runs(&self) -> bool {
        self.enabled && self.queue.ready()
    }

    /// SET_VRING_KICK: starts the queue, whose number is `index`. Where requests in flight are recorded, they
    /// say where it stood, and are taken first.
    ///
    /// # Errors
    ///
    /// Its rings are not in the guest's memory.
    pub fn start(&mut self, index: usize, memory: &GuestMemoryMmap, kick: File) -> Result<(), QueueError> {
        self.kick = Some(Arc::new(kick));
        if self.queue.ready() {
            return Ok(());
        }
        let used = self.queue.used_idx(memory, Ordering::Acquire)?.0;
        self.owes_call = used != 0;
        // Requests are used once they are taken. A front-end that says otherwise has read the index while the
        // threads of the last session still answered.
        if self.queue.next_avail().wrapping_sub(used).cast_signed() < 0 {
            self.queue.set_next_avail(used);
        }
        if let Some(record) = &mut self.record {
            let heads = record.recover(used);
            self.queue.set_next_avail(used.wrapping_add(heads.len() as u16));
            if !heads.is_empty() {
                self.recorded = Some(inflight::queue_of(index, &heads, &self.queue, memory)?);
            }
        }
        self.queue.set_ready(true);
        Ok(())
    }

    /// GET_VRING_BASE: stops it. Requests that are being answered are still handed back.
    pub fn stop(&mut self) {
        self.queue.set_ready(false);
        self.recorded = None;
        self.kick = None;
    }

    pub fn set_call(&mut self, call: Option<File>) {
        self.call = call;
    }

    /// Tells the driver what a back-end that died may not have told.
    pub fn pay_call(&mut self) {
        if self.owes_call && self.runs() && self.call.is_some() {
            self.owes_call = false;
            self.call();
        }
    }

    /// The next request, unless the queue is stopped or empty. If it is empty, the driver will notify us of
    /// the next.
    pub fn next<R>(&mut self, memory: &Memory, mut take: impl FnMut(&mut Queue) -> Taken<R>) -> Taken<R> {
        if !self.runs() {
            return Ok(None);
        }
        if let Some(mut recorded) = self.recorded.take()
            && let Some(request) = take(&mut recorded)?
        {
            self.recorded = Some(recorded);
            return Ok(Some(request));
        }
        // Twice, because a request may arrive before notifications are on. A third time would find nothing
        // new, and a guest whose ring lies half outside its memory would keep us here for ever.
        for _ in 0..2 {
            if let Some((head, request)) = take(&mut self.queue)? {
                if let Some(record) = &mut self.record {
                    record.take(head);
                }
                return Ok(Some((head, request)));
            }
            if !self.queue.enable_notification(&*memory.memory())? {
                return Ok(None);
            }
        }
        Err(QueueError::InvalidAvailRingIndex.into())
    }

    /// Whether there are more requests. If the ring makes no sense, [`Self::next`] will find that.
    pub fn has_more(&self, memory: &Memory) -> bool {
        let available = self.queue.avail_idx(&*memory.memory(), Ordering::Acquire);
        self.recorded.is_some() || available.is_ok_and(|available| available.0 != self.queue.next_avail())
    }

    /// Hands a request back to the driver, with `written` bytes of answer.
    pub fn hand_back(&mut self, memory: &Memory, head: u16, written: u32) -> Result<(), QueueError> {
        let memory = memory.memory();
        if let Some(record) = &self.record {
            record.hand_back(head);
        }
        self.queue.add_used(&*memory, head, written)?;
        if let Some(record) = &self.record {
            record.handed_back(head, self.queue.next_used());
        }
        if self.queue.needs_notification(&*memory)? {
            self.call();
        }
        Ok(())
    }

    fn call(&self) {
        if let Some(mut call) = self.call.as_ref() {
            // A counter that cannot be higher: the driver is told already.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }
}
