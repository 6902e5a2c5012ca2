//! How fast a guest reads what is mapped into a window, beside its own memory: pages of 4 KiB, and of 2
//! MiB on the host, which KVM then maps with entries of 2 MiB (checked by its own counter).
//!
//! The guest is the tests' monitor. It reads 16 MiB of each, in turns: a word of each cache line, and a
//! word of each page. Each time there is a line of output, `NAME: NUMBER`, in ticks of the guest's
//! time-stamp counter.
//!
//! The argument is hotslot. `scripts/bench.sh speed` runs it: on this machine, or on an emulated host
//! whose clock counts instructions. That clock shows faults and exits, and no page walks. A software KVM
//! takes some microseconds for each instruction.

#![allow(clippy::unwrap_used, clippy::panic)] // As in tests.

use std::fs;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::process::Command;

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::files::{MIB, memfd};
use hotslot_test_support::guest::{self, Guest};
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, writable};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

const LEN: u64 = 16 * MIB;
const HUGE: u64 = 2 * MIB;
/// Where in RAM it reads: behind the monitor.
const RAM: u64 = 64 * MIB;
const MEMORY: &str = "128M";
const ROUNDS: usize = 5;
/// Bytes from one word to the next, as a power of two: one in each cache line, and one in each page.
const STRIDES: [(&str, u8); 2] = [("lines", 6), ("pages", 12)];

fn main() {
    if !kvm::is_here() {
        std::process::exit(1);
    }
    let backend = Backend::offering(Offer { regions: vec![(0, LEN)], ..Offer::default() });
    let kernel = guest::kernel();
    let program =
        std::env::args().skip(1).find(|argument| argument != "--bench").expect("an argument: hotslot");
    let mut hotslot = Command::new(program);
    hotslot.args(["-m", MEMORY, "--debug-exit", "--vhost-user", &backend.device("device"), "-k"]);
    hotslot.arg(kernel.path());
    let mut guest = Guest::spawn(hotslot, Some(kernel));
    guest.start_device();
    let whole = MMap { len: LEN, ..MMap::default() };
    assert_eq!(backend.map(writable(whole), &memfd(LEN)), 0);
    let places = [("ram", RAM), ("mapping", guest.region(0).0)];
    measure(&mut guest, &places, "4k");
    // What was read, and no more: a huge page needs a page to begin with.
    let ram = mapped(guest.pid(), "memfd:guest-ram").start + RAM as usize;
    let ranges = [ram..ram + LEN as usize, mapped(guest.pid(), "memfd:test")];
    let small = kvm::statistic(guest.pid(), "pages_2m");
    match ranges.iter().try_for_each(|range| collapse(guest.pid(), range)) {
        Ok(()) => {
            measure(&mut guest, &places, "2m");
            // Otherwise these are not figures of pages of 2 MiB.
            let huge = kvm::statistic(guest.pid(), "pages_2m");
            let made = huge.zip(small).map(|(huge, small)| huge - small);
            let expected = places.len() as u64 * LEN / HUGE;
            assert!(
                made.is_none_or(|made| made == expected),
                "KVM made {made:?} entries of 2 MiB, not {expected}"
            );
        }
        Err(error) => {
            eprintln!("no figures for pages of 2 MiB: the host cannot collapse small ones ({error})")
        }
    }
    guest.exit();
}

fn measure(guest: &mut Guest, places: &[(&str, u64)], pages: &str) {
    for round in 0..=ROUNDS {
        for (stride_name, stride) in STRIDES {
            for (place, address) in places {
                let ticks = guest.sweep(*address, LEN, stride);
                // In the first round there are pages missing.
                if round > 0 {
                    println!("speed-{stride_name}-{pages}@{place}: {ticks}");
                }
            }
        }
    }
}

/// Where a process has mapped a file of this name.
fn mapped(pid: i32, name: &str) -> Range<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.contains(name)).unwrap();
    let (from, to) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
    usize::from_str_radix(from, 16).unwrap()..usize::from_str_radix(to, 16).unwrap()
}

/// Has the kernel put pages of 2 MiB in the place of small ones.
fn collapse(pid: i32, range: &Range<usize>) -> std::io::Result<()> {
    let process = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty())?;
    let part = libc::iovec { iov_base: range.start as *mut _, iov_len: range.len() };
    // SAFETY: it changes which pages are behind addresses of another process, and not what is in them.
    let done = unsafe {
        libc::syscall(libc::SYS_process_madvise, process.as_raw_fd(), &part, 1, libc::MADV_COLLAPSE, 0)
    };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
