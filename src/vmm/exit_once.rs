//! How the machine ends: set by any thread, awaited by the main loop and by the thread `signals`.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::eventfd::EventFd;

use super::error::{VmmError, eventfd, watch};
use crate::exit::Exit;
use crate::report::{Failure, STATUS_ERROR, failure_text};

/// What the program says last, and its exit status.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    pub last: String,
    pub status: u8,
    /// Whether it is a fault, of the guest or of hotslot, for which a dump is written.
    pub is_fault: bool,
}

impl From<&Exit> for Ending {
    fn from(exit: &Exit) -> Self {
        let is_fault = matches!(exit, Exit::Crash(_) | Exit::Panicked);
        Ending { last: format!("hotslot: {exit}"), status: exit.into(), is_fault }
    }
}

impl From<&dyn Failure> for Ending {
    fn from(failure: &dyn Failure) -> Self {
        let (last, status) = (failure_text(failure), failure.status());
        Ending { last, status, is_fault: status == STATUS_ERROR }
    }
}

/// How the machine ends. Set once: the first caller wins.
pub(super) struct ExitOnce {
    /// Lock order: innermost, held for a moment only.
    ending: Mutex<Option<Ending>>,
    event: EventFd,
}

impl ExitOnce {
    pub fn new() -> Result<ExitOnce, VmmError> {
        Ok(ExitOnce { ending: Mutex::new(None), event: eventfd()? })
    }

    /// Called by any thread. Wakes the main loop and the thread `signals`.
    pub fn set(&self, ending: Ending) {
        let mut first = self.lock();
        if first.is_none() {
            *first = Some(ending);
        } else {
            log::debug!("the machine ends already, so this does not count: {ending:?}");
        }
        // A write fails only where the counter is at 2^64 - 2; the threads that wait for it wake anyway.
        let _full = self.event.write(1);
    }

    /// Called by the main loop and the thread `signals` each time around.
    pub fn get(&self) -> Option<Ending> {
        self.lock().clone()
    }

    /// Can be read from the moment on that the end is set.
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the event owns its descriptor, and is borrowed for as long as the result is used.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Ending>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSubscriber for ExitOnce {
    /// The main loop wakes up, and calls [`ExitOnce::get`].
    fn process(&self, _events: Events, _ops: &mut EventOps) {}

    fn init(&self, ops: &mut EventOps) {
        watch(ops, &self.event);
    }
}
