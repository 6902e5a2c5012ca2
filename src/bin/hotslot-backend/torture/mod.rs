//! A back-end that misbehaves on demand, to test front-ends with. It uses nothing but the protocol, so it
//! works with any front-end.
//!
//! Reading order: `plan` and `moment` (`--do`: an action and its time), `session` (the main socket),
//! `answers` (wrong ones), `cases` and `trial` (requests that have a verdict), `streams` (what may end the
//! channel), `actor` (the thread of the backend channel) and `channel`, `rings` (the device itself), `wire`
//! (bytes), `files` (what is mapped), `report` (what is printed), `shared` (between the two threads).

mod actor;
mod answers;
mod cases;
mod channel;
mod files;
mod moment;
mod plan;
mod report;
mod rings;
mod session;
mod shared;
mod streams;
mod trial;
mod wire;

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use hotslot::size;

use self::plan::{OTHERS, Step};
use self::report::Report;
use self::shared::Device;
use self::wire::{F_PROTOCOL_FEATURES, protocol};
use crate::error::Error;
use crate::sandbox;
use crate::server::{self, Ended};

const NAME: &str = "torture";

/// VIRTIO_F_VERSION_1, which every device offers.
const VERSION_1: u64 = 1 << 32;

/// A back-end that misbehaves on demand, to test any front-end with
///
/// Without --do it is a well-behaved entropy device with shared memory: it maps a pattern (64-bit
/// little-endian words, 2^32 plus their offset) at the beginning of region 0 when it is started, fills what
/// its queue is given with random bytes, and forgets everything at a reset. Each --do adds an action at a
/// certain time. It prints, on stdout, what it did and what the front-end answered, and a verdict where the
/// specification is clear.
#[derive(clap::Args)]
#[command(after_long_help = after_help())]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    /// Shared memory region: its id, and its size in bytes (64K, 4M); region 0 of 4M unless any is given
    #[arg(long, value_name = "ID=SIZE", value_parser = parse_region)]
    region: Vec<(u8, u64)>,

    /// Number of queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,

    /// Protocol feature bit that means SHMEM: 22 in the specification, 20 or 21 in drafts of it
    #[arg(long, value_name = "BIT", default_value_t = protocol::SHMEM_BIT,
        value_parser = clap::value_parser!(u32).range(20..=22))]
    shmem_bit: u32,

    /// Feature bits to offer besides VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES
    #[arg(long, value_name = "MASK", default_value_t = 0, value_parser = parse_mask)]
    features: u64,

    /// Protocol feature bits to offer instead of MQ, REPLY_ACK, BACKEND_REQ, CONFIG, BACKEND_SEND_FD,
    /// RESET_DEVICE, STATUS and SHMEM
    #[arg(long, value_name = "MASK", value_parser = parse_mask)]
    protocol_features: Option<u64>,

    /// Map the pattern read-write, not read-only
    #[arg(long)]
    read_write: bool,

    /// Action, and when; may be given several times (--help lists all)
    #[arg(long = "do", value_name = "WHAT[=ARG][@WHEN]")]
    steps: Vec<Step>,

    /// Time limit for the front-end to answer on the backend channel, or to take a request there
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = parse_seconds)]
    patience: f32,

    /// Pairs of requests a second in --do flood; no limit unless given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,

    /// Print each message of the front-end, too
    #[arg(long)]
    trace: bool,
}

const WHEN: &str = "\
WHEN is one of
  start          once the device was started (the default)
  kick           when the guest kicked a queue
  reset          at a reset of the device after a start
  MESSAGE        at this message of the front-end, as in SET_MEM_TABLE
  MAP, UNMAP     when the back-end sends one: for die, hang-up and close-channel
then #N for its Nth time in a connection (the first, unless given) or #all, and one of
  :before        before it is answered, or sent (for messages of the front-end, and reset, the default)
  :half          after half of the answer, or of the back-end's request
  :sent          after it was sent, without reading the answer (for MAP and UNMAP the default)
  :after         after it was answered

Examples:
  --do everything
  --do die@SET_MEM_TABLE:after
  --do answer=short@GET_SHMEM_CONFIG
  --do die@MAP#2:half --do truncate=half@kick

The exit status is 1 if a verdict was `NOT as specified`, or if nothing of --do could be tried; 2 for a wrong command line.
--once ends with the first front-end.";

fn parse_region(text: &str) -> Result<(u8, u64), String> {
    let (id, bytes) = text.split_once('=').ok_or("expected ID=SIZE, as in 0=4M".to_owned())?;
    let id = id.parse().map_err(|_| format!("`{id}` is no id: give 0 to 255"))?;
    let size = size::parse(bytes).map_err(|error| error.to_string())?;
    if size == 0 {
        return Err("a region cannot have size 0".to_owned());
    }
    Ok((id, size))
}

fn parse_mask(text: &str) -> Result<u64, String> {
    plan::parse_number(text)
        .ok_or_else(|| format!("`{text}` is no number: give decimal, or 0x and hexadecimal"))
}

fn parse_seconds(text: &str) -> Result<f32, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..=3600.0).contains(seconds));
    seconds.ok_or_else(|| format!("`{text}` is no number of seconds from 0.001 to 3600"))
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`].
pub fn run(args: &Args) -> Result<(), Error> {
    let report = Arc::new(Report::default());
    let mut regions = args.region.clone();
    regions.sort_unstable();
    if let Some(twice) = regions.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::RegionTwice(twice[0].0));
    }
    if regions.is_empty() {
        regions.push((0, 4 << 20));
    }
    let well_behaved = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::CONFIG
        | protocol::BACKEND_SEND_FD
        | protocol::RESET_DEVICE
        | protocol::STATUS
        | 1 << args.shmem_bit;
    let device = Device {
        features: VERSION_1 | F_PROTOCOL_FEATURES | args.features,
        protocol_features: args.protocol_features.unwrap_or(well_behaved),
        shmem_bit: args.shmem_bit,
        queues: args.queues,
        regions,
        read_write: args.read_write,
        timeout: Duration::from_secs_f32(args.patience),
        rate: args.rate,
        trace: args.trace,
    };
    let steps = args.steps.clone();
    let listening = server::listen(&args.server)?;
    report.line(format_args!("{listening}"));
    let report_of_sessions = Arc::clone(&report);
    server::serve_with(NAME, listening, sandbox::torture, move |listener| {
        session(listener, &device, &steps, &report_of_sessions)
    })?;
    report.line(&report);
    match report.wrong() {
        0 if !args.steps.is_empty() && !report.has_tried() => Err(Error::NothingTried),
        0 => Ok(()),
        wrong => Err(Error::NotAsSpecified(wrong)),
    }
}

fn session(
    listener: &UnixListener,
    device: &Device,
    steps: &[Step],
    report: &Arc<Report>,
) -> Result<Ended, Error> {
    let (socket, _) = listener.accept().map_err(Error::set_up("a connection"))?;
    Ok(session::serve(socket, device, steps, report))
}

/// Everything that --do can do, and when.
// Inlined into the code that clap derives, it costs the compiler minutes (see Cargo.toml).
#[inline(never)]
fn after_help() -> String {
    let entry =
        |name: &str, about: &str, duty: &str| format!("  {name}\n      {about}\n      Correct: {duty}.\n");
    let requests = cases::CASES.iter().map(|case| entry(case.name, case.about, case.duty));
    let others = OTHERS.iter().map(|(name, about, duty)| entry(name, about, duty));
    let messages: Vec<_> = wire::frontend_request_names().collect();
    format!(
        "WHAT is one of these requests, each of which has a verdict:\n\n{}\nor one of these:\n\n{}\n{WHEN}\n\nMESSAGE is one of {}.",
        requests.collect::<String>(),
        others.collect::<String>(),
        messages.join(", ")
    )
}
