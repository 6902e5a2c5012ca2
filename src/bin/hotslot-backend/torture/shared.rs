//! What the session's two threads know together: the plan, the regions, and what became of the device.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use super::plan::{End, Event, Moment, Step, What};
use super::report::Report;
use super::wire::Wire;

/// What the device is.
#[derive(Clone, Debug)]
pub struct Device {
    pub features: u64,
    pub protocol_features: u64,
    /// The protocol feature bit that means SHMEM.
    pub shmem_bit: u32,
    pub queues: u16,
    /// Shared memory regions: id and size. As they are, not as they may be announced.
    pub regions: Vec<(u8, u64)>,
    /// Whether the pattern is mapped read-write.
    pub read_write: bool,
    /// How long the front-end may take for an answer on the backend channel, or to take a request.
    pub patience: Duration,
    /// Pairs of requests a second, in a flood.
    pub rate: Option<u32>,
    /// Whether each message is printed.
    pub trace: bool,
}

/// One session.
pub struct Shared {
    pub report: Arc<Report>,
    pub steps: Arc<Vec<Step>>,
    pub device: Device,
    main: Arc<Wire>,
    /// Innermost lock; held to copy the handle.
    channel: Mutex<Option<Arc<Wire>>>,
    resets: AtomicU32,
    stops: AtomicU32,
    running: AtomicBool,
    ended: AtomicBool,
}

impl Shared {
    pub fn new(report: Arc<Report>, steps: Arc<Vec<Step>>, device: &Device, main: Arc<Wire>) -> Self {
        Shared {
            report,
            steps,
            device: device.clone(),
            main,
            channel: Mutex::new(None),
            resets: AtomicU32::new(0),
            stops: AtomicU32::new(0),
            running: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        }
    }

    /// The size of a region; 0 where there is none.
    pub fn region_size(&self, shmid: u8) -> u64 {
        let region = self.device.regions.iter().find(|(id, _)| *id == shmid);
        region.map_or(0, |(_, size)| *size)
    }

    pub fn set_channel(&self, channel: Arc<Wire>) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
    }

    /// The device runs.
    pub fn start(&self) {
        self.running.store(true, Ordering::Release);
    }

    /// A ring was stopped; the device no longer runs as a whole.
    pub fn stop(&self) {
        self.running.store(false, Ordering::Release);
        self.stops.fetch_add(1, Ordering::AcqRel);
    }

    /// The device was reset: nothing is mapped any more.
    pub fn reset(&self) {
        self.stop();
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// How often the device was reset.
    pub fn resets(&self) -> u32 {
        self.resets.load(Ordering::Acquire)
    }

    /// How often it was stopped, if it runs: as long as this does not change, our requests are to be served.
    pub fn run(&self) -> Option<u32> {
        let stops = self.stops.load(Ordering::Acquire);
        self.running.load(Ordering::Acquire).then_some(stops)
    }

    /// Whether the session is over.
    pub fn is_over(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The session is over: wakes who waits for an answer.
    pub fn finish(&self) {
        self.ended.store(true, Ordering::Release);
        self.close_channel();
        self.main.hang_up();
    }

    /// What is to end at this moment.
    pub fn ends(&self, event: Event, nth: u32, moment: Moment) -> impl Iterator<Item = (&Step, End)> {
        let due = move |step: &&Step| step.when.is(event, nth, moment);
        self.steps.iter().filter(due).filter_map(|step| match step.what {
            What::End(end) => Some((step, end)),
            _ => None,
        })
    }

    /// Ends what is to end at this moment. True if anything did.
    pub fn end(&self, event: Event, nth: u32, moment: Moment) -> bool {
        let mut any = false;
        for (step, end) in self.ends(event, nth, moment) {
            any = true;
            let when = step.when;
            match end {
                End::Die => {
                    self.report.line(format_args!("die: SIGKILL {when}"));
                    // Nothing of ours runs after it.
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
        any
    }

    fn close_channel(&self) {
        if let Some(channel) = &*self.channel.lock().unwrap_or_else(PoisonError::into_inner) {
            channel.hang_up();
        }
    }
}
