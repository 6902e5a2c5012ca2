//! Windows: host address space reserved for the shared memory regions of VIRTIO section 2.10.
//!
//! A [`Window`] is a guest physical range and, of the same size, a range of host addresses in which nothing
//! can be accessed (PROT_NONE). A file that a back-end hands over is placed inside it, at the offset that the
//! guest sees it at. A [`Span`] is a checked part of a window. Only a span can place or clear, so no
//! unchecked number becomes an address (SHM-50).
//!
//! `memory::shmem` and `memory::missing` are the only callers.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::mm::{self, MapFlags, MprotectFlags, MremapFlags};

use super::pages::{OwnedPages, protection};
use super::{Access, GuestRange, PAGE_SIZE};

/// Host and guest addresses of a window agree modulo this (1 GiB, x86-64's largest page), so that huge pages
/// can be used on both levels.
const CONGRUENCE: u64 = 1 << 30;

/// From statfs(2): files made of huge pages, which can only be mapped in whole huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

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
        // The reservation starts anywhere: one unit more than needed holds a congruent start.
        let padded = guest.len().checked_add(CONGRUENCE).ok_or(Errno::NOMEM)?;
        let mut ahead = OwnedPages::reserve(padded as usize)?;
        let excess = guest.start().wrapping_sub(ahead.address() as u64) % CONGRUENCE;
        let mut host = ahead.split_off(excess as usize);
        let _behind = host.split_off(guest.len() as usize);
        Ok(Window { guest, host })
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

    /// The first `len` bytes of the span; `None` where there are fewer, or `len` is 0 or not whole pages.
    pub fn first(&self, len: u64) -> Option<Self> {
        (len <= self.len).then(|| self.window.span(self.offset, len))?
    }

    /// The last `len` bytes of the span; `None` as for [`Self::first`].
    pub fn last(&self, len: u64) -> Option<Self> {
        self.window.span(self.offset + self.len.checked_sub(len)?, len)
    }

    /// Maps `file` from `file_offset` on into the span, shared, in place of the reservation.
    ///
    /// The file's size does not matter (SHM-44). Fails with the errno of mmap(2); the reservation stays then.
    pub fn place(&self, file: BorrowedFd<'_>, file_offset: u64, access: Access) -> io::Result<()> {
        // Mapped elsewhere first, then moved: an mmap(MAP_FIXED) that fails may already have removed the
        // reservation, and another thread's memory could take its place.
        self.replace_with(OwnedPages::of_file(file, file_offset, self.len as usize, access)?)
    }

    /// Moves pages, as many, into the span: those of a file, or what [`Self::fill_and_save`] gave. An error
    /// unmaps them.
    pub fn replace_with(&self, mut pages: OwnedPages) -> io::Result<()> {
        let (at, len) = self.pages();
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

    /// Puts zero pages in place of the file in the span. Gives the file's pages, at addresses of their own.
    pub fn fill_and_save(&self, access: Access) -> io::Result<OwnedPages> {
        let (at, len) = self.pages();
        // SAFETY: an old length of 0 makes a second mapping of the file, which the result owns; the first
        // stays.
        let address = unsafe { mm::mremap(at, 0, len, MremapFlags::MAYMOVE) }?;
        let saved = OwnedPages { address, len };
        self.fill(Some(access))?;
        Ok(saved)
    }

    /// Whether a page in the span was accessed since [`Self::fill_and_save`] filled it.
    pub fn is_touched(&self) -> io::Result<bool> {
        let (at, len) = self.pages();
        let mut pages = vec![0u8; (self.len / PAGE_SIZE) as usize];
        // SAFETY: the span lies in the window's own range, and is only inspected; `pages` has a byte for each
        // page.
        let result = unsafe { libc::mincore(at, len, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().any(|page| page & 1 != 0))
    }

    /// Makes the span inaccessible (`None`), or accessible again.
    pub fn protect(&self, access: Option<Access>) -> io::Result<()> {
        let (at, len) = self.pages();
        let protection = MprotectFlags::from_bits_retain(protection(access).bits());
        // SAFETY: the span lies in the window's own range, and no Rust reference goes into it.
        unsafe { mm::mprotect(at, len, protection) }?;
        Ok(())
    }

    /// The end of the span that cannot be read, because the file under it became shorter or it was made
    /// inaccessible; `None` where all can (SHM-45). Pages go missing from the end of a file, so a binary
    /// search finds the edge.
    pub fn missing(&self) -> Option<Self> {
        let pages = self.len / PAGE_SIZE;
        let (mut present, mut missing) = (0, pages);
        if self.can_read(self.len - PAGE_SIZE) {
            return None;
        }
        while present < missing {
            let middle = present + (missing - present) / 2;
            match self.can_read(middle * PAGE_SIZE) {
                true => present = middle + 1,
                false => missing = middle,
            }
        }
        self.last((pages - missing) * PAGE_SIZE)
    }

    /// Whether the byte at `offset` can be read.
    fn can_read(&self, offset: u64) -> bool {
        self.read(offset, &mut [0])
    }

    /// Reads what is at `offset`, without the SIGBUS that a plain access to a missing page would raise. False
    /// where not all of it is in the span, or some of it cannot be read.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let len = data.len();
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return false;
        }
        let process = std::process::id() as libc::pid_t;
        let local = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: len };
        let remote = libc::iovec { iov_base: self.host().wrapping_add(offset as usize).cast(), iov_len: len };
        // SAFETY: `local` is the caller's slice; `remote` is only read, and a bad address is an error, not a
        // fault.
        let count = unsafe { libc::process_vm_readv(process, &local, 1, &remote, 1, 0) };
        count == len as isize
    }

    /// Refuses, with EINVAL, part of a huge page of a file in memory: mmap(2) would round the length up, past
    /// the span.
    pub fn check_huge_pages(&self, file: BorrowedFd<'_>, file_offset: u64) -> io::Result<()> {
        let fs = rustix::fs::fstatfs(file)?;
        let page = u64::try_from(fs.f_bsize).map_err(|_| Errno::INVAL)?;
        let is_part = || [self.offset, self.len, file_offset].iter().any(|n| n % page != 0);
        if fs.f_type == HUGETLBFS_MAGIC && is_part() {
            return Err(Errno::INVAL.into());
        }
        Ok(())
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

    /// Gives it up.
    pub fn give_up(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn window(start: u64, len: u64) -> Window {
        Window::reserve(GuestRange::new(start, len).unwrap()).unwrap()
    }

    fn file(contents: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    fn peek(span: &Span<'_>, offset: u64) -> Option<u8> {
        span.can_read(offset).then(|| {
            // SAFETY: `can_read` said that it can be read, and the test changes no file meanwhile.
            unsafe { span.host().wrapping_add(offset as usize).read_volatile() }
        })
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
        span.place(file(&contents).as_fd(), 0x1000, Access::ReadOnly).unwrap();
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
        whole.place(file(&[3; 0x2000]).as_fd(), 0, Access::ReadOnly).unwrap();
        let first = window.span(0, 0x1000).unwrap();
        let mut data = [0; 8];
        assert!(first.read(0xff8, &mut data) && data == [3; 8]);
        for offset in [0xff9, 0xfff, 0x1000, 0x1ff8, u64::MAX, u64::MAX - 7] {
            assert!(!first.read(offset, &mut data), "{offset:#x}");
        }
        assert!(whole.read(0xff9, &mut data));
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_and_the_reservation_stays() {
        let window = window(0x4000_0000, 0x1000);
        let (socket, _) = UnixStream::pair().unwrap();
        let others: [OwnedFd; 2] = [socket.into(), File::open("/").unwrap().into()];
        for fd in others {
            window.whole().place(fd.as_fd(), 0, Access::ReadOnly).unwrap_err();
            assert_eq!(peek(&window.whole(), 0), None);
        }
    }

    #[test]
    fn missing_pages_become_zeroes_and_present_ones_stay() {
        let window = window(0x4000_0000, 0x8000);
        for present in [0u64, 1, 3, 7, 8] {
            let file = file(&vec![9; (present * 0x1000) as usize]);
            let whole = window.whole();
            whole.place(file.as_fd(), 0, Access::ReadOnly).unwrap();
            let missing = whole.missing();
            assert_eq!(missing.map_or(0, |span| span.len), (8 - present) * 0x1000);
            if let Some(missing) = missing {
                missing.fill(Some(Access::ReadOnly)).unwrap();
            }
            let seen: Vec<_> = (0..8).map(|page| peek(&whole, page * 0x1000)).collect();
            let expected: Vec<_> = (0..8).map(|page| Some(if page < present { 9 } else { 0 })).collect();
            assert_eq!(seen, expected, "{present} pages present");
        }
    }
}
