//! More threads for a queue, which answer its requests beside its own thread while several slow ones wait.
//!
//! A thread executes one request at a time, and a disk that is asked for one page at a time is idle most of
//! the time. More queues would do the same, but a guest uses no more of them than it has processors. Called
//! by `queues`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::lock::lock;

/// The helpers of one queue.
#[derive(Default)]
pub struct Helpers {
    /// Innermost lock.
    state: Mutex<State>,
    called: Condvar,
    /// Those that wait and are not called; for a look without the lock.
    idle: AtomicUsize,
}

#[derive(Default)]
struct State {
    calls: usize,
    ended: bool,
}

impl Helpers {
    /// Has one more helper look for requests, if one is idle.
    pub fn call(&self) {
        if self.idle.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut state = lock(&self.state);
        if self.idle.load(Ordering::Relaxed) > 0 {
            self.idle.fetch_sub(1, Ordering::Relaxed);
            state.calls += 1;
            self.called.notify_one();
        }
    }

    /// On a helper's thread: waits until it is called. False at the end of the session.
    pub fn wait(&self) -> bool {
        let state = lock(&self.state);
        self.idle.fetch_add(1, Ordering::Relaxed);
        let state = &mut *self
            .called
            .wait_while(state, |state| state.calls == 0 && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        if state.ended {
            return false;
        }
        state.calls -= 1;
        true
    }

    /// The session has ended.
    pub fn end(&self) {
        lock(&self.state).ended = true;
        self.called.notify_all();
    }
}
