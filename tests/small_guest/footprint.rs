//! What hotslot takes of the host, and gives back.

use std::fs;
use std::time::Duration;

use crate::backend::{Backend, MIB, Offer, PAGE, content, file, page, writable};
use crate::guest::Guest;
use crate::kvm;
use crate::wire::{MAP, MMap, UNMAP};

fn boot(backend: &Backend) -> Guest {
    let mut guest = Guest::boot(["--vhost-user", &backend.device("device")]);
    guest.start_device();
    guest
}

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
    let mut guest = boot(&backend);
    let data = file(1, 4);
    let round = |index: u64| {
        let payload = MMap {
            len: 4 * PAGE,
            ..page(index * 5)
        };
        assert_eq!(backend.map(writable(payload), &data), 0);
        assert!(backend.map(page(index * 5 + 3), &data) < 0);
        payload
    };
    assert_eq!(backend.unmap(round(0)), 0);
    let before = counts(&guest);
    for index in 0..200 {
        assert_eq!(backend.unmap(round(index)), 0);
    }
    assert_eq!(counts(&guest), before);
    // No descriptor for each mapping, and all of them gone by the reset.
    for index in 0..200 {
        round(index);
    }
    assert_eq!(counts(&guest).0, before.0);
    assert!(counts(&guest).1 >= before.1 + 200);
    guest.reset_device();
    assert_eq!(counts(&guest), before);
    guest.exit();
}

#[test]
fn too_many_mappings_are_refused_and_harm_nobody() {
    // SHM-48
    if !kvm::is_here() {
        return;
    }
    // Each device has its share; with eight of them the first one's is soon used up.
    const BATCH: u64 = 100;
    let pages = 10_000;
    let offer = Offer {
        regions: vec![(0, pages * 2 * PAGE)],
        ..Offer::default()
    };
    let backends: Vec<_> = (0..8).map(|_| Backend::offering(offer.clone())).collect();
    let devices = (0..)
        .zip(&backends)
        .map(|(index, backend)| backend.device(&format!("device{index}")));
    let options: Vec<_> = devices
        .flat_map(|device| ["--vhost-user".to_string(), device])
        .collect();
    let mut guest = Guest::boot(&options);
    let (backend, other) = (&backends[0], &backends[1]);
    guest.start_device();
    let (base, _) = guest.region(0);
    let data = file(1, 1);
    // Every other page, so that none can be joined with the next.
    let mut mapped = 0;
    let refused = 'all: loop {
        assert!(mapped < pages, "there is no limit");
        (mapped..mapped + BATCH).for_each(|index| backend.send(MAP, page(index * 2), Some(&data)));
        let answers: Vec<_> = (0..BATCH).map(|_| backend.answer(MAP)).collect();
        for answer in answers {
            if answer != 0 {
                break 'all answer;
            }
            mapped += 1;
        }
    };
    assert_eq!(refused, -i64::from(libc::ENOSPC));
    assert!(mapped > 1000, "{mapped}");
    for index in [0, mapped / 2, mapped - 1] {
        assert_eq!(guest.read64(base + index * 2 * PAGE), content(1, 0));
    }
    assert_eq!(guest.read64(base + mapped * 2 * PAGE), u64::MAX);
    assert_eq!(other.map(page(0), &data), 0);
    assert_eq!(backend.unmap(page(0)), 0);
    assert_eq!(backend.map(page(mapped * 2), &data), 0);
    assert_eq!(guest.read64(base + mapped * 2 * PAGE), content(1, 0));
    // The worst that can happen to the number of address ranges: every file is cut short.
    data.set_len(0).unwrap();
    assert_eq!(guest.read64(base + 2 * PAGE), 0);
    guest.reset_device();
    guest.start_device();
    assert_eq!(guest.read64(base + 2 * PAGE), u64::MAX);
    assert_eq!(backend.map(page(1), &file(2, 1)), 0);
    backend.send(UNMAP, page(1), None);
    assert_eq!(backend.answer(UNMAP), 0);
    guest.exit();
}

#[test]
fn sigusr1_prints_the_memory_map_with_live_mappings() {
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = boot(&backend);
    let (base, len) = guest.region(0);
    let payload = MMap {
        fd_offset: PAGE,
        ..page(3)
    };
    assert_eq!(backend.map(writable(payload), &file(1, 2)), 0);
    // SAFETY: a signal to a child of ours, which is not reaped yet.
    unsafe { libc::kill(guest.pid(), libc::SIGUSR1) };
    guest.wait_for_log("region 7");
    let log = guest.log();
    let range = |start: u64, len: u64| format!("{start:#014x}-{:#014x}", start + len - 1);
    for line in [
        format!("{}  RAM", range(0, 64 * MIB)),
        format!("{}  registers of device", range(0xd000_0000, PAGE)),
        format!("{}  device shared memory region 0", range(base, len)),
        format!(
            "{}  mapping, read-write, file offset 0x1000",
            range(base + 3 * PAGE, PAGE)
        ),
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
    let mut guest = boot(&backend);
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
    assert!(
        ram >= touched / 4 / 1024 && ram <= 64 * 1024,
        "{ram} KiB of guest RAM"
    );
    println!("hotslot: {ours} KiB resident, beside {ram} KiB of guest RAM");
    assert!(ours < 32 * 1024, "{ours} KiB beside guest RAM");
    guest.exit();
}
