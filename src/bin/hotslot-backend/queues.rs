//! The queues of a device, and the threads that answer their requests.
//!
//! Each queue has a thread, which waits for the driver's notifications; a device may have more for each
//! ([`super::helpers`]). One value serves one front-end. Called by [`super::session`] and [`super::server`].

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use crate::complaints::Complaints;
use crate::device::{Device, Later};
use crate::helpers::Helpers;
use crate::lock::lock;
use crate::ring::{Memory, Ring, Taken};

/// A request that takes longer waited for a disk, or moved some hundred KiB. A page out of the page cache
/// takes about 2 us, and there a second thread would only be in the way.
const SLOW: Duration = Duration::from_micros(20);

/// The queues of a device.
pub struct Queues<D> {
    pub device: D,
    pub memory: Memory,
    pub complaints: Arc<Complaints>,
    served: Vec<Served>,
    /// Not taken by the threads themselves.
    threads: Mutex<Vec<JoinHandle<()>>>,
    ended: AtomicBool,
}

struct Served {
    ring: Arc<Ring>,
    /// Wakes the queue's own thread: the ring runs now, or no longer, or the session has ended.
    wake: File,
    /// One for each thread: held while it answers a request, and taken to wait for that. Lock order:
    /// outermost; the ring's lock is inside.
    answering: Vec<Mutex<()>>,
    helpers: Helpers,
}

impl<D: Device> Queues<D> {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// A thread or an eventfd that cannot be made; no thread is left.
    pub fn start(device: D, memory: Memory, complaints: Arc<Complaints>) -> io::Result<Arc<Self>> {
        let served = (0..device.queues()).map(|_| {
            Ok(Served {
                ring: Arc::new(Ring::stopped()),
                wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.into(),
                answering: (0..device.threads()).map(|_| Mutex::new(())).collect(),
                helpers: Helpers::default(),
            })
        });
        let queues = Arc::new(Queues {
            served: served.collect::<io::Result<_>>()?,
            device,
            memory,
            complaints,
            threads: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        queues.start_threads().inspect_err(|_| queues.end())?;
        Ok(queues)
    }

    fn start_threads(self: &Arc<Self>) -> io::Result<()> {
        for (queue, served) in self.served.iter().enumerate() {
            for number in 0..served.answering.len() {
                let queues = Arc::clone(self);
                let thread = if number == 0 {
                    let waits = Waits::new(&served.wake)?;
                    thread::Builder::new().name("queue".to_owned()).spawn(move || {
                        if let Err(e) = queues.serve_notifications(queue, &waits) {
                            queues.complaints.say(format_args!("queue {queue} is not served any more: {e}"));
                        }
                    })?
                } else {
                    thread::Builder::new().name("helper".to_owned()).spawn(move || {
                        // Called because a request was slow, so it need not find that out.
                        while queues.served[queue].helpers.wait() {
                            queues.serve(queue, number, true);
                        }
                    })?
                };
                lock(&self.threads).push(thread);
            }
        }
        Ok(())
    }

    /// The session has ended. Returns when its threads have: the next session's have the same numbers.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        for (index, served) in self.served.iter().enumerate() {
            self.wake(index);
            served.helpers.end();
        }
        for thread in lock(&self.threads).drain(..) {
            // One that panicked has ended, too.
            let _ = thread.join();
        }
    }

    pub fn len(&self) -> usize {
        self.served.len()
    }

    pub fn ring(&self, index: usize) -> Option<&Ring> {
        self.served.get(index).map(|served| &*served.ring)
    }

    /// A ring has changed: its thread looks at it.
    pub fn wake(&self, index: usize) {
        // Its counter cannot overflow: each look sets it to 0.
        let _ = (&self.served[index].wake).write(&1u64.to_ne_bytes());
    }

    /// Returns when the requests that are being answered have their answers. Later ones see the queues and
    /// the memory as they are now.
    pub fn wait(&self) {
        (0..self.served.len()).for_each(|index| self.wait_for(index));
    }

    /// The same, for one queue.
    pub fn wait_for(&self, index: usize) {
        for answering in &self.served[index].answering {
            drop(lock(answering));
        }
    }

    /// The thread of a queue.
    fn serve_notifications(&self, index: usize, waits: &Waits) -> rustix::io::Result<()> {
        let served = &self.served[index];
        let mut watched: Option<Arc<File>> = None;
        while !self.ended.load(Ordering::Acquire) {
            let kick = {
                let mut ring = served.ring.lock();
                ring.pay_call();
                ring.kick.clone().filter(|_| ring.runs())
            };
            if kick.as_ref().map(Arc::as_ptr) != watched.as_ref().map(Arc::as_ptr) {
                if let Some(old) = watched.take() {
                    epoll::delete(&waits.0, &*old)?;
                }
                if let Some(new) = &kick {
                    waits.add(new, KICK)?;
                }
                watched = kick;
                // The kick may have been given to a back-end that died.
                self.serve(index, 0, false);
            }
            let happened = waits.wait()?;
            if happened.contains(&WAKE) {
                let _ = (&served.wake).read(&mut [0; 8]);
            }
            if let Some(kick) = watched.as_deref().filter(|_| happened.contains(&KICK)) {
                let mut counter = [0; 8];
                let read = (&*kick).read(&mut counter);
                if !matches!(&read, Ok(1..)) && !read.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                    self.complaints.say(format_args!("queue {index}: its notifications cannot be read"));
                    served.ring.lock().kick = None;
                }
            }
            self.serve(index, 0, false);
        }
        Ok(())
    }

    /// Answers the requests of a queue until it is empty; `slow` says whether they are known to be.
    fn serve(&self, index: usize, thread: usize, slow: bool) {
        if let Err(e) = self.answer(index, thread, slow) {
            self.complaints.say(format_args!("queue {index} is broken: {e}"));
        }
    }

    fn answer(&self, index: usize, thread: usize, mut slow: bool) -> Result<(), Box<dyn Error>> {
        let Served { ring, answering, helpers, .. } = &self.served[index];
        let number = index * answering.len() + thread;
        loop {
            // Anew for each request: a thread that waits must not wait for all requests of a busy guest.
            let _answering = lock(&answering[thread]);
            let Some((head, request)) = self.next(ring)? else {
                return Ok(());
            };
            if slow && answering.len() > 1 && ring.lock().has_more(&self.memory) {
                helpers.call();
            }
            let begun = Instant::now();
            let later = || Later {
                ring: Arc::clone(ring),
                memory: self.memory.clone(),
                head,
                complaints: Arc::clone(&self.complaints),
            };
            let written = self.device.answer_or_wait(number, request, later());
            slow = begun.elapsed() >= SLOW;
            // The requests behind it may have come with the same kick, whatever becomes of this one.
            if let Some(written) = written {
                later().hand_back(written);
            }
        }
    }

    fn next(&self, ring: &Ring) -> Taken<D::Request> {
        ring.lock().next(&self.memory, |queue| self.device.take(queue))
    }
}

/// What the thread of a queue waits for. Not poll(2), which fails when RLIMIT_NOFILE is lowered.
struct Waits(OwnedFd);

const WAKE: u64 = 0;
const KICK: u64 = 1;

impl Waits {
    fn new(wake: &File) -> io::Result<Self> {
        let waits = Waits(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        waits.add(wake, WAKE)?;
        Ok(waits)
    }

    fn add(&self, file: &File, what: u64) -> rustix::io::Result<()> {
        epoll::add(&self.0, file, epoll::EventData::new_u64(what), epoll::EventFlags::IN)
    }

    /// Which of them happened, at least one.
    fn wait(&self) -> rustix::io::Result<Vec<u64>> {
        let mut events = Vec::with_capacity(2);
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => Ok(events.iter().map(|event| event.data.u64()).collect()),
            Err(e) => Err(e),
        }
    }
}
