//! A case of `cases`, tried on a backend channel: its conditions, its requests with their expected outcomes,
//! and its verdict.
//!
//! Called by `actor`.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::channel::{Channel, ChannelError, Outcome};
use super::files::{self, PAGE};
use super::report::Verdict;
use super::wire::{MAP, MMap, UNMAP};

/// Requests that a front-end must carry out or refuse.
#[derive(Debug)]
pub struct Case {
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What a correct front-end does about it, and where that is written.
    pub duty: &'static str,
    pub run: fn(&mut Trial<'_>) -> Result<(), ChannelError>,
}

/// The duty of the cases for which the specification says none.
pub const UNSAID: &str = "carries it out or refuses it (vhost-user does not say), and goes on";
/// The duty of the cases at which the front-end may close the channel.
pub const FRAMING: &str =
    "refuses a malformed request (vhost-user, Back-end message types), and goes on or closes the channel";

/// A case while it is tried.
pub struct Trial<'a> {
    pub name: &'static str,
    pub channel: &'a mut Channel,
    /// The offset in region 0 behind the pattern: from there on nothing is mapped.
    pub start: u64,
    /// The size of region 0.
    pub size: u64,
    /// What the front-end did not do as it must.
    wrong: Vec<String>,
    /// Why there is no verdict.
    skipped: Option<&'static str>,
}

/// Bytes behind the pattern that the cases need.
const ROOM: u64 = 12 * PAGE;

/// Tries a case, and reports the verdict.
///
/// # Errors
///
/// The channel cannot be used any more; the verdict takes that into account.
pub fn try_case(case: &Case, channel: &mut Channel) -> Result<(), ChannelError> {
    let report = Arc::clone(&channel.shared.report);
    let none = |why| {
        report.verdict(case.name, &Verdict::None(why), case.duty);
        Ok(())
    };
    let run = channel.shared.run();
    let (start, size) = (channel.pattern_len(), channel.shared.region_size(0));
    if case.name == "not-negotiated" && channel.negotiated.shmem {
        return none("SHMEM was negotiated");
    }
    if case.name != "not-negotiated" && !channel.negotiated.shmem {
        return none("SHMEM was not negotiated");
    }
    if size < start + ROOM || size % PAGE != 0 {
        return none("region 0 is too small for it: --region 0=1M");
    }
    if !channel.negotiated.reply_ack {
        return none("REPLY_ACK was not negotiated, so the front-end does not answer");
    }
    let mut trial = Trial { name: case.name, channel, start, size, wrong: Vec::new(), skipped: None };
    let result = (case.run)(&mut trial);
    // The front-end may have left only this request unanswered.
    let goes_on = match &result {
        Ok(()) | Err(ChannelError::Timeout(_)) => trial.still_works(),
        Err(_) => Ok(()),
    };
    let Trial { wrong, skipped, channel, .. } = trial;
    let verdict = match (result.as_ref().and(goes_on.as_ref()), wrong.first()) {
        _ if run.is_none() || channel.shared.run() != run => {
            Verdict::None("the device did not run all the time, so the front-end may refuse")
        }
        (_, Some(_)) => Verdict::Wrong(wrong.join("; ")),
        (Err(ChannelError::Closed), _) if case.duty == FRAMING => Verdict::LeftOpen,
        (Err(error), _) => Verdict::Wrong(error.to_string()),
        (Ok(()), None) => match skipped {
            Some(why) => Verdict::None(why),
            None if case.duty == UNSAID => Verdict::LeftOpen,
            None => Verdict::AsSpecified,
        },
    };
    report.verdict(case.name, &verdict, case.duty);
    match result {
        Err(ChannelError::Timeout(_)) => goes_on,
        result => result.and(goes_on),
    }
}

impl Trial<'_> {
    /// A MAP or UNMAP of so many pages; page 0 is the first behind the pattern.
    pub fn pages(&self, page: u64, pages: u64) -> MMap {
        MMap { shm_offset: self.start + page * PAGE, len: pages * PAGE, ..MMap::default() }
    }

    pub fn page(&self, page: u64) -> MMap {
        self.pages(page, 1)
    }

    pub fn line(&self, line: impl std::fmt::Display) {
        self.channel.shared.report.line(format_args!("{}: {line}", self.name));
    }

    pub fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    pub fn skip(&mut self, why: &'static str) {
        self.skipped = Some(why);
    }

    /// Notes as wrong an outcome that is not the expected one. Returns it as a word, for the report.
    pub fn must(&mut self, what: &str, outcome: Outcome, expected: Outcome) -> &'static str {
        let done = match outcome {
            Outcome::Done => "done",
            Outcome::Refused => "refused",
            Outcome::Unanswered => "not answered",
        };
        if outcome != expected {
            self.wrong(format!("it did not {what}: {done}"));
        }
        done
    }

    pub fn map(&mut self, request: MMap, fds: &[BorrowedFd<'_>]) -> Result<Outcome, ChannelError> {
        self.channel.map(self.name, &request, fds)
    }

    pub fn unmap(&mut self, request: MMap, fds: &[BorrowedFd<'_>]) -> Result<Outcome, ChannelError> {
        self.channel.unmap(self.name, &request, fds)
    }

    pub fn must_map(&mut self, request: MMap, fd: BorrowedFd<'_>) -> Result<(), ChannelError> {
        let outcome = self.map(request, &[fd])?;
        self.must("map", outcome, Outcome::Done);
        Ok(())
    }

    pub fn must_refuse_map(&mut self, request: MMap, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let outcome = self.map(request, fds)?;
        self.must("refuse", outcome, Outcome::Refused);
        Ok(())
    }

    pub fn must_unmap(&mut self, request: MMap) -> Result<(), ChannelError> {
        let outcome = self.unmap(request, &[])?;
        self.must("unmap", outcome, Outcome::Done);
        Ok(())
    }

    pub fn must_refuse_unmap(&mut self, request: MMap) -> Result<(), ChannelError> {
        let outcome = self.unmap(request, &[])?;
        self.must("refuse", outcome, Outcome::Refused);
        Ok(())
    }

    pub fn maps_and_unmaps(&mut self, request: MMap) -> Result<(), ChannelError> {
        let file = files::file(2, request.fd_offset + request.len)?;
        self.must_map(request, file.as_fd())?;
        self.must_unmap(request)
    }

    /// MAPs of a file that is long enough; each must be refused.
    pub fn each_refused(&mut self, requests: &[MMap]) -> Result<(), ChannelError> {
        let file = files::file(2, 4 * PAGE)?;
        requests.iter().try_for_each(|request| self.must_refuse_map(*request, &[file.as_fd()]))
    }

    /// A MAP of a one-page file, which may be refused. If it succeeds, its UNMAP must succeed, too.
    pub fn may_map(&mut self, request: MMap) -> Result<(), ChannelError> {
        let file = files::file(2, PAGE)?;
        let outcome = self.map(request, &[file.as_fd()])?;
        match outcome {
            Outcome::Done => self.must_unmap(request),
            _ => Ok(()),
        }
    }

    /// UNMAPs while pages 1 to 3 are mapped; each must be refused.
    pub fn unmaps_refused(&mut self, requests: &[MMap]) -> Result<(), ChannelError> {
        let file = files::file(2, 3 * PAGE)?;
        self.must_map(self.pages(1, 3), file.as_fd())?;
        for request in requests {
            self.must_refuse_unmap(*request)?;
        }
        self.must_unmap(self.pages(1, 3))
    }

    /// Unmaps what the case left mapped; then a MAP and its UNMAP must succeed.
    fn still_works(&mut self) -> Result<(), ChannelError> {
        self.channel.clean_up()?;
        if !self.channel.negotiated.shmem {
            return Ok(());
        }
        let file = files::file(3, PAGE)?;
        let request = self.page(0);
        let (mapped, _) = self.channel.exchange(MAP, &request, &[file.as_fd()])?;
        let (unmapped, _) = match mapped {
            Outcome::Done => self.channel.exchange(UNMAP, &request, &[])?,
            _ => (Outcome::Refused, 0),
        };
        self.must("map and unmap a page afterwards", unmapped, Outcome::Done);
        Ok(())
    }
}
