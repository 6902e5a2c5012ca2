//! Waiting for what another thread or process does. Every wait of a test has an end.

use std::thread;
use std::time::{Duration, Instant};

/// How long any wait may take: longer than anything needs, on the slowest machine when it is busy.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "not so: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
