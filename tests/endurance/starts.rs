//! A machine is started and ended, and a device started and reset, again and again: nothing of it is left.
//!
//! The devices have the back-ends of `hotslot-backend`, which serve one machine after another.
//! HOTSLOT_ENDURANCE_MACHINES=10000 and HOTSLOT_ENDURANCE_STARTS=100000 make it long.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hotslot_guest::board::{RUNNING, START};
use hotslot_test_support::child::Running;
use hotslot_test_support::files::PAGE;
use hotslot_test_support::guest::{Guest, register};
use hotslot_test_support::host::{self, Host};
use hotslot_test_support::wait::eventually;
use hotslot_test_support::{built, guest, image, kvm, monitor};
use tempfile::TempDir;

use crate::watch::Footprint;
use crate::{SLACK_KIB, say};

/// A back-end for each: its device type, and its options.
const DEVICES: [(&str, &str); 3] = [
    ("pmem", "--file memory.img"),
    ("blk", "--file disk.img"),
    ("fs", "--dir share --tag share --window 4M"),
];

/// Where in the guest's RAM the list of writes is that starts each device once.
const LIST: u64 = 0x200_0000;
/// Starts from one look at the devices to the next.
const BATCH: u64 = 60;

/// What the persistent memory begins with.
const FIRST: u64 = 0x1122_3344_5566_7788;

struct Backends {
    programs: [Running; 3],
    dir: TempDir,
}

impl Backends {
    fn start() -> Backends {
        // The path of a socket must be short.
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        let mut bytes = vec![0; 2 << 20];
        bytes[..8].copy_from_slice(&FIRST.to_le_bytes());
        ["memory.img", "disk.img"].iter().for_each(|name| fs::write(dir.path().join(name), &bytes).unwrap());
        let programs = DEVICES.map(|(kind, options)| {
            let mut command = Command::new(built::hotslot_backend());
            command.current_dir(dir.path()).args([kind, "--socket", kind]).args(options.split(' '));
            let program = Running::start(&mut command);
            program.wait_for("listening on ");
            program
        });
        Backends { programs, dir }
    }

    /// For hotslot: the devices, in order.
    fn options(&self) -> impl Iterator<Item = String> {
        let device = |(kind, _)| format!("{},type={kind}", self.dir.path().join(kind).display());
        DEVICES.into_iter().flat_map(move |entry| ["--vhost-user".to_owned(), device(entry)])
    }

    fn footprints(&self) -> Vec<Footprint> {
        self.programs.iter().map(|program| Footprint::of(program.pid())).collect()
    }
}

fn count(variable: &str, short: u64) -> u64 {
    std::env::var(variable).map_or(short, |count| count.parse().expect("a number"))
}

fn compare(what: &str, before: &[Footprint], after: &[Footprint]) {
    for (before, after) in before.iter().zip(after) {
        say(&format!("{what}: before: {before}"));
        say(&format!("{what}: after:  {after}"));
    }
    for (before, after) in before.iter().zip(after) {
        // One that the warm-up had not closed yet may be gone.
        let ((descriptors, areas, threads), most) = (after.counts(), before.counts());
        assert!(descriptors <= most.0 && areas <= most.1 && threads <= most.2, "{before}, then {after}");
        assert!(after.resident() <= before.resident() + SLACK_KIB, "{before}, then {after}");
    }
}

fn names(directory: &Path) -> BTreeSet<std::ffi::OsString> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

/// The writes that start each device once, from whatever it was.
fn start_of_all() -> Vec<(u64, u32)> {
    let mut writes = Vec::new();
    for (device, (kind, _)) in (0..).zip(DEVICES) {
        let registers = guest::REGISTERS + device * PAGE;
        writes.push((registers + register::STATUS, 0));
        writes.extend(START.map(|(offset, value)| (registers + u64::from(offset), value)));
        let lower_features =
            writes.iter_mut().rev().filter(|(at, _)| *at == registers + register::DRIVER_FEATURES);
        // Of persistent memory: that it is a shared memory region.
        lower_features.last().unwrap().1 = u32::from(kind == "pmem");
    }
    writes
}

#[test]
fn a_device_that_is_started_again_and_again_leaves_nothing_behind() {
    // SHM-46, SHM-69, SHM-72, SHM-78
    if !kvm::is_here() {
        return;
    }
    let count = count("HOTSLOT_ENDURANCE_STARTS", 300);
    let backends = Backends::start();
    let mut guest = Guest::boot(backends.options());
    let devices = DEVICES.len() as u64;
    guest.write_list(LIST, start_of_all());
    let mut cycle = |count: u64| {
        for first in (0..count).step_by(BATCH as usize) {
            guest.repeat(LIST, BATCH.min(count - first).div_ceil(devices));
            for device in 0..devices {
                guest.select(device);
                assert_eq!(guest.register(register::STATUS), RUNNING, "{}", guest.log());
            }
            guest.select(0);
            let (base, _) = guest.region(0);
            assert_eq!(guest.read64(base), FIRST, "{}", guest.log());
        }
        for device in 0..devices {
            guest.select(device);
            guest.reset_device();
        }
        let mut footprints = backends.footprints();
        footprints.push(Footprint::of(guest.pid()));
        footprints
    };
    let before = cycle(30 + count / 10);
    let after = cycle(count);
    compare(&format!("{count} starts of devices"), &before, &after);
    guest.exit();
}

#[test]
fn machines_that_start_and_end_leave_nothing_behind() {
    if !kvm::is_here() {
        return;
    }
    let count = count("HOTSLOT_ENDURANCE_MACHINES", 20);
    let backends = Backends::start();
    // The guest starts its devices by itself: to be told each write would take most of the time.
    let kernel = image::kernel(&monitor::elf_after(&start_of_all()));
    let temporary = tempfile::tempdir().unwrap();
    let quiet = backends.footprints();
    let mut slowest = Duration::ZERO;
    let mut machines = |count| {
        for _ in 0..count {
            let start = Instant::now();
            let mut command = guest::command(kernel.path());
            command.args(backends.options()).env("TMPDIR", temporary.path());
            let mut guest = Guest::spawn(command, None);
            guest.answer();
            for device in 0..DEVICES.len() as u64 {
                guest.select(device);
                assert_eq!(guest.register(register::STATUS), RUNNING, "{}", guest.log());
            }
            guest.select(0);
            let (base, _) = guest.region(0);
            assert_eq!(guest.read64(base), FIRST, "{}", guest.log());
            let pid = guest.pid();
            guest.exit();
            assert!(!Path::new(&format!("/proc/{pid}")).exists());
            slowest = slowest.max(start.elapsed());
        }
        // A back-end sees the end of its front-end a little later.
        let counts = |footprints: &[Footprint]| footprints.iter().map(Footprint::counts).collect::<Vec<_>>();
        let mut now = Vec::new();
        eventually("the back-ends have what they had before", || {
            now = backends.footprints();
            counts(&now) == counts(&quiet)
        });
        now
    };
    let files = names(backends.dir.path());
    let before = machines(5 + count / 10);
    let host = Host::now();
    for _ in 1..10 {
        let now = machines(count / 10);
        now.iter().for_each(|footprint| say(&format!("{} machines more: {footprint}", count / 10)));
    }
    let after = machines(count - count / 10 * 9);
    compare(&format!("{count} machines"), &before, &after);
    // With what else the host did meanwhile.
    say(&format!(
        "the slowest took {slowest:?}; the host, before and after:\n{}",
        host.compare(&Host::now())
    ));
    assert_eq!(names(backends.dir.path()), files);
    assert!(names(temporary.path()).is_empty());
    assert_eq!(host::processes_with("TMPDIR", temporary.path().to_str().unwrap()), [0_i32; 0]);
}
