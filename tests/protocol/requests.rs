//! SHMEM_MAP and SHMEM_UNMAP: what the guest sees of them, and what is refused.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use hotslot::memory::Access;
use hotslot::memory::alloc::WindowAllocator;
use hotslot::memory::shmem::MapRequest;
use hotslot_test_support::bench::*;
use hotslot_test_support::files::memfd_with;
use hotslot_test_support::wire::{Leash, MMap, NEED_REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, message};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use vmm_sys_util::eventfd::EventFd;

const EINVAL: i64 = -(libc::EINVAL as i64);
const ENOENT: i64 = -(libc::ENOENT as i64);
const EEXIST: i64 = -(libc::EEXIST as i64);
const ERANGE: i64 = -(libc::ERANGE as i64);
const EOVERFLOW: i64 = -(libc::EOVERFLOW as i64);
const EBADF: i64 = -(libc::EBADF as i64);
const EACCES: i64 = -(libc::EACCES as i64);
const EPERM: i64 = -(libc::EPERM as i64);
const ENOSPC: i64 = -(libc::ENOSPC as i64);

const READ_WRITE: u64 = 1;

#[test]
fn what_is_mapped_is_seen_where_it_was_asked_for() {
    let bench = Setup::default().start();
    let file = memfd(0);
    for page in 0..8u8 {
        file.write_all_at(&[page; PAGE as usize], u64::from(page) * PAGE).unwrap();
    }
    let request = MMap {
        padding: [0xff; 7], // SHM-26
        fd_offset: 5 * PAGE,
        shm_offset: 2 * PAGE,
        len: 2 * PAGE,
        ..MMap::default()
    };
    assert_eq!(bench.map(request, &file), 0);
    // SHM-60: already when the answer is there. SHM-43.
    let seen: Vec<_> = (1..5).map(|page| bench.reads(0, page * PAGE)).collect();
    assert_eq!(seen, [None, Some(5), Some(6), None]);
    // SHM-37
    assert_eq!(bench.map(MMap { shmid: 7, ..request }, &file), 0);
    assert_eq!(bench.reads(7, 2 * PAGE), Some(5));
    // SHM-53; SHM-56: gone when the answer is there.
    let unmap = MMap { padding: [1; 7], fd_offset: u64::MAX, flags: u64::MAX, ..request };
    assert_eq!(bench.unmap(unmap), 0);
    assert_eq!((bench.sees(0), bench.sees(7).len()), (vec![], 1));
    // SHM-55
    let other = MMap { len: PAGE, ..request };
    assert_eq!(bench.map(other, &file), 0);
    assert_eq!(bench.reads(0, 2 * PAGE), Some(5));
}

#[test]
fn the_guest_writes_where_it_may() {
    let bench = Setup::default().start();
    let file = file_of(2, 1);
    let writable = MMap { flags: READ_WRITE, ..page_at(0) };
    let read_only = MMap { fd_offset: PAGE, ..page_at(1) };
    assert_eq!(bench.map(writable, &file), 0);
    assert_eq!(bench.map(read_only, &file), 0);
    assert_eq!(bench.sees(0), [(0, PAGE, Access::ReadWrite), (PAGE, PAGE, Access::ReadOnly)]);
    assert!(bench.writes(0, 5, 0xee) && !bench.writes(0, PAGE + 5, 0xee));
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes[..1], 5).unwrap();
    file.read_exact_at(&mut bytes[1..], PAGE + 5).unwrap();
    assert_eq!(bytes, [0xee, 1]); // SHM-40, SHM-38
    file.write_all_at(&[0x77], 6).unwrap();
    assert_eq!(bench.reads(0, 6), Some(0x77)); // SHM-40
}

#[test]
fn a_read_only_descriptor_serves_reading_only() {
    let bench = Setup::default().start();
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().write_all_at(&[3; PAGE as usize], 0).unwrap();
    let file = File::open(named.path()).unwrap();
    assert_eq!(bench.map(MMap { flags: READ_WRITE, ..page_at(0) }, &file), EACCES); // SHM-41
    assert_eq!(bench.map(page_at(0), &file), 0); // SHM-39, SHM-49
    assert_eq!(bench.reads(0, 0), Some(3));
    // Why, for the log.
    let write_only = File::options().write(true).open(named.path()).unwrap();
    for (file, access, why) in [
        (&file, Access::ReadWrite, "not open for writing: send one that is open for reading and writing"),
        (&write_only, Access::ReadOnly, "not open for reading"),
    ] {
        let (shm_offset, len, file_offset) = (2 * PAGE, PAGE, 0);
        let file = &Arc::new(file.try_clone().unwrap().into());
        let request = MapRequest { shmid: 0, shm_offset, len, file, file_offset, access };
        let error = bench.shmem().map(&request).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_file_that_its_owner_sealed_against_writing_serves_reading_only() {
    // SHM-41
    let bench = Setup::default().start();
    let file = memfd_with(MemfdFlags::ALLOW_SEALING, PAGE);
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    assert_eq!(bench.map(MMap { flags: READ_WRITE, ..page_at(0) }, &file), EPERM);
    bench.assert_works();
}

#[test]
fn huge_pages_are_mapped_as_a_whole_or_not_at_all() {
    // SHM-47, SHM-50: mmap(2) would round a part up to the whole page, over what is behind it in the window.
    const HUGE: u64 = 2 << 20;
    let mut setup = Setup::default();
    setup.offer.regions = vec![(0, 2 * HUGE), (7, PAGE)];
    let bench = setup.start();
    let file = memfd_with(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 2 * HUGE);
    let place = |shm_offset, len, fd_offset| MMap { shm_offset, len, fd_offset, ..MMap::default() };
    for (offset, len, fd_offset) in
        [(0, PAGE, 0), (0, HUGE + 1, 0), (PAGE, HUGE, 0), (0, HUGE, PAGE), (0, HUGE - PAGE, 0)]
    {
        assert_eq!(bench.map(place(offset, len, fd_offset), &file), EINVAL, "{offset:#x} {len:#x}");
        assert_eq!(bench.guest().count(), 0);
    }
    // Most machines have none to give.
    assert!([0, -i64::from(libc::ENOMEM)].contains(&bench.map(place(HUGE, HUGE, HUGE), &file)));
}

#[test]
fn each_wrong_map_is_refused_and_the_right_one_then_succeeds() {
    let bench = Setup::default().start();
    let file = file_of(1, 1);
    let page = page_at(0);
    let top = u64::MAX - (PAGE - 1);
    let wrong = [
        (MMap { shmid: 1, ..page }, ENOENT),                       // SHM-29
        (MMap { shmid: 255, ..page }, ENOENT),                     // SHM-29
        (MMap { len: 0, ..page }, EINVAL),                         // SHM-30
        (MMap { len: REGION + 1, ..page }, ERANGE),                // SHM-31
        (MMap { shm_offset: REGION, ..page }, ERANGE),             // SHM-31
        (MMap { shm_offset: top, ..page }, ERANGE),                // SHM-31, SHM-50
        (MMap { shm_offset: top, len: u64::MAX, ..page }, ERANGE), // SHM-31, SHM-50
        (MMap { len: u64::MAX, ..page }, ERANGE),                  // SHM-31
        (MMap { shm_offset: PAGE, len: REGION, ..page }, ERANGE),  // SHM-31
        (MMap { shm_offset: 1 << 63, ..page }, ERANGE),            // SHM-31, SHM-50
        (MMap { fd_offset: top, ..page }, EOVERFLOW),              // SHM-32
        (MMap { fd_offset: (1 << 63) - PAGE, ..page }, EOVERFLOW), // SHM-32
        (MMap { fd_offset: 1 << 63, ..page }, EOVERFLOW),          // SHM-32
        (MMap { shm_offset: 1, ..page }, EINVAL),                  // SHM-33
        (MMap { shm_offset: PAGE + 1, ..page }, EINVAL),           // SHM-33
        (MMap { fd_offset: 2048, ..page }, EINVAL),                // SHM-33
        (MMap { fd_offset: PAGE - 1, ..page }, EINVAL),            // SHM-33
        (MMap { flags: 2, ..page }, EINVAL),                       // SHM-42
        (MMap { flags: READ_WRITE | 1 << 63, ..page }, EINVAL),    // SHM-42
    ];
    for (request, errno) in wrong {
        assert_eq!(bench.map(request, &file), errno, "{request:?}");
        assert_eq!(bench.guest().count(), 0, "{request:?}");
        bench.assert_works(); // SHM-62
    }
    assert_eq!(bench.map(MMap { len: REGION, ..page }, &file), 0); // SHM-31, SHM-44, SHM-49
    assert_eq!(file.metadata().unwrap().len(), PAGE); // SHM-44
    assert!(!bench.needs_reset()); // SHM-62
}

#[test]
fn a_length_of_part_of_a_page_is_unmapped_by_that_length() {
    // SHM-34
    let bench = Setup::default().start();
    let request = MMap { len: PAGE + 1, ..page_at(0) };
    assert_eq!(bench.map(request, &file_of(2, 4)), 0);
    assert_eq!(bench.reads(0, 2 * PAGE - 1), Some(4));
    assert_eq!(bench.map_page(1, 5), EEXIST);
    assert_eq!(bench.unmap(MMap { len: 2 * PAGE, ..request }), ENOENT);
    assert_eq!(bench.unmap(request), 0);
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn overlaps_are_refused_and_neighbours_are_not() {
    let bench = Setup::default().start();
    let place = |page, pages| MMap { len: pages * PAGE, ..page_at(page) };
    assert_eq!(bench.map(place(4, 4), &file_of(4, 1)), 0);
    for (page, pages) in [(4, 4), (0, 5), (3, 2), (3, 6), (7, 2), (4, 1), (5, 1), (7, 1), (0, 64)] {
        assert_eq!(bench.map(place(page, pages), &file_of(4, 2)), EEXIST); // SHM-35
    }
    assert_eq!(bench.map_page(3, 2), 0); // SHM-36
    assert_eq!(bench.map_page(8, 2), 0); // SHM-36
    assert_eq!(bench.map(MMap { shmid: 7, ..place(4, 4) }, &file_of(4, 3)), 0); // SHM-36
    let seen: Vec<_> = (2..10).map(|page| bench.reads(0, page * PAGE)).collect();
    let old = Some(1);
    assert_eq!(seen, [None, Some(2), old, old, old, old, Some(2), None]); // SHM-35
}

#[test]
fn only_a_whole_mapping_is_unmapped() {
    let bench = Setup::default().start();
    let place = |page, pages| MMap { len: pages * PAGE, ..page_at(page) };
    assert_eq!(bench.map(place(4, 4), &file_of(4, 1)), 0);
    assert_eq!(bench.map(place(8, 2), &file_of(2, 1)), 0);
    let before = bench.sees(0);
    for (page, pages) in [(4, 3), (5, 3), (5, 2), (3, 6), (4, 6), (4, 5), (0, 1), (4, 0), (0, 64)] {
        assert_eq!(bench.unmap(place(page, pages)), ENOENT); // SHM-52
        bench.assert_works(); // SHM-62
    }
    assert_eq!(bench.unmap(MMap { shmid: 7, ..place(4, 4) }), ENOENT); // SHM-52
    assert_eq!(bench.unmap(MMap { shmid: 9, ..place(4, 4) }), ENOENT); // SHM-52
    assert_eq!(bench.sees(0), before);
    assert_eq!(bench.unmap(place(4, 4)), 0); // SHM-51
    assert_eq!(bench.unmap(place(4, 4)), ENOENT); // SHM-52
    assert_eq!(bench.sees(0), before[1..]);
}

#[test]
fn descriptors_that_are_not_mappable_files_are_refused() {
    // SHM-47
    let bench = Setup::default().start();
    let (pipe, leash) = Leash::new();
    let (socket, _other) = UnixStream::pair().unwrap();
    let event = EventFd::new(0).unwrap();
    // SAFETY: the descriptor is new, and nobody else's.
    let event = unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) };
    let path_only = File::options().read(true).custom_flags(libc::O_PATH).open("/proc/self/exe").unwrap();
    let fds: [(OwnedFd, i64); 6] = [
        (pipe, EINVAL),
        (socket.into(), EINVAL),
        (File::open("/").unwrap().into(), EINVAL),
        (File::open("/dev/zero").unwrap().into(), EINVAL),
        (event, EINVAL),
        (path_only.into(), EBADF),
    ];
    for (fd, errno) in &fds {
        assert_eq!(bench.map(page_at(0), fd), *errno);
    }
    drop(fds);
    leash.wait_until_closed(); // SHM-27
    bench.assert_works(); // SHM-62
}

#[test]
fn a_map_needs_one_descriptor_and_an_unmap_none() {
    let bench = Setup::default().start();
    let channel = bench.channel();
    let request = |id| message(id, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    assert_eq!(bench.map_page(1, 1), 0);
    for count in [0, 2, 3, 253] {
        // SHM-27
        let (fd, leash) = Leash::new();
        channel.send_with(&request(SHMEM_MAP), &vec![fd.as_raw_fd(); count]).unwrap();
        assert_eq!(channel.answer(SHMEM_MAP), EBADF, "{count} descriptors");
        drop(fd);
        leash.wait_until_closed();
    }
    for count in [1, 2, 253] {
        // SHM-54
        let (fd, leash) = Leash::new();
        let unmap = message(SHMEM_UNMAP, VERSION_1 | NEED_REPLY, &page_at(1).bytes());
        channel.send_with(&unmap, &vec![fd.as_raw_fd(); count]).unwrap();
        assert_eq!(channel.answer(SHMEM_UNMAP), EBADF, "{count} descriptors");
        drop(fd);
        leash.wait_until_closed();
    }
    assert_eq!(bench.reads(0, PAGE), Some(1));
    bench.assert_works(); // SHM-62
}

#[test]
fn mappings_outlive_the_back_ends_descriptor_and_need_one_of_ours_for_a_file() {
    // SHM-46
    let bench = Setup::default().start();
    let file = file_of(1, 6);
    let inode = file.metadata().unwrap().ino();
    for page in 0..3 {
        assert_eq!(bench.map(page_at(page), &file), 0);
    }
    drop(file);
    let open = || {
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        open.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
            // A memfd has no name: it is told by inode number, length and link count.
            .filter(|file| file.ino() == inode && file.len() == PAGE && file.nlink() == 0)
            .count()
    };
    eventually("the file is open once", || open() == 1);
    assert_eq!(bench.unmap(page_at(1)), 0);
    assert_eq!((open(), bench.reads(0, 0)), (1, Some(6)));
    assert_eq!((bench.unmap(page_at(0)), bench.unmap(page_at(2))), (0, 0));
    eventually("the file is open nowhere", || open() == 0);
}

#[test]
fn a_file_may_be_longer_or_shorter_than_its_mapping() {
    // SHM-44
    let bench = Setup::default().start();
    let file = memfd(0);
    let request = MMap { len: 512 * PAGE, flags: READ_WRITE, ..MMap::default() };
    let request = MMap { len: request.len.min(REGION), ..request };
    assert_eq!(bench.map(request, &file), 0);
    assert_eq!(bench.map(MMap { shmid: 7, fd_offset: 1 << 40, ..request }, &file), 0);
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(bench.reads(0, 0), None, "no file there yet");
    file.write_all_at(&[8], 10).unwrap();
    assert_eq!(bench.reads(0, 10), Some(8));
}

#[test]
fn more_mappings_than_allowed_fail_one_by_one() {
    // SHM-48: over all regions.
    let mut setup = Setup::default();
    setup.quota = 3;
    let bench = setup.start();
    let elsewhere = MMap { shmid: 7, ..page_at(0) };
    assert_eq!(bench.map(elsewhere, &file_of(1, 9)), 0);
    let answers: Vec<_> = (0..4).map(|page| bench.map_page(page, page as u8 + 1)).collect();
    assert_eq!(answers, [0, 0, ENOSPC, ENOSPC]);
    assert_eq!(bench.map(MMap { shmid: 7, ..page_at(1) }, &file_of(1, 9)), ENOSPC);
    assert_eq!(bench.unmap(page_at(1)), 0);
    assert_eq!(bench.map_page(4, 5), 0);
    assert_eq!(bench.map_page(5, 6), ENOSPC);
    let seen: Vec<_> = (0..5).map(|page| bench.reads(0, page * PAGE)).collect();
    assert_eq!((seen, bench.reads(7, 0)), (vec![Some(1), None, None, None, Some(5)], Some(9)));
    // A reset frees all of them.
    bench.reset();
    bench.start().unwrap();
    let answers: Vec<_> = (0..4).map(|page| bench.map_page(page, page as u8 + 1)).collect();
    assert_eq!(answers, [0, 0, 0, ENOSPC]);
}

#[test]
fn a_machine_without_slots_fails_one_request_and_leaves_nothing_behind() {
    // SHM-48, SHM-49
    let bench = Setup::default().start();
    assert_eq!(bench.map_page(0, 1), 0);
    bench.guest().no_slots.store(true, Ordering::Relaxed);
    assert_eq!(bench.map_page(1, 2), ENOSPC);
    assert_eq!((bench.sees(0).len(), bench.reads(0, 0)), (1, Some(1)));
    bench.guest().no_slots.store(false, Ordering::Relaxed);
    assert_eq!(bench.map_page(1, 2), 0);
    assert_eq!(bench.reads(0, PAGE), Some(2));
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn what_a_length_is_rounded_up_to_is_what_is_checked() {
    let bench = Setup::default().start();
    let file = file_of(4, 1);
    let place = |offset, len, fd_offset| MMap { shm_offset: offset, len, fd_offset, ..MMap::default() };
    let last = REGION - PAGE;
    let end = (1 << 63) - 2 * PAGE;
    for (request, expected) in [
        // SHM-31, SHM-34: the region's last page, all of it or not, and a byte beyond.
        (place(last, PAGE + 1, 0), ERANGE),
        (place(last - PAGE, 2 * PAGE + 1, 0), ERANGE),
        (place(last, 1, 0), 0),
        // SHM-35: the mapping has that page, though it asked for a byte of it.
        (place(last, PAGE, 0), EEXIST),
        (place(last - PAGE, PAGE + 1, 0), EEXIST),
        (place(last - PAGE, PAGE, 0), 0), // SHM-36
        (place(PAGE, PAGE, 0), 0),
        (place(0, PAGE + 1, 0), EEXIST),
        (place(0, PAGE - 1, 0), 0), // SHM-36
        // SHM-32: where an off_t ends.
        (place(4 * PAGE, PAGE, end), 0),
        (place(5 * PAGE, 1, end), 0),
        (place(6 * PAGE, PAGE + 1, end), EOVERFLOW),
        (place(6 * PAGE, 1, end + PAGE), EOVERFLOW),
        (place(6 * PAGE, 1, end + 2 * PAGE), EOVERFLOW),
        (place(6 * PAGE, u64::MAX, end), ERANGE),
    ] {
        let before = bench.guest().count();
        assert_eq!(bench.map(request, &file), expected, "{request:x?}");
        let mapped = usize::from(expected == 0);
        assert_eq!(bench.guest().count(), before + mapped, "{request:x?}");
    }
    // SHM-34, SHM-52
    assert_eq!(bench.unmap(place(last, PAGE, 0)), ENOENT);
    assert_eq!(bench.unmap(place(0, PAGE, 0)), ENOENT);
    assert_eq!(bench.unmap(place(last, 1, 0)), 0);
    assert_eq!(bench.unmap(place(0, PAGE - 1, 0)), 0);
    assert_eq!((bench.reads(0, last), bench.reads(0, last - PAGE)), (None, Some(1)));
}

#[test]
fn no_number_wraps_around_to_a_mapping() {
    // SHM-50, SHM-52
    let bench = Setup::default().start();
    assert_eq!(bench.map(page_at(0), &file_of(1, 1)), 0);
    assert_eq!(bench.map(page_at(2), &file_of(1, 2)), 0);
    let before = bench.sees(0);
    let numbers = [0, 1, PAGE - 1, PAGE, 2 * PAGE, REGION, 1 << 32, 1 << 63];
    let numbers = numbers.iter().flat_map(|&number: &u64| [number, number.wrapping_neg()]);
    for shm_offset in numbers.clone() {
        for len in numbers.clone() {
            let request = MMap { shm_offset, len, ..MMap::default() };
            if ![(0, PAGE), (2 * PAGE, PAGE)].contains(&(shm_offset, len)) {
                assert_eq!(bench.unmap(request), ENOENT, "{request:x?}");
            }
            let mapped = bench.map(request, &file_of(1, 3));
            // Only the one page between the two is free, and there are its offset and lengths.
            let fits = shm_offset == PAGE && (1..=PAGE).contains(&len);
            match fits {
                true => assert_eq!((mapped, bench.unmap(request)), (0, 0), "{request:x?}"),
                false => assert!([EINVAL, ERANGE, EEXIST].contains(&mapped), "{request:x?}: {mapped}"),
            }
        }
    }
    assert_eq!(bench.sees(0), before);
    assert_eq!((bench.reads(0, 0), bench.reads(0, 2 * PAGE)), (Some(1), Some(2)));
}

#[test]
fn a_part_of_a_file_can_be_at_several_places() {
    // SHM-37, SHM-38, SHM-40
    let bench = Setup::default().start();
    let file = file_of(2, 1);
    let writable = MMap { flags: READ_WRITE, ..page_at(0) };
    assert_eq!(bench.map(writable, &file), 0);
    assert_eq!(bench.map(MMap { shm_offset: 9 * PAGE, ..writable }, &file), 0);
    assert_eq!(bench.map(page_at(1), &file), 0);
    assert_eq!(bench.map(MMap { shmid: 7, ..writable }, &file), 0);
    assert!(bench.writes(0, 9 * PAGE + 3, 0x55) && !bench.writes(0, PAGE + 3, 0x66));
    let seen = [(0, 3), (0, PAGE + 3), (0, 9 * PAGE + 3), (7, 3)];
    assert!(seen.iter().all(|&(shmid, offset)| bench.reads(shmid, offset) == Some(0x55)));
    // Each is a mapping of its own.
    assert_eq!(bench.unmap(writable), 0);
    assert_eq!((bench.reads(0, 3), bench.reads(7, 3)), (None, Some(0x55)));
    assert_eq!(bench.reads(0, 9 * PAGE + 3), Some(0x55));
}

#[test]
fn two_devices_map_and_unmap_at_the_same_time() {
    // SHM-36, SHM-50, SHM-51, SHM-61
    let machine = Arc::new(Guest::default());
    let devices = [1u64, 2].map(|number| {
        let mut setup = Setup::default();
        setup.guest = Arc::clone(&machine);
        setup.windows = WindowAllocator::new(number << 32, (number + 1) << 32);
        setup.start()
    });
    thread::scope(|scope| {
        for (number, bench) in (1u8..).zip(&devices) {
            scope.spawn(move || {
                // The same offsets, regions and moments; other files.
                let file = file_of(4, number);
                for round in 0..300u64 {
                    let request = MMap {
                        shmid: [0, 7][round as usize % 2],
                        len: (round % 4 + 1) * PAGE,
                        ..page_at(round % 60)
                    };
                    let last = request.shm_offset + request.len - 1;
                    assert_eq!(bench.map(request, &file), 0);
                    assert_eq!(bench.map(request, &file), EEXIST);
                    assert_eq!(bench.reads(request.shmid, last), Some(number));
                    assert_eq!(bench.unmap(request), 0);
                    assert_eq!(bench.unmap(request), ENOENT);
                    assert_eq!(bench.reads(request.shmid, last), None);
                    if round % 50 == 0 {
                        bench.reset();
                        bench.start().unwrap();
                    }
                }
                assert_eq!(bench.map(page_at(number.into()), &file), 0);
            });
        }
    });
    assert_eq!(machine.count(), 2);
    devices[0].reset();
    assert_eq!((machine.count(), devices[1].reads(0, 2 * PAGE)), (1, Some(2)));
}

#[test]
fn bytes_beyond_the_device_s_limit_are_refused_until_others_are_unmapped() {
    // SHM-85: also where each is far below it, and where the file has none of them.
    let mut setup = Setup::default();
    setup.bytes = 8 * PAGE;
    let bench = setup.start();
    let of = |page, pages| MMap { len: pages * PAGE, ..page_at(page) };
    assert_eq!(bench.map(of(0, 9), &memfd(0)), ENOSPC);
    assert_eq!(bench.map(of(0, 5), &file_of(5, 1)), 0);
    assert_eq!(bench.map(MMap { shmid: 7, ..of(0, 3) }, &memfd(0)), 0);
    assert_eq!(bench.map(of(5, 1), &memfd(0)), ENOSPC);
    assert_eq!((bench.reads(0, 4 * PAGE), bench.reads(0, 5 * PAGE)), (Some(1), None));
    assert_eq!(bench.unmap(of(0, 5)), 0);
    assert_eq!(bench.map(of(20, 5), &memfd(0)), 0);
    bench.reset();
    bench.start().unwrap();
    assert_eq!(bench.map(of(0, 8), &memfd(0)), 0);
    assert_eq!(bench.map(of(8, 1), &memfd(0)), ENOSPC);
}

#[test]
fn unmapped_ranges_lose_their_slots_at_a_reset_or_after_a_while_without_requests() {
    // SHM-102
    let bench = Setup::default().start();
    let unmap_20 = || {
        for page in (0..40).step_by(2) {
            assert_eq!((bench.map_page(page, 1), bench.unmap(page_at(page))), (0, 0));
            assert_eq!(bench.reads(0, page * PAGE), None); // SHM-56
        }
        assert_eq!((bench.guest().count(), bench.guest().idle()), (0, 20));
    };
    unmap_20();
    bench.reset();
    assert_eq!(bench.guest().idle(), 0);
    bench.start().unwrap();
    unmap_20();
    eventually("no slot is idle", || bench.guest().idle() == 0);
    bench.assert_works();
}
