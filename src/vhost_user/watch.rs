//! A device's own thread: serves the backend channel, sees when the back-end goes away, and takes the
//! mappings away at a reset.
//!
//! It is the only thread that receives, maps, unmaps and refuses what the back-end sent. Any system call on
//! these descriptors and mappings can wait for another process, without limit. So every wait for this thread
//! has a deadline; past it the device is given up and the thread is left behind. Other threads touch only
//! files that were accepted (SHM-83): a vCPU that needs a page.
//!
//! It takes no lock that is held while another thread waits for an answer of this back-end (deadlock rule of
//! the protocol: a back-end that maps while we wait for its answer on the main socket is served here).

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use log::Level;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use thiserror::Error;

use super::link::{Link, Session};
use super::sharing::Participant;
use super::shmem_handler::BackendChannel;
use super::wire::channel::ChannelError;
use super::wire::connection::{ConnectionError, Deadline};
use crate::memory::shmem::{SharedMemory, ShmemError};
use crate::report::with_causes;
use crate::sandbox::vmm::Kind;
use crate::thread;

/// How long the end of a device waits for its thread.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a device without requests keeps the slots of ranges that were unmapped.
const KEEP_SLOTS: Duration = Duration::from_secs(3);

/// The most slots that are deleted at a time. KVM takes about 24 us for each on the emulated host, 2 ms
/// where it is software: a request that comes meanwhile waits for 16 ms at most.
const SLOTS_AT_A_TIME: usize = 8;

/// The thread did not take the mappings away in time.
#[derive(Debug, Error)]
#[error("a call on a file or a descriptor of its back-end does not return")]
pub struct Stuck;

/// The running thread. Dropping it stops it and waits for it, with a time limit.
pub struct Watch {
    orders: Arc<Orders>,
    thread: JoinHandle<()>,
}

/// What the thread is told to do.
pub struct Orders {
    /// Signalled when something changed here.
    wake: OwnedFd,
    /// Signalled by the back-end.
    ring_error: OwnedFd,
    /// Lock order: innermost, held for a moment.
    state: Mutex<State>,
    done: Condvar,
}

#[derive(Default)]
struct State {
    stop: bool,
    /// A wait for the thread timed out: no thread waits for it again.
    is_left: bool,
    /// Serve another session: the back-end came back.
    adopt: Option<(Arc<Session>, Option<BackendChannel>)>,
    /// Take away the mappings that it has not made anew, once its channel is quiet.
    settle: bool,
    /// Take all mappings away, until this deadline.
    clear: Option<Deadline>,
    /// Counts what was taken away: with many mappings that takes long.
    progress: u64,
    /// The result of `clear`: how many mappings were unmapped.
    cleared: Option<Result<usize, ShmemError>>,
}

impl Orders {
    /// Orders with nothing to do.
    pub fn new() -> io::Result<Arc<Orders>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ring_error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Orders { wake, ring_error, state: Mutex::default(), done: Condvar::new() }))
    }

    /// The back-end came back (SHM-77): from now on its session is served, and the mappings of the one before
    /// make way for its own. Does not wait.
    pub fn adopt(&self, session: &Arc<Session>, channel: Option<BackendChannel>) {
        let mut state = self.lock();
        state.settle = false;
        let replaced = state.adopt.replace((Arc::clone(session), channel));
        drop(state);
        self.wake();
        // Closing its socket can wait for what was sent there.
        drop(replaced);
    }

    /// The back-end that came back has been started: what it has sent until now is served, then the old
    /// mappings that it has not made anew are taken away. Does not wait.
    pub fn settle(&self) {
        self.lock().settle = true;
        self.wake();
    }

    /// For the back-end to signal that a ring makes no sense to it.
    pub fn ring_error(&self) -> BorrowedFd<'_> {
        self.ring_error.as_fd()
    }

    /// Has the thread close the files that are shared no longer, soon: waits for nothing.
    pub fn close_files(&self) {
        self.wake();
    }

    /// For a reset: serves what is queued on the channel, then takes all mappings away; gives their number.
    /// Gives up when the thread has unmapped nothing for `limit`. The caller has closed the gate.
    /// Called on a vCPU's thread.
    pub fn clear(&self, limit: Duration) -> Result<Result<usize, ShmemError>, Stuck> {
        let mut state = self.lock();
        if state.is_left {
            return Err(Stuck);
        }
        (state.clear, state.cleared) = (Some(Deadline::after(limit)), None);
        self.wake();
        loop {
            let before = state.progress;
            let waited = self.done.wait_timeout_while(state, limit, |state| state.cleared.is_none());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.cleared.is_some() || state.progress == before {
                break;
            }
        }
        let cleared = state.cleared.take();
        (state.clear, state.is_left) = (None, cleared.is_none());
        cleared.ok_or(Stuck)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A nonblocking eventfd fails only when its counter is full: the thread is woken then, too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Watch {
    /// Starts the thread. It serves no more than `rate` requests of the backend channel in a second, evenly
    /// spread; `None` for no limit.
    pub fn start(
        orders: &Arc<Orders>,
        link: Arc<Link>,
        channel: Option<BackendChannel>,
        shmem: Arc<SharedMemory>,
        shares: Option<Participant>,
        rate: Option<NonZeroU32>,
    ) -> io::Result<Watch> {
        let name = format!("vhost-{}", link.name);
        let interval = rate.map(|rate| Duration::from_secs(1) / rate.get());
        let watched = Watched {
            orders: Arc::clone(orders),
            session: link.session(),
            channel,
            interval,
            hurries: false,
            next: None,
            was_told: false,
            is_over: false,
            settles: false,
            retires: None,
            link,
            shmem,
            shares,
        };
        let thread = thread::spawn(name, Kind::Channel, move || watched.run())?;
        Ok(Watch { orders: Arc::clone(orders), thread })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = self.orders.lock();
        state.stop = true;
        let is_left = state.is_left;
        drop(state);
        self.orders.wake();
        let _left_behind = is_left || !thread::join_within(END_TIMEOUT, &self.thread);
    }
}

struct Watched {
    orders: Arc<Orders>,
    session: Arc<Session>,
    /// `None` once it ended.
    channel: Option<BackendChannel>,
    /// The least time between two requests of the backend channel.
    interval: Option<Duration>,
    /// The back-end is gone: what it left is served without intervals.
    hurries: bool,
    /// When the next request is due, whether or not the socket has anything to read: it may have been read
    /// together with the one before.
    next: Option<Deadline>,
    /// The back-end has reported an error of a queue. Once is enough: a read of the eventfd could wait, since
    /// the back-end has its other end.
    was_told: bool,
    /// The session is over: only orders are carried out.
    is_over: bool,
    /// Old mappings go as soon as the channel is quiet.
    settles: bool,
    /// When unmapped ranges lose their slots, unless a request comes before.
    retires: Option<Deadline>,
    link: Arc<Link>,
    shmem: Arc<SharedMemory>,
    /// Where its mappings are shown to other devices: it closes their files.
    shares: Option<Participant>,
}

impl Watched {
    fn run(mut self) {
        loop {
            let mut polled = vec![PollFd::new(&self.orders.wake, PollFlags::IN)];
            if !self.is_over {
                let looked_for = if self.was_told { PollFlags::empty() } else { PollFlags::IN };
                polled.push(PollFd::new(&self.orders.ring_error, looked_for));
                polled.push(PollFd::new(&self.session.main, PollFlags::RDHUP));
                // Until the next request is due, the channel's socket is left alone.
                if let Some(channel) = self.channel.as_ref().filter(|_| self.next.is_none()) {
                    polled.push(PollFd::from_borrowed_fd(channel.socket().as_fd(), PollFlags::IN));
                }
            }
            let timeout = match (self.next, self.retires) {
                (None, _) if self.settles => Some(Timespec::default()),
                (next, retires) => next.or(retires).map(|due| due.time_left().unwrap_or_default()),
            };
            match poll(&mut polled, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => {
                    self.give_up(&io::Error::from(error));
                    continue;
                }
            }
            let is_ready =
                |index| polled.get(index).is_some_and(|entry: &PollFd| !entry.revents().is_empty());
            let [orders, ring_error, main, channel] = [0, 1, 2, 3].map(is_ready);
            if orders {
                self.carry_out_orders();
                if self.orders.lock().stop {
                    return;
                }
                continue;
            }
            if ring_error && !std::mem::replace(&mut self.was_told, true) {
                self.link.log.warn(format_args!("the back-end reports an error of a queue (SET_VRING_ERR)"));
            }
            // The back-end is gone: drop the rate limit, so that the end of what it left is reached at once.
            let is_due = self.next.is_some_and(|next| next.has_passed())
                || main && self.interval.is_some() && !std::mem::replace(&mut self.hurries, true);
            if channel || is_due {
                self.serve();
            } else if main {
                // Only once the channel is quiet: what the back-end sent before its end is served.
                self.give_up(&ConnectionError::HungUp);
            } else if self.settles {
                self.settle();
            } else if self.retires.is_some_and(|due| due.has_passed()) {
                self.retire();
            }
        }
    }

    fn give_up(&mut self, why: &dyn std::error::Error) {
        (self.is_over, self.settles, self.next) = (true, false, None);
        self.link.give_up(&self.session, why);
        self.session.discard();
        // And the part of a message that it had.
        self.channel = None;
    }

    fn channel_ended(&mut self, why: &ChannelError) {
        self.link.channel_ended(&self.session, why);
        self.channel = None;
    }

    fn carry_out_orders(&mut self) {
        // The only error is that there is nothing to read.
        let _ = rustix::io::read(&self.orders.wake, &mut [0; 8]);
        if let Some(shares) = &self.shares {
            shares.close_files();
        }
        let mut state = self.orders.lock();
        let (adopted, settle, clear) = (state.adopt.take(), std::mem::take(&mut state.settle), state.clear);
        drop(state);
        if let Some((session, channel)) = adopted {
            self.adopt(session, channel);
        }
        self.settles |= settle;
        let Some(deadline) = clear else { return };
        if let Some(Err(error)) = self.channel.as_ref().map(|channel| channel.drain(deadline)) {
            self.channel_ended(&error);
        }
        let cleared = self.shmem.unmap_all(|| self.orders.lock().progress += 1);
        let mut state = self.orders.lock();
        // The caller may have given up meanwhile.
        if state.clear.take().is_some() {
            state.cleared = Some(cleared);
            self.orders.done.notify_all();
        }
    }

    fn adopt(&mut self, session: Arc<Session>, channel: Option<BackendChannel>) {
        // The old one is over, whether or not this thread has seen that. What it left unread is late.
        self.session.discard();
        (self.session, self.channel) = (session, channel);
        (self.is_over, self.settles, self.hurries, self.next) = (false, false, false, None);
        self.shmem.make_old();
    }

    /// SHM-77
    fn settle(&mut self) {
        self.settles = false;
        match self.shmem.unmap_old(|| self.orders.lock().progress += 1) {
            Ok(0) => {}
            Ok(count) => {
                self.link.event("old-mappings-gone", &[("unmapped", count as u64)], None);
                let why = "the back-end that came back did not make them again";
                self.link.log.log(Level::Info, format_args!("{count} mappings are gone: {why}"));
            }
            Err(error) => {
                let why = with_causes(&error);
                self.link.log.log(Level::Error, format_args!("mappings stay after a reconnect: {why}"));
            }
        }
        self.link.settled();
    }

    /// SHM-102
    fn retire(&mut self) {
        match self.shmem.retire(SLOTS_AT_A_TIME) {
            Ok(SLOTS_AT_A_TIME) => {}
            Ok(_) => self.retires = None,
            Err(error) => {
                self.retires = None;
                self.link.log.warn(format_args!("slots without a mapping stay: {}", with_causes(&error)));
            }
        }
    }

    fn serve(&mut self) {
        (self.next, self.retires) = (None, Some(Deadline::after(KEEP_SLOTS)));
        let Some(channel) = &self.channel else { return };
        let served = match self.interval.filter(|_| !self.hurries) {
            None => channel.serve(),
            Some(interval) => channel.serve_request().map(|is_one| {
                self.next = is_one.then(|| Deadline::after(interval));
            }),
        };
        if let Err(error) = served {
            self.channel_ended(&error);
        }
    }
}
