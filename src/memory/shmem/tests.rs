#[path = "../../../tests/support/recorder.rs"]
mod recorder;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use recorder::Guest;

use super::*;

const PAGE: u64 = PAGE_SIZE;

/// Where the fake machine's windows may go.
const FIRST: u64 = 0x1_0000_0000;
const LIMIT: u64 = 1 << 39;

pub(super) struct Bench {
    guest: Arc<Guest>,
    pub(super) shmem: SharedMemory,
    pub(super) file: File,
}

/// Regions 0 and 7 of 16 pages each; a file whose page n is full of n + 1, 32 pages long.
pub(super) fn bench() -> Bench {
    let guest = Arc::new(Guest::default());
    let mapper = Arc::clone(&guest);
    let mut windows = WindowAllocator::new(FIRST, LIMIT);
    let sizes = [(0, 16 * PAGE), (3, 0), (7, 16 * PAGE)];
    let shmem = SharedMemory::new(sizes, &mut windows, mapper, 100).unwrap();
    Bench { guest, shmem, file: numbered(32) }
}

/// A file whose page n is full of n + 1.
fn numbered(pages: u8) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all(&[page + 1; PAGE as usize]).unwrap();
    }
    file
}

impl Bench {
    pub(super) fn request(&self, shmid: u8, shm_offset: u64, len: u64, file_offset: u64) -> MapRequest<'_> {
        MapRequest { shmid, shm_offset, len, file: self.file.as_fd(), file_offset, access: Access::ReadOnly }
    }

    fn writable(&self) -> MapRequest<'_> {
        MapRequest { access: Access::ReadWrite, ..self.request(0, 0, PAGE, 0) }
    }

    fn map(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        self.shmem.map(&self.request(shmid, shm_offset, len, 0))
    }

    fn region(&self, shmid: u8) -> GuestRange {
        self.shmem.region(shmid).unwrap()
    }

    fn sees(&self, shmid: u8) -> Vec<(u64, u64)> {
        let list = self.guest.sees(self.region(shmid));
        list.iter().map(|&(offset, len, _)| (offset, len)).collect()
    }

    pub(super) fn reads(&self, shmid: u8, offset: u64) -> Option<u8> {
        self.guest.read(self.region(shmid).start() + offset)
    }

    /// `request` fails with `errno` and changes nothing.
    fn refused(&self, request: &MapRequest<'_>, errno: i32) {
        let before = (self.shmem.mappings(), self.sees(0), self.sees(7), vmas(&self.shmem));
        let error = self.shmem.map(request).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        let after = (self.shmem.mappings(), self.sees(0), self.sees(7), vmas(&self.shmem));
        assert_eq!(before, after, "{error}");
    }

    fn not_unmapped(&self, shmid: u8, offset: u64, len: u64) {
        let before = (self.shmem.mappings(), self.sees(0), self.sees(7), vmas(&self.shmem));
        let error = self.shmem.unmap(shmid, offset, len).unwrap_err();
        assert_eq!(error.errno(), libc::ENOENT, "{error}");
        let after = (self.shmem.mappings(), self.sees(0), self.sees(7), vmas(&self.shmem));
        assert_eq!(before, after, "{error}");
    }
}

/// What /proc/self/maps says of the windows: first address, last, and the rest of the line. Their neighbours
/// are other tests' memory, with which the kernel may join what is at the edge.
fn vmas(shmem: &SharedMemory) -> Vec<(u64, u64, String)> {
    let state = shmem.lock();
    let windows = state.regions.values().map(|region| {
        let start = region.window.whole().host() as u64;
        (start, start + region.window.guest().len())
    });
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let parse = |text| u64::from_str_radix(text, 16).unwrap();
    let mut list = Vec::new();
    for (start, end) in windows {
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

fn memfd(flags: u32) -> File {
    // SAFETY: the name is a C string, and the new descriptor is nobody else's.
    unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), flags | libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    }
}

#[test]
fn a_region_that_is_not_there_has_no_mappings() {
    // SHM-29
    let bench = bench();
    for shmid in [1, 3, 6, 8, 255] {
        assert_eq!(bench.shmem.region(shmid), None);
        bench.refused(&bench.request(shmid, 0, PAGE, 0), libc::ENOENT);
    }
}

#[test]
fn a_region_takes_its_size_and_no_byte_more() {
    let bench = bench();
    let size = 16 * PAGE;
    bench.refused(&bench.request(0, 0, 0, 0), libc::EINVAL); // SHM-30
    for (offset, len) in [
        (0, size + 1),
        (0, u64::MAX),
        (PAGE, size),
        (size, 1),
        (size - PAGE, PAGE + 1),
        (u64::MAX - (PAGE - 1), PAGE),
        (u64::MAX - (PAGE - 1), u64::MAX),
        (1 << 63, PAGE),
    ] {
        bench.refused(&bench.request(0, offset, len, 0), libc::ERANGE); // SHM-31, SHM-50
    }
    bench.map(0, size - PAGE, PAGE).unwrap(); // SHM-31
    bench.map(7, 0, size).unwrap();
    assert_eq!((bench.sees(0), bench.sees(7)), (vec![(size - PAGE, PAGE)], vec![(0, size)]));
}

#[test]
fn offsets_are_whole_pages_and_stay_where_a_file_can_be() {
    let bench = bench();
    for wrong in [1, 512, PAGE - 1, PAGE + 1] {
        bench.refused(&bench.request(0, wrong, PAGE, 0), libc::EINVAL); // SHM-33
        bench.refused(&bench.request(0, 0, PAGE, wrong), libc::EINVAL); // SHM-33
    }
    let last_page = u64::MAX - (PAGE - 1);
    for file_offset in [last_page, 1 << 63, i64::MAX as u64 & !(PAGE - 1)] {
        bench.refused(&bench.request(0, 0, PAGE, file_offset), libc::EOVERFLOW); // SHM-32
    }
    bench.refused(&bench.request(0, 0, 2 * PAGE, (1 << 63) - 2 * PAGE), libc::EOVERFLOW);
    bench.shmem.map(&bench.request(0, 0, PAGE, (1 << 63) - 2 * PAGE)).unwrap();
}

#[test]
fn a_length_that_is_no_whole_page_is_backed_by_one_and_named_as_it_was() {
    // SHM-34
    let bench = bench();
    bench.map(0, 0, 1).unwrap();
    bench.map(0, PAGE, PAGE + 1).unwrap();
    assert_eq!(bench.sees(0), [(0, PAGE), (PAGE, 2 * PAGE)]);
    bench.refused(&bench.request(0, 2 * PAGE, PAGE, 0), libc::EEXIST);
    bench.map(0, 3 * PAGE, PAGE).unwrap();
    bench.not_unmapped(0, 0, PAGE);
    bench.not_unmapped(0, PAGE, 2 * PAGE);
    bench.shmem.unmap(0, PAGE, PAGE + 1).unwrap();
    bench.shmem.unmap(0, 0, 1).unwrap();
    assert_eq!(bench.sees(0), [(3 * PAGE, PAGE)]);
}

#[test]
fn what_touches_a_live_mapping_is_refused_and_what_only_borders_on_it_is_not() {
    let bench = bench();
    bench.map(0, 4 * PAGE, 4 * PAGE).unwrap();
    for (first, pages) in [(4, 4), (3, 2), (7, 2), (5, 1), (4, 1), (7, 1), (0, 5), (3, 6), (0, 16)] {
        // SHM-35
        bench.refused(&bench.request(0, first * PAGE, pages * PAGE, 0), libc::EEXIST);
        // SHM-36: another region's offsets are its own.
        bench.map(7, first * PAGE, pages * PAGE).unwrap();
        bench.shmem.unmap(7, first * PAGE, pages * PAGE).unwrap();
    }
    bench.map(0, 3 * PAGE, PAGE).unwrap(); // SHM-36
    bench.map(0, 8 * PAGE, PAGE).unwrap();
    let expected = [(3 * PAGE, PAGE), (4 * PAGE, 4 * PAGE), (8 * PAGE, PAGE)];
    assert_eq!(bench.sees(0), expected);
}

#[test]
fn the_guest_sees_the_part_of_the_file_that_was_named_as_often_as_it_was() {
    let bench = bench();
    bench.shmem.map(&bench.request(0, 2 * PAGE, 2 * PAGE, 5 * PAGE)).unwrap(); // SHM-43
    bench.shmem.map(&bench.request(7, 0, PAGE, 5 * PAGE)).unwrap(); // SHM-37
    bench.shmem.map(&bench.request(7, PAGE, PAGE, 5 * PAGE)).unwrap();
    let seen: Vec<_> = (1..5).map(|page| bench.reads(0, page * PAGE)).collect();
    assert_eq!(seen, [None, Some(6), Some(7), None]);
    assert_eq!((bench.reads(7, 0), bench.reads(7, PAGE)), (Some(6), Some(6)));
}

#[test]
fn a_file_may_be_shorter_than_what_is_mapped_of_it_and_stays_so() {
    // SHM-44
    let bench = bench();
    let size = bench.file.metadata().unwrap().len();
    bench.shmem.map(&bench.request(0, 0, 16 * PAGE, 1 << 40)).unwrap();
    bench.shmem.map(&bench.request(7, 0, 16 * PAGE, size - PAGE)).unwrap();
    assert_eq!(bench.file.metadata().unwrap().len(), size);
    assert_eq!((bench.reads(7, 0), bench.reads(7, PAGE)), (Some(32), None));
}

#[test]
fn a_mapping_needs_no_descriptor_once_it_is_there() {
    // SHM-46
    let mut bench = bench();
    // A file that nothing else in this process has open: what is open of it is ours.
    let file = memfd(0);
    file.set_len(PAGE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    bench.file = file;
    bench.map(0, 0, PAGE).unwrap();
    bench.file = tempfile::tempfile().unwrap();
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
        .filter(|metadata| std::os::unix::fs::MetadataExt::ino(metadata) == inode && metadata.len() == PAGE)
        .count();
    assert_eq!(open, 0);
    assert_eq!(bench.reads(0, 0), Some(b'x'));
}

#[test]
fn what_cannot_be_mapped_is_refused_with_its_reason() {
    let mut bench = bench();
    let read_only = {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(PAGE).unwrap();
        named.reopen().unwrap();
        File::open(named.path()).unwrap()
    };
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    let path_only = std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true), libc::O_PATH)
        .open("/proc/self/exe")
        .unwrap();
    // SHM-47
    let unmappable: [(OwnedFd, i32); 5] = [
        (pipe.into(), libc::EINVAL),
        (socket.into(), libc::EINVAL),
        (File::open("/").unwrap().into(), libc::EINVAL),
        (File::open("/dev/null").unwrap().into(), libc::EINVAL),
        (path_only.into(), libc::EBADF),
    ];
    for (fd, errno) in unmappable {
        let request = MapRequest { file: fd.as_fd(), ..bench.request(0, 0, PAGE, 0) };
        bench.refused(&request, errno);
    }
    // SHM-41; SHM-39
    bench.file = read_only;
    bench.refused(&bench.writable(), libc::EACCES);
    bench.map(0, 0, PAGE).unwrap();
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    // A file that its owner sealed against writing.
    bench.file = memfd(libc::MFD_ALLOW_SEALING);
    bench.file.set_len(PAGE).unwrap();
    // SAFETY: the descriptor is open.
    let sealed = unsafe {
        libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&bench.file), libc::F_ADD_SEALS, libc::F_SEAL_WRITE)
    };
    assert_eq!(sealed, 0);
    bench.refused(&bench.writable(), libc::EPERM);
}

#[test]
fn huge_pages_are_mapped_as_a_whole_or_not_at_all() {
    // SHM-47, SHM-50: mmap(2) would round a part up to the whole page, over what is behind it in the window.
    const HUGE: u64 = 2 << 20;
    let guest = Arc::new(Guest::default());
    let mut windows = WindowAllocator::new(FIRST, LIMIT);
    let shmem = SharedMemory::new([(0, 2 * HUGE), (7, PAGE)], &mut windows, guest.clone(), 3).unwrap();
    let bench = Bench { guest, shmem, file: memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    bench.file.set_len(2 * HUGE).unwrap();
    for (offset, len, file_offset) in
        [(0, PAGE, 0), (0, HUGE + 1, 0), (PAGE, HUGE, 0), (0, HUGE, PAGE), (0, HUGE - PAGE, 0)]
    {
        bench.refused(&bench.request(0, offset, len, file_offset), libc::EINVAL);
    }
    // Most machines have none to give.
    if let Err(error) = bench.shmem.map(&bench.request(0, HUGE, HUGE, HUGE)) {
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    }
}

#[test]
fn the_quota_counts_live_mappings_of_all_regions() {
    // SHM-48
    let guest = Arc::new(Guest::default());
    let mut windows = WindowAllocator::new(FIRST, LIMIT);
    let sizes = [(0, 16 * PAGE), (7, 16 * PAGE)];
    let shmem = SharedMemory::new(sizes, &mut windows, guest.clone(), 3).unwrap();
    let bench = Bench { guest, shmem, file: numbered(1) };
    bench.map(0, 0, PAGE).unwrap();
    bench.map(0, PAGE, PAGE).unwrap();
    bench.map(7, 0, PAGE).unwrap();
    bench.refused(&bench.request(7, PAGE, PAGE, 0), libc::ENOSPC);
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    bench.map(7, PAGE, PAGE).unwrap();
    bench.refused(&bench.request(0, 0, PAGE, 0), libc::ENOSPC);
    assert_eq!(bench.shmem.unmap_all().unwrap(), 3);
    bench.map(0, 0, PAGE).unwrap();
}

#[test]
fn a_machine_without_slots_fails_one_request_and_leaves_nothing_behind() {
    // SHM-48, SHM-49
    let bench = bench();
    bench.map(0, 0, PAGE).unwrap();
    bench.guest.no_slots.store(true, Ordering::Relaxed);
    bench.refused(&bench.request(0, PAGE, PAGE, 0), libc::ENOSPC);
    assert_eq!(bench.reads(0, 0), Some(1));
    bench.guest.no_slots.store(false, Ordering::Relaxed);
    bench.map(0, PAGE, PAGE).unwrap();
    assert_eq!(bench.shmem.unmap_all().unwrap(), 2);
}

#[test]
fn a_failed_map_does_not_stand_in_the_way_of_the_right_one() {
    // SHM-49
    let bench = bench();
    bench.refused(&bench.request(0, 0, 17 * PAGE, 0), libc::ERANGE);
    bench.refused(&bench.request(0, 0, PAGE, 1), libc::EINVAL);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let no_file = MapRequest { file: pipe.as_fd(), ..bench.request(0, 0, 16 * PAGE, 0) };
    bench.refused(&no_file, libc::EINVAL);
    bench.map(0, 0, 16 * PAGE).unwrap();
}

#[test]
fn only_one_whole_live_mapping_is_unmapped() {
    let bench = bench();
    bench.map(0, 4 * PAGE, 4 * PAGE).unwrap();
    bench.map(0, 8 * PAGE, PAGE).unwrap();
    bench.map(7, 0, PAGE).unwrap();
    for (shmid, first, pages) in [
        (0, 4, 3), // prefix
        (0, 5, 3), // suffix
        (0, 5, 2), // middle
        (0, 3, 6), // superset
        (0, 4, 6), // superset from the same start
        (0, 4, 5), // two as one
        (7, 4, 4), // another region's
        (0, 0, 1), // never mapped
        (0, 4, 0), // nothing
        (1, 0, 1), // no region
    ] {
        bench.not_unmapped(shmid, first * PAGE, pages * PAGE); // SHM-52
    }
    bench.not_unmapped(0, 4 * PAGE, u64::MAX);
    bench.not_unmapped(0, u64::MAX, 4 * PAGE);
    bench.shmem.unmap(0, 4 * PAGE, 4 * PAGE).unwrap(); // SHM-51
    assert_eq!((bench.sees(0), bench.sees(7)), (vec![(8 * PAGE, PAGE)], vec![(0, PAGE)]));
    assert_eq!(bench.reads(0, 4 * PAGE), None);
    bench.not_unmapped(0, 4 * PAGE, 4 * PAGE); // SHM-52
}

#[test]
fn an_unmapped_range_is_free_for_something_else() {
    // SHM-55
    let bench = bench();
    bench.map(0, 0, 8 * PAGE).unwrap();
    bench.shmem.unmap(0, 0, 8 * PAGE).unwrap();
    bench.shmem.map(&bench.request(0, 2 * PAGE, 3 * PAGE, 9 * PAGE)).unwrap();
    assert_eq!(bench.sees(0), [(2 * PAGE, 3 * PAGE)]);
    assert_eq!(bench.reads(0, 2 * PAGE), Some(10));
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
        let before = (vmas(&bench.shmem), bench.sees(0));
        bench.map(0, first * PAGE, pages * PAGE).unwrap();
        bench.shmem.unmap(0, first * PAGE, pages * PAGE).unwrap();
        assert_eq!((vmas(&bench.shmem), bench.sees(0)), before, "{pages} from {first} on");
        let left: Vec<_> = [0, 2, 9].map(|page| bench.reads(0, page * PAGE)).into();
        assert_eq!(left, [Some(1), Some(3), Some(10)], "{pages} from {first} on");
    }
}

#[test]
fn an_error_that_names_no_reason_is_no_success() {
    // SHM-58
    for errno in [0, -1] {
        let error = io::Error::from_raw_os_error(errno);
        assert_eq!(ShmemError::Guest(error).errno(), libc::EIO);
    }
    assert_eq!(ShmemError::Place(io::ErrorKind::Other.into()).errno(), libc::EIO);
}

#[test]
fn a_mapping_stays_where_the_machine_keeps_its_slot() {
    let bench = bench();
    bench.map(0, 0, PAGE).unwrap();
    bench.guest.keeps_slots.store(true, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap(0, 0, PAGE).unwrap_err().errno(), libc::EIO);
    assert_eq!(bench.shmem.unmap_all().unwrap_err().errno(), libc::EIO);
    assert_eq!((bench.reads(0, 0), bench.shmem.mappings().len()), (Some(1), 1));
    bench.guest.keeps_slots.store(false, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap_all().unwrap(), 1);
}

#[test]
fn a_closed_gate_lets_mappings_out_but_none_in() {
    // SHM-71, SHM-75
    let bench = bench();
    bench.map(0, 0, PAGE).unwrap();
    bench.map(0, PAGE, PAGE).unwrap();
    bench.shmem.close_gate();
    bench.refused(&bench.request(0, 2 * PAGE, PAGE, 0), libc::EBUSY);
    bench.shmem.unmap(0, 0, PAGE).unwrap();
    assert_eq!(bench.shmem.unmap_all().unwrap(), 1); // SHM-69
    bench.refused(&bench.request(0, 0, PAGE, 0), libc::EBUSY);
    bench.shmem.open_gate();
    bench.not_unmapped(0, PAGE, PAGE); // SHM-72
    bench.map(0, 0, 16 * PAGE).unwrap(); // SHM-72
}

#[test]
fn nothing_is_left_when_everything_is_unmapped_or_dropped() {
    // SHM-69, SHM-78
    let bench = bench();
    let untouched = vmas(&bench.shmem);
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
    assert_eq!(bench.shmem.unmap_all().unwrap(), 16);
    assert_eq!(bench.shmem.unmap_all().unwrap(), 0);
    assert_eq!((bench.shmem.has_mappings(), reached()), (false, 0));
    assert_eq!((bench.sees(0), bench.sees(7)), (vec![], vec![]));
    assert_eq!(vmas(&bench.shmem), untouched, "reserved again, as one piece each");
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
    assert_eq!(bench.shmem.fill_missing(region.start() + 7 * PAGE), None);
    for (number, (file_pages, left)) in [(8, 6), (7, 5), (3, 1), (2, 0)].into_iter().enumerate() {
        bench.file.set_len(file_pages * PAGE).unwrap();
        // Neither what is there nor what is beside it is a reason.
        let last_left = (left > 0).then(|| region.start() + left * PAGE - 1);
        for other in last_left.into_iter().chain([region.start() + 8 * PAGE, region.start() - 1]) {
            assert_eq!(bench.shmem.fill_missing(other), None, "{other:#x}");
        }
        let len = (8 - left) * PAGE;
        let filled = Filled { is_first: number == 0, shmid: 0, guest, len };
        let touched = region.start() + left * PAGE;
        assert_eq!(bench.shmem.fill_missing(touched), Some(filled));
        let expected: Vec<_> =
            (0..8).map(|page| Some(if page < left { page as u8 + 3 } else { 0 })).collect();
        assert_eq!(pages(&bench), expected, "{file_pages} pages left of the file");
        assert_eq!(bench.shmem.mappings()[0].filled, len);
        assert_eq!(bench.shmem.fill_missing(touched), None);
        let total = bench.shmem.filled();
        assert_eq!((total.mappings, total.bytes), (1, len));
    }
    assert_eq!(bench.reads(7, PAGE), Some(2));
    bench.shmem.unmap(0, 0, 8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 0), None);
}

#[test]
fn where_nobody_knows_what_was_touched_only_that_becomes_zeroes() {
    // SHM-44, SHM-45
    let bench = bench();
    for shmid in [0, 7] {
        bench.shmem.map(&bench.request(shmid, 0, 8 * PAGE, 0)).unwrap();
    }
    assert_eq!(bench.shmem.fill_all_for_now(), None);
    let untouched = vmas(&bench.shmem);
    bench.file.set_len(3 * PAGE).unwrap();
    for guarded in [false, true] {
        if guarded {
            bench.shmem.guard_missing();
            bench.shmem.guard_missing();
        }
        assert_eq!(bench.reads(0, 2 * PAGE), Some(3));
        assert_eq!(bench.reads(7, 3 * PAGE), None);
        // Nobody touches it: the file shows again when it grows.
        assert_eq!(bench.shmem.fill_all_for_now(), Some(vec![]));
        assert_eq!(bench.shmem.fill_all_for_now(), None);
        assert_eq!(bench.shmem.settle(), []);
        assert_eq!(bench.shmem.settle(), []);
        assert_eq!(vmas(&bench.shmem), untouched);
        bench.file.set_len(5 * PAGE).unwrap();
        assert_eq!(bench.reads(7, 4 * PAGE), Some(0));
        bench.file.set_len(3 * PAGE).unwrap();
    }

    bench.shmem.guard_missing();
    assert_eq!(bench.shmem.fill_all_for_now(), Some(vec![]));
    assert_eq!(bench.reads(7, 6 * PAGE), Some(0));
    let start = bench.region(7).start();
    let guest = GuestRange::new(start, 8 * PAGE).unwrap();
    let len = 5 * PAGE;
    let filled = Filled { is_first: true, shmid: 7, guest, len };
    assert_eq!(bench.shmem.settle(), [filled]);
    assert_eq!((bench.reads(7, 3 * PAGE), bench.reads(0, 3 * PAGE)), (Some(0), None));
    // What has grown again is within reach, after the next look.
    bench.shmem.guard_missing();
    bench.file.set_len(8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 3 * PAGE), None);
    assert_eq!(bench.shmem.fill_all_for_now(), Some(vec![]));
    assert_eq!(bench.shmem.settle(), []);
    assert_eq!(bench.reads(0, 3 * PAGE), Some(0));
    // Whatever state they are in, they can go.
    bench.file.set_len(0).unwrap();
    assert_eq!(bench.shmem.fill_all_for_now(), Some(vec![]));
    assert_eq!(bench.shmem.unmap_all().unwrap(), 2);
    bench.file.set_len(8 * PAGE).unwrap();
    bench.map(0, 0, 8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 0), Some(0));
}

#[test]
fn what_goes_missing_while_more_is_filled_for_now_is_filled_too() {
    // SHM-45: or who touches it tries for ever.
    let bench = bench();
    bench.shmem.map(&bench.request(0, 0, 8 * PAGE, 0)).unwrap();
    let (region, areas) = (bench.region(0), vmas(&bench.shmem));
    for file_pages in [6, 4, 2] {
        bench.file.set_len(file_pages * PAGE).unwrap();
        bench.shmem.guard_missing();
        assert_eq!(bench.shmem.fill_all_for_now(), Some(vec![]));
        assert_eq!(bench.shmem.fill_all_for_now(), None);
        assert_eq!(vmas(&bench.shmem).len(), areas.len() + 1, "zeroes are one piece");
    }
    // Untouched, all of it is the file's again.
    assert_eq!(bench.shmem.settle(), []);
    assert_eq!(vmas(&bench.shmem), areas);
    bench.file.set_len(8 * PAGE).unwrap();
    assert_eq!((bench.reads(0, PAGE), bench.reads(0, 7 * PAGE)), (Some(2), Some(0)));
    // What was touched stays.
    bench.file.set_len(6 * PAGE).unwrap();
    assert_eq!(bench.shmem.fill_all_for_now(), Some(vec![]));
    assert_eq!(bench.reads(0, 7 * PAGE), Some(0));
    bench.file.set_len(5 * PAGE).unwrap();
    let kept = bench.shmem.fill_all_for_now().unwrap();
    assert_eq!(kept.iter().map(|kept| kept.len).collect::<Vec<_>>(), [2 * PAGE]);
    // Also when it is known what was touched.
    bench.file.set_len(4 * PAGE).unwrap();
    let filled = bench.shmem.fill_missing(region.start() + 4 * PAGE).unwrap();
    assert_eq!((filled.len, filled.is_first), (4 * PAGE, false));
    assert_eq!(bench.shmem.settle(), []);
    let total = bench.shmem.filled();
    assert_eq!((total.mappings, total.bytes), (1, 4 * PAGE));
    bench.file.set_len(8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 3 * PAGE), Some(0));
}

#[test]
fn a_look_for_missing_pages_is_no_touch() {
    // SHM-44, SHM-45
    let bench = bench();
    for shmid in [0, 7] {
        bench.shmem.map(&bench.request(shmid, 0, 8 * PAGE, 0)).unwrap();
    }
    bench.file.set_len(3 * PAGE).unwrap();
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| {
            for _ in 0..2000 {
                bench.shmem.fill_all_for_now();
                assert_eq!(bench.shmem.settle(), []);
            }
        });
        while !filling.is_finished() {
            bench.shmem.guard_missing();
        }
    });
    bench.file.set_len(8 * PAGE).unwrap();
    bench.shmem.fill_all_for_now();
    bench.shmem.settle();
    assert_eq!((bench.reads(0, 7 * PAGE), bench.reads(7, 7 * PAGE)), (Some(0), Some(0)));
}

#[test]
fn a_read_that_came_too_late_gives_what_is_there_now() {
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
    bench.file.set_len(PAGE).unwrap();
    assert_eq!(read(start + 2 * PAGE), None);
    assert!(bench.shmem.fill_missing(start + 2 * PAGE).is_some());
    assert_eq!(read(start + 2 * PAGE), Some(0));
    bench.shmem.unmap(0, PAGE, 2 * PAGE).unwrap();
    assert_eq!((access(start + PAGE), read(start + PAGE)), (None, None));
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let layout = |sizes: Vec<(u8, u64)>| {
        let mut windows = WindowAllocator::new(FIRST, LIMIT);
        SharedMemory::new(sizes, &mut windows, Arc::new(Guest::default()), 1)
    };
    for size in [1, PAGE - 1, PAGE + 1, u64::MAX] {
        // SHM-15
        let error = layout(vec![(0, PAGE), (9, size)]).err().unwrap();
        assert!(matches!(error, LayoutError::NotPages { shmid: 9, .. }), "{error}");
    }
    let most = LIMIT - FIRST;
    for sizes in [
        vec![(0, LIMIT)],
        vec![(0, 1 << 63)],
        vec![(0, most), (1, PAGE)],
        vec![(0, 1 << 63), (1, 1 << 63)],
        vec![(0, !(PAGE - 1)), (1, !(PAGE - 1))],
    ] {
        // SHM-16
        let error = layout(sizes).err().unwrap();
        assert!(matches!(error, LayoutError::NoGuestAddresses { .. }), "{error}");
    }
    // SHM-13, SHM-19, SHM-23
    let all = layout((0..=255).map(|shmid| (shmid, (u64::from(shmid) + 1) * PAGE)).collect()).unwrap();
    let regions = all.regions();
    assert_eq!(regions.len(), 256);
    for (index, &(shmid, range)) in regions.iter().enumerate() {
        assert_eq!((usize::from(shmid), range.len()), (index, (index as u64 + 1) * PAGE));
        assert_eq!(range.start() % (2 << 20), 0);
        assert!(range.start() >= FIRST && range.last() < LIMIT);
        assert!(regions[..index].iter().all(|(_, other)| !other.overlaps(&range)));
    }
}
