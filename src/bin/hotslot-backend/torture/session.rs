//! One front-end, from its connection to its end: the main socket (vhost-user, "Front-end message types").
//!
//! Each message is understood, what is to be done before its answer is done, it is answered, and what is to
//! be done after that is done. Without a plan it is a well-behaved entropy device with shared memory.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use super::actor::{self, Job, Order};
use super::channel::Agreed;
use super::files;
use super::plan::{Absurd, Event, Moment, Step, What, WrongAnswer};
use super::report::{Report, Verdict};
use super::rings::{RingError, Rings};
use super::shared::{Device, Shared};
use super::wire::{self, Message, Name, Wire, WireError, flags, message, protocol, quads, words};

/// How long an answer waits for what is to be done before it. A front-end may serve the backend channel only
/// once it has the answer to its own message.
const BEFORE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a front-end may take to make room for an answer.
const SEND_PATIENCE: Duration = Duration::from_secs(10);

/// How a session ended.
pub enum Ended {
    /// Without a message.
    NothingAsked,
    HungUp,
    Broken(String),
}

/// A session.
struct Session<'a> {
    device: &'a Device,
    main: Arc<Wire>,
    shared: Arc<Shared>,
    orders: Sender<Order>,
    rings: Rings,
    protocol_acked: u64,
    status: u64,
    counts: HashMap<Event, u32>,
    /// Whether the device was started since its last reset.
    was_started: bool,
    muted: bool,
    /// What was done wrong on the main socket, until it is known what the front-end makes of it.
    done_wrong: Option<String>,
}

/// Serves a front-end until it disconnects.
pub fn serve(socket: UnixStream, device: &Device, steps: &Arc<Vec<Step>>, report: &Arc<Report>) -> Ended {
    let main = Arc::new(Wire::new(socket));
    let shared = Shared::new(Arc::clone(report), Arc::clone(steps), device, Arc::clone(&main));
    let shared = Arc::new(shared);
    let rings = match Rings::new(device.queues) {
        Ok(rings) => rings,
        Err(error) => return Ended::Broken(error.to_string()),
    };
    let (orders, received) = mpsc::channel();
    thread::scope(|scope| {
        let (shared_of_actor, read_write) = (Arc::clone(&shared), device.read_write);
        scope.spawn(move || actor::run(&received, &shared_of_actor, read_write));
        let mut session = Session {
            device,
            main,
            shared,
            orders,
            rings,
            protocol_acked: 0,
            status: 0,
            counts: HashMap::new(),
            was_started: false,
            muted: false,
            done_wrong: None,
        };
        let ended = session.run();
        session.shared.finish();
        session.finish(&ended);
        ended
    })
}

impl Session<'_> {
    fn run(&mut self) -> Ended {
        let mut asked = false;
        loop {
            let kicked = match self.wait() {
                Ok(Ready { main: true, .. }) => match self.main.receive(None) {
                    Ok(message) => {
                        asked = true;
                        match self.handle(message) {
                            Ok(()) => continue,
                            Err(WireError::Closed) => return Ended::HungUp,
                            Err(error) => return Ended::Broken(error.to_string()),
                        }
                    }
                    Err(WireError::Closed) if asked => return Ended::HungUp,
                    Err(WireError::Closed) => return Ended::NothingAsked,
                    Err(error) => return Ended::Broken(error.to_string()),
                },
                Ok(Ready { kicked, .. }) => kicked,
                Err(error) => return Ended::Broken(error.to_string()),
            };
            for index in kicked {
                self.kicked(index);
            }
        }
    }

    /// Waits for a message or a kick.
    fn wait(&self) -> rustix::io::Result<Ready> {
        let kicks: Vec<_> = self.rings.kicks().collect();
        let fds = kicks.iter().map(|(_, fd)| *fd).chain([self.main.as_fd()]);
        let mut polled: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        loop {
            match poll(&mut polled, None) {
                Err(rustix::io::Errno::INTR) => {}
                result => {
                    result?;
                    break;
                }
            };
        }
        let ready: Vec<_> = polled.iter().map(|entry| !entry.revents().is_empty()).collect();
        let kicked = kicks.iter().zip(&ready).filter(|(_, ready)| **ready);
        Ok(Ready {
            main: ready.last().copied().unwrap_or_default(),
            kicked: kicked.map(|((index, _), _)| *index).collect(),
        })
    }

    fn kicked(&mut self, index: usize) {
        let result = self.rings.take_kick(index);
        if !self.muted {
            let result = result.and_then(|()| self.rings.complete());
            if let Err(error) = result {
                self.say(format_args!("queue {index}: {error}"));
            }
        }
        let nth = self.count(Event::Kick);
        self.moment(Event::Kick, nth, Moment::After);
    }

    fn handle(&mut self, mut message: Message) -> Result<(), WireError> {
        let id = message.request;
        if self.device.trace {
            let (size, fds) = (message.payload.len(), message.fds.len());
            self.say(format_args!("<- {} ({size} bytes, {fds} descriptors)", Name(id)));
        }
        if let Some(what) = self.done_wrong.take() {
            self.say(format_args!("{what}: then the front-end sent {}", Name(id)));
        }
        let mut events = vec![(Event::Frontend(id), self.count(Event::Frontend(id)))];
        let resets = id == wire::RESET_DEVICE || id == wire::SET_STATUS && message.quad(0) == 0;
        if resets && std::mem::take(&mut self.was_started) {
            events.push((Event::Reset, self.count(Event::Reset)));
        }
        for &(event, nth) in &events {
            self.moment(event, nth, Moment::Before);
        }
        let answer = self.answer(&mut message);
        let started = id == wire::SET_VRING_KICK && self.rings.are_started() && self.shared.run().is_none();
        if started {
            self.shared.start();
            self.was_started = true;
            self.order(Job::Pattern, Some(BEFORE_PATIENCE));
        }
        match answer {
            Some(payload) => self.send(id, events[0].1, &payload)?,
            None => self.note_missing_answer(events[0].0, events[0].1),
        }
        if started {
            events.push((Event::Start, self.count(Event::Start)));
        }
        for (event, nth) in events {
            self.moment(event, nth, Moment::After);
        }
        Ok(())
    }

    /// Does what a message says. Gives the payload of the answer, if one is due.
    fn answer(&mut self, message: &mut Message) -> Option<Vec<u8>> {
        let result = match message.request {
            wire::GET_FEATURES => return Some(quads([self.device.features])),
            wire::GET_PROTOCOL_FEATURES => return Some(quads([self.device.protocol_features])),
            wire::GET_QUEUE_NUM => {
                let absurd = self.find(|what| match what {
                    What::QueueNum(number) => Some(number),
                    _ => None,
                });
                if let Some(number) = absurd {
                    self.did_wrong(format!("queue-num: announced {number} queues"));
                }
                return Some(quads([absurd.unwrap_or(self.device.queues.into())]));
            }
            wire::GET_SHMEM_CONFIG => return Some(self.shmem_config()),
            wire::GET_STATUS => return Some(quads([self.status])),
            wire::GET_CONFIG => {
                // u32 offset, size, flags, and as much of the configuration space: this device has none of
                // its own.
                let mut payload = message.payload.clone();
                payload.iter_mut().skip(12).for_each(|byte| *byte = 0);
                return Some(payload);
            }
            wire::GET_VRING_BASE => {
                let index = message.word(0);
                let base = self.rings.stop(index);
                if !self.rings.are_started() {
                    self.shared.stop();
                }
                if let Err(error) = &base {
                    self.say(format_args!("GET_VRING_BASE: {error}"));
                }
                return Some(words([index, base.unwrap_or_default().into()]));
            }
            request => self.obey(request, message),
        };
        if let Err(error) = &result {
            self.say(format_args!("{}: {error}", Name(message.request)));
        }
        let due = message.needs_reply() && self.has(protocol::REPLY_ACK);
        due.then(|| quads([u64::from(result.is_err())]))
    }

    /// A message that by itself has no answer.
    fn obey(&mut self, request: u32, message: &mut Message) -> Result<(), RingError> {
        match request {
            wire::SET_FEATURES => {
                self.rings.set_enable_counts(message.quad(0) & wire::F_PROTOCOL_FEATURES != 0);
                Ok(())
            }
            wire::SET_PROTOCOL_FEATURES => {
                self.protocol_acked = message.quad(0) & self.device.protocol_features;
                Ok(())
            }
            wire::SET_BACKEND_REQ_FD => {
                let fd = message.fds.pop().ok_or(RingError::Payload)?;
                let channel = Arc::new(Wire::new(fd.into()));
                self.shared.set_channel(Arc::clone(&channel));
                let agreed = Agreed {
                    reply_ack: self.has(protocol::REPLY_ACK),
                    shmem: self.has(1 << self.device.shmem_bit),
                };
                self.order(Job::Channel(channel, agreed), None);
                Ok(())
            }
            wire::SET_MEM_TABLE => self.rings.set_memory(message),
            wire::SET_VRING_NUM => self.rings.set_size(message),
            wire::SET_VRING_BASE => self.rings.set_base(message),
            wire::SET_VRING_ADDR => self.rings.set_addresses(message),
            wire::SET_VRING_CALL => self.rings.set_call(message),
            wire::SET_VRING_KICK => self.rings.set_kick(message).and_then(|()| self.rings.complete()),
            wire::SET_VRING_ENABLE => self.rings.set_enabled(message).and_then(|()| self.rings.complete()),
            wire::RESET_DEVICE => {
                self.reset();
                Ok(())
            }
            wire::SET_STATUS => {
                self.status = message.quad(0);
                if self.status == 0 {
                    self.reset();
                }
                Ok(())
            }
            // Nothing of it concerns us.
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.rings.reset();
        self.shared.reset();
    }

    fn shmem_config(&mut self) -> Vec<u8> {
        let absurd = self.find(|what| match what {
            What::ShmemConfig(absurd) => Some(absurd),
            _ => None,
        });
        let regions = &self.device.regions;
        let (count, regions) = match absurd {
            None => (regions.len() as u32, regions.clone()),
            Some(absurd) => {
                self.did_wrong(format!("shmem-config: answered GET_SHMEM_CONFIG absurdly ({absurd:?})"));
                absurd.answer(regions)
            }
        };
        wire::shmem_config(count, &regions)
    }

    /// Says so where the plan has something for an answer that the front-end does not ask for.
    fn note_missing_answer(&self, event: Event, nth: u32) {
        let planned = self.find_at(event, nth, |step| {
            let concerns_answer = matches!(step.what, What::Silence | What::Answer(_));
            (concerns_answer || step.when.moment == Moment::Half).then_some(step.when)
        });
        if let (Some(when), Event::Frontend(id)) = (planned, event) {
            let name = Name(id);
            self.say(format_args!("nothing is done {when}: the front-end asked for no answer to {name}"));
        }
    }

    /// Answers, rightly unless the plan says otherwise.
    fn send(&mut self, id: u32, nth: u32, payload: &[u8]) -> Result<(), WireError> {
        let event = Event::Frontend(id);
        let wrong = self.find_at(event, nth, |step| match step.what {
            What::Answer(wrong) => Some(wrong),
            _ => None,
        });
        let silent = self.find_at(event, nth, |step| matches!(step.what, What::Silence).then_some(()));
        let reply = flags::VERSION_1 | flags::REPLY;
        if self.muted || silent.is_some() {
            self.did_wrong(format!("silence: did not answer {}", Name(id)));
            return Ok(());
        }
        if self.shared.ends(event, nth, Moment::Half).next().is_some() {
            let bytes = message(id, reply, payload);
            self.main.send(&bytes[..bytes.len() / 2], &[], SEND_PATIENCE)?;
            self.shared.end(event, nth, Moment::Half);
            return Ok(());
        }
        let Some(wrong) = wrong else {
            return self.main.send(&message(id, reply, payload), &[], SEND_PATIENCE);
        };
        self.did_wrong(format!("answer: answered {} wrongly ({wrong:?})", Name(id)));
        let mut payload = payload.to_vec();
        let mut header = (id, reply);
        match wrong {
            WrongAnswer::Short => drop(payload.pop()),
            WrongAnswer::Long => payload.extend([0; 8]),
            WrongAnswer::Id => header.0 += 1,
            WrongAnswer::Error if is_acknowledged(id) => payload = quads([1]),
            WrongAnswer::Error => payload.clear(),
            WrongAnswer::Request => header.1 &= !flags::REPLY,
            WrongAnswer::Version => header.1 = flags::VERSION_2 | flags::REPLY,
            WrongAnswer::Fd | WrongAnswer::Half => {}
        }
        let bytes = message(header.0, header.1, &payload);
        match wrong {
            WrongAnswer::Half => self.main.send(&bytes[..bytes.len() / 2], &[], SEND_PATIENCE),
            WrongAnswer::Fd => {
                let fd = files::device()?;
                self.main.send(&bytes, &[fd.as_fd()], SEND_PATIENCE)
            }
            _ => self.main.send(&bytes, &[], SEND_PATIENCE),
        }
    }

    /// Does what the plan has for this moment, apart from answers.
    fn moment(&mut self, event: Event, nth: u32, moment: Moment) {
        if moment != Moment::Half {
            self.shared.end(event, nth, moment);
        }
        let steps = Arc::clone(&self.shared.steps);
        for step in steps.iter().filter(|step| step.when.is(event, nth, moment)) {
            match step.what {
                What::Mute => {
                    self.say(format_args!("mute: answers nothing any more {}", step.when));
                    self.muted = true;
                }
                What::Everything | What::Case(_) | What::Stream(_) | What::Truncate(_) => {
                    let patience = (moment == Moment::Before).then_some(BEFORE_PATIENCE);
                    self.order(Job::Do(step.what), patience);
                }
                // `Shared::end`, `send` and `answer` do these.
                What::End(_) | What::Silence | What::Answer(_) | What::ShmemConfig(_) | What::QueueNum(_) => {
                }
            }
        }
    }

    /// Has the other thread do something; waits for it if it is to be done before something else.
    fn order(&self, job: Job, patience: Option<Duration>) {
        if self.muted {
            return;
        }
        let (done, is_done) = mpsc::channel();
        let done = patience.map(|_| done);
        // It ends only with the session.
        let _ = self.orders.send(Order { job, done });
        if let Some(patience) = patience {
            let _too_late_is_late = is_done.recv_timeout(patience);
        }
    }

    fn count(&mut self, event: Event) -> u32 {
        let count = self.counts.entry(event).or_default();
        *count += 1;
        *count
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol_acked & feature != 0
    }

    fn find<T>(&self, pick: impl Fn(What) -> Option<T>) -> Option<T> {
        self.shared.steps.iter().find_map(|step| pick(step.what))
    }

    fn find_at<T>(&self, event: Event, nth: u32, pick: impl Fn(&Step) -> Option<T>) -> Option<T> {
        let answers =
            |step: &&Step| step.when.event == event && step.when.nth.is_none_or(|wanted| wanted == nth);
        let mut steps = self.shared.steps.iter().filter(answers);
        steps.find_map(pick)
    }

    fn did_wrong(&mut self, what: String) {
        self.say(&what);
        self.done_wrong = Some(what);
    }

    fn say(&self, line: impl std::fmt::Display) {
        self.shared.report.line(line);
    }

    /// The front-end is gone: what that says about what we did.
    fn finish(&mut self, ended: &Ended) {
        if let Some(what) = self.done_wrong.take() {
            self.say(format_args!("{what}: then the front-end closed the connection"));
        }
        let absurd = self.find(|what| match what {
            What::ShmemConfig(absurd) => Some(absurd),
            _ => None,
        });
        let asked = self.counts.contains_key(&Event::Frontend(wire::GET_SHMEM_CONFIG));
        let started = self.counts.contains_key(&Event::Start);
        if let (Some(absurd), true) = (absurd, asked) {
            let (verdict, duty) = match (absurd, started) {
                (Absurd::Count, _) => (Verdict::LeftOpen, "refuses what contradicts itself"),
                (Absurd::All, true) => (Verdict::AsSpecified, ""),
                (Absurd::All, false) => (
                    Verdict::Wrong("it did not start the device".to_owned()),
                    "works with 256 regions (vhost-user, GET_SHMEM_CONFIG)",
                ),
                (_, false) => (Verdict::AsSpecified, ""),
                (_, true) => (
                    Verdict::Wrong("it started the device".to_owned()),
                    "refuses sizes that cannot be (vhost-user, GET_SHMEM_CONFIG: multiples of the page size)",
                ),
            };
            self.shared.report.verdict("shmem-config", &verdict, duty);
        }
        match ended {
            Ended::NothingAsked => {}
            Ended::HungUp => self.say("the front-end is gone"),
            Ended::Broken(why) => self.say(format_args!("the session cannot go on: {why}")),
        }
    }
}

/// Whether the answer to a message is a u64 that is 0 for success.
fn is_acknowledged(id: u32) -> bool {
    !matches!(
        id,
        wire::GET_FEATURES
            | wire::GET_PROTOCOL_FEATURES
            | wire::GET_QUEUE_NUM
            | wire::GET_SHMEM_CONFIG
            | wire::GET_STATUS
            | wire::GET_CONFIG
            | wire::GET_VRING_BASE
    )
}

/// What is there to be read.
struct Ready {
    main: bool,
    kicked: Vec<usize>,
}
