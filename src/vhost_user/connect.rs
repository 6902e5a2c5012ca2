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

use super::handshake::{Handshake, HandshakeError, handshake};
use super::tracer::Tracer;
use super::wire::frontend::{FrontendError, QueueSize};
use super::wire::message::protocol_features as protocol;
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
    /// SHM-90. Without MQ it does not say how many queues it has.
    #[error(
        "the back-end refuses SET_VRING_NUM of {size} entries for queue {index} and takes it for queue 0"
    )]
    FewerQueues { index: u16, size: u16 },
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
            ConnectError::FewerQueues { .. } => "say how many it has with queues=N".to_string(),
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
    let attempt = |timeout| {
        let socket = connect_socket(&spec.name, &spec.socket, timeout)?;
        Ok(handshake(socket, spec, memory_slots, u64::MAX, tracer.clone())?)
    };
    let mut backend = attempt(timeout)?;
    let asked = backend.queue_size;
    let takes = queue_size(&mut backend, asked, |index, size| {
        again(attempt).map_err(|error| ConnectError::Died { index, size, source: Box::new(error) })
    })?;
    if takes < asked && spec.queue_size.is_some() {
        return Err(ConnectError::QueueSize { index: backend.queues - 1, asked, takes });
    }
    backend.queue_size = takes;
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
    let shake_hands = || {
        let mut backend = handshake(socket, spec, memory_slots, acceptable, tracer.clone())?;
        backend.ask_inflight_size()?;
        Ok(backend)
    };
    shake_hands().inspect_err(|error: &ConnectError| {
        tracer.iter().for_each(|tracer| tracer.not_used(error));
    })
}

/// The largest size up to `asked` that the back-end takes for its queues (SHM-90). The last queue stands for
/// all: where the back-end has fewer than it is to have, that shows, too. `again` connects to a back-end that
/// hung up at a size.
fn queue_size(
    backend: &mut Handshake,
    asked: u16,
    again: impl Fn(u16, u16) -> Result<Handshake, ConnectError>,
) -> Result<u16, ConnectError> {
    let (index, says_how_many) = (backend.queues - 1, backend.frontend.agreement.has(protocol::MQ));
    let mut takes = |index, size| {
        let tried = backend.frontend.set_up().try_queue_size(index, size)?;
        if tried == QueueSize::HungUp {
            *backend = again(index, size)?;
        }
        Ok::<_, ConnectError>(tried == QueueSize::Taken)
    };
    let mut size = asked;
    while !takes(index, size)? {
        if size == asked && index > 0 && !says_how_many && takes(0, size)? {
            return Err(ConnectError::FewerQueues { index, size });
        }
        if size == 1 {
            return Err(ConnectError::NoQueueSize { index, asked });
        }
        size /= 2;
    }
    Ok(size)
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

/// Connects, trying again while nobody listens; says so each second.
fn connect_socket(name: &str, path: &Path, timeout: Duration) -> Result<UnixStream, ConnectError> {
    let len = path.as_os_str().len();
    if len > MAX_PATH {
        return Err(ConnectError::PathTooLong(len));
    }
    let start = Instant::now();
    let mut said = 0;
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
        if seconds > said {
            said = seconds;
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
