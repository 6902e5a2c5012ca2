//! A device's own thread: serves the backend channel, and sees when the back-end goes away.
//!
//! It takes no lock that anybody holds while waiting for this back-end (deadlock rule of the protocol: a
//! back-end that maps while we wait for its answer on the main socket is served here).

use std::io;
use std::net::Shutdown;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend_channel::{BackendChannel, ChannelError};
use super::connection::{ConnectionError, Deadline};
use crate::report::with_causes;
use crate::thread;
use crate::virtio::interrupt::Interrupt;

/// The two sockets to a device's back-end: whether they can still be used, and the way to end that.
pub struct Link {
    name: String,
    lost: AtomicBool,
    interrupt: Arc<Interrupt>,
    /// A copy of the main socket.
    main: UnixStream,
    channel: Option<Arc<BackendChannel>>,
}

impl Link {
    /// A back-end that just connected. `main` is a copy of the main socket.
    pub fn new(
        name: &str,
        interrupt: Arc<Interrupt>,
        main: OwnedFd,
        channel: Option<Arc<BackendChannel>>,
    ) -> Self {
        Link { name: name.to_string(), lost: AtomicBool::new(false), interrupt, main: main.into(), channel }
    }

    /// Whether the back-end is gone, or was cut off.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Gives the back-end up: says why, once, tells the driver (SHM-76), and hangs up on both sockets, since
    /// one that is no longer told to stop must not go on either. Its mappings stay until the reset.
    pub fn give_up(&self, why: &dyn std::error::Error) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            log::error!("{}: {}; the device needs a reset", self.name, with_causes(why));
            self.interrupt.needs_reset();
            self.hang_up();
        }
    }

    /// Hangs up on both sockets: whoever waits on them goes on.
    pub fn hang_up(&self) {
        // It fails only where the peer was faster.
        let _ = self.main.shutdown(Shutdown::Both);
        if let Some(channel) = &self.channel {
            channel.shut_down();
        }
    }

    /// Serves what is queued on the backend channel, at a reset.
    pub fn drain_channel(&self, deadline: Deadline) {
        if let Some(Err(error)) = self.channel.as_ref().map(|channel| channel.drain(deadline)) {
            self.channel_ended(&error);
        }
    }

    /// The backend channel ended. A back-end may do without it; if it is gone as a whole, the main socket
    /// tells.
    fn channel_ended(&self, why: &ChannelError) {
        match why {
            ChannelError::Connection(ConnectionError::HungUp) => {
                log::debug!("{}: the back-end closed the backend channel", self.name);
            }
            // SHM-64
            why => self.give_up(why),
        }
    }
}

/// The running thread. Dropping it stops and joins it.
pub struct Watch {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the thread. It serves no more than `rate` requests of the backend channel in a second, evenly
    /// spread; `None` for no limit.
    pub fn start(link: Arc<Link>, rate: Option<NonZeroU32>) -> io::Result<Watch> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let watched = Watched {
            stop: stop.try_clone()?,
            channel: link.channel.clone(),
            interval: rate.map(|rate| Duration::from_secs(1) / rate.get()),
            next: None,
            link,
        };
        let name = format!("vhost-{}", watched.link.name);
        let thread = thread::spawn(name, move || watched.run())?;
        Ok(Watch { stop, thread: Some(thread) })
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
    /// `None` once it ended.
    channel: Option<Arc<BackendChannel>>,
    /// The least time between two requests of the backend channel.
    interval: Option<Duration>,
    /// When the channel's turn comes whether or not its socket has anything to read: a request may have been
    /// read with the one before.
    next: Option<Deadline>,
    link: Arc<Link>,
}

impl Watched {
    fn run(mut self) {
        loop {
            // poll(2) passes over a negative descriptor.
            let channel = self.channel.as_deref().filter(|_| self.next.is_none());
            let channel_fd = channel.map_or(-1, |channel| channel.as_fd().as_raw_fd());
            let timeout = self.next.map_or(-1, |next| next.poll_timeout());
            let poll = |fd, events| libc::pollfd { fd, events, revents: 0 };
            let mut polled = [
                poll(self.stop.as_raw_fd(), libc::POLLIN),
                poll(channel_fd, libc::POLLIN),
                poll(self.link.main.as_raw_fd(), libc::POLLRDHUP),
            ];
            // SAFETY: the array is on our stack, and the descriptors live as long as `self`.
            if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as _, timeout) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return self.link.give_up(&error);
            }
            let [stop, channel, main] = polled.map(|entry| entry.revents != 0);
            if stop {
                return;
            }
            // What a back-end leaves behind is not much, and its end is not to be noticed the later for it.
            let is_due =
                self.next.is_some_and(|next| next.has_passed()) || main && self.interval.take().is_some();
            if channel || is_due {
                self.serve();
            } else if main {
                // Only once the channel is quiet: what the back-end sent before its end is served.
                return self.link.give_up(&ConnectionError::HungUp);
            }
        }
    }

    fn serve(&mut self) {
        self.next = None;
        let Some(channel) = &self.channel else { return };
        let served = match self.interval {
            None => channel.serve(),
            Some(interval) => channel.serve_request().map(|is_one| {
                self.next = is_one.then(|| Deadline::after(interval));
            }),
        };
        if let Err(error) = served {
            self.link.channel_ended(&error);
            self.channel = None;
        }
    }
}
