//! When a `--do` takes effect: an event, its number within the connection, and a moment of its message.
//!
//! The part of `WHAT[=ARG][@WHEN]` behind the `@`. The session and the backend channel compare each event
//! with it.

use std::fmt;
use std::str::FromStr;

use super::wire;

/// When an action is carried out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct When {
    pub event: Event,
    /// Counted from 1 in each connection; `None`: each time.
    pub nth: Option<u32>,
    pub moment: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The device was started: the first ring got its kick descriptor.
    Start,
    /// The guest kicked a queue.
    Kick,
    /// The device is reset after a start: RESET_DEVICE, or SET_STATUS with 0.
    Reset,
    /// The front-end's request with this id.
    Frontend(u32),
    /// The back-end's request with this id.
    Own(u32),
}

/// A moment of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    /// Before a request of the front-end is answered, or one of the back-end is sent.
    Before,
    /// After half of the answer, or of the back-end's request, was sent.
    Half,
    /// After the back-end's request was sent, before its answer is read.
    Sent,
    /// After the request was answered.
    After,
}

impl When {
    /// Without `@WHEN`.
    pub const START: When = When { event: Event::Start, nth: Some(1), moment: Moment::After };

    /// Whether the `nth` occurrence of `event` is meant.
    pub fn is_event(&self, event: Event, nth: u32) -> bool {
        self.event == event && self.nth.is_none_or(|wanted| wanted == nth)
    }

    pub fn is(&self, event: Event, nth: u32, moment: Moment) -> bool {
        self.is_event(event, nth) && self.moment == moment
    }
}

/// No `WHEN` that could be understood.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error(
    "`{0}` is no time: give start, kick, reset, a message as in SET_MEM_TABLE, or MAP or UNMAP; with #N for its Nth \
     time or #all for each, and :before, :half, :sent or :after"
)]
pub struct WhenError(String);

impl FromStr for When {
    type Err = WhenError;

    fn from_str(text: &str) -> Result<Self, WhenError> {
        let wrong = || WhenError(text.to_owned());
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
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.event, self.moment) {
            (Event::Own(_), Moment::Before) => "before sending ",
            (Event::Own(_), Moment::Half) => "after half of ",
            (Event::Own(_), Moment::Sent) => "without reading the answer to ",
            (Event::Own(_), Moment::After) => "after the answer to ",
            (_, Moment::Before) => "before answering ",
            (_, Moment::Half) => "after half of the answer to ",
            (_, Moment::Sent | Moment::After) => "after ",
        })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_an_event_a_count_and_a_moment() {
        for (text, event, nth, moment) in [
            ("start", Event::Start, Some(1), Moment::After),
            ("kick#3", Event::Kick, Some(3), Moment::After),
            ("SET_MEM_TABLE", Event::Frontend(5), Some(1), Moment::Before),
            ("VHOST_USER_SET_STATUS#2:after", Event::Frontend(39), Some(2), Moment::After),
            ("GET_FEATURES:half", Event::Frontend(1), Some(1), Moment::Half),
            ("MAP#4:half", Event::Own(9), Some(4), Moment::Half),
            ("BACKEND_SHMEM_UNMAP", Event::Own(10), Some(1), Moment::Sent),
            ("start#all", Event::Start, None, Moment::After),
            ("reset", Event::Reset, Some(1), Moment::Before),
        ] {
            assert_eq!(text.parse(), Ok(When { event, nth, moment }), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "NOTHING", "start#0", "start:before", "SET_OWNER:sent", "reset:half", "MAP:later"] {
            text.parse::<When>().expect_err(text);
        }
    }
}
