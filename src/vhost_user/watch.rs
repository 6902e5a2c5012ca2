//! A device's own thread: serves the backend channel, and sees when the back-end goes away.
//!
//! It takes no lock that is held while another thread waits for an answer of this back-end (deadlock rule of
//! the protocol: a back-end that maps while we wait for its answer on the main socket is served here).

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::link::Link;
use super::shmem_handler::BackendChannel;
use super::wire::connection::{ConnectionError, Deadline};
use crate::thread;

/// The running thread. Dropping it stops and joins it.
pub struct Watch {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the thread. It serves no more than `rate` requests of the backend channel in a second, evenly
    /// spread; `None` for no limit.
    pub fn start(
        link: Arc<Link>,
        channel: Option<Arc<BackendChannel>>,
        rate: Option<NonZeroU32>,
    ) -> io::Result<Watch> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let name = format!("vhost-{}", link.name);
        let interval = rate.map(|rate| Duration::from_secs(1) / rate.get());
        let watched = Watched { stop: Arc::clone(&stop), channel, interval, next: None, link };
        let thread = thread::spawn(name, move || watched.run())?;
        Ok(Watch { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A nonblocking eventfd fails only when its counter is full: the thread is woken then, too.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic in there was printed already.
            let _ = thread.join();
        }
    }
}

struct Watched {
    stop: Arc<OwnedFd>,
    /// `None` once it ended.
    channel: Option<Arc<BackendChannel>>,
    /// The least time between two requests of the backend channel.
    interval: Option<Duration>,
    /// When the next request is due, whether or not the socket has anything to read: it may have been read
    /// together with the one before.
    next: Option<Deadline>,
    link: Arc<Link>,
}

impl Watched {
    fn run(mut self) {
        loop {
            let mut polled =
                vec![PollFd::new(&self.stop, PollFlags::IN), PollFd::new(&self.link.main, PollFlags::RDHUP)];
            // Until the next request is due, the channel's socket is left alone.
            if let Some(channel) = self.channel.as_ref().filter(|_| self.next.is_none()) {
                polled.push(PollFd::from_borrowed_fd(channel.socket().as_fd(), PollFlags::IN));
            }
            let timeout = self.next.map(|next| next.time_left().unwrap_or_default());
            match poll(&mut polled, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return self.link.give_up(&io::Error::from(error)),
            }
            let is_ready =
                |index| polled.get(index).is_some_and(|entry: &PollFd| !entry.revents().is_empty());
            let [stop, main, channel] = [0, 1, 2].map(is_ready);
            if stop {
                return;
            }
            // The back-end is gone: drop the rate limit, so that the end of what it left is reached at once.
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
