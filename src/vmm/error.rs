//! Errors of the set-up and the main loop themselves, and the system calls that several files here make.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use event_manager::{EventOps, EventSet, Events};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout;
use crate::report::{Failure, STATUS_ERROR, STATUS_USAGE};

/// Why a machine could not be built, or could not go on.
#[derive(Debug, Error)]
pub(super) enum VmmError {
    #[error("{0} vCPUs are more than the {most} that a machine can have", most = layout::MAX_VCPUS)]
    TooManyVcpus(u32),
    #[error(
        "{0} devices are more than the {most} that a machine can have: each has an interrupt of its own, {first} to {last}",
        most = layout::MAX_DEVICES, first = layout::FIRST_DEVICE_GSI, last = layout::IOAPIC_INPUTS - 1
    )]
    TooManyDevices(usize),
    #[error("devices {first} and {second} have the same socket, {socket}: each needs a back-end of its own", socket = .socket.display())]
    SameSocket { first: String, second: String, socket: PathBuf },
    /// `end` is the first address after RAM.
    #[error("guest memory up to {end:#x} is beyond this processor's {bits} bits of physical address")]
    AddressWidth { end: u64, bits: u32 },
    #[error("cannot create the memory picture {0}")]
    PictureFile(PathBuf, #[source] io::Error),
    #[error("cannot create the file {0} for statistics")]
    StatsFile(PathBuf, #[source] io::Error),
    #[error("cannot open {0} for the serial port")]
    SerialFile(PathBuf, #[source] io::Error),
    #[error("cannot listen for gdb on {0}")]
    Gdb(String, #[source] io::Error),
    #[error("cannot use {0} for a dump")]
    Dump(PathBuf, #[source] io::Error),
    #[error("cannot {0}")]
    Os(&'static str, #[source] io::Error),
}

impl Failure for VmmError {
    fn status(&self) -> u8 {
        if matches!(self, VmmError::Os(..)) { STATUS_ERROR } else { STATUS_USAGE }
    }
}

/// For `map_err`: a system call that was to do `what`.
pub(super) fn failed_to(what: &'static str) -> impl Fn(io::Error) -> VmmError {
    move |error| VmmError::Os(what, error)
}

/// Makes the main loop wait for something to read. It fails only where the host is out of memory.
pub(super) fn watch(ops: &mut EventOps, source: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        log::error!("the main loop cannot wait for one of its events: {error}");
    }
}

pub(super) fn eventfd() -> Result<EventFd, VmmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed_to("make an eventfd"))
}
