//! A queue's kick: an eventfd that the back-end shares. Its flags are shared, too: the back-end can clear
//! O_NONBLOCK, and then a read of 0, or a write to a full counter, would wait. `virtio::mmio` calls these
//! functions on vCPU threads, `vhost_user` for a back-end that came back; none of them waits.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

/// The eventfd's descriptor.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor, and is borrowed for as long as the result is used.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes back a kick that the back-end has not seen.
pub(super) fn forget(kick: &EventFd) {
    // An eventfd has no position: -1. An error means that there was no kick.
    let _ = preadv2(borrow(kick), &mut [IoSliceMut::new(&mut [0; 8])], u64::MAX, ReadWriteFlags::NOWAIT);
}

/// Kicks. KVM does that by itself (ioeventfd), except for a write by an instruction that it emulates.
pub fn signal(kick: &EventFd) {
    let mut has_room = [PollFd::from_borrowed_fd(borrow(kick), PollFlags::OUT)];
    // Without room a kick is pending already.
    if poll(&mut has_room, Some(&Timespec::default())) == Ok(1) {
        let _ = kick.write(1);
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{OFlags, fcntl_setfl};
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

    use super::*;

    #[test]
    fn neither_waits_though_the_other_side_makes_the_eventfd_block() {
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        fcntl_setfl(borrow(&kick), OFlags::empty()).unwrap();
        forget(&kick);
        signal(&kick);
        forget(&kick);
        kick.write(u64::MAX - 1).unwrap();
        signal(&kick);
        assert_eq!(kick.read().unwrap(), u64::MAX - 1);
        signal(&kick);
        assert_eq!(kick.read().unwrap(), 1);
    }
}
