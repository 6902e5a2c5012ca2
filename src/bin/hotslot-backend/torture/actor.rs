//! The thread that sends requests to the front-end and waits for the answers, while the main socket is
//! served.
//!
//! Started by `session` for each connection.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use super::cases::CASES;
use super::channel::{Channel, ChannelError, Negotiated};
use super::plan::Action;
use super::shared::Shared;
use super::streams;
use super::trial::try_case;
use super::wire::Wire;

pub enum Job {
    /// From now on this is the backend channel.
    Channel(Arc<Wire>, Negotiated),
    /// The device was started: map the pattern.
    Pattern,
    /// Carry out a `--do`.
    Do(Action),
}

/// A job, and where to send that it is done.
pub struct Order {
    pub job: Job,
    pub done: Option<Sender<()>>,
}

/// Carries out orders until the session drops the sender, or is over.
pub fn run(orders: &Receiver<Order>, shared: &Arc<Shared>) {
    let mut channel = None;
    while let Ok(Order { job, done }) = orders.recv() {
        if shared.is_over() {
            return;
        }
        match (job, &mut channel) {
            (Job::Channel(wire, negotiated), _) => {
                channel = Some(Channel::new(wire, negotiated, Arc::clone(shared)));
            }
            (_, None) => shared.report.line("there is no backend channel that could be used"),
            (job, Some(open)) => {
                let result = match job {
                    Job::Do(action) => act(action, open),
                    _ => open.map_pattern(),
                };
                if let Err(error) = result {
                    shared.report.line(format_args!("no more requests on this backend channel: {error}"));
                    channel = None;
                }
            }
        }
        // The session may have stopped waiting.
        let _ = done.map(|done| done.send(()));
    }
}

fn act(action: Action, channel: &mut Channel) -> Result<(), ChannelError> {
    match action {
        Action::Everything => {
            let mut tried = 0;
            let result = CASES.iter().try_for_each(|case| {
                tried += 1;
                try_case(case, channel)
            });
            let report = &channel.shared.report;
            let all = CASES.len();
            report.line(format_args!("everything: {tried} of {all} cases tried; so far: {report}"));
            result
        }
        Action::Case(case) => try_case(case, channel),
        Action::Stream(stream) => {
            channel.shared.report.tried();
            streams::run(stream, channel)
        }
        Action::Truncate(how) => {
            channel.shared.report.tried();
            streams::truncate(how, channel)
        }
        // The session carries these out.
        Action::End(_)
        | Action::Silence
        | Action::Mute
        | Action::Answer(_)
        | Action::ShmemConfig(_)
        | Action::QueueNum(_) => Ok(()),
    }
}
