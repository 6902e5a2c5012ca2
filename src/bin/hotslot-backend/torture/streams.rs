//! Actions on the backend channel after which the front-end may close it: malformed messages, and floods of
//! messages.
//!
//! Called by `actor`.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::channel::{Channel, ChannelError, Outcome};
use super::files::{self, PAGE};
use super::report::Answer;
use super::wire::{MAP, MMap, UNMAP, flags, message, words};

/// What is sent on the backend channel, and may end it.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// This many bytes of a MAP, and no more.
    Stall(usize),
    /// A MAP in version 2 of the protocol.
    Version,
    /// A MAP with the reply flag.
    ReplyFlag,
    /// A header that announces a payload of this size.
    Oversized(u32),
    /// This many pairs of MAP and UNMAP, whose answers are read; `None`: until the session ends.
    Flood(Option<u64>),
    /// This many requests that fail, whose answers are not read.
    FloodUnread(Option<u64>),
}

/// How a file is cut.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Truncate {
    Nothing,
    Half,
    /// To nothing, page by page.
    Pages,
}

/// Pairs of requests in a flood that are unanswered at a time: they and their answers fit in a socket's
/// buffers.
const WINDOW: u64 = 32;
/// Between the pages, when a file is cut page by page.
const PAGE_BY_PAGE: Duration = Duration::from_millis(5);

/// Carries the action out, and reports what the front-end did.
pub fn run(stream: Stream, channel: &mut Channel) -> Result<(), ChannelError> {
    let good = MMap { shm_offset: channel.pattern_len(), len: PAGE, ..MMap::default() };
    let asks = flags::VERSION_1 | flags::NEED_REPLY;
    match stream {
        Stream::Stall(count) => {
            let bytes = message(MAP, asks, &good.bytes());
            let file = files::file(2, PAGE)?;
            channel.send(&bytes[..count], &[file.as_fd()])?;
            let size = bytes.len();
            let report = &channel.shared.report;
            report.line(format_args!("stall: {count} of the {size} bytes of a MAP, and no more"));
            observe(channel, "stall")
        }
        Stream::Version => {
            let bytes = message(MAP, flags::VERSION_2 | flags::NEED_REPLY, &good.bytes());
            send_bad(channel, "version", "a MAP in version 2 of the protocol", &bytes)
        }
        Stream::ReplyFlag => {
            let bytes = message(MAP, asks | flags::REPLY, &good.bytes());
            send_bad(channel, "reply-flag", "a MAP with the reply flag", &bytes)
        }
        Stream::Oversized(size) => {
            let what = format!("the header of a MAP with {size} bytes of payload");
            send_bad(channel, "oversized", &what, &words([MAP, asks, size]))
        }
        Stream::Flood(pairs) => flood(channel, good, pairs),
        Stream::FloodUnread(count) => flood_unread(channel, count),
    }
}

fn send_bad(channel: &mut Channel, name: &str, what: &str, bytes: &[u8]) -> Result<(), ChannelError> {
    let file = files::file(2, PAGE)?;
    let fd = file.as_fd();
    channel.send(bytes, &[fd])?;
    channel.shared.report.line(format_args!("{name}: {what}"));
    observe(channel, name)
}

/// Reports what the front-end does: nothing, an answer, or a hang-up. After this the channel cannot be used.
fn observe(channel: &Channel, name: &str) -> Result<(), ChannelError> {
    let report = &channel.shared.report;
    match channel.wire.receive(Some(channel.shared.device.timeout)) {
        Ok(reply) => report.line(format_args!("{name}: {}", Answer(reply.quad(0)))),
        Err(error) => report.line(format_args!("{name}: {}", ChannelError::from(error))),
    }
    Err(ChannelError::Unusable("a malformed message was sent"))
}

fn flood(channel: &mut Channel, good: MMap, pairs: Option<u64>) -> Result<(), ChannelError> {
    let file = files::file(2, PAGE)?;
    let start = Instant::now();
    let pairs = pairs.unwrap_or(u64::MAX);
    let (mut sent, mut answered, mut refused) = (0, 0, 0u64);
    let asks = flags::VERSION_1 | flags::NEED_REPLY;
    let [map, unmap] = [MAP, UNMAP].map(|id| message(id, asks, &good.bytes()));
    let mut result = Ok(());
    while result.is_ok() && answered < pairs && !channel.shared.is_over() {
        if sent < pairs && sent - answered < WINDOW {
            result = channel
                .send_own(MAP, &map, &[file.as_fd()])
                .and_then(|_| channel.send_own(UNMAP, &unmap, &[]))
                .map(drop);
            sent += 1;
            if let Some(rate) = channel.shared.device.rate {
                let due = Duration::from_secs_f64(sent as f64 / f64::from(rate));
                thread::sleep(due.saturating_sub(start.elapsed()));
            }
        } else {
            for id in [MAP, UNMAP] {
                match channel.answer(id) {
                    Ok((Outcome::Refused, _)) => refused += 1,
                    Ok(_) => {}
                    Err(gone) => result = Err(gone),
                }
            }
            answered += 1;
        }
    }
    let end = match &result {
        Ok(()) => String::new(),
        Err(gone) => format!("; then: {gone}"),
    };
    channel.shared.report.line(format_args!(
        "flood: {answered} pairs of MAP and UNMAP answered in {:.3} s, {refused} requests refused{end}",
        start.elapsed().as_secs_f64()
    ));
    result
}

fn flood_unread(channel: &mut Channel, count: Option<u64>) -> Result<(), ChannelError> {
    let count = count.unwrap_or(u64::MAX);
    let request = message(UNMAP, flags::VERSION_1 | flags::NEED_REPLY, &MMap::default().bytes());
    let mut sent = 0;
    let mut result = Ok(());
    while sent < count && result.is_ok() && !channel.shared.is_over() {
        result = channel.send(&request, &[]);
        sent += u64::from(result.is_ok());
    }
    let report = &channel.shared.report;
    match &result {
        Ok(()) => report.line(format_args!("flood-unread: the front-end took all {sent} requests")),
        Err(ChannelError::Timeout(timeout)) => report.line(format_args!(
            "flood-unread: the front-end took {sent} requests, then no more for {} s",
            timeout.as_secs_f32()
        )),
        Err(gone) => {
            report.line(format_args!("flood-unread: the front-end took {sent} requests; then: {gone}"))
        }
    }
    if let Err(ChannelError::Closed) = result {
        return result;
    }
    // A later request would read the answer to one of these.
    Err(ChannelError::Unusable("answers were left unread"))
}

/// Cuts the file of the pattern.
pub fn truncate(how: Truncate, channel: &Channel) -> Result<(), ChannelError> {
    let report = &channel.shared.report;
    let Some(file) = channel.pattern() else {
        report.line("truncate: the pattern is not mapped, so there is nothing to cut");
        return Ok(());
    };
    let len = channel.pattern_len();
    let (to, step) = match how {
        Truncate::Nothing => (0, len),
        Truncate::Half => (len / 2 / PAGE * PAGE, len),
        Truncate::Pages => (0, PAGE),
    };
    let mut now = len;
    while now > to {
        now = now.saturating_sub(step).max(to);
        file.set_len(now)?;
        if step == PAGE {
            thread::sleep(PAGE_BY_PAGE);
        }
    }
    report.line(format_args!(
        "truncate: the file of the pattern, {len:#x} bytes long and mapped, has {to:#x} bytes now"
    ));
    Ok(())
}
