//! A terminal for a program of the test.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A terminal: our end, and that of the program's user.
pub fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: both numbers live on our stack through the call; name, settings and size are not given.
    let result = unsafe { libc::openpty(&mut ours, &mut theirs, null, null.cast(), null.cast()) };
    assert_eq!(result, 0);
    // SAFETY: the descriptor is new, and nobody else owns it.
    let ours = unsafe { File::from_raw_fd(ours) };
    // SAFETY: as above.
    let theirs = unsafe { OwnedFd::from_raw_fd(theirs) };
    (ours, theirs)
}

/// The terminal's input, output, control and local flags.
pub fn settings(terminal: &impl AsRawFd) -> [u32; 4] {
    // SAFETY: a termios is plain data, for which all-zero is a value.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the struct lives on our stack through the call.
    assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &mut settings) }, 0);
    [settings.c_iflag, settings.c_oflag, settings.c_cflag, settings.c_lflag]
}
