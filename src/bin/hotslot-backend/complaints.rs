//! Messages about a front-end or its guest, on stderr: the first few of each session, so that neither can
//! fill it.

use std::fmt::Display;
use std::sync::atomic::{AtomicU32, Ordering};

use hotslot::report::say;

const MAX_COMPLAINTS: u32 = 10;

/// The messages of one session.
pub struct Complaints {
    device: &'static str,
    said: AtomicU32,
}

impl Complaints {
    /// Messages that begin with the device's name.
    pub fn of(device: &'static str) -> Self {
        Complaints { device, said: AtomicU32::new(0) }
    }

    /// Prints a message, unless there were too many.
    pub fn say(&self, message: impl Display) {
        let device = self.device;
        match self.said.fetch_add(1, Ordering::Relaxed) {
            n if n < MAX_COMPLAINTS => say(format_args!("{device}: {message}")),
            MAX_COMPLAINTS => say(format_args!("{device}: no more complaints about this front-end's guest")),
            _ => {}
        }
    }
}
