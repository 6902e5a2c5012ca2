//! Endurance: four processors read and write the window of a device in mapped and unmapped parts, while its
//! back-end maps, unmaps and replaces as fast as it can, and the guest resets the device now and then. What
//! each access has to give is told by [`hotslot_guest::board`].
//!
//! The guest is a few dozen instructions on this machine's `/dev/kvm`. `tests/linux` runs the same program on
//! a host whose KVM boots Linux, with `probe hammer` as the guest: the ignored test here.
//!
//! HOTSLOT_ENDURANCE_SECONDS=600 makes it long, and then it also holds hotslot to its promise that no
//! processor stands still for a second; a short run asserts no timings.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod churn;
mod eyes;
mod hammer;
mod page;
mod starts;
mod truncation;
mod watch;

use std::io::{Write, stderr};
use std::process::Command;
use std::time::{Duration, Instant};

use hotslot_guest::board::*;
use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::files::PAGE;
use hotslot_test_support::guest::Guest;
use hotslot_test_support::wire::{page_at, writable};
use hotslot_test_support::{built, guest, image, kvm};

use churn::Churn;
use page::Words;
use watch::Footprint;

/// How long the guest may take to its first access.
const BOOT: Duration = Duration::from_secs(240);
const SHORT: Duration = Duration::from_secs(10);
/// Resident memory that comes and goes: a page of a program or a stack that was not needed before. The
/// decoder of instructions, which a vCPU that takes many page faults may need, makes half a MiB of tables
/// once.
const SLACK_KIB: u64 = 256 + 512;

fn hotslot() -> Command {
    let mut command = Command::new(built::hotslot());
    command.args(["-v", "--debug-exit", "--cpus", &CPUS.to_string()]);
    command
}

/// A guest that hammers, its board, and the back-end of the window.
struct Bench {
    guest: Guest,
    board: Words,
    window: Backend,
    board_device: Backend,
}

impl Bench {
    /// `boot` gets the options for the devices: the one with the window, the one with the board.
    fn new(board: Words, boot: impl FnOnce(&[String]) -> Guest) -> Bench {
        let with_region = |bytes| Backend::offering(Offer { regions: vec![(0, bytes)], ..Offer::default() });
        let (window, board_device) = (with_region(WINDOW_WORDS as u64 * 8), with_region(2 * PAGE));
        let devices = [window.device("window"), board_device.device("board")];
        let guest = boot(&devices.map(|device| ["--vhost-user".to_string(), device]).concat());
        assert_eq!(board_device.map(writable(page_at(0)), board.file()), 0);
        board.set(READY, 1);
        Bench { guest, board, window, board_device }
    }

    fn small() -> Bench {
        Bench::small_with(Words::new(PAGE_WORDS))
    }

    fn small_with(board: Words) -> Bench {
        Bench::new(board, |devices| {
            let kernel = image::kernel(&hammer::elf());
            let mut command = hotslot();
            command.args(["-m", "64M", "-k"]).arg(kernel.path()).args(devices);
            Guest::spawn(command, Some(kernel))
        })
    }

    /// Waits until all processors are at work.
    fn wait(&self) {
        let start = Instant::now();
        while (0..CPUS).any(|cpu| self.report(cpu, ACCESSES) == 0) {
            let log = || self.guest.log();
            assert!(start.elapsed() < BOOT, "the guest does not come: {}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn report(&self, cpu: usize, what: usize) -> u64 {
        self.board.get(report(cpu) + what)
    }

    fn sum(&self, what: usize) -> u64 {
        (0..CPUS).map(|cpu| self.report(cpu, what)).sum()
    }

    /// No processor read a wrong word so far.
    fn assert_no_errors(&self) {
        for cpu in 0..CPUS {
            let [index, read, state, written] = [0, 1, 2, 3].map(|word| self.report(cpu, WRONG + word));
            assert_eq!(
                self.report(cpu, ERRORS),
                0,
                "processor {cpu}, the last: word {index:#x} read {read:#x}, state {state:#x}, {written:#x} was written \
                 before; hotslot said:\n{}",
                self.guest.log()
            );
        }
    }

    /// Ends the guest; gives what hotslot printed on stderr.
    fn end(self) -> String {
        self.board.set(STOP, 1);
        let (status, log) = self.guest.wait();
        assert_eq!(status.code(), Some(GOOD_END.into()), "{log}");
        log
    }
}

/// Past the test harness, which would keep the figures to itself.
fn say(text: &str) {
    let _nobody_listens = writeln!(stderr(), "endurance: {text}");
}

fn endure(bench: Bench) {
    let long = std::env::var("HOTSLOT_ENDURANCE_SECONDS")
        .ok()
        .map(|seconds| Duration::from_secs(seconds.parse().expect("HOTSLOT_ENDURANCE_SECONDS is a number")));
    let time = long.unwrap_or(SHORT);
    bench.wait();
    let mut churn = Churn::new(&bench.board, bench.window.channel());
    churn.run(time / 5);
    churn.rest();
    let before = Footprint::of(bench.guest.pid());
    let ((), stalls) = watch::longest_stall(bench.guest.pid(), &bench.board, || churn.run(time));
    churn.rest();
    let after = Footprint::of(bench.guest.pid());
    let done = &churn.done;
    say(&format!(
        "{} s: {} MAPs and {} UNMAPs done, {} requests refused, {} resets, slowest answer {:?}; {} accesses of the guest, \
         {} of them writes, longest stalls {stalls:?}",
        time.as_secs(),
        done.maps,
        done.unmaps,
        done.refused,
        done.resets,
        done.slowest,
        bench.sum(ACCESSES),
        bench.sum(WRITES)
    ));
    say(&format!("before: {before}"));
    say(&format!("after:  {after}"));
    bench.assert_no_errors();
    assert_eq!(bench.sum(ZEROES), 0);
    assert!(done.resets > 0 && done.maps > PLACES as u64, "{}", bench.guest.log());
    assert_eq!(after.counts(), before.counts());
    assert!(after.resident() <= before.resident() + SLACK_KIB, "{before}, then {after}");
    if long.is_some() {
        let still = stalls.iter().any(|&stall| stall >= Duration::from_secs(1));
        assert!(!still, "a processor stood still: {stalls:?}");
    }
    bench.end();
}

#[test]
fn small_guests_see_every_change_and_nothing_else() {
    // SHM-24, SHM-38, SHM-40, SHM-55, SHM-56, SHM-60, SHM-61, SHM-69, SHM-71, SHM-72, SHM-78
    if !kvm::is_here() {
        return;
    }
    endure(Bench::small());
}

#[test]
#[ignore = "tests/linux runs it, where KVM boots Linux"]
fn a_linux_guest_sees_every_change_and_nothing_else() {
    // SHM-24, SHM-38, SHM-40, SHM-55, SHM-56, SHM-60, SHM-61, SHM-69, SHM-71, SHM-72, SHM-78
    let file = |name| std::env::var_os(name).unwrap_or_else(|| panic!("{name} names no file"));
    let (kernel, image) = (file("BZIMAGE"), file("IMAGE"));
    let bench = Bench::new(Words::new(PAGE_WORDS), |devices| {
        // Without modules no driver takes the devices.
        let parameters = "quiet hotslot.modules= hotslot.debug_exit=0xf4";
        let hammer =
            format!("probe hammer {:#x} {:#x} && exit {GOOD_END}", guest::REGISTERS, guest::REGISTERS + PAGE);
        let mut command = hotslot();
        command.arg("-k").arg(kernel).arg("-i").arg(image);
        command.args(["-m", "256M", "-c"]);
        command.arg(format!("{parameters} -- sh -c \"{hammer}\"")).args(devices);
        Guest::spawn(command, None)
    });
    endure(bench);
}
