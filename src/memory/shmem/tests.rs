mod recorder;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use recorder::Guest;

use super::*;

const PAGE: u64 = PAGE_SIZE;

pub(in crate::memory) struct Bench {
    guest: Arc<Guest>,
    pub shmem: SharedMemory,
    pub file: File,
}

/// Regions 0 and 7 of 16 pages each; a file whose page n is full of n + 1, 32 pages long.
pub(in crate::memory) fn bench() -> Bench {
    let guest = Arc::new(Guest::default());
    let mapper = Arc::clone(&guest);
    let mut windows = WindowAllocator::new(1 << 32, 1 << 39);
    let sizes = [(0, 16 * PAGE), (3, 0), (7, 16 * PAGE)];
    let shmem = SharedMemory::new(
        sizes,
        &mut windows,
        mapper,
        Limits { mappings: 100, bytes: u64::MAX, foreign_files: false },
    )
    .unwrap();
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..32u8 {
        file.write_all(&[page + 1; PAGE as usize]).unwrap();
    }
    Bench { guest, shmem, file }
}

impl Bench {
    pub fn request(&self, shmid: u8, shm_offset: u64, len: u64, file_offset: u64) -> MapRequest<'_> {
        MapRequest { shmid, shm_offset, len, file: self.file.as_fd(), file_offset, access: Access::ReadOnly }
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
    bench.guest.keeps_slots.store(true, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap(0, 0, PAGE).unwrap_err().errno(), libc::EIO);
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap_err().errno(), libc::EIO);
    assert_eq!((bench.reads(0, 0), bench.shmem.mappings().len()), (Some(1), 1));
    bench.guest.keeps_slots.store(false, Ordering::Relaxed);
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap(), 1);
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
