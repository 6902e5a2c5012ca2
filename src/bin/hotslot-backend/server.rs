//! The socket of a back-end, and one front-end after another on it.
//!
//! vhost-user, "Communication": the back-end listens, a front-end connects, and the end of the connection is
//! the end of the session. Called by each device's `run`.
//!
//! Threads: main waits for a signal or for the end of `--once`; `front-ends` accepts connections and waits
//! for the end of each session; the `vhost-user-backend` crate adds, for each session, one that reads the
//! socket and one for each queue; `device` adds more for the queues of `blk`.

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

use hotslot::report::say;

use crate::complaints::Complaints;
use crate::device::{Adapter, Device, Memory};
use crate::error::Error;
use crate::lock::lock;
use crate::sandbox;

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

fn handle(signal: libc::c_int) -> Result<(), Error> {
    register_signal_handler(signal, on_signal).map_err(|e| Error::set_up("the signal handlers")(e.into()))
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
    let listener = listening.listener.try_clone().map_err(Error::set_up("the listening socket"))?;
    let mut listener = Listener::from(listener);
    serve_with(name, listening, confine, move |_| session(name, &mut listener, &mut make))
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
///
/// With a daemon of its own: the crate's would refuse the second SET_OWNER.
fn session<D: Device>(
    name: &'static str,
    listener: &mut Listener,
    make: &mut impl FnMut(Memory, Arc<Complaints>) -> Result<D, Error>,
) -> Result<Ended, Error> {
    let memory = Memory::new(GuestMemoryMmap::new());
    let complaints = Arc::new(Complaints::of(name));
    let device = make(memory.clone(), Arc::clone(&complaints))?;
    let device = Arc::new(Adapter::new(device, memory.clone(), complaints));
    let end_worker =
        EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(Error::set_up("an eventfd"))?;
    let mut daemon = VhostUserDaemon::new(name.to_owned(), Arc::clone(&device), memory)
        .map_err(|e| Error::Session(format!("cannot set up a session: {e}")))?;

    // The crate's own way to end its threads (`exit_event`) leaks a descriptor each time.
    for worker in daemon.get_epoll_handlers() {
        if let Err(source) =
            worker.register_listener(end_worker.as_raw_fd(), EventSet::IN, device.end_event())
        {
            // Its drop would wait for a thread that cannot be ended.
            std::mem::forget(daemon);
            return Err(Error::set_up("the end of a session")(source));
        }
    }

    let result = device.start().map(|()| daemon.start(listener).and_then(|()| daemon.wait()));
    // The daemon's drop, at the end of this function, waits for its threads.
    let _ = end_worker.write(1);
    device.end();
    match result.map_err(Error::set_up("the threads of the queues"))? {
        Ok(()) | Err(DaemonError::HandleRequest(ProtocolError::Disconnected)) => {
            Ok(if device.was_asked() { Ended::HungUp } else { Ended::NothingAsked })
        }
        Err(DaemonError::HandleRequest(e)) => {
            Ok(Ended::Broken(format!("a request of the front-end cannot be served: {e}")))
        }
        Err(e) => Err(Error::Session(e.to_string())),
    }
}
