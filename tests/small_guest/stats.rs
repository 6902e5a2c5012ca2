//! What hotslot has counted: `--stats`, SIGUSR1, and the end with `-v`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{MIB, PAGE, numbered_file};
use hotslot_test_support::guest::{self, Guest, register};
use hotslot_test_support::monitor::Operation;
use hotslot_test_support::wait::eventually;
use hotslot_test_support::wire::{page_at, writable};
use hotslot_test_support::{built, kvm};
use serde_json::Value;
use tempfile::TempDir;

/// A port without a device.
const NOTHING: u16 = 0x80;

/// A machine with one device, whose statistics go into a file.
struct Counted {
    guest: Guest,
    backend: Backend,
    directory: TempDir,
}

impl Counted {
    fn boot(keys: &str, options: &[&str]) -> Counted {
        Counted::with_memory("64M", keys, options)
    }

    fn with_memory(size: &str, keys: &str, options: &[&str]) -> Counted {
        let (directory, backend, kernel) = (tempfile::tempdir().unwrap(), Backend::start(), guest::kernel());
        let mut hotslot = Command::new(built::hotslot());
        hotslot.arg("-k").arg(kernel.path()).arg("--stats").arg(directory.path().join("stats"));
        let device = backend.device("device") + keys;
        hotslot.args(["-m", size, "--debug-exit", "--vhost-user", &device]).args(options);
        let mut guest = Guest::spawn(hotslot, Some(kernel));
        guest.start_device();
        Counted { guest, backend, directory }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("stats")
    }

    /// The statistics now.
    fn now(&self) -> Value {
        let before = lines(&self.file()).len();
        self.guest.signal(libc::SIGUSR1);
        let mut now = Vec::new();
        eventually("there is another line", || {
            now = lines(&self.file());
            now.len() > before
        });
        now.pop().unwrap()
    }
}

/// The lines that are complete.
fn lines(file: &PathBuf) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    let complete = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    complete.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The number at a place such as `devices/com1/writes`; 0 where there is none.
fn at(stats: &Value, place: &str) -> u64 {
    let step = |value: &Value, name: &str| match (value, name.parse::<usize>()) {
        (Value::Array(list), Ok(index)) => list[index].clone(),
        (Value::Array(list), _) => list.iter().find(|one| one["name"] == name).unwrap().clone(),
        (object, _) => object[name].clone(),
    };
    place.split('/').fold(stats.clone(), |value, name| step(&value, name)).as_u64().unwrap_or(0)
}

#[test]
fn what_guest_and_back_end_do_is_counted_exactly() {
    if !kvm::is_here() {
        return;
    }
    // So that no slot outlives its mapping.
    let mut machine = Counted::boot(",foreign-files=on", &[]);
    let file = numbered_file(1, 8);
    let (window, _) = machine.guest.region(0);
    let before = machine.now();
    let Counted { guest, backend, .. } = &mut machine;
    for _ in 0..17 {
        guest.set_register(register::QUEUE_SEL, 1);
    }
    // A kick of a queue that the device does not have is no doorbell.
    guest.set_register(register::QUEUE_NOTIFY, 7);
    for _ in 0..5 {
        assert_eq!(guest.read64(window + 8 * PAGE), u64::MAX);
        guest.write8(window + 8 * PAGE, 1);
    }
    for _ in 0..3 {
        guest.out8(NOTHING, 1);
    }
    for page in 0..7 {
        assert_eq!(backend.map(writable(page_at(page)), &file), 0);
    }
    for _ in 0..2 {
        assert_eq!(backend.map(page_at(0), &file), -i64::from(libc::EEXIST));
    }
    assert_eq!(backend.unmap(page_at(9)), -i64::from(libc::ENOENT));
    for page in 0..4 {
        assert_eq!(backend.unmap(page_at(page)), 0);
    }
    let after = machine.now();
    let operations = 17 + 1 + 2 * 5 + 3;
    for (place, number) in [
        ("devices/device/writes", 17 + 1),
        ("devices/device/kicks", 1),
        ("devices/device/interrupts", 0),
        ("devices/device/maps", 7),
        ("devices/device/unmaps", 4),
        ("devices/device/refused", 3),
        ("devices/device/refused_EEXIST", 2),
        ("devices/device/refused_ENOENT", 1),
        ("devices/device/mapped_bytes", 3 * PAGE),
        ("devices/device/mapped_bytes_ever", 7 * PAGE),
        ("slots/added", 7),
        ("slots/deleted", 4),
        ("unclaimed/mmio_reads", 5),
        ("unclaimed/mmio_writes", 5),
        ("unclaimed/ports", 3),
        ("vcpus/0/mmio_reads", 5),
        ("vcpus/0/mmio_writes", 17 + 1 + 5),
        // The guest answers each operation with 8 bytes.
        ("devices/com1/writes", 8 * operations),
        ("vcpus/0/port_writes", 8 * operations + 3),
        ("vcpus/0/memory_faults", 0),
        ("vcpus/0/page_waits", 0),
        ("vcpus/0/hole_waits", 0),
    ] {
        assert_eq!(at(&after, place) - at(&before, place), number, "{place}: {before}\n{after}");
    }
    // KVM's own: a software KVM has it, too.
    let exits = ["mmio_reads", "mmio_writes"].map(|name| at(&after, &format!("vcpus/0/{name}")));
    assert_eq!(at(&after, "vcpus/0/kvm/mmio_exits"), exits.iter().sum::<u64>(), "{after}");
    machine.guest.exit();
}

#[test]
fn a_slot_that_is_kept_is_neither_deleted_nor_added() {
    // SHM-102
    if !kvm::is_here() {
        return;
    }
    let machine = Counted::boot("", &[]);
    let file = numbered_file(1, 1);
    let before = machine.now();
    for _ in 0..50 {
        assert_eq!(machine.backend.map(page_at(0), &file), 0);
        assert_eq!(machine.backend.unmap(page_at(0)), 0);
    }
    let after = machine.now();
    let [added, deleted, taken_over] = ["added", "deleted", "taken_over"].map(|name| {
        let place = format!("slots/{name}");
        at(&after, &place) - at(&before, &place)
    });
    // A busy machine may take longer for one of them than a slot is kept.
    assert!(added + taken_over == 50 && deleted <= added && taken_over > 0, "{after}");
    machine.guest.exit();
}

#[test]
fn the_manual_has_each_counter() {
    if !kvm::is_here() {
        return;
    }
    let machine = Counted::boot("", &[]);
    assert!(machine.backend.unmap(page_at(9)) < 0);
    let mut left = vec![machine.now()];
    machine.guest.exit();
    let manual = include_str!("../../src/manual/statistics.md");
    while let Some(value) = left.pop() {
        match value {
            Value::Array(list) => left.extend(list),
            Value::Object(members) => {
                for (name, value) in members {
                    let name = if name == "refused_ENOENT" { "refused_ERRNO" } else { &name };
                    assert!(manual.contains(&format!("| `{name}` |")), "{name}");
                    left.push(value);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn the_end_adds_a_line_and_prints_the_table_with_v() {
    if !kvm::is_here() {
        return;
    }
    let machine = Counted::boot("", &["-v"]);
    let file = numbered_file(1, 8);
    machine.now();
    let Counted { guest, backend, directory } = machine;
    guest.wait_for_log("\n  slots ");
    let maps = |log: &str| log.matches(" maps ").count();
    assert_eq!(maps(&guest.log()), 0, "what is 0 is left out");
    assert_eq!(backend.map(page_at(0), &file), 0);
    let log = guest.exit();
    let lines = lines(&directory.path().join("stats"));
    assert_eq!(lines.iter().map(|line| at(line, "devices/device/maps")).collect::<Vec<_>>(), [0, 1]);
    assert!(log.contains("hotslot: info: statistics after "), "{log}");
    assert_eq!(maps(&log), 1, "{log}");
}

#[test]
fn waits_are_counted_with_the_longest_while_they_last() {
    if !kvm::is_here() {
        return;
    }
    let mut machine = Counted::boot(",reconnect=600", &[]);
    let (window, _) = machine.guest.region(0);
    machine.backend.hang_up();
    machine.guest.wait_for_log("the guest waits for the back-end to come back");
    machine.guest.begin(Operation::Read, 8, window, 0);
    let mut now = Value::Null;
    eventually("the wait is counted", || {
        now = machine.now();
        at(&now, "vcpus/0/longest_hole_wait_us") > 20_000
    });
    assert_eq!((at(&now, "vcpus/0/hole_waits"), at(&now, "vcpus/0/page_waits")), (1, 0), "{now}");
    machine.guest.signal(libc::SIGTERM);
    machine.guest.wait();
}

#[test]
fn an_unmap_costs_the_guest_no_page_outside_of_its_range() {
    // SHM-102; KVM_X86_QUIRK_SLOT_ZAP_ALL is off.
    if !kvm::is_here() || !kvm::is_hardware() {
        return;
    }
    const PAGES: u64 = 256 * MIB / PAGE;
    /// Faults that have nothing to do with it.
    const FEW: u64 = 100;
    // So that the UNMAP deletes a slot.
    let mut machine = Counted::with_memory("384M", ",foreign-files=on", &[]);
    let (window, _) = machine.guest.region(0);
    assert_eq!(machine.backend.map(page_at(0), &numbered_file(1, 1)), 0);
    machine.guest.read64(window);
    let faults = |machine: &mut Counted| {
        let before = at(&machine.now(), "vcpus/0/kvm/pf_taken");
        machine.guest.touch(64 * MIB, PAGES);
        at(&machine.now(), "vcpus/0/kvm/pf_taken") - before
    };
    let [first, again] = [faults(&mut machine), faults(&mut machine)];
    let deleted = at(&machine.now(), "slots/deleted");
    assert_eq!(machine.backend.unmap(page_at(0)), 0);
    assert_eq!(at(&machine.now(), "slots/deleted"), deleted + 1);
    let after = faults(&mut machine);
    // A guest that meets the hole has its idle slot deleted.
    assert_eq!(machine.guest.read64(window), u64::MAX);
    let now = machine.now();
    assert_eq!(at(&now, "slots/deleted"), 1, "{now}");
    let deleted = faults(&mut machine);
    println!(
        "page faults of 256 MiB: first {first}, again {again}, after an UNMAP {after}, after its slot's end {deleted}"
    );
    assert!(first >= PAGES / 512, "{first}");
    assert!(again < FEW && after < FEW && deleted < FEW, "{again} {after} {deleted}");
    machine.guest.exit();
}

#[test]
fn a_full_disk_ends_the_statistics_and_not_the_machine() {
    if !kvm::is_here() {
        return;
    }
    let mut guest = Guest::boot(["--stats", "/dev/full"]);
    guest.out8(NOTHING, 1);
    guest.signal(libc::SIGUSR1);
    guest.wait_for_log("the statistics /dev/full end here, and the machine goes on: No space left on device");
    guest.out8(NOTHING, 1);
    let log = guest.exit();
    assert_eq!(log.matches("end here").count(), 1, "{log}");
}
