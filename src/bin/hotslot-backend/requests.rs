//! The requests in a virtqueue, one after another (VIRTIO 1.2, section 2.7), and complaints about those that
//! are wrong.
//!
//! [`Requests`] is for the devices whose requests are answered at once, on the crate's worker thread; the
//! rest is for all.

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hotslot::report::say;
use vhost::vhost_user::Error as ProtocolError;
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{DescriptorChain, Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};

use crate::server::Memory;

/// A request: its buffers, and the guest's memory as it was when the request was found.
pub type Request = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// A guest can be wrong as often as it likes; it is not given the whole of stderr.
const MAX_COMPLAINTS: u32 = 10;

/// What is wrong with a front-end or its guest, on stderr, a few times.
pub struct Complaints {
    device: &'static str,
    said: AtomicU32,
}

impl Complaints {
    /// `device` is for messages.
    pub fn of(device: &'static str) -> Self {
        Complaints { device, said: AtomicU32::new(0) }
    }

    /// Says it, up to a limit.
    pub fn say(&self, what: impl Display) {
        let device = self.device;
        match self.said.fetch_add(1, Ordering::Relaxed) {
            n if n < MAX_COMPLAINTS => say(format_args!("{device}: {what}")),
            MAX_COMPLAINTS => say(format_args!("{device}: no more complaints about this front-end's guest")),
            _ => {}
        }
    }
}

/// The requests of a device with one queue.
pub struct Requests {
    memory: Memory,
    /// Held while a request is answered, and taken by whoever has to know that it is done. Innermost after
    /// it: the crate's lock of the queue.
    answering: Mutex<()>,
    complaints: Complaints,
}

impl Requests {
    /// `device` is for messages.
    pub fn new(device: &'static str, memory: Memory) -> Self {
        Requests { memory, answering: Mutex::new(()), complaints: Complaints::of(device) }
    }

    /// Has `answer` execute what is in the queue, and waits for nothing more. `answer` returns how many bytes
    /// of the request's buffers it wrote.
    pub fn answer(&self, vring: &VringMutex, mut answer: impl FnMut(Request) -> u32) {
        if let Err(e) = self.try_answer(vring, &mut answer) {
            self.complain(format_args!("the request queue is broken: {e}"));
        }
    }

    fn try_answer(
        &self,
        vring: &VringMutex,
        answer: &mut impl FnMut(Request) -> u32,
    ) -> Result<(), QueueError> {
        loop {
            // Anew for each request: who waits for us shall not wait for all that a busy guest has to ask.
            let _answering = lock(&self.answering);
            let Some(request) = self.next(vring)? else {
                return Ok(());
            };
            let head = request.head_index();
            let written = answer(request);
            // The requests behind it may have come with the same kick.
            if let Err(e) = hand_back(vring, head, written) {
                self.complain(format_args!("request {head} cannot be handed back: {e}"));
            }
        }
    }

    /// The next request, unless the queue is stopped or empty. When it is empty, the driver notifies us of
    /// the next.
    fn next(&self, vring: &VringMutex) -> Result<Option<Request>, QueueError> {
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return Ok(None);
        }
        // Twice, because a request may arrive before notifications are on. A third time would find nothing
        // new, and a guest whose ring lies half outside its memory would keep us here for ever.
        for _ in 0..2 {
            if let Some(request) = state.get_queue_mut().iter(self.memory.memory())?.next() {
                return Ok(Some(request));
            }
            if !state.enable_notification()? {
                return Ok(None);
            }
        }
        Err(QueueError::InvalidAvailRingIndex)
    }

    /// Returns when the request that is being answered, if there is one, has its answer. Later ones see the
    /// queue and the memory as they are now.
    pub fn wait(&self) {
        drop(lock(&self.answering));
    }

    /// Says what is wrong with the guest's requests, up to a limit.
    pub fn complain(&self, what: impl Display) {
        self.complaints.say(what);
    }
}

/// Hands a request back to the driver, with `written` bytes of answer.
///
/// # Errors
///
/// A head that is none, a used ring that is not in the guest's memory, a call descriptor that cannot be
/// written.
pub fn hand_back(vring: &VringMutex, head: u16, written: u32) -> Result<(), Box<dyn Error>> {
    let mut state = vring.get_mut();
    state.add_used(head, written)?;
    if state.needs_notification()? {
        state.signal_used_queue()?;
    }
    Ok(())
}

/// Why the front-end did not do what was asked of it on the backend channel, as far as the crate tells: it
/// keeps the value of the answer to itself.
pub fn refusal(error: &io::Error) -> String {
    match error.get_ref().and_then(|e| e.downcast_ref::<ProtocolError>()) {
        Some(ProtocolError::FrontendInternalError) => "the front-end refused".to_owned(),
        Some(ProtocolError::PartialMessage) => "the front-end closed the channel".to_owned(),
        _ => error.to_string(),
    }
}

/// What `handle_event` returns to end the worker (see [`crate::server::Device::end_event`]).
pub fn session_has_ended() -> io::Error {
    io::Error::other("the session has ended")
}

/// A lock whose holder cannot leave anything half done.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
