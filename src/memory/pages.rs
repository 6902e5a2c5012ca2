//! Host addresses that a value owns: mapped, replaced in part, and unmapped when the value is dropped.
//!
//! The system calls on them are all here, each behind a check that it stays inside the range; nothing here
//! dereferences them. Used for the windows of shared memory regions (`memory::window`) and for the page of a
//! device's registers (`virtio::register_page`).

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{self, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::PAGE_SIZE;

/// Whole pages of host addresses, unmapped on drop. Offsets and lengths are in bytes and multiples of
/// [`PAGE_SIZE`], unless said otherwise; a part that is not inside fails with EINVAL and changes nothing.
#[derive(Debug)]
pub struct OwnedPages {
    address: *mut c_void,
    len: usize,
}

// SAFETY: the range is the value's until it is dropped, on whatever thread; nothing here dereferences it.
unsafe impl Send for OwnedPages {}
// SAFETY: as above; the system calls on the range may come from several threads at once.
unsafe impl Sync for OwnedPages {}

impl OwnedPages {
    /// Reserves `len` bytes of addresses: inaccessible, and without memory behind them.
    pub fn reserve(len: usize) -> io::Result<Self> {
        Self::anonymous(len, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// The same for one page that is an area (VMA) of its own: shared memory is not merged with its neighbours.
    pub fn reserve_vma() -> io::Result<Self> {
        Self::anonymous(PAGE_SIZE as usize, MapFlags::SHARED)
    }

    fn anonymous(len: usize, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses; the result owns them.
        let address = unsafe { mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), flags) }?;
        Ok(OwnedPages { address, len })
    }

    /// Maps `len` bytes of a file from `offset` on, shared, at addresses that the kernel chooses.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len: usize, protection: ProtFlags) -> io::Result<Self> {
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses; the result owns them.
        let address = unsafe { mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset) }?;
        Ok(OwnedPages { address, len })
    }

    /// Maps once more what a part maps of a file, at addresses that the kernel chooses.
    pub fn duplicate(&self, offset: usize, len: usize) -> io::Result<Self> {
        let from = self.part(offset, len)?;
        // SAFETY: an old length of 0 leaves the part, which is ours, as it is; the result owns the new addresses.
        let address = unsafe { mm::mremap(from, 0, len, MremapFlags::MAYMOVE) }?;
        Ok(OwnedPages { address, len })
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

    /// Puts zero pages in place of a part; inaccessible ones (an empty `protection`) are a reservation.
    pub fn replace_with_zeroes(&self, offset: usize, len: usize, protection: ProtFlags) -> io::Result<()> {
        let at = self.part(offset, len)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the part is in the range that we own, and stays mapped.
        unsafe { mm::mmap_anonymous(at, len, protection, flags) }?;
        Ok(())
    }

    /// Puts a file, from `offset` on, in place of the whole range.
    pub fn replace_with_file(&self, file: BorrowedFd<'_>, offset: u64, access: ProtFlags) -> io::Result<()> {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range is ours, and stays mapped.
        unsafe { mm::mmap(self.address, self.len, access, flags, file, offset) }?;
        Ok(())
    }

    /// Moves other pages into the range, in place of as many at `offset`. An error unmaps the others.
    pub fn replace_with(&self, offset: usize, mut pages: OwnedPages) -> io::Result<()> {
        let to = self.part(offset, pages.len)?;
        // SAFETY: the source is `pages`' own, the target is in our range; both are `pages.len` long.
        unsafe { mm::mremap_fixed(pages.address, pages.len, pages.len, MremapFlags::MAYMOVE, to) }?;
        pages.len = 0;
        Ok(())
    }

    /// Changes what may be done with a part.
    pub fn protect(&self, offset: usize, len: usize, protection: ProtFlags) -> io::Result<()> {
        let at = self.part(offset, len)?;
        let protection = MprotectFlags::from_bits_retain(protection.bits());
        // SAFETY: the part is in the range that we own, and no Rust reference goes into it.
        unsafe { mm::mprotect(at, len, protection) }?;
        Ok(())
    }

    /// Whether a page of a part is in memory: for the private zero pages of [`Self::replace_with_zeroes`],
    /// whether one was accessed.
    pub fn is_any_resident(&self, offset: usize, len: usize) -> io::Result<bool> {
        let at = self.part(offset, len)?;
        let mut pages = vec![0u8; len.div_ceil(PAGE_SIZE as usize)];
        // SAFETY: the part is ours and only inspected; `pages` has a byte for each of its pages.
        let result = unsafe { libc::mincore(at, len, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().any(|page| page & 1 != 0))
    }

    /// Reads what is at `offset`, of any alignment and length, without the SIGBUS that a plain access to a
    /// missing page raises. False where not all of it is inside, or some of it cannot be read.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> bool {
        let Ok(from) = self.part(offset, data.len()) else {
            return false;
        };
        let process = std::process::id() as libc::pid_t;
        let local = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        let remote = libc::iovec { iov_base: from, iov_len: data.len() };
        // SAFETY: `local` is the caller's slice; `remote` is only read, and what cannot be read is an error.
        let count = unsafe { libc::process_vm_readv(process, &local, 1, &remote, 1, 0) };
        count == data.len() as isize
    }

    fn part(&self, offset: usize, len: usize) -> Result<*mut c_void, Errno> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if inside { Ok(self.address.wrapping_byte_add(offset)) } else { Err(Errno::INVAL) }
    }
}

impl Drop for OwnedPages {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the range is ours until now; the caller of `GuestMapper::map` has ended the guest's view of it.
            let _cannot_fail = unsafe { mm::munmap(self.address, self.len) };
        }
    }
}
