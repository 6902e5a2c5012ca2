//! Threads that leave the process's signals to the thread that takes them, and waiting for a thread's end
//! with a time limit.

use std::io;
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::create_sigset;

use crate::sandbox::vmm::Kind;

/// Starts a thread, confined as its kind is (see [`crate::sandbox`]). On it every signal is blocked, so that
/// SIGTERM and the like always reach the signalfd of `vmm::signals` (or, before there is one, end the process
/// as usual). A thread that needs a signal unblocks it.
pub fn spawn<T: Send + 'static>(
    name: String,
    kind: Kind,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let mut all = create_sigset(&[])?;
    // SAFETY: the set is a local variable; the call fills it and keeps no pointer to it.
    unsafe { libc::sigfillset(&mut all) };
    // A call that the sandbox refuses raises it; blocked, it would end the process without a word.
    // SAFETY: as above.
    unsafe { libc::sigdelset(&mut all, libc::SIGSYS) };
    // A new thread inherits this thread's mask. If it set its own, a signal could arrive before that.
    let old = set_mask(&all)?;
    let confine = kind.for_new_thread();
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        confine();
        body()
    });
    set_mask(&old)?;
    thread
}

/// Waits for the end of a thread. False if it does not end in time: it may be stuck in a system call on what
/// another process sent, and is left behind. A panic in it was printed already.
pub fn join_within<T>(limit: Duration, thread: &JoinHandle<T>) -> bool {
    let start = Instant::now();
    while !thread.is_finished() {
        if start.elapsed() >= limit {
            return false;
        }
        sleep(Duration::from_millis(1));
    }
    true
}

/// Sets this thread's signal mask; the result is the one before.
fn set_mask(mask: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut old = create_sigset(&[])?;
    // SAFETY: both sets live through the call, which reads one, fills the other and keeps no pointer.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, &mut old) } {
        0 => Ok(old),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
