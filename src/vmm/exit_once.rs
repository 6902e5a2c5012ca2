//! How the machine ends: set by any thread, awaited by the main loop.

use std::sync::{Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::eventfd::EventFd;

use super::error::{VmmError, eventfd, watch};
use crate::exit::Exit;
use crate::report::Failure;

type Ending = Result<Exit, Box<dyn Failure>>;

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

    /// Called by vCPU threads and by the main loop. Wakes the main loop.
    pub fn set(&self, ending: Ending) {
        let mut first = self.lock();
        if first.is_none() {
            *first = Some(ending);
        } else {
            log::debug!("the machine ends already, so this does not count: {ending:?}");
        }
        // A write fails only where the counter is at 2^64 - 2; the main loop then wakes anyway.
        let _full = self.event.write(1);
    }

    /// Called by the main loop each time around.
    pub fn take(&self) -> Option<Ending> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Ending>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSubscriber for ExitOnce {
    /// The main loop wakes up, and calls [`ExitOnce::take`].
    fn process(&self, _events: Events, _ops: &mut EventOps) {}

    fn init(&self, ops: &mut EventOps) {
        watch(ops, &self.event);
    }
}
