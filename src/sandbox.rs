//! The sandbox: which system calls a thread may make, and that no thread opens a file.
//!
//! `main` calls [`prepare`] before there is a second thread. From then on each thread confines itself, once,
//! before it does anything that a guest or a back-end asks for: [`crate::thread::spawn`] does it for a thread
//! that it starts, and the main thread calls [`vmm::Kind::confine`] when the set-up is done. A thread that a
//! confined thread starts inherits its confinement; the kernel has no call that lifts it.
//!
//! Three layers:
//!
//! - a seccomp filter: the calls of a table for its kind of thread (`vmm`), and of `every_thread`;
//! - Landlock: no right to any file or directory;
//! - no new privileges, so that no program can give any, and not dumpable, so that another process of the
//!   same user cannot trace this one or read its memory.
//!
//! A refused call ends the process ([`refusal`]). To allow one, add a line with its reason to a table.
//!
//! Library code that runs without `prepare` (tests, fuzz targets) is not confined.

pub mod every_thread;
pub mod refusal;
pub mod rule;
pub mod vmm;

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;

use clap::ValueEnum;
use landlock::{ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetError, RulesetStatus};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;
use seccompiler::SeccompAction;
use syscalls::Sysno;
use thiserror::Error;

use rule::Rule;

/// Whether threads are confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// A system call that a thread should not need ends the process
    #[default]
    On,
    /// Such a call is carried out, and the kernel logs it (audit, or else dmesg)
    Log,
    /// No sandbox
    Off,
}

/// Why there can be no sandbox.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum SandboxError {
    #[error("the kernel has no seccomp filters that can {0}")]
    NoSeccomp(&'static str, #[source] io::Error),
    #[error("cannot {0}")]
    Process(&'static str, #[source] io::Error),
}

/// What a user can do about it.
pub const HINT: &str = "--sandbox off does without a sandbox";

/// As on the command line; empty in a process without a sandbox.
static MODE: OnceLock<Mode> = OnceLock::new();

thread_local! {
    static IS_CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// Makes the process ready for threads that confine themselves. Called once, before it has other threads.
///
/// # Errors
///
/// The kernel lacks something, and the user asked for a sandbox.
pub fn prepare(mode: Mode) -> Result<(), SandboxError> {
    let (action, what) = match mode {
        Mode::On => (libc::SECCOMP_RET_TRAP, "refuse a call"),
        Mode::Log => (libc::SECCOMP_RET_LOG, "log a call"),
        Mode::Off => return Ok(()),
    };
    let available = {
        let action: *const u32 = &action;
        // SAFETY: the kernel reads the four bytes of `action`, which live through the call.
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, action) }
    };
    if available != 0 {
        return Err(SandboxError::NoSeccomp(what, io::Error::last_os_error()));
    }
    let failed = |what| move |error: rustix::io::Errno| SandboxError::Process(what, error.into());
    set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    if mode == Mode::On {
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("become not dumpable"))?;
        refusal::catch().map_err(|error| SandboxError::Process("handle SIGSYS", error))?;
    }
    use_one_heap();
    // The first call counts.
    let _ = MODE.set(mode);
    Ok(())
}

/// Keeps glibc's malloc from opening files. For heaps besides the first one it would, at some time: for how
/// many processors there are (a ninth heap), for vm.overcommit_memory (a heap that shrinks).
fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number of malloc's own; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Takes all files from this thread, and confines it to the calls of these tables; also the threads that it
/// will start. Ends the process if the kernel refuses. Does nothing for a thread that is confined already, or
/// in a process without a sandbox.
pub fn confine(tables: &[&[Rule]]) {
    apply(tables, restrict_files);
}

/// The same for a thread that must reach some files, or takes them from itself in a way of its own: confines
/// it to the calls of these tables only.
pub fn confine_calls(tables: &[&[Rule]]) {
    apply(tables, || Ok(()));
}

fn apply(tables: &[&[Rule]], restrict_files: fn() -> Result<(), RulesetError>) {
    let Some(&mode) = MODE.get() else { return };
    if is_confined() {
        return;
    }
    let files = if mode == Mode::On { restrict_files() } else { Ok(()) };
    if let Err(why) = files.map_err(Into::into).and_then(|()| restrict_calls(mode, tables)) {
        refusal::end(format_args!("error: cannot confine a thread: {why}\n"));
    }
    set_confined();
}

/// Whether this thread is confined.
pub fn is_confined() -> bool {
    IS_CONFINED.get()
}

/// Says that this thread has inherited its confinement.
pub fn set_confined() {
    IS_CONFINED.set(true);
}

fn restrict_calls(mode: Mode, tables: &[&[Rule]]) -> Result<(), Box<dyn std::error::Error>> {
    let refuse = if mode == Mode::On { SeccompAction::Trap } else { SeccompAction::Log };
    let rules = || tables.iter().copied().flatten();
    if rules().any(|rule| rule.call == Sysno::clone3) {
        seccompiler::apply_filter(&rule::without_clone3()?)?;
    }
    seccompiler::apply_filter(&rule::only(rules(), refuse, std::process::id())?)?;
    Ok(())
}

/// No right to any file, as far as this kernel's Landlock goes (Linux 5.13 and later). Files that are open
/// already stay as they are.
fn restrict_files() -> Result<(), RulesetError> {
    let status = Ruleset::default().handle_access(AccessFs::from_all(ABI::V5))?.create()?.restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        log::debug!("this kernel has no Landlock: only seccomp keeps this thread from files");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
