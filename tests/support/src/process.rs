//! What a process has of the host: descriptors, address ranges, threads, and whether these are confined.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};

/// How many descriptors are open.
pub fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

pub fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

/// How many address ranges there are, and how many there may be.
pub fn ranges() -> (usize, usize) {
    let maps = BufReader::new(File::open("/proc/self/maps").unwrap());
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    (maps.lines().count(), most.trim().parse().unwrap())
}

/// The lines of a process's maps (its number, or `self`) that are mappings of files in memory, or
/// reservations. Not among them are reservations of one page, which guard the stacks of threads, and what the
/// allocator has in reserve behind its heaps.
pub fn areas(process: &str) -> Vec<String> {
    const HEAP: u64 = 64 << 20;
    let maps = BufReader::new(File::open(format!("/proc/{process}/maps")).unwrap());
    let mut end_of_memory = 0;
    let mut areas = Vec::new();
    for line in maps.lines().map(Result::unwrap) {
        let (start, rest) = line.split_once('-').unwrap();
        let (end, rest) = rest.split_once(' ').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let is_guard = end - start == 4096;
        // A reservation right behind a heap's own is one area with it, for the kernel.
        let heap_end = start.checked_next_multiple_of(HEAP).unwrap_or(start);
        let is_heap = start == end_of_memory && start != heap_end && end >= heap_end;
        if rest.starts_with("rw-p") {
            end_of_memory = end;
        }
        let is_reserved = rest.starts_with("---p") && !is_guard;
        if is_reserved && is_heap && end > heap_end {
            areas.push(format!("{heap_end:x}-{end:x} {rest}"));
        } else if line.contains("memfd:") || is_reserved && !is_heap {
            areas.push(line);
        }
    }
    areas
}

/// A thread, as the kernel shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// It has a seccomp filter.
    pub filter: bool,
    pub no_new_privs: bool,
}

/// The threads of a process, by their names.
pub fn confinements(process: i32) -> BTreeMap<String, Vec<Confinement>> {
    let mut threads: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let task = task.unwrap().path();
        // It may have ended meanwhile.
        let read = |file| fs::read_to_string(task.join(file));
        let (Ok(name), Ok(status)) = (read("comm"), read("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit('\t').next().unwrap().parse::<u8>().unwrap()
        };
        // KVM's own run in the kernel.
        if !name.starts_with("kvm-") {
            let has = Confinement { filter: field("Seccomp:") == 2, no_new_privs: field("NoNewPrivs:") == 1 };
            threads.entry(name.trim().to_owned()).or_default().push(has);
        }
    }
    threads
}
