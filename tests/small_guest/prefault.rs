//! `prefault=on`: the page tables of a mapping are filled before its back-end is answered.

use std::fs;

use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{MIB, PAGE, content, numbered_file};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, page_at};

/// How many of the first mapping's pages this process has in its page tables: `Rss` of the first shared area
/// of smaps that is a file of memory of this size.
fn resident_pages(pid: i32, pages: u64) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let number = |line: &str| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    let mut lines = text.lines().skip_while(|line| **line != *format!("Size: {:>18} kB", pages * 4));
    let rss = lines.find(|line| line.starts_with("Rss:")).expect("an area of that size");
    number(rss) / 4
}

/// Maps 513 pages to a device with these further keys. How many pages were in the host's page tables when
/// the back-end was answered, and how many faults the guest's first reads of all of them cost.
fn map(keys: &str) -> (u64, Option<u64>) {
    const PAGES: u64 = 513;
    let backend = Backend::start();
    let mut guest = Guest::boot(["--vhost-user", &format!("{}{keys}", backend.device("device"))]);
    guest.start_device();
    let (region, _) = guest.region(0);
    let file = numbered_file(5, PAGES);
    // What the first access to any page of the region costs once.
    assert_eq!(backend.map(page_at(1023), &file), 0);
    assert_eq!(guest.read64(region + 4 * MIB - PAGE), content(5, 0));
    assert_eq!(backend.map(MMap { len: PAGES * PAGE, ..page_at(0) }, &file), 0);
    let resident = resident_pages(guest.pid(), PAGES);
    let faults = |guest: &Guest| kvm::statistic(guest.pid(), "pf_fixed");
    let before = faults(&guest);
    for page in 0..PAGES {
        assert_eq!(guest.read64(region + page * PAGE), content(5, page * PAGE));
    }
    let faults = faults(&guest).zip(before).map(|(after, before)| after - before);
    guest.exit();
    (resident, faults)
}

#[test]
fn a_mapping_is_there_before_its_back_end_is_answered() {
    // SHM-105
    if !kvm::is_here() {
        return;
    }
    let ((resident, faults), (without, faults_without)) = (map(",prefault=on"), map(""));
    assert_eq!((resident, without), (513, 0));
    // Only a KVM with hardware virtualization counts, and fills its own page tables.
    if let (Some(faults), Some(faults_without)) = (faults, faults_without) {
        println!("faults of the guest: {faults} with prefault=on, {faults_without} without");
        assert!(faults == 0 && faults_without > 0);
    }
}
