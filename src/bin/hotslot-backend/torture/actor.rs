//! The thread that asks the front-end for things, so that the main socket is served meanwhile.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use super::cases::{CASES, try_case};
use super::channel::{Agreed, Channel, Gone};
use super::plan::What;
use super::shared::Shared;
use super::streams;
use super::wire::Wire;

/// What it is told to do.
pub enum Job {
    /// This is the backend channel from now on.
    Channel(Arc<Wire>, Agreed),
    /// The device was started: map the pattern.
    Pattern,
    /// Something of the plan.
    Do(What),
}

/// A job, and whom to tell that it is done.
pub struct Order {
    pub job: Job,
    pub done: Option<Sender<()>>,
}

/// Carries out orders until nobody gives any, or the session is over.
pub fn run(orders: &Receiver<Order>, shared: &Arc<Shared>, read_write: bool) {
    let mut channel = None;
    while let Ok(Order { job, done }) = orders.recv() {
        if shared.is_over() {
            return;
        }
        match (job, &mut channel) {
            (Job::Channel(wire, agreed), _) => {
                channel = Some(Channel::new(wire, agreed, Arc::clone(shared)));
            }
            (_, None) => shared.report.line("there is no backend channel that could be used"),
            (job, Some(open)) => {
                let result = match job {
                    Job::Do(what) => act(what, open),
                    _ => open.map_pattern(read_write),
                };
                if let Err(gone) = result {
                    shared.report.line(format_args!("nothing more is asked on this backend channel: {gone}"));
                    channel = None;
                }
            }
        }
        // Nobody waits any more where it took too long.
        let _ = done.map(|done| done.send(()));
    }
}

fn act(what: What, channel: &mut Channel) -> Result<(), Gone> {
    match what {
        What::Everything => {
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
        What::Case(case) => try_case(case, channel),
        What::Stream(stream) => streams::run(stream, channel),
        What::Truncate(how) => streams::truncate(how, channel),
        // Those are the session's.
        What::End(_)
        | What::Silence
        | What::Mute
        | What::Answer(_)
        | What::ShmemConfig(_)
        | What::QueueNum(_) => Ok(()),
    }
}
