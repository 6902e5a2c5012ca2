//! A device's own thread: serves the backend channel, and sees when the back-end goes away.
//!
//! It takes no lock that anybody holds while waiting for this back-end (deadlock rule of the protocol: a back-end that
//! maps while we wait for its answer on the main socket is served here).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend_channel::{BackendChannel, ChannelError};
use super::connection::ConnectionError;
use crate::virtio::interrupt::Interrupt;

/// Whether a device's back-end can still be used.
pub struct Health {
    name: String,
    lost: AtomicBool,
    interrupt: Arc<Interrupt>,
}

impl Health {
    /// A back-end that just connected.
    pub fn new(name: &str, interrupt: Arc<Interrupt>) -> Self {
        Health {
            name: name.to_string(),
            lost: AtomicBool::new(false),
            interrupt,
        }
    }

    /// Whether the back-end is gone, or was cut off.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Gives the back-end up: says why, once, and tells the driver (SHM-76). Its mappings stay until the reset.
    pub fn give_up(&self, why: &dyn std::error::Error) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            let causes = std::iter::successors(why.source(), |error| error.source());
            let why = causes.fold(why.to_string(), |text, cause| format!("{text}: {cause}"));
            log::error!("{}: {why}; the device needs a reset", self.name);
            self.interrupt.needs_reset();
        }
    }
}

/// The running thread. Dropping it stops and joins it.
pub struct Watch {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the thread. `main` is a copy of the main socket, whose hang-up it looks for.
    pub fn start(
        health: Arc<Health>,
        main: OwnedFd,
        channel: Option<Arc<BackendChannel>>,
    ) -> io::Result<Watch> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let channel_fd = channel.as_ref().map(|channel| channel.watch_fd()).transpose()?;
        let watched = Watched {
            stop: stop.try_clone()?,
            main,
            channel,
            channel_fd,
            health,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vhost-{}", watched.health.name))
            .spawn(move || watched.run())?;
        Ok(Watch {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A nonblocking eventfd fails only when its counter is full: the thread is woken then, too.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic in there was printed already.
            let _ = thread.join();
        }
    }
}

struct Watched {
    stop: EventFd,
    main: OwnedFd,
    channel: Option<Arc<BackendChannel>>,
    channel_fd: Option<OwnedFd>,
    health: Arc<Health>,
}

impl Watched {
    fn run(mut self) {
        loop {
            // poll(2) passes over a negative descriptor.
            let channel_fd = self.channel_fd.as_ref().map_or(-1, |fd| fd.as_raw_fd());
            let poll = |fd, events| libc::pollfd {
                fd,
                events,
                revents: 0,
            };
            let mut polled = [
                poll(self.stop.as_raw_fd(), libc::POLLIN),
                poll(channel_fd, libc::POLLIN),
                poll(self.main.as_raw_fd(), libc::POLLRDHUP),
            ];
            // SAFETY: the array is on our stack, and the descriptors live as long as `self`.
            if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as _, -1) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return self.health.give_up(&error);
            }
            let [stop, channel, main] = polled.map(|entry| entry.revents != 0);
            if stop {
                return;
            }
            if channel {
                self.serve();
            } else if main {
                // Only once the channel is quiet: what the back-end sent before its end is served.
                return self.health.give_up(&ConnectionError::HungUp);
            }
        }
    }

    fn serve(&mut self) {
        let Some(channel) = &self.channel else { return };
        if let Err(error) = channel.serve() {
            match error {
                // A back-end may do without the channel; if it is gone as a whole, the main socket tells.
                ChannelError::Connection(ConnectionError::HungUp) => {
                    log::debug!("{}: the back-end closed the backend channel", self.health.name);
                }
                error => {
                    channel.shut_down();
                    self.health.give_up(&error);
                }
            }
            self.channel_fd = None;
        }
    }
}
