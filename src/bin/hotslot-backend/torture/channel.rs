//! The backend channel: requests to the front-end, and its answers (vhost-user, "Back-end message types").
//!
//! Used by the thread of `actor` only: while it waits here, the main socket is served.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::files::{self, PAGE};
use super::moment::{Event, Moment};
use super::report::Answer;
use super::shared::Shared;
use super::wire::{self, MAP, MMap, UNMAP, Wire, WireError, flags, message};

/// The pattern is a quarter of region 0, and at most this long.
const MAX_PATTERN: u64 = 16 * PAGE;

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    Done,
    Refused,
    /// REPLY_ACK was not negotiated.
    Unanswered,
}

/// An outcome, and the value of the answer.
pub type Answered = Result<(Outcome, u64), ChannelError>;

/// Why the channel can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("no answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("the front-end closed the channel")]
    Closed,
    #[error("not an answer to it: {0}")]
    OutOfStep(String),
    #[error("{0}")]
    Unusable(&'static str),
    #[error("this back-end cannot go on: {0}")]
    Io(#[from] io::Error),
}

impl From<WireError> for ChannelError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Timeout(timeout) => ChannelError::Timeout(timeout),
            WireError::Closed => ChannelError::Closed,
            WireError::Oversized(_) => ChannelError::OutOfStep(error.to_string()),
            WireError::Io(error) => ChannelError::Io(error),
        }
    }
}

/// What was negotiated that concerns the channel.
#[derive(Clone, Copy, Debug)]
pub struct Negotiated {
    pub reply_ack: bool,
    pub shmem: bool,
}

/// A range that the front-end has mapped, by its answers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mapping {
    shmid: u8,
    shm_offset: u64,
    len: u64,
}

/// Our end of a backend channel.
pub struct Channel {
    pub wire: Arc<Wire>,
    pub negotiated: Negotiated,
    pub shared: Arc<Shared>,
    mappings: Vec<Mapping>,
    /// The count of resets at which `mappings` is right.
    resets: u32,
    maps: u32,
    unmaps: u32,
    pattern: Option<File>,
}

impl Channel {
    pub fn new(wire: Arc<Wire>, negotiated: Negotiated, shared: Arc<Shared>) -> Self {
        let resets = shared.resets();
        Channel { wire, negotiated, shared, mappings: Vec::new(), resets, maps: 0, unmaps: 0, pattern: None }
    }

    /// The pattern's length; it begins at offset 0 of region 0. 0 if the region is too small.
    pub fn pattern_len(&self) -> u64 {
        (self.shared.region_size(0) / 4 / PAGE * PAGE).min(MAX_PATTERN)
    }

    /// The file of the pattern that is mapped.
    pub fn pattern(&self) -> Option<&File> {
        self.pattern.as_ref()
    }

    /// Has the pattern mapped into region 0, unless it is.
    pub fn map_pattern(&mut self) -> Result<(), ChannelError> {
        let len = self.pattern_len();
        self.forget_after_reset();
        if !self.negotiated.shmem || len == 0 || self.mappings.contains(&self.pattern_range()) {
            return Ok(());
        }
        let file = files::file(files::PATTERN, len)?;
        let request = MMap {
            len,
            flags: if self.shared.device.read_write { MMap::READ_WRITE } else { 0 },
            ..MMap::default()
        };
        let outcome = self.map("pattern", &request, &[file.as_fd()])?;
        if outcome != Outcome::Refused {
            self.pattern = Some(file);
        }
        Ok(())
    }

    fn pattern_range(&self) -> Mapping {
        Mapping { shmid: 0, shm_offset: 0, len: self.pattern_len() }
    }

    /// MAP, with a line for the report.
    pub fn map(
        &mut self,
        why: &str,
        request: &MMap,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Outcome, ChannelError> {
        let result = self.exchange(MAP, request, fds);
        let with = match fds.len() {
            1 => String::new(),
            0 => ", without a descriptor".to_owned(),
            count => format!(", with {count} descriptors"),
        };
        self.say(why, format_args!("MAP {}{with}", Shown(request)), &result);
        result.map(|(outcome, _)| outcome)
    }

    /// UNMAP, with a line for the report.
    pub fn unmap(
        &mut self,
        why: &str,
        request: &MMap,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Outcome, ChannelError> {
        let result = self.exchange(UNMAP, request, fds);
        let with = if fds.is_empty() { "" } else { ", with a descriptor" };
        let MMap { shmid, shm_offset, len, .. } = request;
        let what = format_args!("UNMAP shmid {shmid}, shm_offset {shm_offset:#x}, len {len:#x}{with}");
        self.say(why, what, &result);
        result.map(|(outcome, _)| outcome)
    }

    /// Any other request, with a line for the report.
    pub fn other(&mut self, why: &str, what: &str, bytes: &[u8], id: u32) -> Result<Outcome, ChannelError> {
        let result = self.send(bytes, &[]).and_then(|()| self.answer(id));
        self.say(why, what, &result);
        result.map(|(outcome, _)| outcome)
    }

    /// MAP or UNMAP, without a line.
    pub fn exchange(&mut self, id: u32, request: &MMap, fds: &[BorrowedFd<'_>]) -> Answered {
        let bytes = message(id, flags::VERSION_1 | flags::NEED_REPLY, &request.bytes());
        let nth = self.send_own(id, &bytes, fds)?;
        let (outcome, value) = self.answer(id)?;
        self.moment(id, nth, Moment::After)?;
        if outcome != Outcome::Refused {
            self.note(id == MAP, request);
        }
        Ok((outcome, value))
    }

    /// Records that a range is mapped, or no longer is.
    pub fn note(&mut self, mapped: bool, request: &MMap) {
        let range = Mapping { shmid: request.shmid, shm_offset: request.shm_offset, len: request.len };
        match mapped {
            true => self.mappings.push(range),
            false => self.mappings.retain(|mapping| *mapping != range),
        }
    }

    /// Unmaps all but the pattern.
    pub fn clean_up(&mut self) -> Result<(), ChannelError> {
        self.forget_after_reset();
        let pattern = self.pattern_range();
        for range in std::mem::take(&mut self.mappings) {
            if range == pattern {
                self.mappings.push(pattern);
                continue;
            }
            let request =
                MMap { shmid: range.shmid, shm_offset: range.shm_offset, len: range.len, ..MMap::default() };
            self.exchange(UNMAP, &request, &[])?;
        }
        Ok(())
    }

    fn forget_after_reset(&mut self) {
        let resets = self.shared.resets();
        if resets != self.resets {
            self.resets = resets;
            self.mappings.clear();
            self.pattern = None;
        }
    }

    /// Sends a MAP or an UNMAP; ends what is to end before, in the middle of and after it. Returns its number
    /// among those of its kind, from 1.
    pub fn send_own(&mut self, id: u32, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<u32, ChannelError> {
        let count = if id == MAP { &mut self.maps } else { &mut self.unmaps };
        *count += 1;
        let nth = *count;
        self.moment(id, nth, Moment::Before)?;
        if self.shared.ends_at(Event::Own(id), nth, Moment::Half) {
            self.send(&bytes[..bytes.len() / 2], fds)?;
            self.moment(id, nth, Moment::Half)?;
        }
        self.send(bytes, fds)?;
        self.moment(id, nth, Moment::Sent)?;
        Ok(nth)
    }

    fn moment(&self, id: u32, nth: u32, moment: Moment) -> Result<(), ChannelError> {
        match self.shared.end(Event::Own(id), nth, moment) {
            true => Err(ChannelError::Closed),
            false => Ok(()),
        }
    }

    /// Sends bytes.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        Ok(self.wire.send(bytes, fds, self.shared.device.timeout)?)
    }

    /// The answer to a request that asked for one.
    pub fn answer(&self, id: u32) -> Answered {
        if !self.negotiated.reply_ack {
            return Ok((Outcome::Unanswered, 0));
        }
        let reply = self.wire.receive(Some(self.shared.device.timeout))?;
        let right_flags =
            reply.flags & (flags::VERSION_MASK | flags::REPLY) == flags::VERSION_1 | flags::REPLY;
        if reply.request != id || !right_flags || reply.payload.len() != 8 || !reply.fds.is_empty() {
            return Err(ChannelError::OutOfStep(format!(
                "id {}, flags {:#x}, {} bytes of payload, {} descriptors; expected is id {id}, flags 0x5, 8 bytes, none",
                reply.request,
                reply.flags,
                reply.payload.len(),
                reply.fds.len()
            )));
        }
        match reply.quad(0) {
            0 => Ok((Outcome::Done, 0)),
            value => Ok((Outcome::Refused, value)),
        }
    }

    fn say(&self, why: &str, what: impl fmt::Display, result: &Answered) {
        let line = |end: &dyn fmt::Display| self.shared.report.line(format_args!("{why}: {what}: {end}"));
        match result {
            Ok((Outcome::Unanswered, _)) => line(&"sent; no answer, since REPLY_ACK was not negotiated"),
            Ok((_, value)) => line(&Answer(*value)),
            Err(error) => line(error),
        }
    }
}

/// A MAP, for the report.
struct Shown<'a>(&'a MMap);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MMap { shmid, fd_offset, shm_offset, len, flags, .. } = self.0;
        write!(f, "shmid {shmid}, shm_offset {shm_offset:#x}, len {len:#x} at file offset {fd_offset:#x}, ")?;
        match *flags {
            0 => f.write_str("read-only"),
            wire::MMap::READ_WRITE => f.write_str("read-write"),
            flags => write!(f, "flags {flags:#x}"),
        }
    }
}
