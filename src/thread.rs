//! Threads that leave the process's signals to the main loop.

use std::io;
use std::thread::JoinHandle;

/// Starts a thread on which every signal is blocked, so that SIGTERM and the like always reach the main
/// loop's signalfd (or, before there is one, end the process as usual). A thread that wants a signal unblocks
/// it.
pub fn spawn<T: Send + 'static>(
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // A thread inherits the mask of the one that starts it: setting it inside the new thread would be too
    // late.
    let old = block_all()?;
    let thread = std::thread::Builder::new().name(name).spawn(body);
    set_mask(&old)?;
    thread
}

fn block_all() -> io::Result<libc::sigset_t> {
    // SAFETY: a sigset_t is plain bits, for which all-zero is a value.
    let (mut all, mut old): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: both sets are ours and live through the calls.
    let result = unsafe {
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old)
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    Ok(old)
}

fn set_mask(mask: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set lives through the call; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
