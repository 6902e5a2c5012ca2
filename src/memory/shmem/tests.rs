mod recorder;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;

use recorder::Guest;

use super::*;

const PAGE: u64 = PAGE_SIZE;

pub(in crate::memory) struct Bench {
    pub guest: Arc<Guest>,
    pub shmem: SharedMemory,
    pub file: File,
    /// The same, as a request brings it.
    fd: Arc<OwnedFd>,
}

/// Regions 0 and 7 of 16 pages each; a file whose page n is full of n + 1, 32 pages long.
pub(in crate::memory) fn bench() -> Bench {
    bench_with(Limits { mappings: 100, bytes: u64::MAX, foreign_files: false, prefault: false })
}

fn bench_with(limits: Limits) -> Bench {
    let guest = Arc::new(Guest::default());
    let mapper = Arc::clone(&guest);
    let mut windows = WindowAllocator::new(1 << 32, 1 << 39);
    let sizes = [(0, 16 * PAGE), (3, 0), (7, 16 * PAGE)];
    let shmem = SharedMemory::new("device", sizes, &mut windows, mapper, limits).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..32u8 {
        file.write_all(&[page + 1; PAGE as usize]).unwrap();
    }
    let fd = Arc::new(file.try_clone().unwrap().into());
    Bench { guest, shmem, file, fd }
}

impl Bench {
    pub fn request(&self, shmid: u8, shm_offset: u64, len: u64, file_offset: u64) -> MapRequest<'_> {
        MapRequest { shmid, shm_offset, len, file: &self.fd, file_offset, access: Access::ReadOnly }
    }

    pub fn map(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        self.shmem.map(&self.request(shmid, shm_offset, len, 0)).map(drop)
    }

    pub fn region(&self, shmid: u8) -> GuestRange {
        self.shmem.region(shmid).unwrap()
    }

    fn sees(&self, shmid: u8) -> Vec<(u64, u64)> {
        let list = self.guest.sees(self.region(shmid));
        list.iter().map(|&(offset, len, _)| (offset, len)).collect()
    }

    pub fn reads(&self, shmid: u8, offset: u64) -> Option<u8> {
        self.guest.read(self.region(shmid).start() + offset)
    }

    /// What /proc/self/maps says of the windows: first address, last, and the rest of the line. Their
    /// neighbours are other tests' memory, which the kernel may merge with what is at the edge.
    pub fn vmas(&self) -> Vec<(u64, u64, String)> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        let mut list = Vec::new();
        for window in self.shmem.windows.values() {
            let start = window.whole().host() as u64;
            let end = start + window.guest().len();
            for line in maps.lines() {
                let (range, rest) = line.split_once(' ').unwrap();
                let (first, last) = range.split_once('-').unwrap();
                let clipped = (parse(first).max(start), parse(last).min(end));
                if clipped.0 < clipped.1 {
                    list.push((clipped.0, clipped.1, rest.to_string()));
                }
            }
        }
        list
    }
}

#[test]
fn what_is_unmapped_is_reserved_again_and_its_neighbours_are_left_alone() {
    // SHM-52, SHM-55, SHM-78
    let bench = bench();
    for page in [0, 2, 9] {
        bench.shmem.map(&bench.request(0, page * PAGE, PAGE, page * PAGE)).unwrap();
    }
    // Between two of them, behind the last; with room on either side, on both, or none.
    for (first, pages) in [(1, 1), (3, 6), (3, 2), (5, 2), (7, 2), (10, 6), (12, 2)] {
        let before = (bench.vmas(), bench.sees(0));
        bench.map(0, first * PAGE, pages * PAGE).unwrap();
        bench.shmem.unmap(0, first * PAGE, pages * PAGE).unwrap();
        assert_eq!((bench.vmas(), bench.sees(0)), before, "{pages} from {first} on");
        let left: Vec<_> = [0, 2, 9].map(|page| bench.reads(0, page * PAGE)).into();
        assert_eq!(left, [Some(1), Some(3), Some(10)], "{pages} from {first} on");
    }
}

#[test]
fn a_mapping_stays_where_the_machine_keeps_its_slot() {
    let bench = bench();
    bench.map(0, 0, PAGE).unwrap();
    bench.guest.deletes_no_slot.store(true, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap_err().errno(), libc::EIO);
    assert_eq!((bench.reads(0, 0), bench.shmem.mappings().len()), (Some(1), 1));
    // SHM-56: it has pages of nothing then.
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    assert_eq!((bench.shmem.mappings().len(), bench.guest.idle()), (0, 1));
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap_err().errno(), libc::EIO);
    bench.guest.deletes_no_slot.store(false, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap(), 0);
    assert_eq!(bench.guest.idle(), 0);
}

#[test]
fn a_slot_outlives_its_mapping_over_pages_that_cannot_be_accessed() {
    // SHM-56, SHM-102
    let bench = bench();
    let host = bench.shmem.windows[&0].whole().host();
    for page in [0, 2, 4] {
        bench.map(0, page * PAGE, PAGE).unwrap();
    }
    let before = bench.shmem.changes(bench.region(0).start());
    bench.shmem.unmap(0, 2 * PAGE, PAGE).unwrap();
    assert_ne!(bench.shmem.changes(bench.region(0).start()), before);
    assert_eq!((bench.guest.idle(), bench.sees(0)), (1, vec![(0, PAGE), (4 * PAGE, PAGE)]));
    let at = host.wrapping_add(2 * PAGE as usize) as u64;
    let maps = bench.vmas();
    let (.., what) = maps.iter().find(|&&(start, end, _)| start <= at && at < end).unwrap();
    assert!(what.starts_with("---p"), "{what}");
    // The same range, and another one over it.
    bench.map(0, 2 * PAGE, PAGE).unwrap();
    assert_eq!(bench.reads(0, 2 * PAGE), Some(1));
    bench.shmem.unmap(0, 2 * PAGE, PAGE).unwrap();
    bench.map(0, PAGE, 3 * PAGE).unwrap();
    assert_eq!((bench.guest.idle(), bench.reads(0, 2 * PAGE)), (0, Some(2)));
    // A reset leaves none.
    bench.shmem.unmap(0, PAGE, 3 * PAGE).unwrap();
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    assert_eq!(bench.guest.idle(), 2);
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap(), 1);
    assert_eq!(bench.guest.idle(), 0);
    // Nor does the end.
    bench.map(0, 0, PAGE).unwrap();
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    assert_eq!(bench.guest.idle(), 1);
    drop(bench.shmem);
    assert_eq!(bench.guest.idle(), 0);
}

#[test]
fn a_device_that_takes_foreign_files_keeps_no_slot() {
    // SHM-86, SHM-102
    let bench = bench_with(Limits { mappings: 100, bytes: u64::MAX, foreign_files: true, prefault: false });
    bench.map(0, 0, PAGE).unwrap();
    bench.guest.deletes_no_slot.store(true, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap(0, 0, PAGE).unwrap_err().errno(), libc::EIO);
    bench.guest.deletes_no_slot.store(false, Ordering::Relaxed);
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    assert_eq!((bench.guest.idle(), bench.sees(0)), (0, vec![]));
}

#[test]
fn what_was_unmapped_goes_by_the_piece_or_where_the_guest_touches_it() {
    // SHM-102
    let bench = bench();
    for page in (0..16).step_by(2) {
        for shmid in [0, 7] {
            bench.map(shmid, page * PAGE, PAGE).unwrap();
            bench.shmem.unmap(shmid, page * PAGE, PAGE).unwrap();
        }
    }
    let start = bench.region(0).start();
    assert!(bench.shmem.retire_at(start + 2 * PAGE + 9));
    assert!(!bench.shmem.retire_at(start + 2 * PAGE + 9), "it is gone");
    assert!(!bench.shmem.retire_at(start + PAGE) && !bench.shmem.retire_at(start - 1));
    assert_eq!(bench.guest.idle(), 15);
    let pieces = [10, 10, 10].map(|most| bench.shmem.retire(most).unwrap());
    assert_eq!((pieces, bench.guest.idle()), ([10, 5, 0], 0));
}

#[test]
fn nothing_is_left_when_everything_is_unmapped_or_dropped() {
    // SHM-69, SHM-78
    let bench = bench();
    let untouched = bench.vmas();
    for shmid in [0, 7] {
        for page in (0..16).step_by(2) {
            bench.map(shmid, page * PAGE, PAGE).unwrap();
        }
    }
    let reached = || {
        let places = [0, 7].map(|shmid| bench.region(shmid).start());
        let places = places.iter().flat_map(|start| (0..16).map(move |page| start + page * PAGE));
        places.filter(|&at| bench.shmem.access_at(at).is_some()).count()
    };
    assert_eq!((bench.shmem.mappings().len(), reached()), (16, 16));
    assert!(bench.shmem.has_mappings());
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap(), 16);
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap(), 0);
    assert_eq!((bench.shmem.has_mappings(), reached()), (false, 0));
    assert_eq!((bench.sees(0), bench.sees(7)), (vec![], vec![]));
    assert_eq!(bench.vmas(), untouched, "reserved again, as one piece each");
    bench.map(0, 0, PAGE).unwrap();
    drop(bench.shmem);
    assert_eq!(bench.guest.count(), 0);
}

#[test]
fn what_goes_missing_under_a_mapping_reads_as_zero_however_often_that_happens() {
    // SHM-45
    let bench = bench();
    bench.shmem.map(&bench.request(0, 0, 8 * PAGE, 2 * PAGE)).unwrap();
    bench.shmem.map(&bench.request(7, 0, 2 * PAGE, 0)).unwrap();
    let pages = |bench: &Bench| (0..8).map(|page| bench.reads(0, page * PAGE)).collect::<Vec<_>>();
    let region = bench.region(0);
    let guest = GuestRange::new(region.start(), 8 * PAGE).unwrap();
    let provide = |at| bench.shmem.provide(at, Access::ReadOnly);
    assert_eq!(provide(region.start() + 7 * PAGE), Some(Page::Present));
    for (number, (file_pages, left)) in [(8, 6), (7, 5), (3, 1), (2, 0)].into_iter().enumerate() {
        bench.file.set_len(file_pages * PAGE).unwrap();
        // Addresses of present pages and beside the mapping fill nothing.
        if left > 0 {
            assert_eq!(provide(region.start() + left * PAGE - 1), Some(Page::Present));
        }
        assert_eq!((provide(region.start() + 8 * PAGE), provide(region.start() - 1)), (None, None));
        let len = (8 - left) * PAGE;
        let filled = Filled { is_first: number == 0, shmid: 0, guest, len };
        let touched = region.start() + left * PAGE + 5;
        assert_eq!(provide(touched), Some(Page::Filled(filled)));
        let expected: Vec<_> =
            (0..8).map(|page| Some(if page < left { page as u8 + 3 } else { 0 })).collect();
        assert_eq!(pages(&bench), expected, "{file_pages} pages left of the file");
        assert_eq!(bench.shmem.mappings()[0].filled, len);
        assert_eq!(provide(touched), Some(Page::Present));
        let total = bench.shmem.filled();
        assert_eq!((total.mappings, total.bytes), (1, len));
    }
    assert_eq!(bench.reads(7, PAGE), Some(2));
    // SHM-44: a page that the guest did not touch is the file's when it grows.
    bench.file.set_len(PAGE).unwrap();
    assert_eq!(bench.reads(7, PAGE), None);
    bench.file.set_len(2 * PAGE).unwrap();
    assert_eq!(bench.reads(7, PAGE), Some(0));
    bench.shmem.unmap(0, 0, 8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 0), None);
}

#[test]
fn no_zeroes_come_where_a_mapping_is_removed_or_exchanged_meanwhile() {
    // SHM-24, SHM-45, SHM-77. A vCPU found its page missing, and only then gets the lock.
    let bench = bench();
    bench.map(0, 0, PAGE).unwrap();
    bench.map(0, 2 * PAGE, PAGE).unwrap();
    bench.file.set_len(0).unwrap();
    let error = io::Error::from_raw_os_error(libc::EFAULT);
    let late = |page: u64| bench.shmem.replace_missing((0, page * PAGE), 0, &error);
    // As in the middle of an UNMAP.
    let removed = bench.shmem.span((0, 0), PAGE).unwrap();
    {
        let state = &mut *bench.shmem.lock();
        let mapping = state.ledger.mappings.get_mut(&(0, 0)).unwrap();
        bench.shmem.hide(removed, &mut mapping.kept, true).unwrap();
    }
    removed.clear().unwrap();
    assert_eq!(late(0), None);
    assert!(!removed.read(0, &mut [0]), "inaccessible");
    // As in the middle of a MAP that takes an old mapping's place, whose own file is long enough.
    let exchanged = bench.shmem.span((0, 2 * PAGE), PAGE).unwrap();
    let new = tempfile::tempfile().unwrap();
    new.write_all_at(&[7; PAGE as usize], 0).unwrap();
    let info = FileInfo::of(new.as_fd(), bench.shmem.origins.of(new.as_fd()).unwrap()).unwrap();
    let begin = || bench.shmem.set_exchanged((0, 2 * PAGE), true);
    exchanged.exchange(new.as_fd(), info, 0, Access::ReadOnly, begin).unwrap();
    assert_eq!(late(2), Some(Page::Present));
    assert_eq!(bench.reads(0, 2 * PAGE), Some(7));
    // Where the exchange failed, its own file counts again.
    bench.shmem.set_exchanged((0, 2 * PAGE), false);
    assert!(matches!(late(2), Some(Page::Filled(_))));
}

#[test]
fn a_file_that_was_placed_before_a_reset_is_not_shown_after_it() {
    // SHM-71: the reset did not wait for the thread that maps.
    let bench = bench();
    let request = bench.request(0, 0, PAGE, 0);
    let (fd, span) = (request.file.as_fd(), bench.shmem.span((0, 0), PAGE).unwrap());
    let info = FileInfo::of(fd, bench.shmem.origins.of(fd).unwrap()).unwrap();
    span.place(fd, info, 0, Access::ReadOnly).unwrap();
    bench.shmem.close_gate();
    let kept = bench.shmem.lock().files.keep(request.file, info);
    assert!(matches!(bench.shmem.show(&request, span, kept, false), Err(ShmemError::GateClosed)));
    assert_eq!((bench.sees(0), bench.shmem.mappings().len()), (vec![], 0));
}

#[test]
fn an_access_that_kvm_passed_on_meets_what_is_there_now() {
    // SHM-45
    let bench = bench();
    let start = bench.region(0).start();
    let read = |at| {
        let mut byte = [0x55];
        bench.shmem.read(at, &mut byte).then_some(byte[0])
    };
    bench.shmem.map(&bench.request(0, PAGE, 2 * PAGE, 0)).unwrap();
    let access = |at| bench.shmem.access_at(at);
    assert_eq!((access(start), access(start + 3 * PAGE)), (None, None));
    assert_eq!(access(start + PAGE), access(start + 3 * PAGE - 1));
    assert!(access(start + PAGE).is_some());
    assert_eq!((read(start), read(start + 2 * PAGE)), (None, Some(2)));
    // SHM-38
    assert!(!bench.shmem.write(start + PAGE, &[9]));
    assert_eq!(bench.shmem.provide(start + PAGE, Access::ReadWrite), Some(Page::Present));
    bench.file.set_len(PAGE).unwrap();
    assert_eq!(read(start + 2 * PAGE), None);
    assert!(matches!(
        bench.shmem.provide(start + 2 * PAGE, Access::ReadOnly),
        Some(Page::Filled(Filled { len: PAGE, .. }))
    ));
    assert_eq!(read(start + 2 * PAGE), Some(0));
    bench.shmem.unmap(0, PAGE, 2 * PAGE).unwrap();
    assert_eq!((access(start + PAGE), read(start + PAGE)), (None, None));

    let request = MapRequest { access: Access::ReadWrite, ..bench.request(0, 0, PAGE, 0) };
    bench.shmem.map(&request).unwrap();
    assert!(bench.shmem.write(start + 8, &[9]));
    let mut byte = [0];
    bench.file.read_exact_at(&mut byte, 8).unwrap();
    assert_eq!((byte, read(start + 8)), ([9], Some(9)));
}

#[test]
fn one_descriptor_is_kept_for_a_file_as_long_as_it_is_mapped() {
    // SHM-46
    let bench = bench();
    let kept = || {
        let of_file = |entry: io::Result<fs::DirEntry>| {
            let target = fs::metadata(entry.unwrap().path()).ok()?;
            Some(target.ino())
        };
        let inode = bench.file.metadata().unwrap().ino();
        let open = fs::read_dir("/proc/self/fd").unwrap().filter_map(of_file);
        // Two are the bench's own.
        open.filter(|&other| other == inode).count() - 2
    };
    // Each request brings a descriptor of its own.
    let map = |page, pages| {
        let file = Arc::new(bench.file.try_clone().unwrap().into());
        let request = MapRequest { file: &file, ..bench.request(0, page * PAGE, pages * PAGE, 0) };
        bench.shmem.map(&request).map(drop)
    };
    let mut seen = vec![kept()];
    for page in [0, 2] {
        map(page, 1).unwrap();
        seen.push(kept());
    }
    map(1, 16).unwrap_err();
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    seen.push(kept());
    bench.shmem.unmap_all(|| {}).unwrap();
    seen.push(kept());
    assert_eq!(seen, [0, 1, 1, 1, 0]);
}

/// What is prefaulted of a region's first 6 MiB, as offsets and lengths in MiB, where the file has `len`
/// bytes and the gate is closed after `parts` of it. The file's blocks on its disk, before and after.
fn prefaulted(len: u64, parts: usize) -> (Vec<(u64, u64)>, [u64; 2]) {
    let guest = Arc::new(Guest::default());
    let mut windows = WindowAllocator::new(1 << 32, 1 << 39);
    let limits = Limits { mappings: 100, bytes: u64::MAX, foreign_files: false, prefault: true };
    let shmem = SharedMemory::new("device", [(0, 8 << 20)], &mut windows, guest.clone(), limits).unwrap();
    let shmem = Arc::new(shmem);
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    let before = file.metadata().unwrap().blocks();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (list, gate, region) = (Arc::clone(&seen), Arc::downgrade(&shmem), shmem.region(0).unwrap());
    *guest.at_prefault.lock().unwrap() = Some(Box::new(move |range: GuestRange| {
        let mut list = list.lock().unwrap();
        list.push(((range.start() - region.start()) >> 20, range.len() >> 20));
        if list.len() == parts {
            gate.upgrade().unwrap().close_gate();
        }
    }));
    let fd = Arc::new(file.try_clone().unwrap().into());
    let access = Access::ReadWrite;
    let request = MapRequest { shmid: 0, shm_offset: 0, len: 6 << 20, file: &fd, file_offset: 0, access };
    shmem.map(&request).unwrap();
    let list = seen.lock().unwrap().clone();
    (list, [before, file.metadata().unwrap().blocks()])
}

#[test]
fn prefaulting_ends_at_the_end_of_the_file_and_at_a_reset() {
    // SHM-105
    let (parts, [before, after]) = prefaulted(6 << 20, usize::MAX);
    assert_eq!(parts, [(0, 2), (2, 2), (4, 2)]);
    let on = rustix::fs::statfs(std::env::temp_dir()).unwrap();
    assert!(before == after || on.f_type == libc::TMPFS_MAGIC, "holes of a disk's file stay holes");
    assert_eq!(prefaulted(5 << 20, usize::MAX).0, [(0, 2), (2, 2)]);
    assert_eq!(prefaulted(6 << 20, 1).0, [(0, 2)]);
}
