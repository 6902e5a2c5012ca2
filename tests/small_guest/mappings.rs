//! What a guest sees of its devices' shared memory while their back-ends map and unmap.

use std::fs::File;
use std::os::unix::fs::FileExt;

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::files::{MIB, PAGE, content, numbered_file};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, page_at, writable};

const HOLE: u64 = u64::MAX;

fn word(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn the_guest_reads_a_mapped_file_where_the_registers_say() {
    // SHM-20, SHM-23, SHM-24, SHM-36, SHM-43, SHM-46, SHM-60
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let (first, len) = guest.region(0);
    let (seventh, seventh_len) = guest.region(7);
    assert_eq!((len, seventh_len), (4 * MIB, 2 * MIB));
    for base in [first, seventh] {
        assert_eq!(base % (2 * MIB), 0);
        assert!(base >= 1 << 32);
    }
    assert!(first + len <= seventh || seventh + seventh_len <= first);
    assert_eq!(guest.read64(first), HOLE);

    let data = numbered_file(5, 8);
    let one = MMap { fd_offset: 3 * PAGE, len: 2 * PAGE, ..page_at(1) };
    assert_eq!(backend.map(one, &data), 0);
    // Right behind it, and at the same place of the other region.
    assert_eq!(backend.map(page_at(3), &data), 0);
    assert_eq!(backend.map(MMap { shmid: 7, ..one }, &data), 0);
    drop(data);
    for (address, expected) in [
        (first + PAGE - 8, HOLE),
        (first + PAGE, content(5, 3 * PAGE)),
        (first + 3 * PAGE - 8, content(5, 5 * PAGE - 8)),
        (first + 3 * PAGE, content(5, 0)),
        (first + 4 * PAGE, HOLE),
        (first + len - 8, HOLE),
        (seventh, HOLE),
        (seventh + 2 * PAGE, content(5, 4 * PAGE)),
    ] {
        assert_eq!(guest.read64(address), expected, "{address:#x}");
    }
    // What is written to a hole is dropped, and the machine goes on.
    guest.write64(first, 1);
    assert_eq!(guest.read64(first), HOLE);
    guest.exit();
}

#[test]
fn a_read_only_mapping_keeps_what_the_guest_writes_from_the_file() {
    // SHM-38, SHM-39
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let (base, _) = guest.region(0);
    let on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.as_file().write_all_at(&vec![0x5a; 2 * PAGE as usize], 0).unwrap();
    let before = std::fs::read(on_disk.path()).unwrap();
    let read_only = File::open(on_disk.path()).unwrap();
    // The mapping is read-only, even where its descriptor is open for writing.
    for (start, fd) in [(0, &read_only), (2, on_disk.as_file())] {
        let request = MMap { len: 2 * PAGE, ..page_at(start) };
        assert_eq!(backend.map(request, fd), 0);
        for offset in [0, 8, 0xff8, 0x1000] {
            let at = base + start * PAGE + offset;
            let old = guest.read64(at);
            guest.write8(at, !old as u8);
            guest.write32(at, !old as u32);
            guest.write64(at, !old);
            assert_eq!(guest.read64(at), old);
        }
        assert_eq!(std::fs::read(on_disk.path()).unwrap(), before);
    }
    // SHM-41
    let refused = backend.map(writable(page_at(8)), &read_only);
    assert_eq!(refused, -i64::from(libc::EACCES));
    guest.exit();
}

#[test]
fn guest_and_back_end_see_each_others_writes() {
    // SHM-40
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let (base, _) = guest.region(0);
    let shared = numbered_file(1, 4);
    let payload = MMap { fd_offset: PAGE, len: 2 * PAGE, ..page_at(2) };
    assert_eq!(backend.map(writable(payload), &shared), 0);
    guest.write64(base + 3 * PAGE, 0xfeed);
    assert_eq!(word(&shared, 2 * PAGE), 0xfeed);
    assert_eq!(word(&shared, PAGE), content(1, PAGE));
    shared.write_all_at(&0xbeef_u64.to_le_bytes(), PAGE).unwrap();
    assert_eq!(guest.read64(base + 2 * PAGE), 0xbeef);
    // SHM-37: once more, elsewhere, read-only.
    assert_eq!(backend.map(MMap { shm_offset: 0, ..payload }, &shared), 0);
    guest.write64(base + 2 * PAGE + 16, 0xcafe);
    assert_eq!(guest.read64(base + 16), 0xcafe);
    guest.exit();
}

#[test]
fn a_mapping_is_gone_when_unmap_is_answered() {
    // SHM-55, SHM-56
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let (base, _) = guest.region(0);
    let (old, new) = (numbered_file(1, 1), numbered_file(2, 1));
    for _ in 0..20 {
        assert_eq!(backend.map(writable(page_at(0)), &old), 0);
        assert_eq!(guest.read64(base), content(1, 0));
        assert_eq!(backend.unmap(page_at(0)), 0);
        assert_eq!(guest.read64(base), HOLE);
        guest.write64(base, 7);
        assert_eq!(backend.map(page_at(0), &new), 0);
        assert_eq!(guest.read64(base), content(2, 0));
        assert_eq!(backend.unmap(page_at(0)), 0);
    }
    assert_eq!(word(&old, 0), content(1, 0));
    guest.exit();
}

#[test]
fn a_range_is_a_hole_between_two_mappings_however_often_the_guest_looks() {
    // SHM-24, SHM-56, SHM-102: more often than a processor may fail in a row.
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let (base, _) = guest.region(0);
    let files = [numbered_file(5, 1), numbered_file(6, 1)];
    for interrupts in [false, true] {
        guest.set_interrupts(interrupts);
        for round in 0..120 {
            let (seed, file) = (5 + round % 2, &files[round as usize % 2]);
            assert_eq!(backend.map(writable(page_at(3)), file), 0);
            // Every third time it is taken over: nobody has looked.
            if round % 3 == 0 {
                assert_eq!(backend.unmap(page_at(3)), 0);
                assert_eq!(backend.map(writable(page_at(3)), file), 0);
            }
            assert_eq!(guest.read64(base + 3 * PAGE), content(seed, 0));
            assert_eq!(backend.unmap(page_at(3)), 0);
            guest.write64(base + 3 * PAGE, 77);
            assert_eq!(guest.read64(base + 3 * PAGE), HOLE);
            assert_eq!(word(file, 0), content(seed, 0));
        }
    }
    guest.exit();
}

#[test]
fn two_hundred_and_fifty_six_regions_work() {
    // SHM-13, SHM-19, SHM-21
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::offering(Offer {
        regions: (0..=255).map(|id| (id, PAGE * (1 + u64::from(id)))).collect(),
        ..Offer::default()
    });
    let mut guest = Guest::with(&backend);
    let regions: Vec<_> = (0..256).map(|id| guest.region(id)).collect();
    for (id, &(base, len)) in (0..).zip(&regions) {
        assert_eq!((base % (2 * MIB), len), (0, PAGE * (1 + id)), "{id}");
        let others = regions.iter().filter(|&&other| other != (base, len));
        assert!(others.into_iter().all(|other| other.0 + other.1 <= base || base + len <= other.0));
    }
    for id in [256, 0x1_0000, u32::MAX] {
        assert_eq!(guest.region(id), (u64::MAX, u64::MAX), "{id}");
    }
    for id in [0, 1, 254, 255] {
        let last = MMap { shmid: id, ..page_at(id.into()) };
        assert_eq!(backend.map(last, &numbered_file(id.into(), 1)), 0);
    }
    for id in [0, 1, 254, 255] {
        let (base, len) = regions[id as usize];
        assert_eq!(guest.read64(base + len - PAGE), content(id, 0));
    }
    guest.exit();
}

#[test]
fn absent_regions_read_all_ones() {
    // SHM-21, SHM-22
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::boot(["--vhost-user", &backend.device("device")]);
    let before = (guest.region(0), guest.region(7));
    for id in [1, 6, 8, 255, 256, u32::MAX] {
        assert_eq!(guest.region(id), (u64::MAX, u64::MAX), "{id}");
    }
    guest.start_device();
    guest.reset_device();
    assert_eq!((guest.region(0), guest.region(7)), before);
    guest.exit();
}
