//! The lessons (`src/lessons.md`) and the solutions of their exercises, with their back-end,
//! `examples/counter.rs`, and hotslot. The guest is not Linux here but the monitor of the tests: the
//! back-end cannot tell. `tests/linux` runs the lessons' commands with Linux.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use hotslot_test_support::child::Running;
use hotslot_test_support::guest::{Guest, register};
use hotslot_test_support::wait::eventually;
use hotslot_test_support::{built, child, kvm};
use tempfile::TempDir;

const LESSONS: &str = include_str!("../src/lessons.md");
const HOTSLOT_TRACE: &str = "target/release/hotslot trace target/trace";

/// A guest with the device of an example, which may start.
struct Lesson {
    back_end: Running,
    guest: Guest,
    trace: PathBuf,
    _directory: TempDir,
}

impl Lesson {
    /// `arguments` are those of the example after its socket.
    fn new(example: &str, arguments: &[&str]) -> Lesson {
        let directory = tempfile::tempdir().unwrap();
        let [socket, trace] = ["socket", "trace"].map(|name| directory.path().join(name));
        let mut command = Command::new(built::example(example));
        let back_end = Running::start(command.arg(&socket).args(arguments));
        eventually("the back-end listens", || socket.exists());
        let device = format!("{},type=63,name=counter", socket.display());
        let guest = Guest::boot(["--trace-vhost-user", trace.to_str().unwrap(), "--vhost-user", &device]);
        Lesson { back_end, guest, trace, _directory: directory }
    }

    fn start(&mut self) -> u64 {
        self.guest.start_device();
        let (window, length) = self.guest.region(0);
        assert_eq!(length, 2 << 20);
        window
    }

    fn grows(&mut self, address: u64) {
        let first = self.guest.read64(address);
        assert!(first < 1 << 32, "{first:#x} is no count");
        eventually("the count grows", || self.guest.read64(address) > first);
    }

    /// Ends the guest, and types the lessons' command that looks at the trace with `pipe`. What it prints.
    fn solve(self, pipe: &str) -> String {
        self.guest.exit();
        let typed = LESSONS.lines().find(|line| line.starts_with(HOTSLOT_TRACE) && line.ends_with(pipe));
        let typed = typed.unwrap_or_else(|| panic!("src/lessons.md has no command that ends with {pipe}"));
        let trace = format!("{} trace {}", built::hotslot().display(), self.trace.display());
        let line = typed.replacen(HOTSLOT_TRACE, &trace, 1);
        let output = child::run(Command::new("sh").args(["-c", &line]));
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn the_trace_has_the_mapping_below_what_caused_it() {
    if !kvm::is_here() {
        return;
    }
    let mut lesson = Lesson::new("counter", &[]);
    lesson.start();
    let text = lesson.solve("| grep -B 1 SHMEM_MAP");
    let mut lines = text.lines();
    assert!(lines.next().unwrap().contains("  -> SET_MEM_TABLE("), "{text}");
    assert!(lines.next().unwrap().contains("<- BACKEND_SHMEM_MAP("), "{text}");
}

#[test]
fn a_mapping_is_in_the_window_where_the_back_end_asked_for_it_and_nowhere_else() {
    if !kvm::is_here() {
        return;
    }
    let mut lesson = Lesson::new("counter", &["0x3000"]);
    let window = lesson.start();
    lesson.grows(window + 0x3000);
    assert_eq!(lesson.guest.read64(window), u64::MAX);
    // Read-only: the store does nothing.
    lesson.guest.write64(window + 0x3008, 5);
    assert_eq!(lesson.guest.read64(window + 0x3008), 0);
    lesson.guest.exit();
}

#[test]
fn mappings_that_overlap_or_reach_out_of_the_region_are_refused_and_the_first_stays() {
    if !kvm::is_here() {
        return;
    }
    let mut lesson = Lesson::new("counter", &["0", "0", "0x1800", "0x200000", "0x3000"]);
    let window = lesson.start();
    for offset in ["0x0", "0x3000"] {
        lesson.back_end.wait_for(&format!("SHMEM_MAP at {offset}: done"));
    }
    for offset in ["0x0", "0x1800", "0x200000"] {
        lesson.back_end.wait_for(&format!("SHMEM_MAP at {offset}: refused"));
    }
    lesson.grows(window);
    lesson.grows(window + 0x3000);
    let text = lesson.solve("| grep -o ' = -E.*'");
    let errors: Vec<&str> = text.lines().filter_map(|line| line.split([' ', ':']).nth(2)).collect();
    assert_eq!(errors, ["-EEXIST", "-EINVAL", "-ERANGE"], "{text}");
}

#[test]
fn a_reset_takes_the_mapping_away_and_the_next_start_brings_it_back() {
    if !kvm::is_here() {
        return;
    }
    let mut lesson = Lesson::new("counter", &[]);
    let window = lesson.start();
    lesson.grows(window);
    let count = lesson.guest.read64(window);
    lesson.guest.set_register(register::STATUS, 0);
    assert_eq!(lesson.guest.read64(window), u64::MAX);
    lesson.start();
    assert!(lesson.guest.read64(window) >= count, "the file is the same");
    let text = lesson.solve("| grep -A 3 'counter guest.* Status = 0x0'");
    assert_eq!(text.matches("*** reset (unmapped=1)").count(), 1, "{text}");
    assert!(text.contains("  -> RESET_DEVICE()"), "{text}");
}

#[test]
fn a_back_end_without_a_crate_for_the_protocol_shows_the_time() {
    if !kvm::is_here() {
        return;
    }
    let mut lesson = Lesson::new("clock", &[]);
    let window = lesson.start();
    lesson.back_end.wait_for("clock: SHMEM_MAP: 0\n");
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (before, shown) = (now(), lesson.guest.read64(window));
    // It is written ten times a second; a machine may be busy.
    assert!(shown.abs_diff(before) < 60, "{shown}, and it is {before}");
    lesson.guest.reset_device();
    assert_eq!(lesson.guest.read64(window), u64::MAX);
    lesson.guest.exit();
}

#[test]
fn wrong_command_lines_of_the_example_are_sentences() {
    let directory = tempfile::tempdir().unwrap();
    let busy = directory.path().join("busy");
    std::fs::write(&busy, "").unwrap();
    let busy = busy.to_str().unwrap();
    let listen = format!("counter: cannot listen on {busy}: ");
    for (arguments, sentence) in [
        (&[][..], "counter: usage: counter SOCKET [OFFSET...]\n"),
        (&["/nonexistent/socket"], "counter: cannot listen on /nonexistent/socket: "),
        (&[busy], &listen),
        (&[busy, "far"], "counter: the offset far: invalid digit found in string\n"),
    ] {
        let output = child::run(Command::new(built::example("counter")).args(arguments));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.starts_with(sentence), "{said}");
    }
}
