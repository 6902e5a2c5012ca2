//! SHM-87: a page that a file has and that the host cannot provide, because its disk is full.

use std::os::unix::fs::FileExt;

use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{PAGE, content, numbered_file};
use hotslot_test_support::full_disk::FullDisk;
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::monitor::Operation;
use hotslot_test_support::wire::{MMap, page_at, writable};

const PAGES: u64 = 8;

/// A guest with the file of a full disk mapped by the first of two back-ends, and the mapping's address;
/// `None` where there can be none.
struct Bench {
    guest: Guest,
    backends: [Backend; 2],
    disk: FullDisk,
    file: std::fs::File,
    base: u64,
}

fn bench(interrupts: bool, options: &[&str]) -> Option<Bench> {
    if !kvm::is_here() {
        return None;
    }
    let Some(disk) = FullDisk::new() else {
        eprintln!("skipped: only root can make a full disk");
        return None;
    };
    let file = disk.sparse_file(PAGES, 7);
    let backends = [Backend::start(), Backend::start()];
    let devices = [backends[0].device("full"), backends[1].device("other")];
    let mut guest =
        Guest::boot([&["--vhost-user", &devices[0], "--vhost-user", &devices[1]], options].concat());
    guest.set_interrupts(interrupts);
    guest.select(1);
    guest.start_device();
    guest.select(0);
    guest.start_device();
    let (base, _) = guest.region(0);
    let whole = MMap { len: PAGES * PAGE, ..page_at(0) };
    assert_eq!(backends[0].map(writable(whole), &file), 0);
    assert_eq!(guest.read8(base), 7);
    Some(Bench { guest, backends, disk, file, base })
}

impl Bench {
    /// The guest begins an access to this page, and hotslot says that it waits.
    fn begin(&mut self, operation: Operation, page: u64, value: u64) {
        let address = self.base + page * PAGE + 8;
        self.guest.begin(operation, 8, address, value);
        self.guest
            .wait_for_log(&format!("full: the host cannot provide the page at {address:#x}, in the mapping"));
        assert!(self.guest.log().contains("(its file system is full): the vCPU that needs it waits"));
        self.guest.wait_for_map(&format!("the guest waits for the page at {:#x}", address - 8));
        assert!(!self.guest.has_answered(), "{}", self.guest.log());
    }
}

/// `interrupts`: in the guest. Without them KVM fails at such a page, with them it may try for ever.
fn waits_and_goes_on(interrupts: bool) {
    let Some(mut bench) = bench(interrupts, &[]) else { return };
    bench.begin(Operation::Write, 5, 77);
    // Other devices go on.
    let other = &bench.backends[1];
    assert_eq!(other.map(page_at(0), &numbered_file(9, 1)), 0);
    assert_eq!(other.map(page_at(1), &numbered_file(8, 1)), 0);
    assert_eq!(other.unmap(page_at(1)), 0);
    assert!(!bench.guest.has_answered());

    bench.disk.make_room();
    bench.guest.answer();
    bench.guest.wait_for_log("can be had again: the guest goes on");
    // Nothing is lost: the file has it, too.
    let mut word = [0; 8];
    bench.file.read_exact_at(&mut word, 5 * PAGE + 8).unwrap();
    assert_eq!((u64::from_le_bytes(word), bench.guest.read64(bench.base + 5 * PAGE + 8)), (77, 77));
    assert_eq!(bench.guest.read64(bench.base + 3 * PAGE), 0);
    bench.guest.select(1);
    let (other, _) = bench.guest.region(0);
    assert_eq!(bench.guest.read64(other), content(9, 0));
    let log = bench.guest.exit();
    assert_eq!(
        log.matches("cannot provide").count(),
        1 + log.matches(", which the host cannot provide").count()
    );
    assert!(!log.contains("ends before the mapping"), "{log}");
}

#[test]
fn a_write_into_a_full_disk_waits_until_there_is_room() {
    // SHM-87
    waits_and_goes_on(false);
}

#[test]
fn a_write_into_a_full_disk_waits_until_there_is_room_also_with_interrupts_on() {
    // SHM-87
    waits_and_goes_on(true);
}

#[test]
fn a_guest_that_waits_for_a_page_can_be_ended() {
    // SHM-87
    for interrupts in [false, true] {
        let Some(mut bench) = bench(interrupts, &[]) else { return };
        bench.begin(Operation::Read, 3, 0);
        bench.guest.signal(libc::SIGTERM);
        let (status, log) = bench.guest.wait();
        assert_eq!(status.code(), Some(128 + libc::SIGTERM), "{log}");
    }
}

#[test]
fn a_mapping_with_an_unavailable_page_can_be_cut_and_unmapped() {
    // SHM-45, SHM-87
    let Some(mut bench) = bench(false, &[]) else { return };
    bench.begin(Operation::Read, 3, 0);
    // Now the file ends before the page.
    bench.file.set_len(PAGE).unwrap();
    assert_eq!(bench.guest.answer(), 0);
    bench.guest.wait_for_log("ends before the mapping");
    let whole = MMap { len: PAGES * PAGE, ..page_at(0) };
    assert_eq!(bench.backends[0].unmap(whole), 0);
    assert_eq!(bench.guest.read64(bench.base), u64::MAX);

    bench.file.set_len(PAGES * PAGE).unwrap();
    assert_eq!(bench.backends[0].map(whole, &bench.file), 0);
    bench.begin(Operation::Read, 4, 0);
    // Now the access is one to a hole.
    assert_eq!(bench.backends[0].unmap(whole), 0);
    assert_eq!(bench.guest.answer(), u64::MAX);
    bench.guest.exit();
}

#[test]
fn an_unavailable_page_ends_the_machine_where_the_user_asked_for_that() {
    // SHM-87
    for interrupts in [false, true] {
        let Some(bench) = bench(interrupts, &["--unavailable-page", "exit"]) else { return };
        let (status, log) = bench.guest.end_with(Operation::Write, 8, bench.base + 2 * PAGE, 1);
        assert_eq!(status.code(), Some(35), "{log}");
        let last = log.lines().last().unwrap();
        assert!(last.starts_with("hotslot: full: the host cannot provide the page at "), "{log}");
        assert!(!log.contains("waits"), "{log}");
    }
}
