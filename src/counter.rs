//! Counters that any thread adds to, and that the statistics read while the machine runs (`vmm::stats`).
//!
//! All accesses are relaxed: a counter orders nothing, and counters that are read together may be of slightly
//! different moments.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Counters by name, at one moment.
pub type Counts = Vec<(String, u64)>;

/// A number that only grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds 1.
    pub fn count(&self) {
        self.add(1);
    }

    /// Adds a number.
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    /// Keeps the longest time so far, in microseconds.
    pub fn keep_longest(&self, time: Duration) {
        let microseconds = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.0.fetch_max(microseconds, Ordering::Relaxed);
    }

    /// The number so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// How often each of these came. For rare things: it takes a lock.
#[derive(Default)]
pub struct CountsBy<K>(
    /// Lock order: innermost; held for a lookup.
    Mutex<BTreeMap<K, u64>>,
);

impl<K: Ord + Copy> CountsBy<K> {
    /// It came once more.
    pub fn count(&self, key: K) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
    }

    /// The numbers so far.
    pub fn get(&self) -> Vec<(K, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(&key, &count)| (key, count)).collect()
    }
}

/// A struct of [`Counter`]s, whose method `counts` gives each by the name of its field.
#[macro_export]
macro_rules! counters {
    ($(#[$about:meta])* $name:ident { $($(#[$one:meta])* $field:ident),* $(,)? }) => {
        $(#[$about])*
        #[derive(Default)]
        pub struct $name { $($(#[$one])* pub $field: $crate::counter::Counter),* }

        impl $name {
            /// The counters by name.
            pub fn counts(&self) -> $crate::counter::Counts {
                vec![$((stringify!($field).to_owned(), self.$field.get())),*]
            }
        }
    };
}
