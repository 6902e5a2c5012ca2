//! What hotslot takes of the host, and gives back.

use std::fs::{self, File};
use std::io::{Write, stderr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::files::{MIB, PAGE, content, numbered_file};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, SHMEM_MAP, page_at, writable};

/// Open descriptors, and mapped address ranges.
fn counts(guest: &Guest) -> (usize, usize) {
    let proc = format!("/proc/{}", guest.pid());
    let fds = fs::read_dir(format!("{proc}/fd")).unwrap().count();
    let maps = fs::read_to_string(format!("{proc}/maps")).unwrap();
    (fds, maps.lines().count())
}

#[test]
fn what_was_mapped_and_unmapped_leaves_nothing_behind() {
    // SHM-46, SHM-49, SHM-78
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let data = numbered_file(1, 4);
    let round = |index: u64| {
        let payload = MMap { len: 4 * PAGE, ..page_at(index * 5) };
        assert_eq!(backend.map(writable(payload), &data), 0);
        assert!(backend.map(page_at(index * 5 + 3), &data) < 0);
        payload
    };
    assert_eq!(backend.unmap(round(0)), 0);
    let before = counts(&guest);
    for index in 0..200 {
        assert_eq!(backend.unmap(round(index)), 0);
    }
    assert_eq!(counts(&guest), before);
    // One descriptor of the file, whatever the number of its mappings; all of them gone by the reset.
    for index in 0..200 {
        round(index);
    }
    assert_eq!(counts(&guest).0, before.0 + 1);
    assert!(counts(&guest).1 >= before.1 + 200);
    guest.reset_device();
    assert_eq!(counts(&guest), before);
    guest.exit();
}

/// Maps every other page, so that none can be joined with the next, until there is a refusal: how many
/// succeeded.
fn map_until_refused(backend: &Backend, file: &File, pages: u64) -> u64 {
    const BATCH: u64 = 100;
    let channel = backend.channel();
    for first in (0..pages).step_by(BATCH as usize) {
        for index in first..first + BATCH {
            channel.ask(SHMEM_MAP, page_at(index * 2), &[file.as_raw_fd()]);
        }
        let answers: Vec<_> = (0..BATCH).map(|_| channel.answer(SHMEM_MAP)).collect();
        if let Some(refused) = answers.iter().position(|&answer| answer != 0) {
            let full = -i64::from(libc::ENOSPC);
            assert!(answers[refused..].iter().all(|&answer| answer == full));
            return first + refused as u64;
        }
    }
    panic!("there is no limit");
}

/// With so many devices, the first one's back-end maps as much as it may.
fn too_many(devices: usize, at_least: u64) {
    let pages = 40_000;
    let offer = Offer { regions: vec![(0, pages * 2 * PAGE)], ..Offer::default() };
    let backends: Vec<_> = (0..devices).map(|_| Backend::offering(offer.clone())).collect();
    let names = (0..).zip(&backends).map(|(index, backend)| backend.device(&format!("device{index}")));
    let options: Vec<_> = names.flat_map(|device| ["--vhost-user".to_string(), device]).collect();
    let mut guest = Guest::boot(&options);
    let backend = &backends[0];
    guest.start_device();
    let (base, _) = guest.region(0);
    let data = numbered_file(1, 1);
    let mapped = map_until_refused(backend, &data, pages);
    // Not `println!`: the test harness would keep it to itself.
    let _ = writeln!(stderr(), "{mapped} live mappings, until the first of {devices} devices was refused");
    assert!(mapped >= at_least, "{mapped}");
    for index in [0, mapped / 2, mapped - 1] {
        assert_eq!(guest.read64(base + index * 2 * PAGE), content(1, 0));
    }
    assert_eq!(guest.read64(base + mapped * 2 * PAGE), u64::MAX);
    for other in &backends[1..] {
        assert_eq!(other.map(page_at(0), &data), 0);
    }
    // One for each that goes.
    assert_eq!(backend.unmap(page_at(0)), 0);
    assert_eq!(backend.map(page_at(mapped * 2), &data), 0);
    assert_eq!(backend.map(page_at(0), &data), -i64::from(libc::ENOSPC));
    assert_eq!(guest.read64(base), u64::MAX);
    assert_eq!(guest.read64(base + mapped * 2 * PAGE), content(1, 0));
    // The worst that can happen to the number of address ranges: every file is cut short.
    data.set_len(0).unwrap();
    assert_eq!(guest.read64(base + 2 * PAGE), 0);
    guest.reset_device();
    guest.start_device();
    assert_eq!(guest.read64(base + 2 * PAGE), u64::MAX);
    assert_eq!(backend.map(page_at(1), &numbered_file(2, 1)), 0);
    assert_eq!(guest.read64(base + PAGE), content(2, 0));
    assert_eq!(backend.unmap(page_at(1)), 0);
    guest.exit();
}

#[test]
fn too_many_mappings_are_refused_and_harm_nobody() {
    // SHM-48
    if !kvm::is_here() {
        return;
    }
    // Each device has its share; with eight of them the first one's is soon used up.
    too_many(8, 1000);
}

#[test]
#[ignore = "takes a minute or two: 16,000 slots come and go"]
fn a_device_alone_has_all_the_mappings_there_can_be() {
    // SHM-48
    if !kvm::is_here() {
        return;
    }
    too_many(1, 8000);
}

#[test]
fn sigusr1_prints_the_memory_map_with_live_mappings() {
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let (base, len) = guest.region(0);
    let payload = MMap { fd_offset: PAGE, ..page_at(3) };
    assert_eq!(backend.map(writable(payload), &numbered_file(1, 2)), 0);
    guest.wait_for_map("region 7");
    let log = guest.log();
    let range = |start: u64, len: u64| format!("{start:#014x}-{:#014x}", start + len - 1);
    for line in [
        format!("{}  RAM", range(0, 64 * MIB)),
        format!("{}  registers of device", range(0xd000_0000, PAGE)),
        format!("{}  device shared memory region 0", range(base, len)),
        format!("{}  mapping, read-write, file offset 0x1000", range(base + 3 * PAGE, PAGE)),
    ] {
        assert!(log.contains(&line), "no '{line}' in:\n{log}");
    }
    assert_eq!(guest.read64(base + 3 * PAGE), content(1, PAGE));
    guest.exit();
}

#[test]
fn guest_memory_is_resident_once() {
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    let touched = 32 * MIB;
    for address in (24 * MIB..24 * MIB + touched).step_by(PAGE as usize * 4) {
        guest.write64(address, address);
    }
    std::thread::sleep(Duration::from_millis(10));
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    let (mut ram, mut ours, mut of_ram, mut rams) = (0, 0, false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next().unwrap_or_default(), words.next()) {
            ("Rss:", Some(kib)) if of_ram => ram += kib.parse::<u64>().unwrap(),
            ("Rss:", Some(kib)) => ours += kib.parse::<u64>().unwrap(),
            (range, _) if range.contains('-') => {
                of_ram = line.contains("memfd:guest-ram");
                rams += usize::from(of_ram);
            }
            _ => {}
        }
    }
    assert_eq!(rams, 1, "64 MiB are one range");
    // Every fourth page was touched; huge pages may make it more, never more than there is.
    assert!(ram >= touched / 4 / 1024 && ram <= 64 * 1024, "{ram} KiB of guest RAM");
    println!("hotslot: {ours} KiB resident, beside {ram} KiB of guest RAM");
    assert!(ours < 32 * 1024, "{ours} KiB beside guest RAM");
    guest.exit();
}
