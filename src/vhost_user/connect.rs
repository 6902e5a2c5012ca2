//! Finds a device's back-end: waits for its socket, makes the handshake, and tries the size of its queues.
//!
//! `vmm::backends` calls [`connect`] for each device before the guest exists.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use thiserror::Error;

use super::handshake::{Handshake, HandshakeError, USUAL_MAX_CONFIG, handshake};
use super::tracer::Tracer;
use super::wire::frontend::{FrontendError, QueueSize};
use super::wire::negotiate::Agreement;
use crate::config::device::DeviceSpec;
use crate::report;

/// How long a back-end that hung up at a queue size may take until it listens again.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(20);

/// Why a back-end cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ConnectError {
    /// No back-end listens and accepts in the time that the user allows; `source` is the last error of
    /// connect(2).
    #[error("nobody accepted a connection within {} s", .waited.as_secs_f32())]
    NobodyListens { waited: Duration, source: io::Error },
    #[error("it is not a socket")]
    NotASocket,
    #[error("its path is {0} bytes long, longer than the {MAX_PATH} that a socket's path can have")]
    PathTooLong(usize),
    /// The socket cannot be connected to, and waiting would not help.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// SHM-90. The user said `asked`.
    #[error("the back-end refuses SET_VRING_NUM of {asked} entries for queue {index} and takes {takes}")]
    QueueSize { index: u16, asked: u16, takes: u16 },
    /// SHM-90. It refuses every size.
    #[error(
        "the back-end refuses SET_VRING_NUM of {asked} entries for queue {index}, and any smaller number"
    )]
    NoQueueSize { index: u16, asked: u16 },
    /// SHM-90. It may have only the queues before.
    #[error(
        "the back-end refuses SET_VRING_NUM of {asked} entries for queue {index}, and any smaller number, and takes \
         {took} for queue {}", .index - 1
    )]
    FewerQueues { index: u16, asked: u16, took: u16 },
    /// SHM-90.
    #[error("the back-end hung up at SET_VRING_NUM of {size} entries for queue {index}, and listens no more")]
    Died { index: u16, size: u16, source: Box<ConnectError> },
}

impl ConnectError {
    /// What the user can do.
    pub fn hint(&self, spec: &DeviceSpec) -> Option<String> {
        Some(match self {
            ConnectError::NobodyListens { .. } => format!(
                "start the back-end on {}, or wait longer with --connect-timeout",
                spec.socket.display()
            ),
            ConnectError::PathTooLong(_) => {
                "a path relative to the working directory may be shorter".to_string()
            }
            ConnectError::Handshake(error) => return error.hint(spec),
            ConnectError::QueueSize { takes, .. } => format!("say queue-size={takes}"),
            &ConnectError::FewerQueues { index, .. } => match (spec.kind, spec.kind.least_queues()) {
                (kind, least) if index < least => {
                    format!("start the back-end with more queues: a device of type {kind} needs {least}")
                }
                _ => format!("if the back-end has only {index} queues, say queues={index}"),
            },
            ConnectError::Died { size, .. } => {
                format!("start the back-end again, and say queue-size={} or less", size / 2)
            }
            ConnectError::NoQueueSize { .. } | ConnectError::NotASocket | ConnectError::Connect(_) => {
                return None;
            }
        })
    }

    fn is_hang_up(&self) -> bool {
        matches!(self, ConnectError::Handshake(error) if error.is_hang_up())
    }
}

impl From<FrontendError> for ConnectError {
    fn from(error: FrontendError) -> Self {
        ConnectError::Handshake(error.into())
    }
}

/// Connects to a back-end, waiting up to `timeout` until it listens, and finds out what it is.
/// `memory_slots`: it is to be told of more than one range of memory (SHM-80, SHM-89). `tracer` records it.
pub fn connect(
    spec: &DeviceSpec,
    timeout: Duration,
    memory_slots: bool,
    tracer: Option<Arc<Tracer>>,
) -> Result<Handshake, ConnectError> {
    let attempt = |spec: &DeviceSpec, timeout| {
        let socket = connect_socket(&spec.name, &spec.socket, timeout)?;
        Ok(handshake(socket, spec, memory_slots, u64::MAX, tracer.clone())?)
    };
    let mut spec = spec.clone();
    let mut backend = match attempt(&spec, timeout) {
        Err(ConnectError::Handshake(error))
            if spec.config_size.is_none() && error.is_end_of_usual_config() =>
        {
            spec.config_size = Some(USUAL_MAX_CONFIG);
            again(|timeout| attempt(&spec, timeout)).map_err(|_| error)?
        }
        attempted => attempted?,
    };
    let spec = &spec;
    let asked = spec.wanted_queue_size();
    let sizes = queue_sizes(&mut backend, asked, |index, size| {
        let attempted = again(|timeout| attempt(spec, timeout));
        attempted.map_err(|error| ConnectError::Died { index, size, source: Box::new(error) })
    })?;
    let least = (0..).zip(&sizes).min_by_key(|(_, takes)| **takes);
    if let Some((index, &takes)) = least.filter(|(_, takes)| spec.queue_size.is_some() && **takes < asked) {
        return Err(ConnectError::QueueSize { index, asked, takes });
    }
    backend.queue_sizes = sizes;
    backend.ask_inflight_size()?;
    backend.report(spec);
    Ok(backend)
}

/// Connects to a back-end that comes back; does not wait until it listens. No protocol feature is agreed on
/// but those of `agreed`, which its predecessor had.
pub fn reconnect(
    spec: &DeviceSpec,
    memory_slots: bool,
    agreed: &Agreement,
    tracer: Option<Arc<Tracer>>,
) -> Result<Handshake, ConnectError> {
    let socket = try_connect(&spec.socket).map_err(ConnectError::Connect)?;
    let acceptable = agreed.protocol_features.unwrap_or(0);
    let shaken = handshake(socket, spec, memory_slots, acceptable, tracer.clone());
    Ok(shaken.inspect_err(|error| tracer.iter().for_each(|tracer| tracer.not_used(error)))?)
}

/// The largest size up to `asked` that the back-end takes for each of its queues (SHM-90). Where it has fewer
/// queues than it is to have, that shows, too. `again` connects to a back-end that hung up at a size.
fn queue_sizes(
    backend: &mut Handshake,
    asked: u16,
    again: impl Fn(u16, u16) -> Result<Handshake, ConnectError>,
) -> Result<Vec<u16>, ConnectError> {
    let (mut sizes, mut most) = (Vec::new(), asked);
    for index in (0..).take(backend.queue_sizes.len()) {
        let mut size = most;
        loop {
            match backend.frontend.set_up().try_queue_size(index, size)? {
                QueueSize::Taken => break,
                QueueSize::Refused => {}
                QueueSize::HungUp => {
                    *backend = again(index, size)?;
                    // It need not hang up at the same size for each of its queues.
                    most = size / 2;
                }
            }
            if size == 1 {
                return Err(match sizes.last() {
                    Some(&took) => ConnectError::FewerQueues { index, asked, took },
                    None => ConnectError::NoQueueSize { index, asked },
                });
            }
            size /= 2;
        }
        sizes.push(size);
    }
    Ok(sizes)
}

/// Connects to a back-end that hung up: it may listen again, at once or soon, or not any more.
fn again(attempt: impl Fn(Duration) -> Result<Handshake, ConnectError>) -> Result<Handshake, ConnectError> {
    let start = Instant::now();
    let mut left = LISTEN_AGAIN;
    loop {
        match attempt(left) {
            // It accepted, and then ended.
            Err(error) if error.is_hang_up() && start.elapsed() < LISTEN_AGAIN => thread::sleep(RETRY),
            result => return result,
        }
        left = LISTEN_AGAIN.saturating_sub(start.elapsed());
    }
}

/// unix(7): sun_path has 108 bytes, of which the last is a zero.
const MAX_PATH: usize = 107;

/// Connects, trying again while nobody listens. Says that it waits after 1, 2, 4, 8 seconds and so on.
fn connect_socket(name: &str, path: &Path, timeout: Duration) -> Result<UnixStream, ConnectError> {
    let len = path.as_os_str().len();
    if len > MAX_PATH {
        return Err(ConnectError::PathTooLong(len));
    }
    let start = Instant::now();
    // In seconds. Seldom, so that the messages of other programs are not pushed out of sight.
    let mut next_message = 1;
    loop {
        let source = match try_connect(path) {
            Ok(socket) => return Ok(socket),
            Err(source) => source,
        };
        // WouldBlock: the backlog of the listener is full.
        use io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
        if !matches!(source.kind(), NotFound | ConnectionRefused | WouldBlock) {
            return Err(ConnectError::Connect(source));
        }
        // A refusal means a socket that nobody listens on (yet), or no socket.
        if path.metadata().is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(ConnectError::NotASocket);
        }
        let waited = start.elapsed();
        if waited >= timeout {
            return Err(ConnectError::NobodyListens { waited: timeout, source });
        }
        let seconds = waited.as_secs();
        if seconds >= next_message {
            next_message = 2 * seconds;
            let path = path.display();
            report::say(format_args!("hotslot: {name}: waiting for a back-end on {path} ({seconds} s)"));
        }
        thread::sleep(RETRY.min(timeout - waited));
    }
}

/// One attempt. It does not wait for a place in the listener's backlog: there may never be one.
fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}
