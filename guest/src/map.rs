//! Memory that others may change at any time: files and physical memory, mapped and accessed word by word.
//!
//! Called by the probes. Each access is volatile or atomic, so the compiler neither repeats nor drops one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use crate::outcome::{Outcome, failed};

/// The size of a page on x86_64.
pub const PAGE: usize = 4096;

/// A value that is one access, and of which each bit pattern is valid.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

/// Mapped memory, unmapped when this value is dropped. Offsets are in bytes; one outside panics.
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory belongs to the value, not to a thread, and is accessed by volatile and atomic words
// only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private memory of this process, all zeroes.
    pub fn anonymous(length: usize) -> io::Result<Mapping> {
        // SAFETY: a new mapping at an address of the kernel's choice; nothing of ours is there.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        Mapping::new(start.cast(), length)
    }

    /// A part of a file, for reading, and for writing if `writable`.
    pub fn part(
        file: &File,
        offset: u64,
        length: usize,
        writable: bool,
        flags: MapFlags,
    ) -> io::Result<Mapping> {
        let protection = ProtFlags::READ | if writable { ProtFlags::WRITE } else { ProtFlags::empty() };
        // SAFETY: as in `anonymous`.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), length, protection, flags, file, offset)? };
        Mapping::new(start.cast(), length)
    }

    /// All of a file.
    pub fn whole(file: &File, path: &Path, writable: bool, flags: MapFlags) -> Outcome<Mapping> {
        let length = file.metadata().map_err(failed("look at", path))?.len() as usize;
        Mapping::part(file, 0, length, writable, flags).map_err(failed("map", path))
    }

    fn new(start: *mut u8, length: usize) -> io::Result<Mapping> {
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("it is at address 0"))?;
        Ok(Mapping { start, length })
    }

    pub fn len(&self) -> usize {
        self.length
    }

    /// Where `count` bytes from `offset` on are.
    fn at(&self, offset: usize, count: usize) -> *mut u8 {
        assert!(offset <= self.length && count <= self.length - offset, "outside the mapping");
        self.start.as_ptr().wrapping_add(offset)
    }

    /// Where an aligned word is.
    fn word<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()), "not aligned");
        self.at(offset, size_of::<T>()).cast()
    }

    pub fn load<T: Word>(&self, offset: usize) -> T {
        let word = self.word::<T>(offset);
        // SAFETY: `word` has checked that it lies in the mapping, which `self` owns, and is aligned.
        unsafe { word.read_volatile() }
    }

    /// In a mapping that is not writable this ends the process (SIGSEGV).
    pub fn store<T: Word>(&self, offset: usize, value: T) {
        let word = self.word::<T>(offset);
        // SAFETY: as in `load`.
        unsafe { word.write_volatile(value) };
    }

    /// All whole words, from the first on.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        (0..self.length / 8).map(|index| self.load(index * 8))
    }

    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        let word = self.word::<u64>(offset);
        // SAFETY: as in `load`; the mapping lives as long as the reference.
        unsafe { AtomicU64::from_ptr(word) }
    }

    pub fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        let word = self.word::<u32>(offset);
        // SAFETY: as in `atomic_u64`.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// Writes what was stored back to the file.
    pub fn synchronise(&self) -> io::Result<()> {
        // SAFETY: the whole mapping, which `self` owns; the call changes no memory.
        unsafe { rustix::mm::msync(self.start.as_ptr().cast(), self.length, MsyncFlags::SYNC)? };
        Ok(())
    }

    /// `read` from a file into all that follows `offset`; the number of bytes.
    pub fn fill_from(&self, file: &File, offset: usize) -> io::Result<usize> {
        let rest = self.length.saturating_sub(offset);
        let to = self.at(offset, rest);
        // SAFETY: the rest of the mapping, which `self` owns; the kernel writes to it like any other who
        // shares it.
        let count = unsafe { libc::read(file.as_raw_fd(), to.cast(), rest) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// `write` to a file of all that follows `offset`; the number of bytes.
    pub fn write_to(&self, file: &File, offset: usize) -> io::Result<usize> {
        let rest = self.length.saturating_sub(offset);
        let from = self.at(offset, rest);
        // SAFETY: the rest of the mapping, which `self` owns; the kernel only reads it.
        let count = unsafe { libc::write(file.as_raw_fd(), from.cast(), rest) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and references to it cannot outlive it. Failure would leave it
        // mapped.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// Physical memory through `/dev/mem`: whole pages, and the offset of `address` in them.
pub fn physical(address: u64, length: usize) -> Outcome<(Mapping, usize)> {
    let inside = address as usize % PAGE;
    let failed = |error: io::Error| {
        format!(
            "cannot map {length} bytes at {address:#x} through /dev/mem: {error} (the kernel allows neither RAM nor a driver's memory)"
        )
    };
    let file = OpenOptions::new().read(true).write(true).open("/dev/mem").map_err(failed)?;
    let whole = (inside + length).next_multiple_of(PAGE);
    let mapping =
        Mapping::part(&file, address - inside as u64, whole, true, MapFlags::SHARED).map_err(failed)?;
    Ok((mapping, inside))
}

/// Accesses that found no page, since [`zeroes_on_bus_error`].
static BUS_ERRORS: AtomicUsize = AtomicUsize::new(0);

pub fn bus_errors() -> usize {
    BUS_ERRORS.load(Ordering::Relaxed)
}

/// From now on an access to a mapped file beyond its end reads zeroes, and is counted.
pub fn zeroes_on_bus_error() {
    // SAFETY: plain data, of which all zeroes is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as extern "C" fn(_, _, _) as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is ours and outlives the call; the handler makes system calls only.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
}

/// Puts a page of zeroes where there is none, so that the access that found none completes.
extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    BUS_ERRORS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel lends the structure to the handler.
    let info = unsafe { &*info };
    // SAFETY: it is that of a SIGBUS, which has an address.
    let address = unsafe { info.si_addr() };
    let page = address.map_addr(|address| address / PAGE * PAGE);
    // SAFETY: the page is part of a [`Mapping`] of a file: nothing else of this program raises the signal.
    // Accesses to it are volatile, so that the compiler assumes nothing of its contents.
    let _ = unsafe {
        rustix::mm::mmap_anonymous(page, PAGE, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::FIXED)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_where_they_were_written() {
        let mapping = Mapping::anonymous(2 * PAGE).unwrap();
        mapping.store(PAGE - 8, 0x0102_0304_0506_0708_u64);
        assert_eq!(mapping.load::<u8>(PAGE - 8), 8);
        assert_eq!(mapping.load::<u16>(PAGE - 2), 0x0102);
        assert_eq!(mapping.atomic_u32(PAGE - 4).load(Ordering::Relaxed), 0x0102_0304);
        assert_eq!(mapping.words().filter(|word| *word != 0).count(), 1);
        assert_eq!((mapping.len(), mapping.words().count()), (2 * PAGE, PAGE / 4));
    }

    #[test]
    fn an_offset_outside_panics() {
        for (offset, is_inside) in
            [(PAGE - 8, true), (PAGE - 4, false), (PAGE, false), (usize::MAX - 7, false)]
        {
            let mapping = Mapping::anonymous(PAGE).unwrap();
            assert_eq!(
                std::panic::catch_unwind(|| mapping.load::<u64>(offset)).is_ok(),
                is_inside,
                "{offset}"
            );
        }
    }
}
