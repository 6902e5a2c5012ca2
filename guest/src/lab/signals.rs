//! The signals that end a run of the lab, or tell its first thread to look at its queue.

use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

/// Blocked in every thread, so that only [`Signals::wait`] receives them.
pub struct Signals(libc::sigset_t);

impl Signals {
    const ALL: [libc::c_int; 6] =
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGWINCH];

    /// Called before any other thread is started.
    pub fn block() -> Signals {
        let set = set_of(&Self::ALL);
        change_mask(libc::SIG_BLOCK, &set);
        Signals(set)
    }

    /// The next signal; `None` when the time is over first.
    pub fn wait(&self, limit: Option<Duration>) -> Option<libc::c_int> {
        let end = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let time = left.map(|left| libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: left.subsec_nanos().into(),
            });
            let time = time.as_ref().map_or(ptr::null(), ptr::from_ref);
            // SAFETY: the set and the time are ours and outlive the call; the null pointer asks for no
            // details.
            let signal = unsafe { libc::sigtimedwait(&raw const self.0, ptr::null_mut(), time) };
            if signal > 0 {
                return Some(signal);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
        }
    }
}

/// Has a new process begin without the blocked signals, which it would inherit.
pub fn unblock_in(command: &mut Command) {
    let unblock = || {
        change_mask(libc::SIG_UNBLOCK, &set_of(&Signals::ALL));
        Ok(())
    };
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(unblock) };
}

/// Ends the first thread's wait, from any thread.
pub fn wake_first_thread() {
    // To ourselves it cannot fail.
    let _ = kill_process(getpid(), Signal::USR1);
}

/// Ends this process by the signal that asked for it, so that the caller sees the truth: a shell stops its
/// script at a program that died of Ctrl-C, and not at one that returned 130.
pub fn die_of(signal: libc::c_int) -> u8 {
    // SAFETY: the default action needs no handler of ours.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: no memory is involved; the signal is pending until it is unblocked below.
    unsafe { libc::raise(signal) };
    change_mask(libc::SIG_UNBLOCK, &set_of(&[signal]));
    (128 + signal) as u8
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is ours and outlives the call, which writes all of it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: `sigemptyset` has initialised it.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is ours, initialised, and outlives the call.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

fn change_mask(how: libc::c_int, set: &libc::sigset_t) {
    // SAFETY: the set outlives the call, which only reads it; the null pointer asks for no old mask.
    unsafe { libc::pthread_sigmask(how, ptr::from_ref(set), ptr::null_mut()) };
}
