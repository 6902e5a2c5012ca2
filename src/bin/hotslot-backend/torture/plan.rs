//! What to do wrong, and when: the values of `--do`, `WHAT[=ARG][@WHEN]`.
//!
//! Pure data: `session` does what concerns the main socket and the whole process, `channel` and `streams` the
//! rest.

use std::fmt;
use std::str::FromStr;

use super::cases::{self, Case};
use super::wire;

/// One `--do`.
#[derive(Clone, Debug)]
pub struct Step {
    pub what: What,
    pub when: When,
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// Each case, one after another.
    Everything,
    Case(&'static Case),
    /// What happens on the backend channel, and may end it.
    Stream(Stream),
    /// The file of the pattern becomes shorter.
    Truncate(Truncate),
    /// The end of something.
    End(End),
    /// A request of the front-end is not answered.
    Silence,
    /// No request is answered any more, nor anything asked.
    Mute,
    /// A request of the front-end is answered wrongly.
    Answer(WrongAnswer),
    /// The answer to GET_SHMEM_CONFIG.
    ShmemConfig(Absurd),
    /// The answer to GET_QUEUE_NUM.
    QueueNum(u64),
}

/// What happens on the backend channel, and may end it.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// So many bytes of a MAP, then nothing any more.
    Stall(usize),
    /// A MAP in version 2 of the protocol.
    Version,
    /// A MAP with the reply flag.
    ReplyFlag,
    /// A header that announces so large a payload.
    Oversized(u32),
    /// So many pairs of MAP and UNMAP, answers read; `None`: until the end.
    Flood(Option<u64>),
    /// So many MAPs that fail, no answer read.
    FloodUnread(Option<u64>),
}

/// How a file becomes shorter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Truncate {
    ToNothing,
    ToHalf,
    PageByPage,
}

/// What ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// This process, by SIGKILL.
    Die,
    /// Both sockets.
    HangUp,
    /// The backend channel.
    CloseChannel,
}

/// What is wrong about an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WrongAnswer {
    /// A byte less of payload; where there is none, a byte of it.
    Short,
    /// Eight bytes more of payload.
    Long,
    /// Another request's id.
    Id,
    /// A file descriptor with it.
    Fd,
    /// "It failed": 1 where 0 means success, or no payload.
    Error,
    /// No reply flag.
    Request,
    /// Version 2 of the protocol.
    Version,
    /// Half of the bytes, and nothing any more.
    Half,
}

/// What is absurd about the shared memory regions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Absurd {
    /// nregions one more than there are.
    Count,
    /// A size that is no multiple of any page size.
    Unaligned,
    /// Sizes whose sum is more than 2^64.
    Overflow,
    /// One region of 2^63 bytes.
    Huge,
    /// All 256 ids, a page each.
    All,
}

impl Absurd {
    /// nregions, and the sizes.
    pub fn answer(self, regions: &[(u8, u64)]) -> (u32, Vec<(u8, u64)>) {
        let regions = match self {
            Absurd::Count => regions.to_vec(),
            Absurd::Unaligned => vec![(0, 0x1001)],
            Absurd::Overflow => vec![(0, 1 << 63), (1, 1 << 63), (2, 0x1000)],
            Absurd::Huge => vec![(0, 1 << 63)],
            Absurd::All => (0..=255).map(|shmid| (shmid, 0x1000)).collect(),
        };
        (regions.len() as u32 + u32::from(self == Absurd::Count), regions)
    }
}

/// When it is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct When {
    pub event: Event,
    /// The how manieth time; `None`: each.
    pub nth: Option<u32>,
    pub moment: Moment,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The device was started: the first ring got its kick descriptor.
    Start,
    /// The guest kicked a queue.
    Kick,
    /// The device is reset after a start: RESET_DEVICE, or a SET_STATUS of 0.
    Reset,
    /// This request of the front-end.
    Frontend(u32),
    /// This request of ours.
    Own(u32),
}

/// Which moment of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    /// Before it is answered; before a request of ours is sent.
    Before,
    /// After half of the answer, or of our request, was sent.
    Half,
    /// After our request was sent, its answer unread.
    Sent,
    /// After it was answered.
    After,
}

impl When {
    const START: When = When { event: Event::Start, nth: Some(1), moment: Moment::After };

    /// Whether it is now.
    pub fn is(&self, event: Event, nth: u32, moment: Moment) -> bool {
        self.event == event && self.moment == moment && self.nth.is_none_or(|wanted| wanted == nth)
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moment = match (self.event, self.moment) {
            (Event::Own(_), Moment::Before) => "before sending ",
            (Event::Own(_), Moment::Half) => "after half of ",
            (Event::Own(_), Moment::Sent) => "without reading the answer to ",
            (Event::Own(_), Moment::After) => "after the answer to ",
            (_, Moment::Before) => "before answering ",
            (_, Moment::Half) => "after half of the answer to ",
            (_, Moment::Sent | Moment::After) => "after ",
        };
        f.write_str(moment)?;
        match self.event {
            Event::Start => f.write_str("the start"),
            Event::Kick => f.write_str("a kick"),
            Event::Reset => f.write_str("a reset"),
            Event::Frontend(id) => write!(f, "{}", wire::Name(id)),
            Event::Own(wire::MAP) => f.write_str("our MAP"),
            Event::Own(_) => f.write_str("our UNMAP"),
        }
    }
}

/// Why a `--do` cannot be done.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PlanError {
    #[error("there is nothing called `{0}` to do: --help names all")]
    What(String),
    #[error("`{what}` does not take `{arg}`: give {expected}")]
    Arg { what: String, arg: String, expected: &'static str },
    #[error(
        "`{0}` is no time: give start, kick, reset, a message as in SET_MEM_TABLE, or MAP or UNMAP; with #N or #all for \
         the how manieth, and :before, :half, :sent or :after"
    )]
    When(String),
    #[error("`{what}` cannot be done {when}: {why}")]
    Combination { what: String, when: String, why: &'static str },
}

impl FromStr for Step {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let (what_text, when_text) = match text.split_once('@') {
            Some((what, when)) => (what, Some(when)),
            None => (text, None),
        };
        let what = parse_what(what_text)?;
        let when = when_text.map_or(Ok(When::START), parse_when)?;
        let combination =
            |why| Err(PlanError::Combination { what: what_text.to_owned(), when: when.to_string(), why });
        match what {
            What::ShmemConfig(_) | What::QueueNum(_) if when_text.is_some() => {
                combination("it is an answer, and has its time")
            }
            What::Silence | What::Answer(_) if !matches!(when.event, Event::Frontend(_)) => {
                combination("name the front-end's message that it answers, as in @GET_FEATURES")
            }
            What::Everything | What::Case(_) | What::Stream(_) | What::Truncate(_) | What::Mute
                if matches!(when.event, Event::Own(_)) || when.moment == Moment::Half =>
            {
                combination("in or around a request of ours, only die, hang-up and close-channel can be done")
            }
            _ => Ok(Step { what, when }),
        }
    }
}

fn parse_what(text: &str) -> Result<What, PlanError> {
    let (name, arg) = match text.split_once('=') {
        Some((name, arg)) => (name, Some(arg)),
        None => (text, None),
    };
    let wrong = |expected| {
        move || PlanError::Arg { what: name.to_owned(), arg: arg.unwrap_or_default().to_owned(), expected }
    };
    let number = |default: Option<u64>, expected| match arg {
        None => default.ok_or_else(wrong(expected)),
        Some(arg) => parse_number(arg).ok_or_else(wrong(expected)),
    };
    let endless = |default| match arg {
        Some("forever") => Ok(None),
        _ => number(Some(default), "a number, or forever").map(Some),
    };
    let what = match name {
        "stall" => {
            let expected = "a number of bytes, 1 to 51";
            let bytes = number(Some(20), expected)?;
            if !(1..52).contains(&bytes) {
                return Err(wrong(expected)());
            }
            return Ok(What::Stream(Stream::Stall(bytes as usize)));
        }
        "oversized" => {
            let expected = "a payload size, 41 to 4294967295";
            let bytes = number(Some(0x1000_0000), expected)?;
            let bytes = u32::try_from(bytes).ok().filter(|bytes| *bytes > 40);
            return Ok(What::Stream(Stream::Oversized(bytes.ok_or_else(wrong(expected))?)));
        }
        "flood" => return Ok(What::Stream(Stream::Flood(endless(10_000)?))),
        "flood-unread" => return Ok(What::Stream(Stream::FloodUnread(endless(100_000)?))),
        "queue-num" => return Ok(What::QueueNum(number(None, "a number")?)),
        "truncate" => {
            return Ok(What::Truncate(match arg.unwrap_or("nothing") {
                "nothing" => Truncate::ToNothing,
                "half" => Truncate::ToHalf,
                "pages" => Truncate::PageByPage,
                _ => return Err(wrong("nothing, half or pages")()),
            }));
        }
        "answer" => {
            return Ok(What::Answer(match arg.unwrap_or_default() {
                "short" => WrongAnswer::Short,
                "long" => WrongAnswer::Long,
                "id" => WrongAnswer::Id,
                "fd" => WrongAnswer::Fd,
                "error" => WrongAnswer::Error,
                "request" => WrongAnswer::Request,
                "version" => WrongAnswer::Version,
                "half" => WrongAnswer::Half,
                _ => return Err(wrong("short, long, id, fd, error, request, version or half")()),
            }));
        }
        "shmem-config" => {
            return Ok(What::ShmemConfig(match arg.unwrap_or_default() {
                "count" => Absurd::Count,
                "unaligned" => Absurd::Unaligned,
                "overflow" => Absurd::Overflow,
                "huge" => Absurd::Huge,
                "all" => Absurd::All,
                _ => return Err(wrong("count, unaligned, overflow, huge or all")()),
            }));
        }
        "everything" => What::Everything,
        "version" => What::Stream(Stream::Version),
        "reply-flag" => What::Stream(Stream::ReplyFlag),
        "die" => What::End(End::Die),
        "hang-up" => What::End(End::HangUp),
        "close-channel" => What::End(End::CloseChannel),
        "silence" => What::Silence,
        "mute" => What::Mute,
        _ => {
            let case = cases::CASES.iter().find(|case| case.name == name);
            What::Case(case.ok_or_else(|| PlanError::What(name.to_owned()))?)
        }
    };
    match arg {
        None => Ok(what),
        Some(_) => Err(wrong("nothing")()),
    }
}

/// Decimal, or hexadecimal after 0x.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn parse_when(text: &str) -> Result<When, PlanError> {
    let wrong = || PlanError::When(text.to_owned());
    let (rest, moment) = match text.split_once(':') {
        Some((rest, moment)) => (rest, Some(moment)),
        None => (text, None),
    };
    let (name, nth) = match rest.split_once('#') {
        Some((name, "all")) => (name, None),
        Some((name, nth)) => (name, Some(nth.parse().ok().filter(|nth| *nth > 0).ok_or_else(wrong)?)),
        None => (rest, Some(1)),
    };
    let event = match name {
        "start" => Event::Start,
        "kick" => Event::Kick,
        "reset" => Event::Reset,
        "MAP" | "BACKEND_SHMEM_MAP" => Event::Own(wire::MAP),
        "UNMAP" | "BACKEND_SHMEM_UNMAP" => Event::Own(wire::UNMAP),
        _ => Event::Frontend(wire::frontend_request(name).ok_or_else(wrong)?),
    };
    let moment = match (event, moment) {
        (Event::Start | Event::Kick, None | Some("after")) => Moment::After,
        (Event::Reset | Event::Frontend(_), None) => Moment::Before,
        (Event::Own(_), None) => Moment::Sent,
        (Event::Start | Event::Kick, _) => return Err(wrong()),
        (_, Some("before")) => Moment::Before,
        (_, Some("after")) => Moment::After,
        (Event::Own(_) | Event::Frontend(_), Some("half")) => Moment::Half,
        (Event::Own(_), Some("sent")) => Moment::Sent,
        _ => return Err(wrong()),
    };
    Ok(When { event, nth, moment })
}

/// What `--help` says of everything that is not a case: what to write, what it does, and what a correct
/// front-end does.
pub const OTHERS: &[(&str, &str, &str)] = &[
    ("everything", "all cases of this list, one by one", "what is correct for each of them"),
    (
        "stall[=BYTES]",
        "so many bytes (20) of a MAP, which has 52, then nothing any more",
        "waits for the rest without delaying anything else: the guest, other devices, its own requests",
    ),
    (
        "version",
        "a MAP in version 2 of the protocol",
        "does not map, since there is no version but 1 (vhost-user, Header); may close the channel",
    ),
    (
        "reply-flag",
        "a MAP with the reply flag",
        "does not map, since it is a reply to nothing (vhost-user, Header); may close the channel",
    ),
    (
        "oversized[=BYTES]",
        "a header that announces so large a payload (256 MiB)",
        "does not wait for it, nor make room for it; may close the channel",
    ),
    (
        "flood[=N|forever]",
        "so many pairs of MAP and UNMAP (10000), as fast as the answers come, or at --rate pairs a second",
        "answers them all, in order (vhost-user, REPLY_ACK)",
    ),
    (
        "flood-unread[=N|forever]",
        "so many requests that fail (100000) without reading an answer",
        "keeps a bound on what it holds for us; delays nothing else; may close the channel",
    ),
    (
        "truncate[=nothing|half|pages]",
        "cuts the file of the pattern, mapped, to nothing, to half, or page by page",
        "survives the guest's accesses to what is missing: they raise SIGBUS in whoever touches the mapping",
    ),
    ("die", "SIGKILL to this process", "survives it, and tells the guest (VIRTIO, 2.1: DEVICE_NEEDS_RESET)"),
    ("hang-up", "closes both sockets", "as with die"),
    (
        "close-channel",
        "closes the backend channel",
        "goes on with the device; nothing is mapped or unmapped any more",
    ),
    (
        "silence@MESSAGE",
        "does not answer this message of the front-end",
        "gives up after a time limit; delays nothing but this device",
    ),
    ("mute", "answers nothing any more", "as with silence"),
    (
        "answer=WRONG@MESSAGE",
        "answers this message wrongly: short (a byte less), long (8 more), id (another request's), fd (a descriptor with \
         it), error (it failed), request (no reply flag), version (2), half (of the bytes)",
        "takes an error for a failure (vhost-user, REPLY_ACK: non-zero), and gives the back-end up for the others, with a clear message",
    ),
    (
        "shmem-config=ABSURD",
        "GET_SHMEM_CONFIG is answered with a nregions one too high (count), a size of 0x1001 (unaligned), sizes whose sum \
         is over 2^64 (overflow), a size of 2^63 (huge), or 256 regions of a page (all)",
        "works with 256 regions (vhost-user, GET_SHMEM_CONFIG), and refuses the back-end for the others, with a clear message",
    ),
    (
        "queue-num=N",
        "GET_QUEUE_NUM is answered with this number",
        "refuses a back-end with fewer queues than it needs; makes no room for what it does not need",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn when(text: &str) -> When {
        text.parse::<Step>().unwrap().when
    }

    #[test]
    fn a_time_has_an_event_a_count_and_a_moment() {
        for (text, event, nth, moment) in [
            ("die", Event::Start, Some(1), Moment::After),
            ("die@kick#3", Event::Kick, Some(3), Moment::After),
            ("die@SET_MEM_TABLE", Event::Frontend(5), Some(1), Moment::Before),
            ("die@VHOST_USER_SET_STATUS#2:after", Event::Frontend(39), Some(2), Moment::After),
            ("die@GET_FEATURES:half", Event::Frontend(1), Some(1), Moment::Half),
            ("die@MAP#4:half", Event::Own(9), Some(4), Moment::Half),
            ("die@BACKEND_SHMEM_UNMAP", Event::Own(10), Some(1), Moment::Sent),
            ("everything@start#all", Event::Start, None, Moment::After),
            ("die@reset", Event::Reset, Some(1), Moment::Before),
        ] {
            assert_eq!(when(text), When { event, nth, moment }, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for text in [
            "",
            "dye",
            "die=1",
            "die@",
            "die@NOTHING",
            "die@start#0",
            "die@start:before",
            "die@SET_OWNER:sent",
            "stall=0",
            "stall=52",
            "stall=x",
            "oversized=40",
            "oversized=0x100000000",
            "flood=ever",
            "queue-num",
            "truncate=all",
            "answer@GET_FEATURES",
            "answer=wrong@GET_FEATURES",
            "answer=short",
            "silence",
            "silence@start",
            "shmem-config",
            "shmem-config=all@start",
            "everything@MAP",
            "stall@SET_OWNER:half",
        ] {
            text.parse::<Step>().expect_err(text);
        }
    }

    #[test]
    fn what_the_list_names_can_be_written() {
        for (text, ..) in OTHERS {
            let text = text
                .replace("MESSAGE", "GET_FEATURES")
                .replace("WRONG", "short")
                .replace("ABSURD", "count")
                .replace("=N|", "=1|")
                .replace("=N", "=1");
            let text = match text.split_once('[') {
                Some((name, _)) => name.to_owned(),
                None => text,
            };
            text.parse::<Step>().expect(&text);
        }
        let mut names: Vec<_> = cases::CASES.iter().map(|case| case.name).collect();
        for name in &names {
            name.parse::<Step>().expect(name);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases::CASES.len());
    }
}
