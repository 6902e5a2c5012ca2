//! The system calls that the standard library does not offer, each with its error turned into a sentence.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::Outcome;

/// A string as the kernel takes it. Only a text with a NUL in it fails, and ours have none.
pub fn c_string(text: &str) -> Outcome<CString> {
    CString::new(text).map_err(|_| format!("{text:?} holds a NUL character"))
}

/// Mounts a kernel file system of type `kind` at `place`, making the directory if it is missing.
pub fn mount(kind: &str, place: &str, options: &str) -> Outcome<()> {
    std::fs::create_dir_all(place).map_err(|error| format!("cannot make {place}: {error}"))?;
    let (c_kind, c_place, c_options) = (c_string(kind)?, c_string(place)?, c_string(options)?);
    // SAFETY: four NUL-terminated strings, ours until the call returns; the kernel keeps none of them.
    let result = unsafe {
        libc::mount(c_kind.as_ptr(), c_place.as_ptr(), c_kind.as_ptr(), 0, c_options.as_ptr().cast())
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(format!("cannot mount {kind} at {place}: {error}"))
}

/// Loads one kernel module from an open `.ko` file; `compressed` says that the kernel has to unpack it.
pub fn load_module(file: &File, compressed: bool) -> io::Result<()> {
    /// linux/module.h; the `libc` crate has none for this target.
    const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    // SAFETY: an open descriptor that `file` owns, and a NUL-terminated string that lives for ever.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits for the next child (or adopted orphan) to end: its process id and its status as a shell would say
/// it, 128+n for signal n. `None` when there is no child left.
pub fn wait_for_any_child() -> Option<(u32, u8)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is ours and outlives the call.
        let child = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if child > 0 {
            return Some((child.unsigned_abs(), shell_status(status)));
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None;
        }
    }
}

/// A `wait` status as a shell would say it.
fn shell_status(status: libc::c_int) -> u8 {
    let number =
        if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    (number & 0xff) as u8
}

/// Between fork and exec: starts a session whose controlling terminal is standard input.
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: no memory is involved; descriptor 0 is the terminal that the parent put there.
    let result = unsafe {
        libc::setsid();
        libc::ioctl(0, libc::TIOCSCTTY, 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Creates one KVM machine with nothing in it.
pub fn create_vm(kvm: &File) -> io::Result<OwnedFd> {
    /// `_IO(0xAE, 1)`, linux/kvm.h.
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    // SAFETY: an open descriptor that `kvm` owns, and no memory.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    if vm < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}

/// Brings the loopback network up. A kernel without a network is no error.
pub fn loopback_up() {
    // SAFETY: `request` is plain data, ours, zero-initialised as its type allows, and outlives both calls;
    // the descriptor is closed once.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return;
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request);
        libc::close(socket);
    }
}

/// Ends every process but this one (PID 1 only: elsewhere it would end the developer's session).
pub fn kill_all_others() {
    if std::process::id() == 1 {
        // SAFETY: no memory is involved; -1 names every process except PID 1, which is us.
        unsafe { libc::kill(-1, libc::SIGKILL) };
    }
}

/// Writes everything back to the disks.
pub fn sync() {
    // SAFETY: no arguments, no result.
    unsafe { libc::sync() };
}

/// The size of a terminal: rows and columns; `None` when it is no terminal.
pub fn window_size(terminal: &impl AsRawFd) -> Option<(u16, u16)> {
    // SAFETY: `size` is plain data, ours, and outlives the call, which fills it.
    unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        let result = libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size);
        (result == 0).then_some((size.ws_row, size.ws_col))
    }
}

/// Tells a terminal its size; the kernel tells the programs on it.
pub fn set_window_size(terminal: &impl AsRawFd, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is ours and outlives the call, which only reads it. Failure is harmless: the size is a
    // courtesy.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}

/// A new pseudo-terminal: the end that we hold, and the end for the command.
pub fn open_terminal_pair() -> io::Result<(File, File)> {
    let (mut ours, mut theirs) = (-1, -1);
    // SAFETY: two integers of ours that the call fills; the null pointers ask for no name and for default
    // settings. On success both descriptors are new and nobody else's.
    unsafe {
        let none = std::ptr::null_mut();
        if libc::openpty(&raw mut ours, &raw mut theirs, none, std::ptr::null(), std::ptr::null()) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The command must not inherit our end, or it would never see a hang-up.
        libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(theirs, libc::F_SETFD, libc::FD_CLOEXEC);
        Ok((File::from_raw_fd(ours), File::from_raw_fd(theirs)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_said_as_a_shell_says_it() {
        assert_eq!(shell_status(0), 0);
        assert_eq!(shell_status(7 << 8), 7);
        assert_eq!(shell_status(255 << 8), 255);
        assert_eq!(shell_status(libc::SIGKILL), 137);
        assert_eq!(shell_status(libc::SIGSEGV | 0x80), 139);
    }
}
