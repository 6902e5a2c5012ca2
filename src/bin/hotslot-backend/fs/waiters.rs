//! Requests that are tried again until they succeed or their time is over.
//!
//! The host says that a lock is free only to a thread that does nothing but wait for it, and that nothing but
//! a signal can interrupt. So one thread tries all, while there are any: at once when this back-end releases
//! a lock, and every [`INTERVAL`], since the host's processes release theirs. Called by [`super::locks`] and
//! [`super::requests`].

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::lock::lock;

const INTERVAL: Duration = Duration::from_millis(20);

/// Tries, and answers if that succeeds. Told that it is the last time, answers in any case. Returns whether
/// it has answered.
pub type Attempt = Box<dyn FnMut(bool) -> bool + Send>;

/// What waits, for one front-end.
#[derive(Default)]
pub struct Waiters(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Lock order: outermost; held while attempts are made, so that none is left behind [`Waiters::end`].
    list: Mutex<List>,
    changed: Condvar,
}

#[derive(Default)]
struct List {
    /// With the time of the last attempt.
    attempts: Vec<(Instant, Attempt)>,
    has_thread: bool,
}

impl Waiters {
    /// Makes an attempt every [`INTERVAL`], for this long.
    ///
    /// # Errors
    ///
    /// There is no thread for it, and no attempt is made.
    pub fn add(&self, limit: Duration, attempt: Attempt) -> io::Result<()> {
        let list = &mut *lock(&self.0.list);
        if !list.has_thread {
            let shared = Arc::clone(&self.0);
            thread::Builder::new().name("waiters".to_owned()).spawn(move || shared.run())?;
            list.has_thread = true;
        }
        list.attempts.push((Instant::now() + limit, attempt));
        Ok(())
    }

    /// Attempts are made at once: one may succeed now.
    pub fn wake(&self) {
        self.0.changed.notify_all();
    }

    /// Makes the last attempt of all.
    pub fn end(&self) {
        for (_, mut attempt) in lock(&self.0.list).attempts.drain(..) {
            attempt(true);
        }
    }
}

impl Shared {
    /// The thread, until nothing waits.
    fn run(&self) {
        let mut list = lock(&self.list);
        while !list.attempts.is_empty() {
            let waited = self.changed.wait_timeout(list, INTERVAL);
            list = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            let now = Instant::now();
            list.attempts.retain_mut(|(last, attempt)| !attempt(now >= *last));
        }
        list.has_thread = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn an_attempt_is_made_until_it_succeeds_and_once_more_when_its_time_is_over() {
        let waiters = Waiters::default();
        let (told, tells) = mpsc::channel();
        for limit in [Duration::from_secs(3600), Duration::ZERO] {
            let told = told.clone();
            let mut left = 3;
            let attempt = move |is_last| {
                left -= 1;
                let _listens = told.send((left, is_last));
                left == 0 || is_last
            };
            waiters.add(limit, Box::new(attempt)).unwrap();
        }
        drop(told);
        let mut calls: Vec<_> = tells.into_iter().collect();
        calls.sort_unstable();
        assert_eq!(calls, [(0, false), (1, false), (2, false), (2, true)]);
    }

    #[test]
    fn the_end_answers_all() {
        let waiters = Waiters::default();
        let (told, tells) = mpsc::channel();
        let attempt = move |is_last| {
            let _listens = told.send(is_last);
            is_last
        };
        waiters.add(Duration::from_secs(3600), Box::new(attempt)).unwrap();
        waiters.end();
        assert_eq!(tells.into_iter().last(), Some(true));
    }
}
