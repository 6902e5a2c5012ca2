//! A thread that writes a file each time it is asked to: that of `picture`, of `dump` and of `stats`.
//! `signals` and the end of the machine ask it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the thread is asked for, and what it has done.
#[derive(Default)]
pub(super) struct Writer {
    /// Lock order: innermost; never held while a file is written.
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Default)]
struct Orders {
    given: u64,
    /// How many of them a finished file is newer than.
    done: u64,
}

impl Writer {
    /// Has the file written, soon. Waits for nothing.
    pub fn order(&self) {
        self.lock().given += 1;
        self.changed.notify_all();
    }

    /// Waits until all orders are carried out; false if that takes longer.
    pub fn wait(&self, limit: Duration) -> bool {
        let is_busy = |orders: &mut Orders| orders.done < orders.given;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, is_busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The thread: writes the file for each order. Those that come meanwhile are carried out together.
    pub fn serve(&self, write: impl Fn()) -> ! {
        let is_idle = |orders: &mut Orders| orders.done == orders.given;
        loop {
            let orders = self.changed.wait_while(self.lock(), is_idle);
            let given = orders.unwrap_or_else(PoisonError::into_inner).given;
            write();
            self.lock().done = given;
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
