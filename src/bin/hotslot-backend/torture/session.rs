//! One front-end, from its connection to its end: the main socket (vhost-user, "Front-end message types").
//!
//! For each message: the steps due before its answer, the answer, the steps due after it. Without any `--do`
//! this is a well-behaved entropy device with shared memory. Called by [`super`] on the thread that accepts
//! connections.

use std::collections::HashMap;
use std::fmt::Display;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;

use super::actor::{self, Job, Order};
use super::answers::{BadConfig, WrongAnswer};
use super::channel::Negotiated;
use super::files;
use super::moment::{Event, Moment};
use super::plan::{Action, Step};
use super::report::Report;
use super::rings::{RingError, Rings};
use super::shared::{Device, Shared};
use super::wire::{self, Message, Name, Wire, WireError, flags, message, protocol, quads, words};
use crate::server::Ended;

/// For the steps that are due before an answer: after this time it is sent anyway. A front-end may serve the
/// backend channel only once it has the answer to its own message.
const BEFORE_TIMEOUT: Duration = Duration::from_secs(5);

/// For the front-end to take an answer.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

struct Session<'a> {
    steps: &'a [Step],
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
    /// What was done wrong on the main socket, until the front-end reacts.
    done_wrong: Option<String>,
}

/// Serves a front-end until it disconnects.
pub fn serve(socket: UnixStream, device: &Device, steps: &[Step], report: &Arc<Report>) -> Ended {
    let main = Arc::new(Wire::new(socket));
    let ends = steps.iter().filter_map(|step| match step.action {
        Action::End(end) => Some((step.when, end)),
        _ => None,
    });
    let shared = Shared::new(Arc::clone(report), device, ends.collect(), Arc::clone(&main));
    let shared = Arc::new(shared);
    let rings = match Rings::new(device.queues) {
        Ok(rings) => rings,
        Err(error) => return Ended::Broken(error.to_string()),
    };
    let (orders, received) = mpsc::channel();
    thread::scope(|scope| {
        let shared_of_actor = Arc::clone(&shared);
        scope.spawn(move || actor::run(&received, &shared_of_actor));
        let mut session = Session {
            steps,
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
            match self.step(&mut asked) {
                Ok(()) => {}
                Err(WireError::Closed) if asked => return Ended::HungUp,
                Err(WireError::Closed) => return Ended::NothingAsked,
                Err(error) => return Ended::Broken(error.to_string()),
            }
        }
    }

    /// Handles one message, or else the kicks that have come.
    fn step(&mut self, asked: &mut bool) -> Result<(), WireError> {
        let ready = self.wait()?;
        if ready.main {
            let message = self.main.receive(None)?;
            *asked = true;
            return self.handle(message);
        }
        for index in ready.kicked {
            self.kicked(index);
        }
        Ok(())
    }

    /// Waits for a message or a kick.
    fn wait(&self) -> rustix::io::Result<Ready> {
        let kicks: Vec<_> = self.rings.kicks().collect();
        let fds = kicks.iter().map(|(_, fd)| *fd).chain([self.main.as_fd()]);
        let mut polled: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        retry_on_intr(|| poll(&mut polled, None))?;
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
        if self.shared.device.trace {
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
            self.order(Job::Pattern, Some(BEFORE_TIMEOUT));
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

    /// Carries out a message. Returns the payload of the answer, if one is due.
    fn answer(&mut self, message: &mut Message) -> Option<Vec<u8>> {
        let result = match message.request {
            wire::GET_FEATURES => return Some(quads([self.shared.device.features])),
            wire::GET_PROTOCOL_FEATURES => return Some(quads([self.shared.device.protocol_features])),
            wire::GET_QUEUE_NUM => {
                let announced = self.find(|action| match action {
                    Action::QueueNum(number) => Some(number),
                    _ => None,
                });
                if let Some(number) = announced {
                    self.did_wrong(format!("queue-num: announced {number} queues"));
                }
                return Some(quads([announced.unwrap_or(self.shared.device.queues.into())]));
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

    /// Carries out a message that is answered only where NEED_REPLY asks for it.
    fn obey(&mut self, request: u32, message: &mut Message) -> Result<(), RingError> {
        match request {
            wire::SET_FEATURES => {
                self.rings.set_needs_enable(message.quad(0) & wire::F_PROTOCOL_FEATURES != 0);
                Ok(())
            }
            wire::SET_PROTOCOL_FEATURES => {
                self.protocol_acked = message.quad(0) & self.shared.device.protocol_features;
                Ok(())
            }
            wire::SET_BACKEND_REQ_FD => {
                let fd = message.fds.pop().ok_or(RingError::Payload)?;
                let channel = Arc::new(Wire::new(fd.into()));
                self.shared.set_channel(Arc::clone(&channel));
                let negotiated = Negotiated {
                    reply_ack: self.has(protocol::REPLY_ACK),
                    shmem: self.has(1 << self.shared.device.shmem_bit),
                };
                self.order(Job::Channel(channel, negotiated), None);
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
            // This device has no use for the others.
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.rings.reset();
        self.shared.reset();
    }

    fn shmem_config(&mut self) -> Vec<u8> {
        let config = self.bad_config();
        if let Some(config) = config {
            self.did_wrong(format!("shmem-config: answered GET_SHMEM_CONFIG wrongly ({config:?})"));
        }
        let regions = &self.shared.device.regions;
        let right = || (regions.len() as u32, regions.clone());
        let (count, regions) = config.map_or_else(right, |config| config.answer(regions));
        wire::shmem_config(count, &regions)
    }

    fn bad_config(&self) -> Option<BadConfig> {
        self.find(|action| match action {
            Action::ShmemConfig(config) => Some(config),
            _ => None,
        })
    }

    /// Reports a step that concerns an answer for which the front-end did not ask.
    fn note_missing_answer(&self, event: Event, nth: u32) {
        let planned = self.find_at(event, nth, |step| {
            let concerns_answer = matches!(step.action, Action::Silence | Action::Answer(_));
            (concerns_answer || step.when.moment == Moment::Half).then_some(step.when)
        });
        if let (Some(when), Event::Frontend(id)) = (planned, event) {
            let name = Name(id);
            self.say(format_args!("nothing is done {when}: the front-end asked for no answer to {name}"));
        }
    }

    /// Answers: rightly, unless a step is due.
    fn send(&mut self, id: u32, nth: u32, payload: &[u8]) -> Result<(), WireError> {
        let event = Event::Frontend(id);
        let silent = self.find_at(event, nth, |step| matches!(step.action, Action::Silence).then_some(()));
        if self.muted || silent.is_some() {
            self.did_wrong(format!("silence: did not answer {}", Name(id)));
            return Ok(());
        }
        let wrong = self.find_at(event, nth, |step| match step.action {
            Action::Answer(wrong) => Some(wrong),
            _ => None,
        });
        let right = || message(id, flags::VERSION_1 | flags::REPLY, payload);
        if self.shared.ends_at(event, nth, Moment::Half) {
            let bytes = right();
            self.main.send(&bytes[..bytes.len() / 2], &[], SEND_TIMEOUT)?;
            self.shared.end(event, nth, Moment::Half);
            return Ok(());
        }
        if let Some(wrong) = wrong {
            self.did_wrong(format!("answer: answered {} wrongly ({wrong:?})", Name(id)));
        }
        let bytes = wrong.map_or_else(right, |wrong| wrong.bytes(id, payload));
        let file = (wrong == Some(WrongAnswer::Fd)).then(files::device).transpose()?;
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        self.main.send(&bytes, &fds, SEND_TIMEOUT)
    }

    /// Carries out the steps that are due at this moment, except those that concern answers.
    fn moment(&mut self, event: Event, nth: u32, moment: Moment) {
        if moment != Moment::Half {
            self.shared.end(event, nth, moment);
        }
        for step in self.steps.iter().filter(|step| step.when.is(event, nth, moment)) {
            match step.action {
                Action::Mute => {
                    self.say(format_args!("mute: from now on answers nothing ({})", step.when));
                    self.shared.report.tried();
                    self.muted = true;
                }
                Action::Everything | Action::Case(_) | Action::Stream(_) | Action::Truncate(_) => {
                    let timeout = (moment == Moment::Before).then_some(BEFORE_TIMEOUT);
                    self.order(Job::Do(step.action), timeout);
                }
                // `Shared::end`, `send` and `answer` do these.
                Action::End(_)
                | Action::Silence
                | Action::Answer(_)
                | Action::ShmemConfig(_)
                | Action::QueueNum(_) => {}
            }
        }
    }

    /// Has the other thread do a job; with a timeout, waits for it.
    fn order(&self, job: Job, timeout: Option<Duration>) {
        if self.muted {
            return;
        }
        let (done, is_done) = mpsc::channel();
        let done = timeout.map(|_| done);
        // The other thread ends only with the session.
        let _ = self.orders.send(Order { job, done });
        if let Some(timeout) = timeout {
            // Done or not: the session goes on.
            let _ = is_done.recv_timeout(timeout);
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

    fn find<T>(&self, pick: impl Fn(Action) -> Option<T>) -> Option<T> {
        self.steps.iter().find_map(|step| pick(step.action))
    }

    fn find_at<T>(&self, event: Event, nth: u32, pick: impl Fn(&Step) -> Option<T>) -> Option<T> {
        self.steps.iter().filter(|step| step.when.is_event(event, nth)).find_map(pick)
    }

    fn did_wrong(&mut self, what: String) {
        self.shared.report.tried();
        self.say(&what);
        self.done_wrong = Some(what);
    }

    fn say(&self, line: impl Display) {
        self.shared.report.line(line);
    }

    /// The session is over: reports how it ended, and how the front-end reacted to wrong answers.
    fn finish(&mut self, ended: &Ended) {
        if let Some(what) = self.done_wrong.take() {
            self.say(format_args!("{what}: then the front-end closed the connection"));
        }
        let asked = self.counts.contains_key(&Event::Frontend(wire::GET_SHMEM_CONFIG));
        if let (Some(config), true) = (self.bad_config(), asked) {
            let (verdict, duty) = config.verdict(self.counts.contains_key(&Event::Start));
            self.shared.report.verdict("shmem-config", &verdict, duty);
        }
        match ended {
            Ended::NothingAsked => {}
            Ended::HungUp => self.say("the front-end hung up"),
            Ended::Broken(why) => self.say(format_args!("the session cannot go on: {why}")),
        }
    }
}

/// What can be read.
struct Ready {
    main: bool,
    kicked: Vec<usize>,
}
