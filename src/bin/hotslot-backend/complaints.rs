//! Messages about a front-end or its guest, on stderr: a few at once and then one a second, so that neither
//! can fill it, and a later error of the host is still said.

use std::fmt::Display;

use hotslot::report::{LineBudget, say};

/// The messages of one session.
pub struct Complaints {
    device: &'static str,
    budget: LineBudget,
}

impl Complaints {
    /// Messages that begin with the device's name.
    pub fn of(device: &'static str) -> Self {
        Complaints { device, budget: LineBudget::default() }
    }

    /// Prints a message, unless there were too many just now.
    pub fn say(&self, message: impl Display) {
        let device = self.device;
        match self.budget.take() {
            None => {}
            Some(0) => say(format_args!("{device}: {message}")),
            Some(dropped) => {
                say(format_args!("{device}: {message} ({dropped} lines before this one left out)"))
            }
        }
    }
}
