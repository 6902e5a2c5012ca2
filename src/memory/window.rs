//! Windows: host address space reserved for the shared memory regions of VIRTIO section 2.10.
//!
//! A [`Window`] is a guest physical range and, of the same size, a range of host addresses in which nothing
//! can be accessed (PROT_NONE). A file that a back-end hands over is placed inside it, at the offset that the
//! guest sees it at. A [`Span`] is a checked part of a window. Only a span can place or clear, so no
//! unchecked number becomes an address (SHM-50).
//!
//! `memory::shmem` is the only caller.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, MremapFlags};
use rustix::rand::{GetRandomFlags, getrandom};

use super::backing::FileInfo;
use super::pages::{OwnedPages, protection};
use super::{Access, GuestRange, PAGE_SIZE};

/// Host and guest addresses of a window agree modulo this (1 GiB, x86-64's largest page), so that huge pages
/// can be used on both levels.
const CONGRUENCE: u64 = 1 << 30;

/// The host addresses of all windows, 1 TiB to 40 TiB. The kernel gives no others out here: it looks for room
/// from the top of 128 TiB downwards, or upwards from a third of that (TASK_UNMAPPED_BASE). So nothing takes
/// the place of a reservation that an mmap(MAP_FIXED) removed before it failed.
const APART: Range<u64> = 1 << 40..40 << 40;

/// A guest physical range with host addresses reserved for it.
#[derive(Debug)]
pub struct Window {
    guest: GuestRange,
    host: OwnedPages,
}

impl Window {
    /// Reserves host addresses for `guest`, whose start and length are multiples of [`PAGE_SIZE`].
    ///
    /// Fails with EINVAL where they are not, with ENOMEM where there is no room.
    pub fn reserve(guest: GuestRange) -> io::Result<Window> {
        if !guest.start().is_multiple_of(PAGE_SIZE) || !guest.len().is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL.into());
        }
        // At random, since guest and back-end choose what is there.
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let places = (APART.end - APART.start) / CONGRUENCE;
        let first = u64::from_ne_bytes(random) % places;
        let place =
            |number| APART.start + (first + number) % places * CONGRUENCE + guest.start() % CONGRUENCE;
        let fits = |at: &u64| at.checked_add(guest.len()).is_some_and(|end| end <= APART.end);
        for at in (0..places).map(place).filter(fits) {
            match OwnedPages::reserve_at(at, guest.len() as usize) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                reserved => return Ok(Window { guest, host: reserved? }),
            }
        }
        Err(Errno::NOMEM.into())
    }

    /// Where the guest sees the window.
    pub fn guest(&self) -> GuestRange {
        self.guest
    }

    /// The `len` bytes at `offset`; `None` where that is empty, not made of whole pages, or not all inside.
    pub fn span(&self, offset: u64, len: u64) -> Option<Span<'_>> {
        let aligned = offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let inside = len > 0 && offset.checked_add(len)? <= self.guest.len();
        (aligned && inside).then_some(Span { window: self, offset, len })
    }

    /// All of it.
    pub fn whole(&self) -> Span<'_> {
        Span { window: self, offset: 0, len: self.guest.len() }
    }
}

/// Whole pages inside a [`Window`].
#[derive(Clone, Copy, Debug)]
pub struct Span<'w> {
    window: &'w Window,
    offset: u64,
    len: u64,
}

impl Span<'_> {
    /// Where the guest sees it.
    pub fn guest(&self) -> GuestRange {
        GuestRange { start: self.window.guest.start + self.offset, len: self.len }
    }

    /// Its host address.
    pub fn host(&self) -> *mut u8 {
        self.window.host.address().wrapping_add(self.offset as usize)
    }

    /// The same and its length, for system calls.
    fn pages(&self) -> (*mut c_void, usize) {
        (self.host().cast(), self.len as usize)
    }

    /// Maps `file` from `file_offset` on into the span, shared, in place of the reservation.
    ///
    /// The file's size does not matter (SHM-44). Fails with EINVAL for part of a huge page, else with the
    /// errno of mmap(2); the caller must clear the span then.
    pub fn place(
        &self,
        file: BorrowedFd<'_>,
        info: FileInfo,
        file_offset: u64,
        access: Access,
    ) -> io::Result<()> {
        self.check(info, file_offset)?;
        let ((at, len), flags) = (self.pages(), MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: the span lies in the window's own range, which is apart from all other memory.
        unsafe { mm::mmap(at, len, protection(Some(access)), flags, file, file_offset) }?;
        Ok(())
    }

    /// The same in place of another file, which stays there where this fails. Calls `before` when the pages
    /// are about to change.
    pub fn exchange(
        &self,
        file: BorrowedFd<'_>,
        info: FileInfo,
        file_offset: u64,
        access: Access,
        before: impl FnOnce(),
    ) -> io::Result<()> {
        self.check(info, file_offset)?;
        // Mapped elsewhere first, then moved: an mmap(MAP_FIXED) that fails may already have removed the
        // other file's pages.
        let mut pages = OwnedPages::of_file(file, file_offset, self.len as usize, access)?;
        let (at, len) = self.pages();
        before();
        // SAFETY: the source is the value's own; the target lies in the window's own range.
        unsafe { mm::mremap_fixed(pages.address, pages.len, len, MremapFlags::MAYMOVE, at) }?;
        pages.len = 0;
        Ok(())
    }

    /// Puts the reservation back in place of whatever is in the span.
    pub fn clear(&self) -> io::Result<()> {
        self.fill(None)
    }

    /// Puts zero pages in place of what is in the span, inaccessible ones for `None`.
    pub fn fill(&self, access: Option<Access>) -> io::Result<()> {
        let (at, len) = self.pages();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the span lies in the window's own range, and stays mapped.
        unsafe { mm::mmap_anonymous(at, len, protection(access), flags) }?;
        Ok(())
    }

    fn check(&self, info: FileInfo, file_offset: u64) -> io::Result<()> {
        // mmap(2) rounds the length up to whole huge pages: it would go past the span.
        let is_whole = [self.offset, self.len, file_offset].iter().all(|n| n % info.page_size == 0);
        if is_whole { Ok(()) } else { Err(Errno::INVAL.into()) }
    }

    /// Makes its pages present, as an access of the guest would: reads them in, or for a write also allocates
    /// their place in the file. Waits for the file system, without limit.
    ///
    /// Fails with EFAULT where an access would raise SIGBUS, with EINVAL where nothing is mapped.
    pub fn populate(&self, access: Access) -> io::Result<()> {
        let (at, len) = self.pages();
        let advice = match access {
            Access::ReadOnly => Advice::LinuxPopulateRead,
            Access::ReadWrite => Advice::LinuxPopulateWrite,
        };
        // SAFETY: the pages lie in the window's own range; what is in them does not change.
        Ok(unsafe { mm::madvise(at, len, advice) }?)
    }

    /// Reads what is at `offset`, without the SIGBUS that a plain access to a missing page would raise. False
    /// where not all of it is in the span, or some of it cannot be read.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let Some((process, remote)) = self.remote(offset, data.len()) else {
            return false;
        };
        let local = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        // SAFETY: `local` is the caller's slice; `remote` is only read, and a bad address is an error, not a
        // fault.
        let count = unsafe { libc::process_vm_readv(process, &local, 1, &remote, 1, 0) };
        count == data.len() as isize
    }

    /// Writes at `offset`. Otherwise as [`Self::read`].
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Some((process, remote)) = self.remote(offset, data.len()) else {
            return false;
        };
        let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        // SAFETY: `local` is only read; `remote` is in the window, which no Rust reference goes into, and a
        // bad address is an error, not a fault.
        let count = unsafe { libc::process_vm_writev(process, &local, 1, &remote, 1, 0) };
        count == data.len() as isize
    }

    /// This process, and the `len` bytes at `offset` in it; `None` where not all of them are in the span.
    fn remote(&self, offset: u64, len: usize) -> Option<(libc::pid_t, libc::iovec)> {
        let _inside = offset.checked_add(len as u64).filter(|&end| end <= self.len)?;
        let iov_base = self.host().wrapping_add(offset as usize).cast();
        Some((std::process::id() as libc::pid_t, libc::iovec { iov_base, iov_len: len }))
    }
}

/// An area of address space (VMA) kept in reserve, to be given up for a moment where the process can have no
/// more: at vm.max_map_count even MAP_FIXED over a range of our own fails, and what was unmapped would stay.
#[derive(Debug)]
pub struct ReserveVma(Option<OwnedPages>);

impl ReserveVma {
    /// Takes one, if there is one to be had.
    pub fn take() -> ReserveVma {
        ReserveVma(OwnedPages::reserve_vma().ok())
    }

    /// Frees the area, so that a call that needs one more succeeds.
    pub fn give_up(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::super::origin::Origin;
    use super::*;

    fn window(start: u64, len: u64) -> Window {
        Window::reserve(GuestRange::new(start, len).unwrap()).unwrap()
    }

    fn file(contents: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    fn place(span: &Span<'_>, file: &impl AsFd, file_offset: u64) {
        let file = file.as_fd();
        span.place(file, FileInfo::of(file, Origin::Memory).unwrap(), file_offset, Access::ReadOnly).unwrap();
    }

    fn peek(span: &Span<'_>, offset: u64) -> Option<u8> {
        let mut byte = [0];
        span.read(offset, &mut byte).then_some(byte[0])
    }

    #[test]
    fn host_and_guest_agree_modulo_1_gib() {
        for start in [0, 0x20_0000, 0x4000_0000, 0x1_2345_6000] {
            let window = window(start, 0x40_0000);
            assert_eq!(window.host.address() as u64 % CONGRUENCE, start % CONGRUENCE, "{start:#x}");
        }
    }

    #[test]
    fn windows_are_whole_pages() {
        for (start, len) in [(0x800, 0x1000), (0x1000, 0x1800), (0x800, 0x1800)] {
            let error = Window::reserve(GuestRange::new(start, len).unwrap()).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{start:#x} {len:#x}");
        }
    }

    #[test]
    fn spans_are_whole_pages_inside() {
        let window = window(0x4000_0000, 0x4000);
        assert_eq!(
            window.span(0x1000, 0x3000).unwrap().guest(),
            GuestRange::new(0x4000_1000, 0x3000).unwrap()
        );
        for (offset, len) in
            [(0, 0), (0, 1), (1, 0x1000), (0, 0x5000), (0x4000, 0x1000), (u64::MAX - 0xfff, 0x1000)]
        {
            assert!(window.span(offset, len).is_none(), "{offset:#x} {len:#x}");
        }
    }

    #[test]
    fn what_is_placed_is_seen_at_its_offset_and_nothing_else_is() {
        let window = window(0x4000_0000, 0x4000);
        let contents: Vec<u8> = (0..3u8).flat_map(|page| vec![page + 1; 0x1000]).collect();
        let span = window.span(0x1000, 0x2000).unwrap();
        place(&span, &file(&contents), 0x1000);
        let whole = window.whole();
        let seen: Vec<_> = (0..4).map(|page| peek(&whole, page * 0x1000)).collect();
        assert_eq!(seen, [None, Some(2), Some(3), None]);
        span.clear().unwrap();
        assert_eq!(peek(&whole, 0x1000), None);
    }

    #[test]
    fn a_read_ends_with_its_span_whatever_is_behind_it() {
        // SHM-50
        let window = window(0x4000_0000, 0x2000);
        let whole = window.whole();
        place(&whole, &file(&[3; 0x2000]), 0);
        let first = window.span(0, 0x1000).unwrap();
        let mut data = [0; 8];
        assert!(first.read(0xff8, &mut data) && data == [3; 8]);
        for offset in [0xff9, 0xfff, 0x1000, 0x1ff8, u64::MAX, u64::MAX - 7] {
            assert!(!first.read(offset, &mut data), "{offset:#x}");
        }
        assert!(whole.read(0xff9, &mut data));
    }

    #[test]
    fn a_page_is_had_as_the_access_asks_for_it() {
        // SHM-87
        let window = window(0x4000_0000, 0x3000);
        let whole = window.whole();
        let errno = |offset, access| {
            let page = window.span(offset / PAGE_SIZE * PAGE_SIZE, PAGE_SIZE);
            let result = page.ok_or(io::Error::from(Errno::INVAL)).and_then(|page| page.populate(access));
            result.map_or_else(|error| error.raw_os_error().unwrap(), |()| 0)
        };
        assert_eq!(errno(0, Access::ReadOnly), libc::EINVAL, "nothing is mapped");
        let file = file(&[3; 0x1800]);
        place(&whole, &file, 0);
        let read = [0, 0x1800, 0x1fff, 0x2000].map(|offset| errno(offset, Access::ReadOnly));
        assert_eq!(read, [0, 0, 0, libc::EFAULT]);
        assert_eq!(errno(0, Access::ReadWrite), libc::EINVAL, "the mapping is read-only");
        assert_eq!(errno(0x3000, Access::ReadOnly), libc::EINVAL);
        file.set_len(0x3000).unwrap();
        assert_eq!(errno(0x2fff, Access::ReadOnly), 0);
    }
}
