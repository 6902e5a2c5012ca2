//! SHM-45: what a guest sees when the file under a mapping becomes shorter.

use std::os::unix::fs::FileExt;

use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{PAGE, content, memfd_with, numbered_file};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::huge_pages::HugePages;
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, page_at, writable};
use rustix::fs::MemfdFlags;

/// `interrupts`: in the guest. Without them KVM fails at a missing page, with them it tries for ever.
fn cut_short(interrupts: bool) {
    let backends = [Backend::start(), Backend::start()];
    let devices = [backends[0].device("short"), backends[1].device("other")];
    let mut guest = Guest::boot(["--vhost-user", &devices[0], "--vhost-user", &devices[1]]);
    guest.set_interrupts(interrupts);
    guest.select(1);
    guest.start_device();
    let (other, _) = guest.region(0);
    assert_eq!(backends[1].map(page_at(0), &numbered_file(9, 1)), 0);
    guest.select(0);
    guest.start_device();
    let (base, _) = guest.region(0);
    let cut = numbered_file(1, 8);
    let whole = MMap { len: 8 * PAGE, ..page_at(0) };
    // SHM-44: a file that is to grow, beside it.
    let growing = numbered_file(3, 1);
    assert_eq!(backends[0].map(MMap { shmid: 7, ..whole }, &growing), 0);
    let (seventh, _) = guest.region(7);
    assert_eq!(backends[0].map(writable(whole), &cut), 0);
    assert_eq!(guest.read64(base + 7 * PAGE), content(1, 7 * PAGE));
    assert_eq!(guest.read64(base + PAGE), content(1, PAGE));

    cut.set_len(3 * PAGE).unwrap();
    for index in 3..8 {
        assert_eq!(guest.read64(base + index * PAGE), 0, "{index}: {}", guest.log());
    }
    guest.wait_for_log("ends before the mapping: the last 0x5000 bytes");
    assert_eq!(guest.read64(base + PAGE), content(1, PAGE));
    // They are memory like any other, though not the file's: it has not grown again.
    guest.write64(base + 5 * PAGE, 77);
    assert_eq!(guest.read64(base + 5 * PAGE), 77);
    assert_eq!(cut.metadata().unwrap().len(), 3 * PAGE);
    // Again, by a write. A software KVM does not know a missing page from a hole, so that write is dropped
    // there.
    cut.set_len(PAGE).unwrap();
    guest.write64(base + 2 * PAGE, 78);
    let written = guest.read64(base + 2 * PAGE);
    assert!(written == 78 || written == 0 && !kvm::is_hardware(), "{written}");
    guest.write64(base + 2 * PAGE, 79);
    assert_eq!(guest.read64(base + 2 * PAGE), 79);
    assert_eq!(guest.read64(base + PAGE), 0);
    assert_eq!(guest.read64(base), content(1, 0));
    guest.wait_for_map("the last 0x7000 bytes are zeroes");
    guest.wait_for_map("short: zeroes took the place of 0x7000 bytes of 1 mappings");
    // Once a mapping.
    assert_eq!(guest.log().matches("ends before the mapping: ").count(), 1, "{}", guest.log());

    growing.write_all_at(&4_u64.to_le_bytes(), 2 * PAGE).unwrap();
    assert_eq!(guest.read64(seventh), content(3, 0));
    assert_eq!(guest.read64(seventh + 2 * PAGE), 4);

    assert_eq!(guest.read64(other), content(9, 0));
    assert_eq!(backends[1].map(page_at(1), &numbered_file(8, 1)), 0);
    assert_eq!(guest.read64(other + PAGE), content(8, 0));
    assert_eq!(backends[0].unmap(whole), 0);
    assert_eq!(guest.read64(base + 7 * PAGE), u64::MAX);
    assert_eq!(backends[0].map(page_at(7), &numbered_file(2, 1)), 0);
    assert_eq!(guest.read64(base + 7 * PAGE), content(2, 0));
    guest.exit();
}

#[test]
fn a_file_cut_short_reads_as_zeroes() {
    // SHM-45
    if !kvm::is_here() {
        return;
    }
    cut_short(false);
}

#[test]
fn a_file_cut_short_reads_as_zeroes_also_with_interrupts_on() {
    // SHM-45
    if !kvm::is_here() {
        return;
    }
    cut_short(true);
}

#[test]
fn a_file_of_huge_pages_cut_short_reads_as_zeroes() {
    // SHM-45
    const HUGE: u64 = 2 << 20;
    if !kvm::is_here() {
        return;
    }
    let Some(_reserved) = HugePages::reserve(HUGE, 2) else {
        eprintln!("skipped: this machine has no huge pages for it");
        return;
    };
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let file = memfd_with(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 2 * HUGE);
    let whole = MMap { len: 2 * HUGE, ..page_at(0) };
    assert_eq!(backend.map(writable(whole), &file), 0);
    let (base, _) = guest.region(0);
    guest.write64(base + HUGE + 8, 77);
    assert_eq!(guest.read64(base + HUGE + 8), 77);
    file.set_len(HUGE).unwrap();
    assert_eq!(guest.read64(base + HUGE + 8), 0, "{}", guest.log());
    guest.wait_for_log("ends before the mapping: the last 0x200000 bytes");
    guest.write64(base + HUGE + PAGE, 78);
    assert_eq!((guest.read64(base + HUGE + PAGE), guest.read64(base)), (78, 0));
    assert_eq!(backend.unmap(whole), 0);
    assert_eq!(guest.read64(base), u64::MAX);
    guest.exit();
}
