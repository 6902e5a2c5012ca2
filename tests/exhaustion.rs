//! What a device does when there is no more of something (SHM-48): KVM's slots, address ranges
//! (vm.max_map_count), descriptors, address space. A program of its own: its limits are lowered and reached,
//! and its tests run one by one.
//!
//! How many mappings there were in the end is printed.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::fs::File;
use std::io::{Write, stderr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hotslot::memory::alloc::WindowAllocator;
use hotslot_test_support::bench::*;
use hotslot_test_support::kvm;
use hotslot_test_support::machine::{Machine, WINDOWS};
use hotslot_test_support::process::{areas, descriptors, ranges};
use hotslot_test_support::wire::{MMap, SHMEM_MAP, SHMEM_UNMAP};

const ENOMEM: i64 = -(libc::ENOMEM as i64);
const ENOSPC: i64 = -(libc::ENOSPC as i64);
const EMFILE: i64 = -(libc::EMFILE as i64);

/// Only one test at a time, from its first descriptor on: what is used up is the process'.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Not `println!`: the test harness would keep it to itself.
fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(stderr(), "{text}");
}

/// A device that may have as many mappings as there can be, with a region of so many pages.
fn unlimited(pages: u64, machine: &Machine) -> Bench {
    let mut setup = Setup::default();
    setup.offer.regions = vec![(0, pages * PAGE), (7, REGION)];
    setup.quota = usize::MAX;
    setup.guest = Arc::new(machine.guest());
    setup.windows = WindowAllocator::new(WINDOWS.0, WINDOWS.1);
    setup.start()
}

/// One page of region 0, of the file's page with this number.
fn page_of(page: u64, file_page: u64) -> MMap {
    MMap { fd_offset: file_page * PAGE, ..page_at(page) }
}

/// Maps until there is a refusal, many at a time: how many succeeded, and the answer to the next.
fn map_until_refused(bench: &Bench, file: &File, request: impl Fn(u64) -> MMap) -> (u64, i64) {
    const BATCH: u64 = 50;
    let channel = bench.channel();
    for first in (0..).step_by(BATCH as usize) {
        for index in first..first + BATCH {
            channel.ask(SHMEM_MAP, request(index), &[file.as_raw_fd()]);
        }
        let answers = [(); BATCH as usize].map(|()| channel.answer(SHMEM_MAP));
        if let Some(refused) = answers.iter().position(|&answer| answer != 0) {
            assert!(answers[refused..].iter().all(|&answer| answer == answers[refused]));
            return (first + refused as u64, answers[refused]);
        }
    }
    unreachable!()
}

fn unmap_many(bench: &Bench, pages: impl Iterator<Item = u64>) {
    let channel = bench.channel();
    let mut waiting = 0;
    for page in pages {
        channel.ask(SHMEM_UNMAP, page_at(page), &[]);
        waiting += 1;
        if waiting == 50 {
            (0..waiting).for_each(|_| assert_eq!(channel.answer(SHMEM_UNMAP), 0));
            waiting = 0;
        }
    }
    (0..waiting).for_each(|_| assert_eq!(channel.answer(SHMEM_UNMAP), 0));
}

/// A file of so many pages, of which these tell their number; the others take no room.
fn numbered(pages: u64, written: &[u64]) -> File {
    let file = memfd(pages * PAGE);
    for &page in written {
        file.write_all_at(&[byte_of(page)], page * PAGE).unwrap();
    }
    file
}

fn byte_of(page: u64) -> u8 {
    (page % 251 + 1) as u8
}

#[test]
fn a_machine_without_slots_refuses_one_mapping_and_takes_one_for_each_that_goes() {
    // SHM-48, SHM-49, SHM-62, SHM-69, SHM-72
    let _alone = alone();
    if !kvm::is_here() {
        return;
    }
    let mut machine = Machine::new(true);
    let most = kvm_ioctls::Kvm::new().unwrap().get_nr_memslots() as u64;
    // The pages of a file, one after another: the VMM's address space has one range for all of them.
    let bench = unlimited(most + 100, &machine);
    let region = bench.shmem().region(0).unwrap();
    let idle = (descriptors(), areas("self"));
    let spots = [0, 1, most / 2, most - 2, most - 1, most];
    let file = numbered(most + 100, &spots);
    let (mapped, refusal) = map_until_refused(&bench, &file, |index| page_of(index, index));
    say(format_args!("{mapped} live mappings, until KVM's {most} slots were used up"));
    // One slot is the machine's RAM.
    assert_eq!((mapped, refusal), (most - 1, ENOSPC));
    let mut reads = |page: u64| machine.read(bench.guest(), region.start() + page * PAGE);
    for page in spots {
        assert_eq!(reads(page), (page < mapped).then_some(byte_of(page)), "{page}");
    }
    assert_eq!(bench.map(page_of(mapped, mapped), &file), ENOSPC);
    assert_eq!(bench.unmap(page_at(1)), 0);
    assert_eq!(bench.map(page_of(mapped, 0), &file), 0);
    assert_eq!(bench.map(page_of(1, 1), &file), ENOSPC);
    assert_eq!((reads(1), reads(mapped), reads(0)), (None, Some(1), Some(1)));

    bench.reset();
    machine.assert_empty(region);
    drop(file);
    assert_eq!((descriptors(), areas("self")), idle);
    bench.start().unwrap();
    assert_eq!(bench.map_page(0, 7), 0);
    assert_eq!(machine.read(bench.guest(), region.start()), Some(7));
}

/// Takes all address ranges that the process may have, but so many; gives them back when dropped.
struct Ballast {
    start: *mut libc::c_void,
    len: usize,
    /// More ranges, one by one.
    single: Vec<*mut libc::c_void>,
}

impl Ballast {
    fn all_but(spare: usize) -> Ballast {
        let (have, most) = ranges();
        let count = most.saturating_sub(have + spare);
        let len = count * PAGE as usize;
        let map = |len, protection| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: without MAP_FIXED nothing else is touched.
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) }
        };
        let start = map(len.max(1), libc::PROT_READ);
        assert_ne!(start, libc::MAP_FAILED);
        // Every other page is different from its neighbours.
        for page in (1..count).step_by(2) {
            let at = start.wrapping_byte_add(page * PAGE as usize);
            // SAFETY: a page of the mapping just made.
            assert_eq!(unsafe { libc::mprotect(at, PAGE as usize, libc::PROT_NONE) }, 0);
        }
        let mut single = Vec::with_capacity(1 << 10);
        if spare == 0 {
            single.extend((0..).map_while(|index| {
                // Nor can one be joined to the one before.
                let page = map(PAGE as usize, [libc::PROT_READ, libc::PROT_WRITE][index % 2]);
                (page != libc::MAP_FAILED).then_some(page)
            }));
        }
        Ballast { start, len, single }
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let single = self.single.iter().map(|&page| (page, PAGE as usize));
        for (start, len) in single.chain([(self.start, self.len.max(1))]) {
            // SAFETY: this value made the mapping, and nobody uses it.
            unsafe { libc::munmap(start, len) };
        }
    }
}

#[test]
fn a_process_without_address_ranges_refuses_one_mapping_and_takes_one_for_each_that_goes() {
    // SHM-48, SHM-49, SHM-62
    let _alone = alone();
    let (_, most) = ranges();
    let bench = unlimited(2 * most as u64, &Machine::new(false));
    let file = numbered(1, &[0]);
    let idle = areas("self");
    // Every other page: a range for each mapping, and one for the hole behind it.
    let (mapped, refusal) = map_until_refused(&bench, &file, |index| page_of(2 * index, 0));
    say(format_args!(
        "{mapped} live mappings with holes between them, until {most} address ranges were used up"
    ));
    assert_eq!(refusal, ENOMEM);
    assert!(mapped as usize > most / 2 - 1000);
    assert_eq!(bench.guest().count() as u64, mapped);
    for index in [0, mapped / 2, mapped - 1] {
        assert_eq!(bench.reads(0, 2 * index * PAGE), Some(1));
    }
    for _ in 0..10 {
        // It leaves nothing behind, each time.
        let before = ranges();
        assert_eq!(bench.map(page_of(2 * mapped, 0), &file), ENOMEM);
        assert_eq!(ranges(), before);
    }
    assert_eq!(bench.unmap(page_at(2)), 0);
    assert_eq!((bench.reads(0, 2 * PAGE), bench.reads(0, 4 * PAGE)), (None, Some(1)));
    assert_eq!(bench.map(page_of(2 * mapped, 0), &file), 0);
    assert_eq!(bench.map(page_of(2, 0), &file), ENOMEM);
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
    assert_eq!(areas("self"), idle);
    bench.start().unwrap();
    bench.assert_works();
}

#[test]
fn what_is_unmapped_where_no_address_range_is_left_is_gone_after_the_reset() {
    // SHM-48, SHM-56, SHM-69
    let _alone = alone();
    const PAGES: u64 = 400;
    let bench = unlimited(PAGES + 2, &Machine::new(false));
    let file = numbered(PAGES, &[0, 1, PAGES - 1]);
    let idle = areas("self");
    let map_all = || {
        for page in 0..PAGES {
            assert_eq!(bench.map(page_of(page, page), &file), 0);
        }
    };
    // One range for all mappings: to take a page out of its middle makes it two, and one for the hole.
    map_all();
    let ballast = Ballast::all_but(PAGES as usize / 2);
    let (before, most) = ranges();
    unmap_many(&bench, (1..PAGES).step_by(2));
    let (after, _) = ranges();
    assert!(after > before + 100 && after + 10 > most, "{after} ranges, and {before} before, of {most}");
    assert_eq!((bench.reads(0, 0), bench.reads(0, PAGE)), (Some(1), None));
    assert_eq!(bench.guest().count() as u64, PAGES / 2);
    // As the others go, what could not be taken out does, too.
    unmap_many(&bench, (0..PAGES).step_by(2));
    assert_eq!(bench.guest().count(), 0);
    // Their one range is a hole again.
    assert_eq!(ranges().0, before - 1);
    drop(ballast);
    assert_eq!(areas("self"), idle);

    // The same, but a reset comes first.
    map_all();
    let ballast = Ballast::all_but(PAGES as usize / 2);
    unmap_many(&bench, (1..PAGES).step_by(2));
    bench.reset();
    assert_eq!((bench.guest().count(), ranges().0), (0, before - 1));
    drop(ballast);
    assert_eq!(areas("self"), idle);

    // At vm.max_map_count even MAP_FIXED over a range of our own fails. Then the guest's view is right all
    // the same; the rest is made good by what comes next.
    bench.start().unwrap();
    map_all();
    let ballast = Ballast::all_but(0);
    assert_eq!(bench.map(page_of(PAGES + 1, 0), &file), ENOMEM);
    unmap_many(&bench, (1..PAGES).step_by(2));
    assert_eq!((bench.reads(0, 0), bench.reads(0, PAGE)), (Some(1), None));
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
    drop(ballast);
    bench.start().unwrap();
    bench.assert_works();
    assert_eq!(areas("self"), idle);
}

/// Lowers a limit of the process, and puts it back when dropped.
struct Lowered(libc::__rlimit_resource_t, libc::rlimit);

impl Lowered {
    fn to(resource: libc::__rlimit_resource_t, limit: u64) -> Lowered {
        let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: one structure, on our stack.
        assert_eq!(unsafe { libc::getrlimit(resource, &mut old) }, 0);
        let lowered = Lowered(resource, old);
        lowered.set(libc::rlimit { rlim_cur: limit, ..old });
        lowered
    }

    fn set(&self, limit: libc::rlimit) {
        // SAFETY: one structure, on our stack.
        assert_eq!(unsafe { libc::setrlimit(self.0, &limit) }, 0);
    }
}

impl Drop for Lowered {
    fn drop(&mut self) {
        self.set(self.1);
    }
}

#[test]
fn a_process_without_descriptors_refuses_one_mapping_and_takes_all_with_two() {
    // SHM-46, SHM-48, SHM-62
    let _alone = alone();
    const PAGES: u64 = 1000;
    let bench = unlimited(2 * PAGES, &Machine::new(false));
    assert_eq!(bench.map_page(0, 1), 0);
    let channel = bench.channel();
    let file = file_of(1, 2);
    let highest = std::fs::read_dir("/proc/self/fd").unwrap();
    let highest = highest.map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.parse::<u64>().unwrap()
    });
    // Two more than the highest, so that two at least are free below the limit, wherever the others are.
    let limit = Lowered::to(libc::RLIMIT_NOFILE, highest.max().unwrap() + 3);
    // Those are taken, so that none is left.
    let mut taken: Vec<_> = std::iter::from_fn(|| file.try_clone().ok()).collect();
    assert_eq!(channel.map(page_at(1), &file), EMFILE);
    assert_eq!(channel.map(page_at(1), &file), EMFILE);
    assert_eq!(channel.unmap(page_at(1)), -i64::from(libc::ENOENT));
    assert!(taken.pop().is_some() && taken.pop().is_some());
    // Two are enough for all: the one of a request, and the one that is kept of the file.
    for page in 1..PAGES {
        assert_eq!(channel.map(page_at(2 * page), &file), 0);
    }
    say(format_args!("{PAGES} live mappings with two descriptors to spare"));
    taken.extend(std::iter::from_fn(|| file.try_clone().ok()));
    assert_eq!(channel.map(page_at(1), &file), EMFILE);
    drop((taken, limit));
    assert_eq!((bench.reads(0, 0), bench.reads(0, 2 * PAGE)), (Some(1), Some(2)));
    bench.reset();
    assert_eq!((bench.guest().count(), bench.needs_reset()), (0, false));
}

/// Bytes of address space that the process has.
fn address_space() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * PAGE
}

#[test]
fn a_mapping_takes_no_address_space_beyond_its_window() {
    // SHM-48, SHM-49
    let _alone = alone();
    const LARGE: u64 = 256 << 20;
    let bench = unlimited(LARGE / PAGE, &Machine::new(false));
    assert_eq!(bench.map_page(0, 1), 0);
    let file = file_of(1, 2);
    let large = MMap { shm_offset: 2 * PAGE, len: LARGE - 2 * PAGE, ..MMap::default() };
    let limit = Lowered::to(libc::RLIMIT_AS, address_space() + LARGE / 2);
    assert_eq!(bench.map(large, &file), 0);
    assert_eq!(bench.map_page(1, 3), 0);
    drop(limit);
    let seen = [0, PAGE, 2 * PAGE].map(|offset| bench.reads(0, offset));
    assert_eq!(seen, [Some(1), Some(3), Some(2)]);
    bench.reset();
    assert_eq!((bench.guest().count(), bench.needs_reset()), (0, false));
}
