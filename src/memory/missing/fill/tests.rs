use super::*;
use crate::memory::PAGE_SIZE as PAGE;
use crate::memory::shmem::tests::{Bench, bench};

#[test]
fn a_mapping_that_was_replaced_or_filled_since_it_was_probed_is_not_changed() {
    // SHM-45: mappings are not locked while they are probed, and the back-end maps and unmaps meanwhile.
    const PAGES: u64 = 8;
    let bench = bench();
    let shmem = &bench.shmem;
    let request = || bench.request(0, 0, PAGES * PAGE, 0);
    let found = || shmem.candidates(ALL, true).0.remove(0);
    let is_changed = |candidate: &Place<'_>| shmem.change(*candidate, |_, _| Ok(()));

    shmem.map(&request()).unwrap();
    let candidate = found();
    assert!(is_changed(&candidate));
    // Another mapping at the same place.
    shmem.unmap(0, 0, PAGES * PAGE).unwrap();
    assert!(!is_changed(&candidate));
    shmem.map(&request()).unwrap();
    assert!(!is_changed(&candidate));

    // The same, with zeroes at its end: permanent, or temporary.
    let candidate = found();
    bench.file.set_len(7 * PAGE).unwrap();
    let last_page = shmem.region(0).unwrap().start() + 7 * PAGE;
    assert!(shmem.fill_missing(last_page).is_some());
    assert!(!is_changed(&candidate));
    let candidate = found();
    bench.file.set_len(6 * PAGE).unwrap();
    assert_eq!(shmem.fill_all_temporarily(), Some(vec![]));
    assert!(!is_changed(&candidate));
    assert_eq!((shmem.settle(), bench.reads(0, 0)), (vec![], Some(1)));
    assert!(is_changed(&candidate), "it is what it was");
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
        // Addresses of present pages and beside the mapping fill nothing.
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
fn without_an_address_only_mappings_that_were_accessed_keep_their_zeroes() {
    // SHM-44, SHM-45
    let bench = bench();
    for shmid in [0, 7] {
        bench.shmem.map(&bench.request(shmid, 0, 8 * PAGE, 0)).unwrap();
    }
    assert_eq!(bench.shmem.fill_all_temporarily(), None);
    let untouched = bench.vmas();
    bench.file.set_len(3 * PAGE).unwrap();
    for guarded in [false, true] {
        if guarded {
            bench.shmem.guard_missing();
            bench.shmem.guard_missing();
        }
        assert_eq!(bench.reads(0, 2 * PAGE), Some(3));
        assert_eq!(bench.reads(7, 3 * PAGE), None);
        // The zeroes are not accessed: the file shows again when it grows.
        assert_eq!(bench.shmem.fill_all_temporarily(), Some(vec![]));
        assert_eq!(bench.shmem.fill_all_temporarily(), None);
        assert_eq!(bench.shmem.settle(), []);
        assert_eq!(bench.shmem.settle(), []);
        assert_eq!(bench.vmas(), untouched);
        bench.file.set_len(5 * PAGE).unwrap();
        assert_eq!(bench.reads(7, 4 * PAGE), Some(0));
        bench.file.set_len(3 * PAGE).unwrap();
    }

    bench.shmem.guard_missing();
    assert_eq!(bench.shmem.fill_all_temporarily(), Some(vec![]));
    assert_eq!(bench.reads(7, 6 * PAGE), Some(0));
    let start = bench.region(7).start();
    let guest = GuestRange::new(start, 8 * PAGE).unwrap();
    let len = 5 * PAGE;
    let filled = Filled { is_first: true, shmid: 7, guest, len };
    assert_eq!(bench.shmem.settle(), [filled]);
    assert_eq!((bench.reads(7, 3 * PAGE), bench.reads(0, 3 * PAGE)), (Some(0), None));
    // Guarded pages that the file has again are accessible after the next fill.
    bench.shmem.guard_missing();
    bench.file.set_len(8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 3 * PAGE), None);
    assert_eq!(bench.shmem.fill_all_temporarily(), Some(vec![]));
    assert_eq!(bench.shmem.settle(), []);
    assert_eq!(bench.reads(0, 3 * PAGE), Some(0));
    // In every state they can be unmapped.
    bench.file.set_len(0).unwrap();
    assert_eq!(bench.shmem.fill_all_temporarily(), Some(vec![]));
    assert_eq!(bench.shmem.unmap_all(|| {}).unwrap(), 2);
    bench.file.set_len(8 * PAGE).unwrap();
    bench.map(0, 0, 8 * PAGE).unwrap();
    assert_eq!(bench.reads(0, 0), Some(0));
}

#[test]
fn what_goes_missing_ahead_of_temporary_zeroes_is_filled_too() {
    // SHM-45: else a vCPU that accesses it tries again without end.
    let bench = bench();
    bench.shmem.map(&bench.request(0, 0, 8 * PAGE, 0)).unwrap();
    let (region, areas) = (bench.region(0), bench.vmas());
    for file_pages in [6, 4, 2] {
        bench.file.set_len(file_pages * PAGE).unwrap();
        bench.shmem.guard_missing();
        assert_eq!(bench.shmem.fill_all_temporarily(), Some(vec![]));
        assert_eq!(bench.shmem.fill_all_temporarily(), None);
        assert_eq!(bench.vmas().len(), areas.len() + 1, "zeroes are one piece");
    }
    // Not accessed: the file shows again everywhere.
    assert_eq!(bench.shmem.settle(), []);
    assert_eq!(bench.vmas(), areas);
    bench.file.set_len(8 * PAGE).unwrap();
    assert_eq!((bench.reads(0, PAGE), bench.reads(0, 7 * PAGE)), (Some(2), Some(0)));
    // Accessed zeroes stay.
    bench.file.set_len(6 * PAGE).unwrap();
    assert_eq!(bench.shmem.fill_all_temporarily(), Some(vec![]));
    assert_eq!(bench.reads(0, 7 * PAGE), Some(0));
    bench.file.set_len(5 * PAGE).unwrap();
    let kept = bench.shmem.fill_all_temporarily().unwrap();
    assert_eq!(kept.iter().map(|kept| kept.len).collect::<Vec<_>>(), [2 * PAGE]);
    // Also when the address is known.
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
fn probing_for_missing_pages_is_not_taken_for_an_access() {
    // SHM-44, SHM-45
    let bench = bench();
    for shmid in [0, 7] {
        bench.shmem.map(&bench.request(shmid, 0, 8 * PAGE, 0)).unwrap();
    }
    bench.file.set_len(3 * PAGE).unwrap();
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| {
            for _ in 0..2000 {
                bench.shmem.fill_all_temporarily();
                assert_eq!(bench.shmem.settle(), []);
            }
        });
        while !filling.is_finished() {
            bench.shmem.guard_missing();
        }
    });
    bench.file.set_len(8 * PAGE).unwrap();
    bench.shmem.fill_all_temporarily();
    bench.shmem.settle();
    assert_eq!((bench.reads(0, 7 * PAGE), bench.reads(7, 7 * PAGE)), (Some(0), Some(0)));
}

#[test]
fn a_read_that_kvm_passed_on_gives_what_is_there_now() {
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
