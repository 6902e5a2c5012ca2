//! What happens at a system call that a filter refuses: a last line, and the end of the process.
//!
//! The kernel sends SIGSYS to the thread. Its handler, and all that it calls, is async-signal-safe: it takes
//! no lock and allocates nothing.

use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::io::{self, Write};
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::stderr;
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

/// As `report::STATUS_ERROR`, which is not used here: messages need threads, and these need a sandbox.
const STATUS: c_int = 1;

/// How long the last line waits for a reader of stderr.
const READER: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// From linux/prctl.h: 16 bytes with a zero at the end.
const NAME_LEN: usize = 16;

/// Of sigaction(2), `siginfo_t` for SIGSYS.
#[repr(C)]
struct Sigsys {
    signo: c_int,
    errno: c_int,
    code: c_int,
    address: *mut c_void,
    call: c_int,
}

static BEFORE_END: OnceLock<fn()> = OnceLock::new();

/// Sets what is to be done before a refusal ends the process. It must be async-signal-safe, and use calls of
/// `every_thread` only. The first caller wins.
pub fn before_end(action: fn()) {
    let _ = BEFORE_END.set(action);
}

/// From now on SIGSYS ends the process with a last line, on each thread that does not block it.
pub(super) fn catch() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, refused).map_err(io::Error::from)
}

extern "C" fn refused(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t for SIGSYS, which lives until the handler returns.
    let number = unsafe { (*info.cast::<Sigsys>()).call };
    // SAFETY: with SA_SIGINFO the third argument is a ucontext_t, which lives as long.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let argument = |register: c_int| registers.get(register as usize).copied().unwrap_or_default();
    let mut name = [0u8; NAME_LEN];
    // SAFETY: the kernel writes no more than the 16 bytes that `name` has.
    let _unnamed = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let thread = CStr::from_bytes_until_nul(&name).ok().and_then(|name| name.to_str().ok()).unwrap_or("?");
    let call =
        usize::try_from(number).ok().and_then(Sysno::new).map_or("a call without a name", |call| call.name());
    let (first, second, third) = (argument(libc::REG_RDI), argument(libc::REG_RSI), argument(libc::REG_RDX));
    end(format_args!(
        "error: the sandbox refused system call {call}({first:#x}, {second:#x}, {third:#x}) on thread {thread}\n"
    ));
}

/// Writes a last line to stderr, unless nobody reads that, and ends the process.
pub(super) fn end(line: fmt::Arguments<'_>) -> ! {
    if let Some(action) = BEFORE_END.get() {
        action();
    }
    let mut text = [0; 256];
    let mut rest = &mut text[..];
    // What does not fit is cut off.
    let _ = rest.write_fmt(line);
    let left = rest.len();
    let len = text.len() - left;
    if poll(&mut [PollFd::from_borrowed_fd(stderr(), PollFlags::OUT)], Some(&READER)) == Ok(1) {
        let _closed = rustix::io::write(stderr(), &text[..len]);
    }
    // SAFETY: no memory is involved, and nothing runs afterwards.
    unsafe { libc::_exit(STATUS) }
}
