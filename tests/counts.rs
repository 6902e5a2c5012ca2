//! What a device takes of the process, it gives back (SHM-78). A program of its own: nothing else opens files here.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

#[path = "protocol/bench.rs"]
mod bench;
#[path = "protocol/wire.rs"]
mod wire;

use bench::*;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of files, and reservations. Those of one page are what guards the stacks of threads.
fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let is_one_page = |line: &str| {
        let (start, rest) = line.split_once('-').unwrap();
        let [start, end] = [start, &rest[..start.len()]].map(|text| u64::from_str_radix(text, 16).unwrap());
        end - start == PAGE
    };
    maps.lines()
        .filter(|line| line.contains("memfd:") || line.contains("---p") && !is_one_page(line))
        .count()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn descriptors_mappings_and_threads_are_given_back() {
    // SAFETY: a setting. The allocator's own reservations, one for each thread otherwise, do not count then.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let counts = || (descriptors(), mappings());
    // The first device may make what stays, such as a thread's stack in the allocator's hands.
    drop(Setup::new().start().end());
    eventually("the back-end's thread ends", || threads() == 2);
    let nothing = counts();
    for _ in 0..3 {
        let bench = Setup::new().start();
        bench.start().unwrap();
        let file = file_of(1, 1);
        let idle = counts();
        for round in 0..100 {
            let page = page_at(round % 60);
            assert_eq!(bench.map(page, &file), 0);
            assert!(bench.map(page, &file) < 0);
            assert_eq!(bench.unmap(page), 0);
            assert!(bench.unmap(page) < 0);
        }
        assert_eq!(counts(), idle);
        for page in 0..60 {
            assert_eq!(bench.map_page(page, 1), 0);
        }
        assert_eq!(descriptors(), idle.0); // SHM-46
        bench.reset();
        assert_eq!(counts(), idle); // SHM-69
        bench.start().unwrap();
        for page in 0..60 {
            assert_eq!(bench.map_page(page, 1), 0);
        }
        drop(file);
        drop(bench.end());
        eventually("the back-end's thread ends", || threads() == 2);
        assert_eq!(counts(), nothing);
    }
}
