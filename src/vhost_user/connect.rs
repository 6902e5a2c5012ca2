//! Finds a device's back-end and learns what it is: waits for its socket, then makes the handshake.
//!
//! `vmm::backends` calls [`connect`] for each device before the guest exists.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use thiserror::Error;

use super::wire::frontend::{Frontend, FrontendError, Handshake};
use super::wire::message::protocol_features as protocol;
use super::wire::negotiate::Needs;
use crate::config::device::DeviceSpec;
use crate::report;

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
    Frontend(#[from] FrontendError),
}

/// Connects to a back-end, waiting up to `timeout` until it listens, and finds out what it is. `sees_others`:
/// there is another device whose mappings it is to see (SHM-80).
pub fn connect(spec: &DeviceSpec, timeout: Duration, sees_others: bool) -> Result<Handshake, ConnectError> {
    let socket = connect_socket(&spec.name, &spec.socket, timeout)?;
    let facts = spec.kind.facts();
    let needs = Needs {
        device_type: spec.kind.to_string(),
        features: facts.features,
        config: facts.needs_config,
        config_len: facts.config_len,
        shmem: facts.needs_shmem,
        shmem_bit: spec.shmem_bit,
        memory_slots: sees_others,
        queues: spec.queues.unwrap_or(facts.queues),
    };
    let handshake = Frontend::handshake(socket, &needs)?;
    let has_config = handshake.frontend.agreement.has(protocol::CONFIG);
    if has_config && needs.config_len.is_none() && handshake.config.is_empty() {
        log::warn!("{}: the back-end gives no configuration space: it stays empty", spec.name);
    }
    Ok(handshake)
}

/// unix(7): sun_path has 108 bytes, of which the last is a zero.
const MAX_PATH: usize = 107;

/// Connects, trying again while nobody listens; says so each second.
fn connect_socket(name: &str, path: &Path, timeout: Duration) -> Result<UnixStream, ConnectError> {
    const RETRY: Duration = Duration::from_millis(20);
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
