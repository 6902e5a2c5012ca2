//! The calls that every thread may make: memory, locks, time, messages, a panic, its own end.
//!
//! Made by glibc and by Rust's standard library.

use libc::{PR_GET_NAME, PR_SET_NAME};
use syscalls::Sysno;

use super::rule::{Argument, Rule, call, call_if, fcntl, ioctl, on_self, prctl, without_exec};

/// CLONE_NEW..., each of which would make a namespace. CLONE_NEWTIME is not for clone(2).
const NAMESPACES: i32 = libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS;
/// Each thread of this process has these flags.
const A_THREAD: i32 = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;

/// For each thread.
pub const EVERY_THREAD: &[Rule] = &[
    // Memory, none of which can be executed.
    call(Sysno::brk, "malloc: the heap"),
    without_exec(Sysno::mmap, "malloc: large blocks, and the heaps of threads"),
    without_exec(Sysno::mprotect, "malloc: grows the heap of a thread"),
    call(Sysno::mremap, "realloc of a large block"),
    call(Sysno::munmap, "free of a large block; a thread's end: its stack"),
    call(Sysno::madvise, "free: gives memory back; a thread's end: its stack"),
    // Locks, threads, time.
    call(Sysno::futex, "locks, condition variables, waiting for a thread"),
    call(Sysno::sched_yield, "a lock that spins"),
    call(Sysno::clock_gettime, "Instant::now, where the vDSO cannot tell"),
    call(Sysno::clock_nanosleep, "sleep"),
    call(Sysno::restart_syscall, "goes on with a wait after SIGSTOP and SIGCONT"),
    call(Sysno::getrandom, "the seeds of hash maps"),
    // Descriptors that are open.
    call(Sysno::read, "eventfds, files"),
    call(Sysno::write, "eventfds, stderr"),
    call(Sysno::writev, "the C library's messages about damaged memory"),
    call(Sysno::close, "a descriptor that was let go"),
    fcntl(libc::F_GETFD, "close, in a debug build: Rust looks whether the descriptor is open"),
    call(Sysno::poll, "waits with a time limit"),
    call(Sysno::ppoll, "the same, by rustix"),
    // Signals, and the end.
    call(Sysno::rt_sigreturn, "the end of a signal handler"),
    call(Sysno::rt_sigprocmask, "abort; a thread's start and end"),
    call(Sysno::rt_sigaction, "abort: SIGABRT is to end the process"),
    call(Sysno::sigaltstack, "a thread's end: the stack for its signals"),
    call(Sysno::getpid, "abort, and calls on this process"),
    call(Sysno::gettid, "abort, and the name of a thread in messages"),
    on_self(Sysno::tgkill, "abort; an interruption of a vCPU's thread"),
    prctl(PR_GET_NAME, "the last line at a refused call"),
    ioctl(libc::TCSETS as u32, "makes the terminal as it was before: at the end, a panic, a refused call"),
    ioctl(libc::TCSETS2 as u32, "the same: rustix tries this one first"),
    call(Sysno::exit, "a thread's end"),
    call(Sysno::exit_group, "the end of the process"),
];

/// For a thread that starts others, which inherit its filter.
pub const STARTS_THREADS: &[Rule] = &[
    call(Sysno::clone3, "a thread, first try: this call does not exist here, so the C library uses clone"),
    call_if(
        Sysno::clone,
        Argument::Bits(0, (NAMESPACES | A_THREAD) as u32, A_THREAD as u32),
        "a thread of this process, in the namespaces that this has",
    ),
    call(Sysno::rseq, "a thread's start: registered by glibc"),
    call(Sysno::set_robust_list, "a thread's start"),
    call(Sysno::sched_getaffinity, "a thread's start: pthread_getattr_np, for the guard of its stack"),
    prctl(PR_SET_NAME, "a thread's start: its name"),
];
