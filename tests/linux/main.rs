//! A stock Debian kernel boots under `hotslot`: what the guest finds, and what the user sees at the end.
//!
//! It takes minutes on an emulated host, and less with more tests at a time than processors, because most of
//! them only wait for a session: `cargo test --test linux -- --test-threads=16`.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod fs;
mod host;
mod lessons;
mod run;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use host::{Guest, Session, stdout};

static MACHINES: LazyLock<Session> = LazyLock::new(|| Session::run("machines", "2G", 420, &[]));
static BOOTS: LazyLock<Session> = LazyLock::new(|| Session::run("boots", "2G", 300 + 30 * boots(), &[]));
static MEMORY: LazyLock<Session> = LazyLock::new(|| Session::run("memory", "8G", 580, &[]));
static CONSOLE: LazyLock<Session> =
    LazyLock::new(|| Session::run("console", "2G", 300, &[("input", input())]));
static SMALL: LazyLock<Session> = LazyLock::new(|| {
    let programs =
        [("ENDURANCE", host::test_program("endurance")), ("SMALL_GUEST", host::test_program("small_guest"))];
    // Warm-up, run, and all that is around.
    let endurance = std::env::var(host::ENDURANCE).map_or(10, |seconds| seconds.parse().unwrap());
    Session::with_programs("endurance", "2G", endurance * 2 + 500, &[], &programs)
});
static PMEM: LazyLock<Session> = LazyLock::new(|| {
    let disks = [("disk0.img", disk(None)), ("disk1.img", disk(Some(GIVEN)))];
    Session::run("pmem", "2G", 300, &disks)
});

static FULL: LazyLock<Session> = LazyLock::new(|| Session::run("full", "2G", 360, &[]));

static EXITS: LazyLock<Session> = LazyLock::new(|| {
    let requests: u32 = std::env::var(host::REQUESTS).map_or(1000, |requests| requests.parse().unwrap());
    Session::run("exits", "2G", 300 + requests / 20, &[("disk.img", vec![0; 16 << 20])])
});

static SHARING: LazyLock<Session> = LazyLock::new(|| {
    let files = [("disk.img", disk(None)), ("blk.img", vec![0; 1 << 20])];
    let daemon = stdout("bash", &["-c", "type -P qemu-storage-daemon"]);
    Session::with_programs("sharing", "2G", 300, &files, &[("STORAGE_DAEMON", daemon.into())])
});

static RECONNECT: LazyLock<Session> = LazyLock::new(|| {
    Session::run("reconnect", "2G", 300, &[("pmem.img", disk(None)), ("blk.img", vec![0; 1 << 20])])
});

fn boots() -> u32 {
    std::env::var(host::BOOTS).map_or(3, |count| count.parse().unwrap())
}

/// A sentence in the file `given` of the read-only disk.
const GIVEN: &str = "Only to be read.";

/// Bytes that cannot be guessed from one another, all 256 of them many times.
fn input() -> Vec<u8> {
    (0..10 << 10)
        .scan(1_u32, |state, _| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*state >> 24) as u8)
        })
        .collect()
}

const DISK: u64 = 16 << 20;

/// Runs one of the tools for ext4, which Debian keeps where only root looks.
fn tool(name: &str, arguments: &[&str]) -> Vec<u8> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(name)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{name} (package e2fsprogs): {error}"));
    assert!(output.status.success(), "{name} {arguments:?}: {output:?}");
    output.stdout
}

/// An image with an ext4 file system; with a sentence in its file `given`.
fn disk(given: Option<&str>) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    if let Some(text) = given {
        std::fs::write(tree.join("given"), text).unwrap();
    }
    let image = directory.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(DISK).unwrap();
    // DAX needs blocks of a page.
    let [image_path, tree] = [&image, &tree].map(|path| path.to_str().unwrap());
    let features = "^has_journal";
    tool("mkfs.ext4", &["-q", "-b", "4096", "-O", features, "-d", tree, image_path]);
    std::fs::read(image).unwrap()
}

/// What a file in an image has in it.
fn file_in(image: &Path, name: &str) -> Vec<u8> {
    let command = format!("cat /{name}");
    let mut bytes = tool("debugfs", &["-R", &command, image.to_str().unwrap()]);
    // A file written as a whole page: text, then zeroes.
    bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    bytes
}

/// The guest has this many processors, all online; each one ran a program, and said so.
fn has_cpus(guest: &Guest, count: usize) {
    let online = match count {
        1 => "0".to_owned(),
        _ => format!("0-{}", count - 1),
    };
    assert_eq!(guest.one("online"), online, "{guest}");
    assert_eq!(guest.one("probe cpus"), format!("{count} ran"), "{guest}");
    let expected: Vec<String> = (0..count).map(|cpu| cpu.to_string()).collect();
    assert_eq!(guest.said("on").collect::<Vec<_>>(), expected, "{guest}");
}

/// The guest has so much memory: the kernel's own parts are missing in its sum, then its needs while it runs.
fn has_memory(guest: &Guest, mib: u64) {
    // `struct page`, 64 bytes for each page of 4096, and hash tables: 1/32. The kernel's image and the like:
    // 64 MiB.
    let reserved = mib / 32 + 64;
    let total = guest.one("total").parse::<u64>().unwrap() >> 10;
    assert!((mib - reserved..=mib).contains(&total), "{total} MiB of {mib}\n{guest}");
    let touched = guest.one("probe memory").split_once(" MiB written and verified");
    let touched: u64 = touched.unwrap_or_else(|| panic!("{guest}")).0.parse().unwrap();
    // What `probe memory` leaves to the kernel: 1/64, and 24 MiB. What the kernel keeps back of what is free,
    // and what runs: about 128 MiB where there is much. Of 128 MiB a sixth is left.
    let missing = total.checked_sub(touched).unwrap_or_else(|| panic!("{guest}"));
    assert!(missing <= mib / 32 + 160 && touched >= total / 6, "{touched} MiB of {total} MiB\n{guest}");
}

/// Errors and warnings of the kernel that are none of the machine's.
const ALLOWED: [&str; 12] = [
    // Nor any control of the processor's frequency.
    "amd_pstate: the _CPC object is not present",
    // So Linux says of each virtio pmem device: it cannot tell that its flushes go to the back-end.
    "unable to guarantee persistence of writes",
    // image.sh strips the signatures, to save time.
    "module verification failed: signature and/or required key missing",
    // The emulated host has other things to do.
    "clocksource: Long readout interval",
    "sched: DL replenish lagged too much",
    "hrtimer: interrupt took",
    // Mitigations depend on the host's processor.
    "Spectre",
    "RETBleed",
    "MDS",
    "TAA",
    "MMIO Stale Data",
    "Speculative Return Stack Overflow",
];

fn complains_of_nothing_else(guest: &Guest) {
    let others: Vec<&str> =
        guest.said("dmesg").filter(|line| !ALLOWED.iter().any(|allowed| line.contains(allowed))).collect();
    assert!(others.is_empty(), "{others:#?}");
}

#[test]
fn a_vmlinux_boots_with_one_cpu_and_128_mib_and_switches_itself_off() {
    let guest = MACHINES.guest("off");
    guest.ended(0, "the guest switched itself off");
    has_cpus(&guest, 1);
    has_memory(&guest, 128);
}

#[test]
fn a_bzimage_boots_with_two_cpus_and_resets_itself() {
    let guest = MACHINES.guest("reset");
    guest.ended(32, "the guest reset itself");
    has_cpus(&guest, 2);
}

#[test]
fn a_vmlinux_boots_with_four_cpus_and_panics() {
    let guest = MACHINES.guest("panic");
    guest.ended(34, "the guest's kernel panicked");
    has_cpus(&guest, 4);
}

#[test]
fn a_panic_without_a_driver_for_it_is_a_panic() {
    MACHINES.guest("panic-early").ended(34, "the guest's kernel panicked");
}

#[test]
fn a_bzimage_boots_with_four_cpus_and_crashes() {
    let guest = MACHINES.guest("crash");
    guest.ended(33, "the guest crashed: triple fault");
    has_cpus(&guest, 4);
}

#[test]
fn a_bzimage_boots_with_one_cpu_and_ends_with_its_own_status() {
    let guest = MACHINES.guest("status");
    guest.ended(77, "the guest ended with status 77 (debug exit)");
    has_cpus(&guest, 1);
}

#[test]
fn a_machine_boots_again_and_again_and_leaves_nothing_behind() {
    let host = BOOTS.host();
    // Status, and hundredths of a second.
    let ended: Vec<_> = host.said("boot").map(|boot| boot.split_once(" after ").unwrap()).collect();
    assert_eq!(ended.len(), boots() as usize, "{host}");
    assert!(ended.iter().all(|(status, _)| *status == "77"), "{ended:?}");
    let mut times: Vec<u32> = ended.iter().map(|(_, time)| time.parse().unwrap()).collect();
    times.sort_unstable();
    let [least, median, most] = [0, times.len() / 2, times.len() - 1].map(|place| times[place]);
    println!("{} boots, hundredths of a second: {least}, median {median}, most {most}", times.len());
    for (before, after) in host.said("before").zip(host.said("after")) {
        println!("{before:32}{after}");
        // The others are the kernel's own, too.
        if before.starts_with("processes of hotslot") || before.starts_with("Unix sockets") {
            assert_eq!(before, after);
        }
    }
}

#[test]
fn the_kernel_has_nothing_to_complain_of() {
    complains_of_nothing_else(&MACHINES.guest("status"));
}

#[test]
fn memory_below_the_hole_can_be_used() {
    let guest = MEMORY.guest("3584M");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    has_memory(&guest, 3584);
}

#[test]
fn memory_on_both_sides_of_the_hole_can_be_used() {
    let guest = MEMORY.guest("6G");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    has_memory(&guest, 6144);
}

#[test]
fn a_shell_on_the_console_answers_and_poweroff_ends_it() {
    let guest = CONSOLE.guest("console");
    guest.ended(0, "the guest switched itself off");
    assert!(guest.out.contains("\nthe answer is 42"), "{guest}");
}

#[test]
fn ten_kib_of_input_arrive_intact() {
    let guest = CONSOLE.guest("console");
    let sum = CONSOLE.text("input.sum");
    assert!(guest.out.contains(sum.trim()), "{sum}\n{guest}");
}

#[test]
fn files_are_persistent_memory() {
    let guest = PMEM.guest("pmem");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    assert_eq!(guest.one("devices"), "3");
    // Not MAP_SYNC: a store is on the disk when the back-end has flushed, not before.
    assert_eq!(guest.one("probe pmem-write"), "26 bytes by MAP_SHARED");
    complains_of_nothing_else(&guest);
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), PMEM.file("disk0.img")).unwrap();
    for (name, text) in [
        ("hello", "Written through a mapping."),
        ("flushed", "Written and flushed.\n"),
        ("restarted", "Written after the restart.\n"),
    ] {
        let found = file_in(image.path(), name);
        assert_eq!(String::from_utf8_lossy(&found), text, "{guest}");
    }
}

#[test]
fn memory_may_be_larger_than_the_guest_s_own_and_of_any_length() {
    let guest = PMEM.guest("pmem");
    // Up to the next multiple of 2 MiB.
    assert_eq!(guest.one("sectors"), (2054_u64 << 11).to_string(), "{guest}");
    assert_eq!(guest.one("end"), "The last bytes.", "{guest}");
    assert_eq!(PMEM.host().one("middle"), "In the middle.", "{guest}");
    assert_eq!(PMEM.host().one("length"), ((2054_u64 << 20) - 5000).to_string());
}

#[test]
fn a_flush_is_answered() {
    let guest = PMEM.guest("pmem");
    // Each answer of the back-end's is an interrupt, and flushes are all that it is asked for.
    let flushes: u32 = guest.one("flushes").parse().unwrap();
    assert!(flushes > 0, "{guest}");
}

#[test]
fn neither_a_kick_nor_an_interrupt_exits_to_user_space() {
    let guest = EXITS.guest("exits");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    let text = EXITS.text("exits.stats");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [before, after, _end] = lines.as_slice() else { panic!("{text}") };
    let made: Vec<u64> = guest.said("probe requests").map(|number| number.parse().unwrap()).collect();
    let [rng, pmem] = ["rng", "pmem"].map(|device| {
        let count: u64 = guest.one(&format!("interrupts of {device}")).parse().unwrap();
        let number = |line: &serde_json::Value, counter: &str| {
            let devices = line["devices"].as_array().unwrap();
            devices.iter().find(|one| one["name"] == device).unwrap()[counter].as_u64().unwrap()
        };
        for counter in ["kicks", "interrupts", "reads", "writes"] {
            assert_eq!(number(before, counter), number(after, counter), "{device} {counter}: {text}");
        }
        count
    });
    assert!(made.len() == 2 && rng >= made[0] && pmem >= made[1], "{guest}");
    let vcpu =
        |line: &serde_json::Value, place: &str| line["vcpus"][0].pointer(place).unwrap().as_u64().unwrap();
    for place in ["/mmio_reads", "/mmio_writes", "/memory_faults", "/kvm/mmio_exits"] {
        assert_eq!(vcpu(before, place), vcpu(after, place), "{place}: {text}");
    }
    // In KVM's sum are the kicks that it handled itself.
    let exits = vcpu(after, "/kvm/exits") - vcpu(before, "/kvm/exits");
    assert!(exits >= made[0] + made[1], "{text}");
    println!("{made:?} requests, {rng} and {pmem} interrupts; KVM: {exits} exits");
}

#[test]
fn read_only_memory_is_read_and_never_written() {
    let guest = PMEM.guest("pmem");
    assert_eq!((guest.one("given"), guest.one("still given")), (GIVEN, GIVEN));
    assert!(!guest.out.contains("was written to"), "{guest}");
    let image = PMEM.file("disk1.img");
    assert_eq!(image.len() as u64, DISK);
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), &image).unwrap();
    assert_eq!(file_in(path.path(), "given"), GIVEN.as_bytes());
}

#[test]
fn a_driver_that_lets_go_and_comes_back_takes_the_mapping_with_it() {
    let guest = PMEM.guest("pmem");
    // Whether the device has a mapping in this map, and what the guest may do with it.
    let mapping = |map: &str, device: &str| {
        map.lines()
            .skip_while(|line| !line.ends_with(&format!("registers of {device}")))
            .skip(1)
            .take_while(|line| !line.contains("registers of"))
            .find_map(|line| line.split_once(" mapping, "))
            .map(|(_, access)| access.split(',').next().unwrap_or_default().to_owned())
    };
    let maps: Vec<&str> = guest.err.split("guest physical memory:").skip(1).collect();
    let seen: Vec<_> = maps.iter().map(|map| mapping(map, "disk0")).collect();
    let there = Some("read-write".to_owned());
    assert_eq!(seen, [there.clone(), None, there], "{guest}");
    // It is nothing to the other device.
    assert!(maps.iter().all(|map| mapping(map, "disk1").as_deref() == Some("read-only")));
    assert_eq!(guest.one("found again"), "Written through a mapping.");
}

#[test]
fn a_disk_of_another_back_end_reads_and_writes_files_that_are_mapped() {
    // SHM-80: O_DIRECT, from the mapping and into it.
    let guest = SHARING.guest("on");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    let done: Vec<_> = guest.said("probe direct").collect();
    assert_eq!(done, ["1048576 bytes"; 2], "{guest}");
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), SHARING.file("on.img")).unwrap();
    let [first, second] = ["first", "second"].map(|name| file_in(image.path(), name));
    assert_eq!(first.len(), 1 << 20);
    assert!(first == second && first == SHARING.file("blk.img"));
}

#[test]
fn a_disk_of_another_back_end_that_does_not_see_them_fails_and_the_machine_goes_on() {
    // SHM-80: how it fails is up to the back-end. QEMU's hangs up, and Linux waits for its disk for ever.
    let guest = SHARING.guest("off");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    assert_eq!(guest.said("probe direct").count(), 0, "{guest}");
    assert_eq!(guest.one("machine"), "goes on", "{guest}");
}

#[test]
fn back_ends_die_and_come_back_and_the_guest_notices_a_pause() {
    // SHM-76, SHM-77, SHM-94, SHM-95, SHM-96, SHM-97
    let guest = RECONNECT.guest("reconnect");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    // The disk once more: it stood still when the guest wrote to its configuration space.
    for (device, times) in [("pmem", 3), ("blk", 4), ("fs", 3)] {
        assert_eq!(guest.err.matches(&format!("{device}: the back-end is back")).count(), times, "{guest}");
    }
    assert_eq!(guest.one("cache"), "write through", "{guest}");
    let host = RECONNECT.host();
    assert!(host.one("kept").contains(" blocks, "), "{host}");
    assert!(guest.one("rounds").parse::<u32>().unwrap() > 3, "{guest}");
    assert_eq!((guest.one("sectors"), guest.one("sectors later")), ("2048", "4096"), "{guest}");
    complains_of_nothing_else(&guest);
}

/// One of the project's other test programs ran all it was asked for, on a KVM that is the processor's. Its
/// messages go to stderr.
fn passed(tests: &Guest, count: usize) {
    let _nobody_listens = std::io::Write::write_all(&mut std::io::stderr(), tests.err.as_bytes());
    assert_eq!(tests.status, 0, "{tests}");
    assert!(tests.out.contains(&format!("{count} passed; 0 failed")), "{tests}");
    assert!(!tests.err.contains("SKIPPED"), "{tests}");
}

#[test]
fn a_linux_guest_hammers_what_its_back_end_maps_and_unmaps() {
    // SHM-24, SHM-38, SHM-40, SHM-55, SHM-56, SHM-60, SHM-61, SHM-69, SHM-71, SHM-72, SHM-78
    passed(&SMALL.guest("linux"), 1);
}

#[test]
fn files_are_cut_short_on_a_kvm_of_hardware() {
    // SHM-45
    let parallel = SMALL.guest("truncation");
    passed(&parallel, 2);
    assert!(parallel.err.contains("KVM: with hardware virtualisation"), "{parallel}");
    passed(&SMALL.guest("faults"), 3);
    // SHM-87
    passed(&SMALL.guest("unavailable"), 5);
}

#[test]
fn counters_agree_with_those_of_a_kvm_of_hardware() {
    let guest = SMALL.guest("stats");
    passed(&guest, 7);
    assert!(guest.out.contains("page faults of 256 MiB: first"), "{guest}");
}

#[test]
fn huge_pages_of_a_mapping_are_the_guests_too() {
    // SHM-36
    let guest = SMALL.guest("huge");
    passed(&guest, 3);
    assert!(guest.out.contains("huge pages of the guest: transparent 2 MiB, reserved 2 MiB"), "{guest}");
}

#[test]
fn a_mapping_can_be_had_without_a_fault_of_the_guest() {
    // SHM-105
    let guest = SMALL.guest("prefault");
    passed(&guest, 1);
    assert!(guest.out.contains("faults of the guest: 0 with prefault=on"), "{guest}");
}

#[test]
fn a_guest_whose_disk_is_full_waits_and_loses_nothing() {
    // SHM-87
    let host = FULL.host();
    if let Some(why) = host.said("skipped").next() {
        eprintln!("skipped: {why}");
        return;
    }
    let guest = FULL.guest("full");
    guest.ended(0, "the guest ended with status 0 (debug exit)");
    for device in ["disk", "share"] {
        let waits = format!("warn: {device}: the host cannot provide the page at ");
        assert!(guest.err.contains(&waits), "{guest}");
        assert!(guest.err.contains(&format!("warn: {device}: the page at ")), "{guest}");
        assert_eq!(host.one(&format!("ticks while {device} waits")), "they go on", "{guest}{host}");
        // A bound on the lines: each wait is said, and its end.
        assert!(guest.err.matches(&waits).count() < 50, "{guest}");
    }
    assert!(guest.err.contains("(its file system is full): the vCPU that needs it waits"), "{guest}");
    let sums = [guest.one("disk sum"), guest.one("written sum")];
    assert_eq!(sums.join(" "), guest.one("right sums"), "{guest}");
    assert_eq!(sums, [host.one("disk sum"), host.one("written sum")], "{host}");
    complains_of_nothing_else(&guest);
}

#[test]
fn an_emulated_host_that_stands_still_is_given_up() {
    if !host::is_emulated() {
        eprintln!("skipped: this machine's KVM boots Linux, and there is no emulated host");
        return;
    }
    // A kernel that has halted waits with interrupts off, without end.
    let mut lab = Command::new("scripts/lab.sh");
    lab.current_dir(host::PROJECT)
        .args(["--icount", "--timeout", "600", "--", "halt", "-f"])
        .stdin(Stdio::null());
    let lab = host::in_turn(|| lab.output().unwrap());
    let said = String::from_utf8_lossy(&lab.stderr);
    assert_eq!(lab.status.code(), Some(125), "{said}");
    assert!(said.contains("lab: the emulated host stands still"), "{said}");
    assert!(said.contains("reboot: System halted"), "{said}");
}
