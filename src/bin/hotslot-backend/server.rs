//! The socket of a back-end, and one front-end after another on it.
//!
//! vhost-user, "Communication": the back-end listens, a front-end connects, and the end of the connection is
//! the end of the session. Called by each device's `run`.
//!
//! Threads: main waits for a signal or for the end of `--once`; `front-ends` accepts connections and serves
//! the requests on the socket; `queues` adds, for each session, one for each queue, and more for `blk`;
//! `console` one that moves bytes.

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

use hotslot::report::say;

use crate::complaints::Complaints;
use crate::device::Device;
use crate::error::Error;
use crate::lock::lock;
use crate::queues::Queues;
use crate::ring::Memory;
use crate::sandbox;
use crate::session::Session;

/// `sun_path` of `sockaddr_un` has 108 bytes, one of which is the terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// Where a back-end listens, and for how long.
#[derive(clap::Args)]
#[group(skip)]
pub struct Options {
    /// Unix socket to listen on; one that a dead back-end left behind is replaced; removed at the end
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// End when the first front-end has disconnected, instead of waiting for the next one
    #[arg(long)]
    once: bool,
}

/// A listening socket, whose file is removed when this is dropped. From now on SIGINT, SIGTERM and SIGHUP end
/// [`serve_with`] only.
pub struct Listening {
    listener: UnixListener,
    once: bool,
    file: SocketFile,
}

/// Listens on the socket of the command line.
///
/// # Errors
///
/// See [`Error`]; nothing is left behind. Of existing files, only a socket on which no process listens is
/// removed.
pub fn listen(options: &Options) -> Result<Listening, Error> {
    let path = &options.socket;
    let bind_error = |source| Error::Bind { path: path.clone(), source };

    let len = path.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(Error::PathTooLong { path: path.clone(), len, max: SOCKET_PATH_MAX });
    }
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(bind_error(e)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(Error::NotASocket(path.clone()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(Error::InUse(path.clone())),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(bind_error)?
            }
            Err(e) => return Err(bind_error(e)),
        },
    }
    // Before there is a socket: a process that sees it may send a signal at once.
    end_event();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        handle(signal)?;
    }
    let listener = UnixListener::bind(path).map_err(bind_error)?;
    let file = SocketFile::new(path).map_err(bind_error)?;
    Ok(Listening { listener, once: options.once, file })
}

/// The socket's name in the file system, and the device and inode number that it had at first.
struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(SocketFile { path: path.to_owned(), id: Self::id(path)? })
    }

    fn id(path: &Path) -> io::Result<(u64, u64)> {
        fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
    }
}

impl Display for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "listening on {:?}", self.file.path)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A successor may have replaced it by its own under the same name.
        if Self::id(&self.path).ok() == Some(self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Written by the signal handler and by the end of the `front-ends` thread.
static END: OnceLock<EventFd> = OnceLock::new();

/// SIGXFSZ comes with a write or an extension beyond the limit of file sizes (RLIMIT_FSIZE), and would end
/// this process, without a word and where a guest chooses. As it is handled, the call fails with EFBIG.
///
/// # Errors
///
/// sigaction(2)'s.
pub fn outlive_file_size_limit() -> Result<(), Error> {
    handle(libc::SIGXFSZ)
}

/// Installs the handler, and unblocks the signal: the parent may have started this process with it blocked.
fn handle(signal: libc::c_int) -> Result<(), Error> {
    register_signal_handler(signal, on_signal).map_err(|e| Error::set_up("the signal handlers")(e.into()))?;
    unblock_signal(signal).expect("invariant: it is the number of a signal");
    Ok(())
}

extern "C" fn on_signal(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // An atomic load and a write(2): both are async-signal-safe.
    if signal != libc::SIGXFSZ
        && let Some(end) = END.get()
    {
        let _ = end.write(1);
    }
}

fn end_event() -> &'static EventFd {
    END.get_or_init(|| EventFd::new(libc::EFD_CLOEXEC).expect("invariant: the first eventfd of a process"))
}

/// Serves one front-end after another, each with a device from `make`: [`serve_with`] for a [`Device`].
///
/// `make` is called on the thread that serves, before it waits for the next front-end; `confine` once, before
/// that.
///
/// # Errors
///
/// Those of [`serve_with`] and of `make`.
pub fn serve<D, F>(name: &'static str, listening: Listening, confine: fn(), mut make: F) -> Result<(), Error>
where
    D: Device,
    F: FnMut(Memory, Arc<Complaints>) -> Result<D, Error> + Send + 'static,
{
    serve_with(name, listening, confine, move |listener| session(name, listener, &mut make))
}

/// Until such a signal, calls `session` again and again, which accepts and serves one front-end, on a
/// thread of its own. With `--once`, until the first front-end that sent a request has disconnected.
///
/// # Errors
///
/// A failed accept, threads or descriptors that cannot be made; with `--once` also a session that ended
/// otherwise than by a hang-up.
pub fn serve_with<F>(
    name: &'static str,
    listening: Listening,
    confine: fn(),
    mut session: F,
) -> Result<(), Error>
where
    F: FnMut(&UnixListener) -> Result<Ended, Error> + Send + 'static,
{
    let end = end_event();

    let Listening { listener, once, file: _file } = listening;
    let served = Arc::new(Mutex::new(None));
    let result_of_thread = Arc::clone(&served);
    thread::Builder::new()
        .name("front-ends".to_owned())
        .spawn(move || {
            confine();
            let result = loop {
                match session(&listener) {
                    Ok(Ended::NothingAsked) => {}
                    Ok(Ended::HungUp) if once => break Ok(()),
                    Ok(Ended::HungUp) => {}
                    Ok(Ended::Broken(why)) if once => break Err(Error::Session(why)),
                    Ok(Ended::Broken(why)) => {
                        say(format_args!("{name}: {why}; waiting for the next front-end"))
                    }
                    Err(e) => break Err(e),
                }
            };
            *lock(&result_of_thread) = Some(result);
            let _ = end.write(1);
        })
        .map_err(Error::set_up("the thread that serves front-ends"))?;

    sandbox::main_thread();
    while let Err(e) = end.read() {
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(Error::set_up("the wait for signals")(e));
        }
    }
    // A session in progress ends with the process: its front-end sees a hang-up.
    lock(&served).take().unwrap_or(Ok(()))
}

/// How a session ended.
pub enum Ended {
    /// The front-end hung up without a request.
    NothingAsked,
    HungUp,
    /// The front-end sent a request that cannot be served.
    Broken(String),
}

/// Accepts one front-end and serves it until it disconnects.
fn session<D: Device>(
    name: &'static str,
    listener: &UnixListener,
    make: &mut impl FnMut(Memory, Arc<Complaints>) -> Result<D, Error>,
) -> Result<Ended, Error> {
    let memory = Memory::new(GuestMemoryMmap::new());
    let complaints = Arc::new(Complaints::of(name));
    let device = make(memory.clone(), Arc::clone(&complaints))?;
    let queues =
        Queues::start(device, memory, complaints).map_err(Error::set_up("the threads of the queues"))?;
    let served = accept(listener).map(|socket| {
        let session = Arc::new(Mutex::new(Session::of(Arc::clone(&queues))));
        let mut requests = BackendReqHandler::from_stream(socket, Arc::clone(&session));
        let ended = loop {
            if let Err(e) = requests.handle_request() {
                break e;
            }
        };
        (ended, lock(&session).was_asked)
    });
    queues.end();
    Ok(match served.map_err(Error::set_up("a connection"))? {
        (ProtocolError::Disconnected | ProtocolError::SocketBroken(_), true) => Ended::HungUp,
        (ProtocolError::Disconnected | ProtocolError::SocketBroken(_), false) => Ended::NothingAsked,
        (e, _) => Ended::Broken(format!("a request of the front-end cannot be served: {e}")),
    })
}

fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    loop {
        match listener.accept() {
            Ok((socket, _)) => return Ok(socket),
            // A front-end that gave up meanwhile.
            Err(e) if [io::ErrorKind::ConnectionAborted, io::ErrorKind::Interrupted].contains(&e.kind()) => {}
            Err(e) => return Err(e),
        }
    }
}
