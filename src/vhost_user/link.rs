//! The two sockets to a device's back-end: whether they can still be used, and how to hang up.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::wire::channel::ChannelError;
use super::wire::connection::{ConnectionError, discard, discard_descriptors};
use crate::report::{MisuseLog, with_causes};
use crate::virtio::interrupt::Interrupt;

/// Shared by the device, its thread ([`super::watch`]) and the threads of [`super::sharing`].
pub struct Link {
    /// The device's name.
    pub name: String,
    /// For what its back-end can provoke.
    pub log: MisuseLog,
    lost: AtomicBool,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// The main socket.
    pub main: Arc<UnixStream>,
    channel: Option<Arc<UnixStream>>,
}

impl Link {
    /// A back-end that just connected, by its sockets.
    pub fn new(
        name: &str,
        interrupt: Arc<Interrupt>,
        main: Arc<UnixStream>,
        channel: Option<Arc<UnixStream>>,
    ) -> Arc<Self> {
        let (name, log, lost) = (name.to_string(), MisuseLog::new(name), AtomicBool::new(false));
        Arc::new(Link { name, log, lost, interrupt, main, channel })
    }

    /// Whether the back-end is gone, or was cut off.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Gives the back-end up: says why, once, tells the driver (SHM-76), and hangs up on both sockets: nobody
    /// will tell this back-end to stop, so it must not go on. Its mappings stay until the reset.
    pub fn give_up(&self, why: &dyn std::error::Error) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            log::error!("{}: {}; the device needs a reset", self.name, with_causes(why));
            self.interrupt.needs_reset();
            self.hang_up();
        }
    }

    /// Throws away what is left on both sockets after [`Self::hang_up`], but for an answer on the main socket
    /// that another thread waits for. May wait: called by the device's own thread.
    pub fn discard(&self) {
        discard_descriptors(&self.main);
        self.channel.iter().for_each(|socket| discard(socket));
    }

    /// Hangs up on both sockets: a thread that waits on one goes on.
    pub fn hang_up(&self) {
        for socket in [Some(&self.main), self.channel.as_ref()].into_iter().flatten() {
            // It fails only where the peer was faster.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The backend channel ended. A back-end may close it alone and go on; if it is gone as a whole, the main
    /// socket tells.
    pub fn channel_ended(&self, why: &ChannelError) {
        match why {
            ChannelError::Connection(ConnectionError::HungUp) => {
                log::debug!("{}: the back-end closed the backend channel", self.name);
            }
            // SHM-64
            why => self.give_up(why),
        }
    }
}
