//! Host addresses that a value owns: mapped when it is made, unmapped when it is dropped. Nothing here
//! dereferences them.
//!
//! Used for the windows of shared memory regions (`memory::window`) and for the page of a device's registers
//! (`virtio::register_page`).

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{self, MapFlags, ProtFlags};

use super::{Access, PAGE_SIZE};

/// Whole pages of host addresses. Offsets and lengths are in bytes, and multiples of [`PAGE_SIZE`].
#[derive(Debug)]
pub struct OwnedPages {
    pub(super) address: *mut c_void,
    pub(super) len: usize,
}

// SAFETY: the range is the value's until it is dropped, on whatever thread; nothing here dereferences it.
unsafe impl Send for OwnedPages {}
// SAFETY: as above; the system calls on the range may come from several threads at once.
unsafe impl Sync for OwnedPages {}

impl OwnedPages {
    /// Reserves `len` bytes of addresses, anywhere: inaccessible, and without memory behind them.
    pub fn reserve(len: usize) -> io::Result<Self> {
        Self::anonymous(ptr::null_mut(), len, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// The same from address `at` on. Fails with EEXIST where something is there.
    pub fn reserve_at(at: u64, len: usize) -> io::Result<Self> {
        let at = ptr::without_provenance_mut(at as usize);
        let pages =
            Self::anonymous(at, len, MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE)?;
        // A kernel before Linux 4.17 takes the address for a wish.
        if pages.address == at { Ok(pages) } else { Err(Errno::EXIST.into()) }
    }

    /// Reserves one page, anywhere, that is an area (VMA) of its own: shared memory is not merged with its
    /// neighbours.
    pub fn reserve_vma() -> io::Result<Self> {
        Self::anonymous(ptr::null_mut(), PAGE_SIZE as usize, MapFlags::SHARED)
    }

    fn anonymous(at: *mut c_void, len: usize, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: without MAP_FIXED the kernel takes only addresses that nobody uses; the result owns them.
        let address = unsafe { mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        Ok(OwnedPages { address, len })
    }

    /// Maps `len` bytes of a file from `offset` on, shared.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len: usize, access: Access) -> io::Result<Self> {
        let protection = protection(Some(access));
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses; the result owns them.
        let address = unsafe { mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset) }?;
        Ok(OwnedPages { address, len })
    }

    /// Puts a file, from `offset` on, in place of the whole range.
    pub fn replace_with_file(&self, file: BorrowedFd<'_>, offset: u64, access: Access) -> io::Result<()> {
        let (flags, protection) = (MapFlags::SHARED | MapFlags::FIXED, protection(Some(access)));
        // SAFETY: the range is ours, and stays mapped.
        unsafe { mm::mmap(self.address, self.len, protection, flags, file, offset) }?;
        Ok(())
    }

    /// Where the range starts.
    pub fn address(&self) -> *mut u8 {
        self.address.cast()
    }

    /// Takes all but the first `at` bytes away, into a value of their own.
    pub fn split_off(&mut self, at: usize) -> OwnedPages {
        let at = at.min(self.len);
        let rest = OwnedPages { address: self.address.wrapping_byte_add(at), len: self.len - at };
        self.len = at;
        rest
    }
}

impl Drop for OwnedPages {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the range is ours until now; the caller of `GuestMapper::map` has ended the guest's
            // view of it.
            let _cannot_fail = unsafe { mm::munmap(self.address, self.len) };
        }
    }
}

/// The protection of pages that may be accessed so; `None`: not at all.
pub(super) fn protection(access: Option<Access>) -> ProtFlags {
    match access {
        None => ProtFlags::empty(),
        Some(Access::ReadOnly) => ProtFlags::READ,
        Some(Access::ReadWrite) => ProtFlags::READ | ProtFlags::WRITE,
    }
}
