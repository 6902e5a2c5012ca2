//! Guest RAM: one sealed memfd, seen by the guest below and above the gap that ends at 4 GiB.
//!
//! The memory is always shareable, because every device is another process. It is sealed against growing and
//! shrinking, so that no back-end can take pages of it away. Called by the set-up in `vmm`; `vhost_user`
//! sends the regions and the file to back-ends.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::mm::{Advice, madvise};
use rustix::system::sysinfo;
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{GuestRange, PAGE_SIZE};
use crate::report::{Failure, STATUS_USAGE};

/// The least RAM that is accepted: the boot structures (see `arch::layout`) are in the first MiB, and a
/// kernel starts at the second.
pub const SMALLEST: u64 = 2 << 20;

/// Why there is no RAM of that size.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum RamError {
    #[error("{0} bytes of guest memory are too few: the least is {SMALLEST}")]
    TooSmall(u64),
    #[error("{0} bytes of guest memory are not a multiple of the page size, {PAGE_SIZE}")]
    Unaligned(u64),
    #[error("{asked} bytes of guest memory are more than the {host} bytes that this host has, swap included")]
    MoreThanHost { asked: u64, host: u64 },
    #[error("cannot {what} for {size} bytes of guest memory")]
    Os { what: &'static str, size: u64, source: io::Error },
}

impl Failure for RamError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }

    fn hint(&self) -> Option<String> {
        match self {
            RamError::TooSmall(_) => Some("a stock Linux kernel wants 128M or more".into()),
            RamError::Unaligned(size) => {
                let below = size / PAGE_SIZE * PAGE_SIZE;
                Some(format!("the nearest sizes are {below} and {}", below.saturating_add(PAGE_SIZE)))
            }
            RamError::MoreThanHost { .. } => None,
            RamError::Os { source, .. } if source.raw_os_error() == Some(libc::EFBIG) => {
                Some("guest memory is a file: raise the limit of file sizes (`ulimit -f`)".into())
            }
            RamError::Os { .. } => Some("try a smaller --memory, or look at `ulimit -v`".into()),
        }
    }
}

/// One piece of RAM, for a KVM slot and for vhost-user's memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Where the guest sees it.
    pub guest: GuestRange,
    /// Where it is mapped in this process, until the [`Ram`] is dropped.
    pub host: *mut u8,
    /// Where it starts in [`Ram::file`].
    pub file_offset: u64,
}

/// The guest's RAM. Unmapped when the last clone of [`Ram::memory`] is gone.
#[derive(Debug)]
pub struct Ram {
    /// The memfd behind all of it.
    pub file: Arc<File>,
    memory: GuestMemoryMmap,
    /// The pieces, by rising guest address.
    pub regions: Vec<RamRegion>,
}

/// Splits `size` bytes into guest ranges: from 0 up to `gap_start`, the rest from `gap_end` on.
fn split(size: u64, gap_start: u64, gap_end: u64) -> Vec<GuestRange> {
    let low = size.min(gap_start);
    [GuestRange::new(0, low), GuestRange::new(gap_end, size - low)].into_iter().flatten().collect()
}

/// Where `size` bytes of RAM are, which leave the addresses from `gap_start` to `gap_end` free.
pub fn ranges(size: u64, gap_start: u64, gap_end: u64) -> Result<Vec<GuestRange>, RamError> {
    check_size(size, u64::MAX)?;
    Ok(split(size, gap_start, gap_end))
}

impl Ram {
    /// Makes `size` bytes of RAM that leave the addresses from `gap_start` to `gap_end` free. No page is
    /// accessed yet, so none is resident.
    pub fn new(size: u64, gap_start: u64, gap_end: u64) -> Result<Ram, RamError> {
        check_size(size, host_memory())?;
        let os = |what| move |source| RamError::Os { what, size, source };
        let file = Arc::new(sealed_memfd("guest-ram", size).map_err(os("make a memfd"))?);
        let ranges = split(size, gap_start, gap_end);
        let places = ranges.iter().zip([0, ranges[0].len()]);
        let mappings = places.clone().map(|(guest, file_offset)| {
            let file = FileOffset::from_arc(Arc::clone(&file), file_offset);
            (GuestAddress(guest.start()), guest.len() as usize, Some(file))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(mappings)
            .map_err(|error| os("map addresses")(io::Error::other(error)))?;
        let mappings = places.zip(memory.iter());
        let regions = mappings.map(|((&guest, file_offset), mapping)| {
            ask_for_huge_pages(mapping.as_ptr(), mapping.size());
            RamRegion { guest, host: mapping.as_ptr(), file_offset }
        });
        Ok(Ram { regions: regions.collect(), file, memory })
    }

    /// Access to RAM by guest physical address, to load the kernel and its tables.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The first address after the RAM below the gap.
    pub fn low_end(&self) -> u64 {
        self.regions[0].guest.len()
    }

    /// The first address after all RAM.
    pub fn end(&self) -> u64 {
        let last = self.regions[self.regions.len() - 1].guest;
        last.start() + last.len()
    }
}

/// Asks for huge pages where the host's administrator lets programs ask (`shmem_enabled` is `advise`).
fn ask_for_huge_pages(start: *mut u8, len: usize) {
    // SAFETY: the range is a mapping of the caller's; the advice does not change what is in it.
    if let Err(error) = unsafe { madvise(start.cast(), len, Advice::LinuxHugepage) } {
        log::debug!("no huge pages for guest memory: {error}");
    }
}

fn check_size(size: u64, host: u64) -> Result<(), RamError> {
    if size < SMALLEST {
        Err(RamError::TooSmall(size))
    } else if !size.is_multiple_of(PAGE_SIZE) {
        Err(RamError::Unaligned(size))
    } else if size > host {
        Err(RamError::MoreThanHost { asked: size, host })
    } else {
        Ok(())
    }
}

/// The host's memory and swap in bytes.
fn host_memory() -> u64 {
    let info = sysinfo();
    info.totalram.saturating_add(info.totalswap).saturating_mul(u64::from(info.mem_unit))
}

/// An anonymous file of `size` bytes that can neither grow nor shrink, ever.
fn sealed_memfd(name: &str, size: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_leaves_the_gap_free() {
        let ranges = |size| -> Vec<(u64, u64)> {
            split(size, 3 * GIB, 4 * GIB).iter().map(|range| (range.start(), range.len())).collect()
        };
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ranges(3 * GIB + 4096), [(0, 3 * GIB), (4 * GIB, 4096)]);
        assert_eq!(ranges(6 * GIB), [(0, 3 * GIB), (4 * GIB, 3 * GIB)]);
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused_with_their_numbers() {
        let message = |size, host| check_size(size, host).unwrap_err().to_string();
        assert!(message(0, GIB).starts_with("0 bytes of guest memory are too few"));
        assert!(message(GIB + 1, 2 * GIB).contains("1073741825 bytes of guest memory are not a multiple"));
        assert!(
            message(2 * GIB, GIB).contains("2147483648 bytes of guest memory are more than the 1073741824")
        );
        assert!(check_size(GIB, GIB).is_ok());
    }

    #[test]
    fn both_pieces_are_one_file_that_cannot_change_its_size() {
        // A gap at 4 MiB stands in for the one at 3 GiB.
        let ram = Ram::new(6 << 20, 4 << 20, 16 << 20).unwrap();
        let offsets: Vec<_> = ram.regions.iter().map(|region| region.file_offset).collect();
        assert_eq!(offsets, [0, 4 << 20]);
        assert_eq!((ram.low_end(), ram.end()), (4 << 20, 18 << 20));
        ram.memory().write_obj(0x1234_u16, GuestAddress(16 << 20)).unwrap();
        let mut bytes = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&*ram.file, &mut bytes, 4 << 20).unwrap();
        assert_eq!(u16::from_le_bytes(bytes), 0x1234);
        assert!(ram.memory().write_obj(0_u8, GuestAddress(4 << 20)).is_err());
        for size in [0, 5 << 20, 7 << 20] {
            let error = ram.file.set_len(size).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size}");
        }
    }
}
