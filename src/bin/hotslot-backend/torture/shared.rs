//! What the session's two threads share: the device's settings, its state, both sockets, and when they end.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use super::moment::{Event, Moment, When};
use super::report::Report;
use super::wire::Wire;
use crate::lock::lock;

/// What is to end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// This process, by SIGKILL.
    Die,
    /// Both sockets.
    HangUp,
    /// The backend channel.
    CloseChannel,
}

/// The device's settings, from the command line.
#[derive(Clone, Debug)]
pub struct Device {
    pub features: u64,
    pub protocol_features: u64,
    /// The protocol feature bit that means SHMEM.
    pub shmem_bit: u32,
    pub queues: u16,
    /// Id and size of each shared memory region. A `--do` may announce others.
    pub regions: Vec<(u8, u64)>,
    /// Whether the pattern is mapped read-write.
    pub read_write: bool,
    /// For the front-end to answer on the backend channel, or to take a request there.
    pub timeout: Duration,
    /// Pairs of requests a second in a flood; `None`: no limit.
    pub rate: Option<u32>,
    /// Whether each message is printed.
    pub trace: bool,
}

/// One session.
pub struct Shared {
    pub report: Arc<Report>,
    pub device: Device,
    /// Each `--do` that ends something.
    ends: Vec<(When, End)>,
    main: Arc<Wire>,
    /// Lock order: innermost; held while the socket is replaced or shut down.
    channel: Mutex<Option<Arc<Wire>>>,
    resets: AtomicU32,
    stops: AtomicU32,
    running: AtomicBool,
    ended: AtomicBool,
}

impl Shared {
    pub fn new(report: Arc<Report>, device: &Device, ends: Vec<(When, End)>, main: Arc<Wire>) -> Self {
        Shared {
            report,
            device: device.clone(),
            ends,
            main,
            channel: Mutex::new(None),
            resets: AtomicU32::new(0),
            stops: AtomicU32::new(0),
            running: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        }
    }

    /// The size of a region; 0 if there is none.
    pub fn region_size(&self, shmid: u8) -> u64 {
        let region = self.device.regions.iter().find(|(id, _)| *id == shmid);
        region.map_or(0, |(_, size)| *size)
    }

    pub fn set_channel(&self, channel: Arc<Wire>) {
        *lock(&self.channel) = Some(channel);
    }

    /// The device runs.
    pub fn start(&self) {
        self.running.store(true, Ordering::Release);
    }

    /// The last running ring was stopped.
    pub fn stop(&self) {
        self.running.store(false, Ordering::Release);
        self.stops.fetch_add(1, Ordering::AcqRel);
    }

    /// The device was reset: the front-end has removed all mappings.
    pub fn reset(&self) {
        self.stop();
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// How often the device was reset.
    pub fn resets(&self) -> u32 {
        self.resets.load(Ordering::Acquire)
    }

    /// How often the device was stopped, if it runs now. While this value stays the same, the front-end must
    /// serve our requests.
    pub fn run(&self) -> Option<u32> {
        let stops = self.stops.load(Ordering::Acquire);
        self.running.load(Ordering::Acquire).then_some(stops)
    }

    /// Whether the session is over.
    pub fn is_over(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The session is over: wakes the thread that waits for an answer on the backend channel.
    pub fn finish(&self) {
        self.ended.store(true, Ordering::Release);
        self.close_channel();
        self.main.hang_up();
    }

    fn ends(&self, event: Event, nth: u32, moment: Moment) -> impl Iterator<Item = &(When, End)> {
        self.ends.iter().filter(move |(when, _)| when.is(event, nth, moment))
    }

    /// Whether something is to end at this moment.
    pub fn ends_at(&self, event: Event, nth: u32, moment: Moment) -> bool {
        self.ends(event, nth, moment).next().is_some()
    }

    /// Ends what is to end at this moment. True if anything did.
    pub fn end(&self, event: Event, nth: u32, moment: Moment) -> bool {
        for (when, end) in self.ends(event, nth, moment) {
            self.report.tried();
            match end {
                End::Die => {
                    self.report.line(format_args!("die: SIGKILL {when}"));
                    // The process runs no further.
                    let _ = kill_process(getpid(), Signal::KILL);
                }
                End::HangUp => {
                    self.report.line(format_args!("hang-up: closed both sockets {when}"));
                    self.finish();
                }
                End::CloseChannel => {
                    self.report.line(format_args!("close-channel: closed the backend channel {when}"));
                    self.close_channel();
                }
            }
        }
        self.ends_at(event, nth, moment)
    }

    fn close_channel(&self) {
        if let Some(channel) = &*lock(&self.channel) {
            channel.hang_up();
        }
    }
}
