//! Guest RAM: one sealed memfd, seen by the guest below and above the gap that ends at 4 GiB.
//!
//! The memory is always shareable, because every device is another process. It is sealed against growing and
//! shrinking, so that no back-end can take pages of it away. Called by the set-up in `vmm`; `vhost_user`
//! sends the regions and the file to back-ends.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::io::retry_on_intr;
use rustix::mm::{Advice, madvise};
use rustix::system::sysinfo;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::pages::OwnedPages;
use super::{Access, GuestRange, PAGE_SIZE};
use crate::report::{Failure, STATUS_USAGE};

/// The least RAM that is accepted: the boot structures (see `arch::layout`) are in the first MiB, and a
/// kernel starts at the second.
pub const SMALLEST: u64 = 2 << 20;

/// The size of a huge page: what one entry of a page directory maps.
const HUGE_PAGE: u64 = 2 << 20;

/// Why there is no RAM of that size.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum RamError {
    #[error("{0} bytes of guest memory are too few: the least is {SMALLEST}")]
    TooSmall(u64),
    #[error("{0} bytes of guest memory are not a multiple of the page size, {PAGE_SIZE}")]
    Unaligned(u64),
    #[error("{0} bytes of guest memory are not a multiple of the size of a huge page, {HUGE_PAGE}")]
    UnalignedHuge(u64),
    #[error(
        "{size} bytes of guest memory are {wanted} huge pages, and of the {total} of this host {free} are free",
        wanted = .size / HUGE_PAGE
    )]
    FewHugePages { size: u64, total: u64, free: u64 },
    #[error("the host does not give {} huge pages for {size} bytes of guest memory", .size / HUGE_PAGE)]
    RefusedHugePages { size: u64, source: io::Error },
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
            RamError::TooSmall(_) => Some("a stock Linux kernel needs 128M or more".into()),
            RamError::Unaligned(size) => Some(nearest(*size, PAGE_SIZE)),
            RamError::UnalignedHuge(size) => Some(nearest(*size, HUGE_PAGE)),
            RamError::FewHugePages { size, total, free } => {
                let enough = total + (size / HUGE_PAGE).saturating_sub(*free);
                Some(format!("make more of them: sysctl vm.nr_hugepages={enough}"))
            }
            RamError::RefusedHugePages { .. } => {
                Some("the limits of its cgroup may be too low: hugetlb.2MB.max, cpuset.mems".into())
            }
            RamError::MoreThanHost { .. } => None,
            RamError::Os { source, .. } if source.raw_os_error() == Some(libc::EFBIG) => {
                Some("guest memory is a file: raise the limit of file sizes (`ulimit -f`)".into())
            }
            RamError::Os { .. } => Some("try a smaller --memory, or look at `ulimit -v`".into()),
        }
    }
}

fn nearest(size: u64, page: u64) -> String {
    let below = size / page * page;
    format!("the nearest sizes are {below} and {}", below.saturating_add(page))
}

/// One piece of RAM, for a KVM slot and for vhost-user's memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Where the guest sees it.
    pub guest: GuestRange,
    /// Where it is mapped in this process, until the process ends.
    pub host: *mut u8,
    /// Where it starts in [`Ram::file`].
    pub file_offset: u64,
}

/// The guest's RAM. It stays mapped until the process ends.
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
    /// accessed yet, so none is resident. With `hugetlb` all are of the host's pool of huge pages, and are
    /// resident.
    pub fn new(size: u64, hugetlb: bool, gap_start: u64, gap_end: u64) -> Result<Ram, RamError> {
        check_size(size, host_memory())?;
        if hugetlb && !size.is_multiple_of(HUGE_PAGE) {
            return Err(RamError::UnalignedHuge(size));
        }
        let os = |what| move |source| RamError::Os { what, size, source };
        let file = Arc::new(sealed_memfd("guest-ram", size, hugetlb).map_err(os("make a memfd"))?);
        let ranges = split(size, gap_start, gap_end);
        // What is free before the first piece takes of it.
        let pool = if hugetlb { pool() } else { None };
        let (mut regions, mut mappings) = (Vec::new(), Vec::new());
        for (&guest, file_offset) in ranges.iter().zip([0, ranges[0].len()]) {
            let host = map_permanently(&file, file_offset, guest.len());
            let host = host.map_err(|error| match pool {
                Some((total, free)) if free < size / HUGE_PAGE => {
                    RamError::FewHugePages { size, total, free }
                }
                _ => os("map addresses")(error),
            })?;
            if hugetlb {
                // The mapping has reserved them. A cgroup or cpuset may refuse them all the same, which
                // would be a SIGBUS at the first access.
                retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), file_offset, guest.len()))
                    .map_err(|error| RamError::RefusedHugePages { size, source: error.into() })?;
            } else {
                ask_for_huge_pages(host, guest.len() as usize);
            }
            let builder = MmapRegionBuilder::new(guest.len() as usize)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), file_offset));
            // SAFETY: the range was just mapped, and is never unmapped.
            let mapping = unsafe { builder.with_raw_mmap_pointer(host) }.build();
            let mapping = mapping.map_err(|error| os("map addresses")(io::Error::other(error)))?;
            mappings.extend(GuestRegionMmap::new(mapping, GuestAddress(guest.start())));
            regions.push(RamRegion { guest, host, file_offset });
        }
        let memory = GuestMemoryMmap::from_regions(mappings)
            .map_err(|error| os("map addresses")(io::Error::other(error)))?;
        Ok(Ram { regions, file, memory })
    }

    /// Puts huge pages behind the RAM from `start` up to `end`, and what else is in the same huge pages. All
    /// of it is resident then. Where the host cannot, the small pages stay. Called before anything is in RAM.
    ///
    /// MADV_COLLAPSE (Linux 6.1) needs no setting of the host, unlike MADV_HUGEPAGE.
    pub fn collapse(&self, start: u64, end: u64) {
        for region in &self.regions {
            let first = region.guest.start();
            let last = first + region.guest.len() / HUGE_PAGE * HUGE_PAGE;
            let region_end = first + region.guest.len();
            if start < region_end && last < end.min(region_end) {
                log::info!("no huge page for guest memory at {last:#x}-{:#x}: too short", region_end - 1);
            }
            let start = start.max(first) / HUGE_PAGE * HUGE_PAGE;
            let end = end.min(last).next_multiple_of(HUGE_PAGE);
            if start >= end {
                continue;
            }
            // A hole in a file does not collapse: each huge page needs one page to begin with.
            for page in (start..end).step_by(HUGE_PAGE as usize) {
                let written = self.memory.write_obj(0_u8, GuestAddress(page));
                written.expect("invariant: the page is in RAM");
            }
            let (at, len) = (region.host.wrapping_add((start - first) as usize), (end - start) as usize);
            // SAFETY: the range is a mapping of this value's; the advice does not change what is in it.
            if unsafe { libc::madvise(at.cast(), len, libc::MADV_COLLAPSE) } != 0 {
                let error = io::Error::last_os_error();
                log::info!("no huge pages for guest memory at {start:#x}-{:#x}: {error}", end - 1);
            }
        }
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

/// Maps `len` bytes of the file, from `offset` on, at an address that is a multiple of [`HUGE_PAGE`].
fn map_permanently(file: &File, offset: u64, len: u64) -> io::Result<*mut u8> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let mut before = OwnedPages::reserve(len.saturating_add(HUGE_PAGE as usize))?;
    let mut pages = before.split_off(before.address().align_offset(HUGE_PAGE as usize));
    let _after = pages.split_off(len);
    pages.replace_with_file(file.as_fd(), offset, Access::ReadWrite)?;
    Ok(ManuallyDrop::new(pages).address())
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

/// The number of huge pages in the host's pool, and how many of them are neither used nor reserved.
fn pool() -> Option<(u64, u64)> {
    let number = |name| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", HUGE_PAGE >> 10);
        std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
    Some((number("nr_hugepages")?, free))
}

/// The host's memory and swap in bytes.
fn host_memory() -> u64 {
    let info = sysinfo();
    info.totalram.saturating_add(info.totalswap).saturating_mul(u64::from(info.mem_unit))
}

/// An anonymous file of `size` bytes that can neither grow nor shrink, ever.
fn sealed_memfd(name: &str, size: u64, hugetlb: bool) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    flags.set(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, hugetlb);
    let file = File::from(memfd_create(name, flags)?);
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
        let error = Ram::new((4 << 20) + 4096, true, GIB, 4 * GIB).unwrap_err();
        assert!(
            error.to_string().contains("4198400 bytes of guest memory are not a multiple of the size of a")
        );
        assert_eq!(error.hint().unwrap(), "the nearest sizes are 4194304 and 6291456");
        let error = RamError::FewHugePages { size: 256 << 20, total: 100, free: 60 };
        assert!(error.to_string().contains("are 128 huge pages, and of the 100 of this host 60 are free"));
        assert!(error.hint().unwrap().ends_with("vm.nr_hugepages=168"));
    }

    #[test]
    fn both_pieces_are_one_file_that_cannot_change_its_size() {
        // A gap at 4 MiB stands in for the one at 3 GiB.
        let ram = Ram::new(6 << 20, false, 4 << 20, 16 << 20).unwrap();
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

    #[test]
    fn huge_pages_are_whole_and_where_they_were_asked_for() {
        use std::os::unix::fs::MetadataExt;

        let blocks = |ram: &Ram| ram.file.metadata().unwrap().blocks() * 512;
        // RAM ends in the middle of a huge page.
        let ram = Ram::new(9 << 20, false, 4 << 20, 16 << 20).unwrap();
        assert!(ram.regions.iter().all(|region| region.host.addr().is_multiple_of(HUGE_PAGE as usize)));
        ram.collapse(3 << 20, (16 << 20) + 1);
        let resident = blocks(&ram);
        if resident < HUGE_PAGE {
            eprintln!("skipped: this host has no huge pages for a memfd");
            return;
        }
        assert_eq!(resident, 2 * HUGE_PAGE);
        ram.collapse(0, ram.end());
        assert_eq!(blocks(&ram), 4 * HUGE_PAGE);
        ram.memory().write_obj(1_u8, GuestAddress((21 << 20) - 1)).unwrap();
    }
}
