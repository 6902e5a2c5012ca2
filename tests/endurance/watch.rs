//! What can be seen of a running hotslot from outside: whether the guest's processors get on, and what the
//! process has.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hotslot_guest::board::*;
use hotslot_test_support::process;

use crate::page::Words;

const LOOK: Duration = Duration::from_millis(5);

/// The threads of a process: the name of each, with a newline, and its directory in /proc.
fn threads(pid: i32) -> impl Iterator<Item = (String, PathBuf)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.filter_map(|thread| {
        let path = thread.unwrap().path();
        // One that has just ended has none.
        let name = fs::read_to_string(path.join("comm")).ok()?;
        Some((name, path))
    })
}

/// How long the thread of a processor has waited so far because the host had other things to run.
struct Waited(File);

impl Waited {
    fn of(pid: i32, cpu: usize) -> Waited {
        let (_, path) = threads(pid)
            .find(|(name, _)| *name == format!("vcpu{cpu}\n"))
            .expect("hotslot names its threads");
        Waited(File::open(path.join("schedstat")).unwrap())
    }

    fn get(&self) -> Duration {
        let mut text = [0; 64];
        let len = self.0.read_at(&mut text, 0).unwrap();
        let text = std::str::from_utf8(&text[..len]).unwrap();
        // Nanoseconds on a processor, nanoseconds waiting for one, number of times.
        let waited = text.split_whitespace().nth(1).unwrap();
        Duration::from_nanos(waited.parse().unwrap())
    }
}

/// Watches the progress of hotslot's processors while `action` runs; gives the longest time in which each of
/// them made none, without that for which the host did not let it run.
pub fn longest_stall<T>(pid: i32, board: &Words, action: impl FnOnce() -> T) -> (T, [Duration; CPUS]) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let waited: [Waited; CPUS] = std::array::from_fn(|cpu| Waited::of(pid, cpu));
            let mut last = waited.each_ref().map(|waited| (0, Instant::now(), waited.get()));
            let mut longest = [Duration::ZERO; CPUS];
            while !done.load(Ordering::SeqCst) {
                for (cpu, (accesses, since, waited_then)) in last.iter_mut().enumerate() {
                    let (now, waited) = (board.get(report(cpu) + ACCESSES), waited[cpu].get());
                    let still = since.elapsed().saturating_sub(waited - *waited_then);
                    longest[cpu] = longest[cpu].max(still);
                    if now != *accesses {
                        (*accesses, *since, *waited_then) = (now, Instant::now(), waited);
                    }
                }
                std::thread::sleep(LOOK);
            }
            longest
        });
        let result = action();
        done.store(true, Ordering::SeqCst);
        (result, watch.join().unwrap())
    })
}

/// What a process has of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Resident memory in KiB: its own, of files, of files in memory (guest RAM and what is mapped).
    pub anonymous: u64,
    pub file: u64,
    pub shared: u64,
    pub fds: usize,
    /// Mappings of files and reservations; the allocator takes some for itself whenever a thread first needs
    /// it.
    pub areas: usize,
    /// All but the one that comes now and then, looks for missing pages, and goes.
    pub threads: usize,
}

impl Footprint {
    pub fn of(pid: i32) -> Footprint {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| -> u64 {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            value.split_whitespace().next().unwrap().parse().unwrap()
        };
        Footprint {
            anonymous: field("RssAnon:"),
            file: field("RssFile:"),
            shared: field("RssShmem:"),
            fds: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            areas: process::areas(&pid.to_string()).len(),
            threads: threads(pid).filter(|(name, _)| name != "guard\n").count(),
        }
    }

    /// What is counted, not measured.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.fds, self.areas, self.threads)
    }

    pub fn resident(&self) -> u64 {
        self.anonymous + self.file + self.shared
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} KiB resident ({} anonymous, {} of files, {} shared), {} descriptors, {} areas, {} threads",
            self.resident(),
            self.anonymous,
            self.file,
            self.shared,
            self.fds,
            self.areas,
            self.threads
        )
    }
}
