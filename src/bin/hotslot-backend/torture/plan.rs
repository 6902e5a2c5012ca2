//! What to do wrong, and when: the values of `--do`, `WHAT[=ARG][@WHEN]`.
//!
//! Pure data. `session` carries out what concerns the main socket and the whole process, `actor` the rest.

use std::str::FromStr;

use clap::ValueEnum;

use super::answers::{BadConfig, WrongAnswer};
use super::cases;
use super::moment::{Event, Moment, When, WhenError};
use super::shared::End;
use super::streams::{Stream, Truncate};
use super::trial::Case;

/// One `--do`.
#[derive(Clone, Debug)]
pub struct Step {
    pub action: Action,
    pub when: When,
}

#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// Each case, one after another.
    Everything,
    Case(&'static Case),
    Stream(Stream),
    Truncate(Truncate),
    End(End),
    /// A request of the front-end is not answered.
    Silence,
    /// From now on no request is answered, and none is sent.
    Mute,
    /// A request of the front-end is answered wrongly.
    Answer(WrongAnswer),
    /// The answer to GET_SHMEM_CONFIG.
    ShmemConfig(BadConfig),
    /// The answer to GET_QUEUE_NUM.
    QueueNum(u64),
}

/// Why a `--do` cannot be done.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PlanError {
    #[error("there is nothing called `{0}` to do: --help names all")]
    Action(String),
    #[error("`{action}` does not take `{arg}`: give {expected}")]
    Arg { action: String, arg: String, expected: &'static str },
    #[error(transparent)]
    When(#[from] WhenError),
    #[error("`{action}` cannot be done {when}: {why}")]
    Combination { action: String, when: When, why: &'static str },
}

impl FromStr for Step {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let (action_text, when_text) = match text.split_once('@') {
            Some((action, when)) => (action, Some(when)),
            None => (text, None),
        };
        let action = action_text.parse()?;
        let when: When = when_text.map_or(Ok(When::START), str::parse)?;
        let why = match action {
            Action::ShmemConfig(_) | Action::QueueNum(_) if when_text.is_some() => {
                "it is the answer to one message, at whose time it is given"
            }
            Action::Silence | Action::Answer(_) if !matches!(when.event, Event::Frontend(_)) => {
                "name the front-end's message that it answers, as in @GET_FEATURES"
            }
            Action::Everything | Action::Case(_) | Action::Stream(_) | Action::Truncate(_) | Action::Mute
                if matches!(when.event, Event::Own(_)) || when.moment == Moment::Half =>
            {
                "in or around a request of ours, only die, hang-up and close-channel can be done"
            }
            _ => return Ok(Step { action, when }),
        };
        Err(PlanError::Combination { action: action_text.to_owned(), when, why })
    }
}

impl FromStr for Action {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let (name, arg) = match text.split_once('=') {
            Some((name, arg)) => (name, Some(arg)),
            None => (text, None),
        };
        let number = |default| arg.map_or(Some(default), parse_number);
        let count = |default| match arg {
            Some("forever") => Some(None),
            _ => number(default).map(Some),
        };
        let alone = |action| (arg.is_none().then_some(action), "nothing");
        let (action, expected) = match name {
            "everything" => alone(Action::Everything),
            "stall" => {
                let bytes = number(20).filter(|bytes| (1..52).contains(bytes));
                (bytes.map(|n| Action::Stream(Stream::Stall(n as usize))), "a number of bytes, 1 to 51")
            }
            "version" => alone(Action::Stream(Stream::Version)),
            "reply-flag" => alone(Action::Stream(Stream::ReplyFlag)),
            "oversized" => {
                let bytes = number(0x1000_0000).and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 40);
                (bytes.map(|n| Action::Stream(Stream::Oversized(n))), "a payload size, 41 to 4294967295")
            }
            "flood" => (count(10_000).map(|n| Action::Stream(Stream::Flood(n))), "a number, or forever"),
            "flood-unread" => {
                (count(100_000).map(|n| Action::Stream(Stream::FloodUnread(n))), "a number, or forever")
            }
            "truncate" => (choice(arg.or(Some("nothing"))).map(Action::Truncate), "nothing, half or pages"),
            "die" => alone(Action::End(End::Die)),
            "hang-up" => alone(Action::End(End::HangUp)),
            "close-channel" => alone(Action::End(End::CloseChannel)),
            "silence" => alone(Action::Silence),
            "mute" => alone(Action::Mute),
            "answer" => {
                (choice(arg).map(Action::Answer), "short, long, id, fd, error, request, version or half")
            }
            "shmem-config" => {
                (choice(arg).map(Action::ShmemConfig), "count, unaligned, overflow, huge or all")
            }
            "queue-num" => (arg.and_then(parse_number).map(Action::QueueNum), "a number"),
            _ => {
                let case = cases::CASES.iter().find(|case| case.name == name);
                alone(Action::Case(case.ok_or_else(|| PlanError::Action(name.to_owned()))?))
            }
        };
        let arg = arg.unwrap_or_default().to_owned();
        action.ok_or_else(|| PlanError::Arg { action: name.to_owned(), arg, expected })
    }
}

fn choice<T: ValueEnum>(arg: Option<&str>) -> Option<T> {
    arg.and_then(|arg| T::from_str(arg, false).ok())
}

/// Decimal, or hexadecimal after 0x.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// All actions but the cases, for `--help`: how it is written, what it does, and what a correct front-end
/// does.
pub const OTHERS: &[(&str, &str, &str)] = &[
    ("everything", "all cases of this list, one by one", "what is correct for each of them"),
    (
        "stall[=BYTES]",
        "sends this many bytes (20) of a MAP, which has 52, and no more",
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
        "a header that announces a payload of this size (256 MiB)",
        "does not wait for it, nor make room for it; may close the channel",
    ),
    (
        "flood[=N|forever]",
        "this many pairs of MAP and UNMAP (10000), as fast as the answers come, or at --rate pairs a second",
        "answers them all, in order (vhost-user, REPLY_ACK)",
    ),
    (
        "flood-unread[=N|forever]",
        "this many requests that fail (100000), of which no answer is read",
        "keeps a bound on what it holds for us; delays nothing else; may close the channel",
    ),
    (
        "truncate[=nothing|half|pages]",
        "cuts the file of the pattern, mapped, to nothing, to half, or page by page",
        "survives the guest's accesses to the missing pages; a process that touches them through its mapping gets SIGBUS",
    ),
    ("die", "SIGKILL to this process", "survives it, and tells the guest (VIRTIO, 2.1: DEVICE_NEEDS_RESET)"),
    ("hang-up", "closes both sockets", "as with die"),
    (
        "close-channel",
        "closes the backend channel",
        "goes on with the device; nothing more is mapped or unmapped",
    ),
    (
        "silence@MESSAGE",
        "does not answer this message of the front-end",
        "gives up after a time limit; delays nothing but this device",
    ),
    ("mute", "from now on answers nothing", "as with silence"),
    (
        "answer=WRONG@MESSAGE",
        "answers this message wrongly: short (a byte less), long (8 more), id (another request's), fd (a descriptor with \
         it), error (it failed), request (no reply flag), version (2), half (of the bytes)",
        "takes an error for a failure (vhost-user, REPLY_ACK: non-zero); at the others it disconnects, with a clear message",
    ),
    (
        "shmem-config=CONFIG",
        "answers GET_SHMEM_CONFIG with an nregions one too high (count), a size of 0x1001 (unaligned), sizes whose sum is \
         over 2^64 (overflow), a size of 2^63 (huge), or 256 regions of a page (all)",
        "works with 256 regions (vhost-user, GET_SHMEM_CONFIG), and refuses the back-end for the others, with a clear message",
    ),
    (
        "queue-num=N",
        "answers GET_QUEUE_NUM with this number",
        "refuses a back-end with fewer queues than it needs; allocates nothing for the queues that it does not need",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_an_action_and_a_time() {
        assert_eq!("die".parse::<Step>().unwrap().when, When::START);
        assert_eq!("stall=1@kick#3".parse::<Step>().unwrap().when, "kick#3".parse().unwrap());
        assert!(matches!("flood=forever".parse(), Ok(Action::Stream(Stream::Flood(None)))));
        assert!(matches!("truncate".parse(), Ok(Action::Truncate(Truncate::Nothing))));
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for text in [
            "",
            "dye",
            "die=1",
            "die@",
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
                .replace("CONFIG", "count")
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
