//! Windows: host address space reserved for the shared memory regions of VIRTIO section 2.10.
//!
//! A [`Window`] is a guest physical range and, of the same size, a range of host addresses in which nothing
//! can be accessed (PROT_NONE). A file that a back-end hands over is placed inside it, at the offset that the
//! guest sees it at. A [`Span`] is a part of a window; it cannot be built without the range checks, and it
//! alone can place and clear, so nothing that a back-end sends turns into an address before it was checked
//! (SHM-50).
//!
//! `memory::shmem` is the only caller.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

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
    host: *mut u8,
}

// SAFETY: the pointer is the address of a reservation that the window owns until it is dropped; it is never
// dereferenced, and the system calls that take it may come from any thread.
unsafe impl Send for Window {}
// SAFETY: as above; `&Window` only gives addresses away.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves host addresses for `guest`, whose start and length are multiples of [`PAGE_SIZE`].
    ///
    /// Fails with EINVAL where they are not, with ENOMEM where there is no room.
    pub fn reserve(guest: GuestRange) -> io::Result<Window> {
        let len = host_len(guest.len())?;
        if !guest.start().is_multiple_of(PAGE_SIZE) || !guest.len().is_multiple_of(PAGE_SIZE) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // The reservation starts anywhere: one unit more than needed holds a congruent start.
        let slack = host_len(CONGRUENCE)?;
        let padded = len.checked_add(slack).ok_or(io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let start = unsafe { reserve_at(ptr::null_mut(), padded, 0) }?;
        let ahead = (guest.start() % CONGRUENCE + CONGRUENCE - start as u64 % CONGRUENCE) % CONGRUENCE;
        let ahead = host_len(ahead)?;
        let host = start.wrapping_add(ahead);
        // SAFETY: the two ends lie in the reservation just made, which nothing else uses, and outside
        // `host..+len`.
        unsafe {
            unmap(start, ahead);
            unmap(host.wrapping_add(len), slack - ahead);
        }
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

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours, and who mapped parts of it for the guest promised the mapper
        // (`GuestMapper::map`) to have taken them away by now.
        unsafe { unmap(self.host, self.guest.len() as usize) };
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
        self.window.host.wrapping_add(self.offset as usize)
    }

    /// Maps `file` from `file_offset` on into the span, shared, in place of the reservation.
    ///
    /// The file's size does not matter (SHM-44). Fails with EINVAL for what is not a regular file or for part
    /// of a huge page, and with what mmap(2) says; the reservation stays then.
    pub fn place(&self, file: BorrowedFd<'_>, file_offset: u64, access: Access) -> io::Result<()> {
        self.check_file(file, file_offset)?;
        let len = self.len as usize;
        let offset = libc::off_t::try_from(file_offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // First to where the kernel likes, then moved: an mmap(MAP_FIXED) that fails may already have removed
        // what was there, and another thread's memory could get into the gap.
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let address = unsafe {
            libc::mmap(ptr::null_mut(), len, protection(access), libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the source is the mapping just made; the target lies in the window's own reservation, and
        // `len` bytes do not leave it (`check_file` ruled out that the kernel rounds it up).
        let moved = unsafe {
            libc::mremap(address, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, self.host())
        };
        if moved == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: the mapping made above, which nobody else knows.
            unsafe { unmap(address.cast(), len) };
            return Err(error);
        }
        Ok(())
    }

    /// Puts the reservation back in place of whatever is in the span.
    pub fn clear(&self) -> io::Result<()> {
        // SAFETY: the span lies in the window's own reservation; see `Window::drop` for the guest's view of
        // it.
        unsafe { reserve_at(self.host(), self.len as usize, libc::MAP_FIXED) }.map(drop)
    }

    /// The end of the span that cannot be read, because the file under it became shorter or it was put out of
    /// reach; `None` where all can (SHM-45).
    pub fn missing(&self) -> Option<Self> {
        let missing_from = self.first_missing_page();
        self.window.span(self.offset + missing_from, self.len - missing_from)
    }

    /// The last `len` bytes of the span.
    pub fn end(&self, len: u64) -> Option<Self> {
        let ahead = self.len.checked_sub(len)?;
        self.window.span(self.offset + ahead, len)
    }

    /// Puts zero pages in place of what is mapped in the span.
    pub fn fill(&self, access: Access) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let (at, len) = (self.host().cast(), self.len as usize);
        // SAFETY: the range is the span, which lies in the window's own reservation.
        let address = unsafe { libc::mmap(at, len, protection(access), flags, -1, 0) };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Puts zero pages in place of the file in the span, and keeps the file's pages for [`Self::put_back`].
    pub fn set_aside(&self, access: Access) -> io::Result<Aside> {
        let len = self.len as usize;
        // SAFETY: an old length of 0 makes a second mapping of the same part of the same file, at addresses
        // that the kernel chooses; the first, in the window's own reservation, stays.
        let second = unsafe { libc::mremap(self.host().cast(), 0, len, libc::MREMAP_MAYMOVE) };
        if second == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let aside = Aside { address: second.cast(), len };
        self.fill(access)?;
        Ok(aside)
    }

    /// Puts back what was set aside of this very span.
    pub fn put_back(&self, aside: &mut Aside) -> io::Result<()> {
        // SAFETY: the source is the aside's own; the target lies in the window's own reservation, and the
        // length is the span's.
        let moved = unsafe {
            libc::mremap(
                aside.address.cast(),
                aside.len,
                self.len as usize,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                self.host(),
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        aside.len = 0;
        Ok(())
    }

    /// Whether anybody touched a page in the span that [`Self::set_aside`] filled.
    pub fn is_touched(&self) -> io::Result<bool> {
        let mut pages = vec![0u8; (self.len / PAGE_SIZE) as usize];
        // SAFETY: a byte for each page of the range, which is only looked at.
        let result = unsafe { libc::mincore(self.host().cast(), self.len as usize, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().any(|page| page & 1 != 0))
    }

    /// Puts the span out of everybody's reach (`None`), or back into it.
    pub fn protect(&self, access: Option<Access>) -> io::Result<()> {
        let protection = access.map_or(libc::PROT_NONE, protection);
        // SAFETY: the range is the span, which lies in the window's own reservation.
        match unsafe { libc::mprotect(self.host().cast(), self.len as usize, protection) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The offset of the first page that cannot be read; the length where all can. Pages go missing from the
    /// end of a file, so a binary search finds the edge.
    fn first_missing_page(&self) -> u64 {
        let (mut present, mut missing) = (0, self.len / PAGE_SIZE);
        if self.can_read(self.len - PAGE_SIZE) {
            return self.len;
        }
        while present < missing {
            let middle = present + (missing - present) / 2;
            if self.can_read(middle * PAGE_SIZE) {
                present = middle + 1;
            } else {
                missing = middle;
            }
        }
        missing * PAGE_SIZE
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
        let local = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: len };
        let remote = libc::iovec { iov_base: self.host().wrapping_add(offset as usize).cast(), iov_len: len };
        // SAFETY: `local` is the caller's slice; `remote` is only read, and a bad address is an error, not a
        // fault.
        unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == len as isize }
    }

    /// Refuses what mmap(2) would take but the guest must not get.
    fn check_file(&self, file: BorrowedFd<'_>, file_offset: u64) -> io::Result<()> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the descriptor is open, and the kernel fills the structure in where it answers 0.
        if unsafe { libc::fstat(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: filled in, see above.
        if unsafe { stat.assume_init() }.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(invalid());
        }
        let mut fs = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the descriptor is open, and the kernel fills the structure in where it answers 0.
        if unsafe { libc::fstatfs(file.as_raw_fd(), fs.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: filled in, see above.
        let fs = unsafe { fs.assume_init() };
        if fs.f_type == HUGETLBFS_MAGIC {
            // mmap(2) rounds a huge page file's length up to whole huge pages: past the span, if we let it.
            let page = u64::try_from(fs.f_bsize).map_err(|_| invalid())?;
            if [self.offset, self.len, file_offset].iter().any(|n| n % page != 0) {
                return Err(invalid());
            }
        }
        Ok(())
    }
}

/// An address range that is given up for a moment where the process can have no more (vm.max_map_count):
/// Linux then refuses even to exchange one for another, and what was unmapped would stay.
#[derive(Debug)]
pub struct Spare(Option<*mut u8>);

// SAFETY: the pointer is the address of a page that the value owns; it is never dereferenced.
unsafe impl Send for Spare {}

impl Spare {
    /// Takes one, if there is one to be had.
    pub fn take() -> Spare {
        // Shared memory of its own: never joined with its neighbours.
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let page = unsafe { libc::mmap(ptr::null_mut(), PAGE_SIZE as usize, libc::PROT_NONE, flags, -1, 0) };
        Spare((page != libc::MAP_FAILED).then_some(page.cast()))
    }

    /// [`Span::clear`], also where no address range is left. Fails then only if the span is in the middle of
    /// what the kernel has joined to one range: that takes two more.
    pub fn clear(&mut self, span: &Span<'_>) -> io::Result<()> {
        span.clear().or_else(|_| {
            self.give_up();
            let cleared = span.clear();
            *self = Spare::take();
            cleared
        })
    }

    fn give_up(&mut self) {
        if let Some(page) = self.0.take() {
            // SAFETY: the page is ours, and nobody else knows it.
            unsafe { unmap(page, PAGE_SIZE as usize) };
        }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// A part of a file that was under a span, at addresses of its own.
#[derive(Debug)]
pub struct Aside {
    address: *mut u8,
    /// 0 once it was put back.
    len: usize,
}

// SAFETY: the pointer is the address of a mapping that the value owns; it is never dereferenced.
unsafe impl Send for Aside {}

impl Drop for Aside {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody else knows it.
        unsafe { unmap(self.address, self.len) };
    }
}

fn protection(access: Access) -> libc::c_int {
    match access {
        Access::ReadOnly => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    }
}

fn host_len(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Maps `len` inaccessible bytes that cost nothing, at `address` where `extra_flags` has MAP_FIXED.
///
/// # Safety
///
/// With MAP_FIXED, the range is the caller's to replace.
unsafe fn reserve_at(address: *mut u8, len: usize, extra_flags: i32) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | extra_flags;
    // SAFETY: the caller's promise, or a range that the kernel chooses.
    let address = unsafe { libc::mmap(address.cast(), len, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

/// Unmaps a range; an empty one is fine.
///
/// # Safety
///
/// The range is the caller's, and nobody uses it any more.
unsafe fn unmap(address: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: the caller's promise. It fails only for unaligned ranges, and ours are made of pages; or to
        // cut a range in three where no more are left, and ours are whole.
        unsafe { libc::munmap(address.cast(), len) };
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
            assert_eq!(window.host as u64 % CONGRUENCE, start % CONGRUENCE, "{start:#x}");
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
    fn what_is_no_regular_file_is_refused_and_the_reservation_stays() {
        let window = window(0x4000_0000, 0x1000);
        let (socket, _) = UnixStream::pair().unwrap();
        let others: [OwnedFd; 3] =
            [socket.into(), File::open("/").unwrap().into(), File::open("/dev/zero").unwrap().into()];
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
                missing.fill(Access::ReadOnly).unwrap();
            }
            let seen: Vec<_> = (0..8).map(|page| peek(&whole, page * 0x1000)).collect();
            let expected: Vec<_> = (0..8).map(|page| Some(if page < present { 9 } else { 0 })).collect();
            assert_eq!(seen, expected, "{present} pages present");
        }
    }
}
