//! How a guest ends: a status written to the debug-exit port, the power switched off, or what `poweroff`,
//! `halt` or `reboot` ask PID 1 for.

use std::arch::asm;
use std::io;
use std::time::Duration;

use rustix::fs::sync;
use rustix::system::{RebootCommand, reboot};

/// Ends the machine: `status` to the I/O port `debug_exit` where there is one, otherwise (or where nothing
/// listens at that port) by switching it off.
pub fn end_machine(status: u8, debug_exit: Option<u16>) -> ! {
    sync();
    if let Some(port) = debug_exit {
        match write_port(port, status) {
            Ok(()) => {
                eprintln!("init: nothing listens at I/O port {port:#x} (--debug-exit adds it)")
            }
            Err(error) => eprintln!("init: cannot write to I/O port {port:#x}: {error}"),
        }
    }
    // On success it does not return.
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("init: cannot switch the power off: {error}");
    }
    // PID 1 must not end: the kernel would panic, and hide the sentence above.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// From here on does what busybox' `poweroff`, `halt` and `reboot` ask PID 1 for, by signals as they send
/// them.
pub fn obey_signals() {
    for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM] {
        // SAFETY: the handler makes system calls only.
        unsafe { libc::signal(signal, asked as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
}

extern "C" fn asked(signal: libc::c_int) {
    let how = if signal == libc::SIGTERM { RebootCommand::Restart } else { RebootCommand::PowerOff };
    sync();
    // On failure the machine goes on: a signal handler cannot report an error.
    let _ = reboot(how);
}

/// Writes one byte to an I/O port.
fn write_port(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: no memory is involved; it allows this process this one port.
    if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the port was allowed above; `out` touches neither memory, stack nor flags.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    Ok(())
}
