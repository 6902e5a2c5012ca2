//! The system calls that the standard library does not offer, each with its error turned into a sentence
//! where it needs words.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::WaitOptions;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use rustix::thread::CpuSet;

use crate::outcome::{Outcome, failed};

/// Mounts `source`, a file system of type `kind`, at `place`, making the directory if it is missing.
pub fn mount(kind: &str, source: &str, place: &Path, options: &str) -> Outcome<()> {
    std::fs::create_dir_all(place).map_err(failed("make", place))?;
    let options = std::ffi::CString::new(options).map_err(failed("mount at", place))?;
    rustix::mount::mount(source, place, kind, MountFlags::empty(), options.as_c_str())
        .map_err(|error| format!("cannot mount {kind} at {}: {error}", place.display()))
}

/// Loads one kernel module from an open `.ko` file; `compressed`: the kernel has to unpack it.
pub fn load_module(file: &File, compressed: bool) -> io::Result<()> {
    /// linux/module.h; the `libc` crate has none for this target.
    const MODULE_INIT_COMPRESSED_FILE: i32 = 4;
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    Ok(rustix::system::finit_module(file, c"", flags)?)
}

/// Waits for the next child (or adopted orphan) to end: its process id, and its status as a shell gives it:
/// 128+n for signal n. `None` when there is no child left.
pub fn wait_for_any_child() -> Option<(u32, u8)> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((child, status))) => {
                return Some((
                    child.as_raw_pid().unsigned_abs(),
                    shell_status(ExitStatus::from_raw(status.as_raw())),
                ));
            }
            Ok(None) | Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn shell_status(status: ExitStatus) -> u8 {
    let signal = status.signal().map(|signal| 128 + signal);
    (signal.or(status.code()).unwrap_or_default() & 0xff) as u8
}

/// Makes this process the leader of a session with `terminal`, for programs that it will start. (When a
/// leader ends, the kernel hangs the terminal up and throws away output that is still on its way.)
pub fn lead_session(terminal: &File) {
    // Both fail where it is done already.
    let _ = rustix::process::setsid();
    let _ = rustix::process::ioctl_tiocsctty(terminal);
    // Inherited until `take_foreground`, which changes the terminal from the background.
    // SAFETY: SIG_IGN is no code of ours.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
}

/// Between fork and exec: makes the new process the foreground of the terminal that is its standard input.
pub fn take_foreground() -> io::Result<()> {
    rustix::process::setpgid(None, None)?;
    rustix::termios::tcsetpgrp(io::stdin(), rustix::process::getpid())?;
    // SAFETY: SIG_DFL is no code of ours.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_DFL) };
    Ok(())
}

/// Between fork and exec: starts a session whose controlling terminal is standard input.
pub fn take_terminal() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(rustix::process::ioctl_tiocsctty(io::stdin())?)
}

/// Creates one KVM machine with nothing in it.
pub fn create_vm(kvm: &File) -> io::Result<OwnedFd> {
    /// `_IO(0xAE, 1)`, linux/kvm.h.
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    // SAFETY: an open descriptor that `kvm` owns; no memory is involved.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    if vm < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for this call: nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}

/// Brings the loopback network up. A kernel without a network is no error.
pub fn loopback_up() {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let Ok(socket) = socket else { return };
    // SAFETY: plain data, of which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: an open descriptor that `socket` owns; `request` is ours and outlives the call, which only
    // reads it.
    unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
}

/// Ends every process but this one (PID 1 only: elsewhere it would end the developer's session).
pub fn kill_all_others() {
    if std::process::id() == 1 {
        // SAFETY: no memory is involved; -1 names every process except PID 1, which is this one.
        unsafe { libc::kill(-1, libc::SIGKILL) };
    }
}

/// The size of a terminal: rows and columns; `None` when it is not a terminal.
pub fn window_size(terminal: impl AsFd) -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(terminal).ok()?;
    Some((size.ws_row, size.ws_col))
}

/// Sets a terminal's size; the kernel signals the programs on it.
pub fn set_window_size(terminal: impl AsFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // A program that is not told draws its screen at the old size: harmless.
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}

/// A new pseudo-terminal: our end, and the end for the command.
pub fn open_terminal_pair() -> io::Result<(File, File)> {
    // CLOEXEC: a command that inherited our end would never see a hang-up.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    Ok((ours.into(), theirs.into()))
}

/// From now on this thread runs on this processor.
pub fn run_on(cpu: usize) -> Outcome<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(format!("there is no processor {cpu}"));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|error| format!("cannot move to processor {cpu}: {error}"))?;
    match rustix::thread::sched_getcpu() {
        now if now == cpu => Ok(()),
        now => Err(format!("asked for processor {cpu}, running on {now}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_what_a_shell_gives() {
        assert_eq!(shell_status(ExitStatus::from_raw(0)), 0);
        assert_eq!(shell_status(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(shell_status(ExitStatus::from_raw(255 << 8)), 255);
        assert_eq!(shell_status(ExitStatus::from_raw(libc::SIGKILL)), 137);
        assert_eq!(shell_status(ExitStatus::from_raw(libc::SIGSEGV | 0x80)), 139);
    }
}
