//! A serial port with a name: a VIRTIO console device (id 3) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.3, with VIRTIO_CONSOLE_F_MULTIPORT and one port. Its other end is a Unix socket of
//! this machine, and bytes pass unchanged both ways. Called by `main`.
//!
//! Reading order: `control` (how the driver learns of the port), `port` (the bytes).
//!
//! A thread of its own moves the bytes, because a queue's thread must not wait for the socket: the device
//! could not be stopped while its other end does not read.

mod control;
mod port;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;

use hotslot::report::say;

use self::port::{CONTROL_TRANSMIT, Port};
use crate::complaints::Complaints;
use crate::device::{self, Device, Later, Request};
use crate::error::Error;
use crate::ring::{Memory, Taken};
use crate::{sandbox, server};

const NAME: &str = "console";

/// Feature bit: there are control queues, and ports with names.
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;

/// In place of a path: standard input.
const STDIN: &str = "-";

/// A serial port with a name (VIRTIO console), connected to a Unix socket of this machine
///
/// Linux in the guest (module virtio_console) has it as /dev/vportNp0, with NAME in
/// /sys/class/virtio-ports/vportNp0/name. Bytes pass unchanged both ways, as fast as the reader takes them.
/// The front-end must give the device four queues, as hotslot does.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    /// Name of the port, and the Unix socket to connect it to, on which another program listens. `-` in place
    /// of PATH: standard input, which must be a connected socket
    #[arg(long, value_name = "NAME=PATH", value_parser = parse_port)]
    port: (String, String),
}

fn parse_port(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), path.to_owned())),
        _ => Err("it is NAME=PATH, neither of them empty".to_owned()),
    }
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]; a port that cannot be connected is found before the socket exists.
pub fn run(args: &Args) -> Result<(), Error> {
    let (name, path) = args.port.clone();
    let stream = connect(&path).map_err(|source| Error::Port {
        name: name.clone(),
        to: if path == STDIN { "standard input".to_owned() } else { format!("{path:?}") },
        source,
    })?;
    let stream = Arc::new(stream);
    let listening = server::listen(&args.server)?;
    say(format_args!("{NAME}: {listening}: port {name:?}"));
    server::serve(NAME, listening, sandbox::console, move |memory, complaints| {
        Console::start(&name, &stream, memory, complaints).map_err(Error::set_up("the thread of the port"))
    })
}

/// The socket of the port's other end, which does not block.
fn connect(path: &str) -> io::Result<OwnedFd> {
    let stream = match path {
        STDIN => io::stdin().as_fd().try_clone_to_owned()?,
        path => UnixStream::connect(path)?.into(),
    };
    if FileType::from_raw_mode(fstat(&stream)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("it is not a socket"));
    }
    fcntl_setfl(&stream, fcntl_getfl(&stream)? | OFlags::NONBLOCK)?;
    Ok(stream)
}

/// The device, for one front-end.
struct Console {
    name: String,
    memory: Memory,
    port: Arc<Port>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    fn start(
        name: &str,
        stream: &Arc<OwnedFd>,
        memory: Memory,
        complaints: Arc<Complaints>,
    ) -> io::Result<Self> {
        let port = Arc::new(Port::new(name, Arc::clone(stream), complaints)?);
        let moves = Arc::clone(&port);
        let thread = thread::Builder::new().name("port".to_owned()).spawn(move || moves.run())?;
        Ok(Console { name: name.to_owned(), memory, port, thread: Some(thread) })
    }
}

impl Drop for Console {
    /// Returns when the thread has ended: the next session's reads the same socket.
    fn drop(&mut self) {
        self.port.end();
        if let Some(thread) = self.thread.take() {
            // One that panicked has ended, too.
            let _ = thread.join();
        }
    }
}

impl Device for Console {
    type Request = Request;

    fn features(&self) -> u64 {
        1 << VIRTIO_CONSOLE_F_MULTIPORT
    }

    fn acked_features(&self, features: u64) {
        let driver_is_there = features & (1 << VIRTIO_F_VERSION_1) != 0;
        let multiport = features & (1 << VIRTIO_CONSOLE_F_MULTIPORT) != 0;
        self.port.use_control_queues(multiport || !driver_is_there);
    }

    /// Two of the port, and two for control.
    fn queues(&self) -> u16 {
        CONTROL_TRANSMIT as u16 + 1
    }

    /// `struct virtio_console_config { le16 cols; le16 rows; le32 max_nr_ports; le32 emerg_wr; }`.
    fn config(&self) -> Vec<u8> {
        [[0; 4], 1_u32.to_le_bytes(), [0; 4]].concat()
    }

    fn reset(&self) {
        self.port.reset(&self.name);
    }

    fn take(&self, queue: &mut Queue) -> Taken<Request> {
        device::take(queue, &self.memory)
    }

    /// Not called: each request is one of [`Device::answer_or_wait`].
    fn answer(&self, _thread: usize, _request: Request) -> u32 {
        0
    }

    /// A queue has one thread, of the same number.
    fn answer_or_wait(&self, thread: usize, request: Request, later: Later) -> Option<u32> {
        self.port.take(thread, request, later)
    }

    fn stop_waiting(&self) {
        self.port.stop();
    }
}
