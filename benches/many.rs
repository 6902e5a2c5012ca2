//! Many machines at once on this host: what each has of it, and how fast they start.
//!
//! Each machine has a `hotslot-backend fs` of its own, all of one directory. The guest is the tests' monitor
//! on this machine's `/dev/kvm`; it is a virtio-fs driver that maps a file of the directory by DAX and adds
//! up the first words of its pages. Then the host changes a word, and each guest must see that: all map the
//! same pages.
//!
//! `scripts/bench.sh many` runs it, `src/manual/many.md` has figures.

#![allow(clippy::unwrap_used, clippy::panic)] // As in tests.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use hotslot_test_support::child::Running;
use hotslot_test_support::files::{MIB, PAGE, content};
use hotslot_test_support::fuse_request as fuse;
use hotslot_test_support::guest::{self, DEBUG_EXIT, Guest, register};
use hotslot_test_support::host::{self, Host};
use hotslot_test_support::monitor::Operation;
use hotslot_test_support::{built, kvm};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The file that all map, in mappings of 2 MiB as Linux makes them.
const FILE: u64 = 4 * MIB;
const MAPPING: u64 = 2 * MIB;
const PAGES: u64 = FILE / PAGE;
/// Of virtio-fs. Queue 0 is hiprio.
const REQUEST_QUEUE: u8 = 1;
/// Enough for each answer.
const ANSWER: u32 = 512;

struct Machine {
    backend: Running,
    guest: Guest,
    /// The guest address of the DAX window, once the device was started.
    window: u64,
}

fn main() {
    if !kvm::is_here() {
        std::process::exit(1);
    }
    let count = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(200);
    // This program has three for each machine.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    let file = File::create_new(share.join("file")).unwrap();
    file.set_len(FILE).unwrap();
    let word = |page: u64| content(1, page * PAGE);
    (0..PAGES).for_each(|page| file.write_all_at(&word(page).to_le_bytes(), page * PAGE).unwrap());
    let sum = (0..PAGES).map(word).fold(0, u64::wrapping_add);

    println!("{count} machines of 64 MiB, each with a back-end of its own; {} start at a time", at_a_time());
    let kernel = guest::kernel();
    let empty = Host::now();
    let indices: Vec<usize> = (0..count).collect();
    let backends = each("back-ends listen", indices.clone(), |index| backend(dir.path(), index));
    let machines = indices.into_iter().zip(backends).collect();
    let mut machines = each("machines have answered", machines, |(index, backend)| {
        machine(kernel.path(), dir.path(), index, backend)
    });
    each("guests have mapped the file", machines.iter_mut().collect(), |machine| machine.awake(map));
    let mut check = |what, sum| {
        each(what, machines.iter_mut().collect(), |machine: &mut Machine| {
            assert_eq!(machine.awake(|machine| machine.guest.sum(machine.window, PAGES)), sum);
        });
    };
    check("guests have added it up", sum);
    file.write_all_at(&(word(0) + 1).to_le_bytes(), 0).unwrap();
    check("guests see the host's change", sum.wrapping_add(1));
    let full = Host::now();

    let processes = |pid: fn(&Machine) -> i32| -> Vec<_> {
        machines.iter().map(|machine| Process::of(pid(machine), &share)).collect()
    };
    let hotslots = processes(|machine| machine.guest.pid());
    let programs = processes(|machine| machine.backend.pid());
    print_figures("hotslot", &hotslots);
    print_figures("hotslot-backend", &programs);
    let all = || hotslots.iter().chain(&programs);
    println!(
        "the file of {} KiB: {} KiB in all page tables together, which are {} KiB of memory",
        FILE >> 10,
        all().map(|process| process.file.resident).sum::<u64>(),
        all().map(|process| process.file.share).sum::<u64>()
    );
    println!("\nthe host, before and with them:\n{}", empty.compare(&full));

    each("machines have ended", machines.into_iter().enumerate().collect(), |(index, machine)| {
        end(index, machine)
    });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the share is left");
    assert_eq!(host::processes_with("TMPDIR", dir.path().to_str().unwrap()), [0_i32; 0]);
    println!("\nthe host, before and after them:\n{}", empty.compare(&Host::now()));
}

fn at_a_time() -> usize {
    thread::available_parallelism().unwrap().get()
}

/// Does something with each, as many at a time as there are processors; prints how many it was a second.
fn each<T: Send, R: Send>(what: &str, of: Vec<T>, act: impl Fn(T) -> R + Sync) -> Vec<R> {
    let (start, count) = (Instant::now(), of.len());
    let (left, done) = (Mutex::new(of.into_iter().enumerate()), Mutex::new(BTreeMap::new()));
    let next = || left.lock().unwrap().next();
    thread::scope(|scope| {
        for _ in 0..at_a_time() {
            scope.spawn(|| {
                while let Some((index, one)) = next() {
                    let result = act(one);
                    done.lock().unwrap().insert(index, result);
                }
            });
        }
    });
    let time = start.elapsed().as_secs_f64();
    println!("{what:36}{time:8.2} s {:8.2} a second", count as f64 / time);
    done.into_inner().unwrap().into_values().collect()
}

fn backend(dir: &Path, index: usize) -> Running {
    let mut command = Command::new(built::hotslot_backend());
    command.current_dir(dir).env("TMPDIR", dir).args(["fs", "--dir", "share", "--tag", "share", "--socket"]);
    let program = Running::start(command.arg(index.to_string()));
    program.wait_for("listening on ");
    program
}

/// A machine whose guest runs.
fn machine(kernel: &Path, dir: &Path, index: usize, backend: Running) -> Machine {
    let mut command = guest::command(kernel);
    let socket = dir.join(index.to_string());
    command.env("TMPDIR", dir).args(["--vhost-user", &format!("{},type=fs", socket.display())]);
    let mut machine = Machine { backend, guest: Guest::spawn(command, None), window: 0 };
    machine.awake(|machine| machine.guest.register(register::MAGIC));
    machine
}

impl Machine {
    /// Asks the guest something. It polls its serial port, so the machine stands still at other times:
    /// otherwise 200 of them would leave the processors no time.
    fn awake<R>(&mut self, act: impl FnOnce(&mut Machine) -> R) -> R {
        self.guest.signal(libc::SIGCONT);
        let result = act(self);
        self.guest.signal(libc::SIGSTOP);
        result
    }
}

/// The guest mounts the share, finds the file and maps it.
fn map(machine: &mut Machine) {
    let guest = &mut machine.guest;
    guest.select_queue(REQUEST_QUEUE);
    guest.start_device();
    machine.window = guest.region(0).0;
    let mut ask = |opcode, node, body: &[u8]| {
        let answer = guest.request(&fuse::request(opcode, node, (0, 0), body), ANSWER);
        assert_eq!(fuse::u32_at(&answer, 4), 0, "opcode {opcode}: {}", guest.log());
        answer
    };
    ask(fuse::INIT, 0, &fuse::init());
    let entry = ask(fuse::LOOKUP, fuse::ROOT, &fuse::name("file"));
    let node = fuse::u64_at(&entry, 16);
    for offset in (0..FILE).step_by(MAPPING as usize) {
        ask(fuse::SETUPMAPPING, node, &fuse::setupmapping(offset, MAPPING, 0, offset));
    }
}

/// The guest ends with a status of its own, and the back-end at SIGTERM.
fn end(index: usize, machine: Machine) {
    let status = index as u8;
    machine.guest.signal(libc::SIGCONT);
    let (ended, log) = machine.guest.end_with(Operation::Out, 1, DEBUG_EXIT, status.into());
    assert_eq!(ended.code(), Some(status.into()), "{log}");
    machine.backend.signal(libc::SIGTERM);
    let (ended, log) = machine.backend.wait();
    assert_eq!(ended.code(), Some(0), "{log}");
}

/// Memory in KiB: what is in the page tables of a process, that which nobody else has, and this process's
/// share of it (Pss).
#[derive(Clone, Copy, Default)]
struct Memory {
    resident: u64,
    private: u64,
    share: u64,
}

impl Memory {
    /// Adds a line of `smaps`.
    fn add(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let (name, kib) = (words.next().unwrap_or_default(), words.next().and_then(|kib| kib.parse().ok()));
        let to = match name {
            "Rss:" => &mut self.resident,
            "Private_Clean:" | "Private_Dirty:" => &mut self.private,
            "Pss:" => &mut self.share,
            _ => return,
        };
        *to += kib.unwrap_or(0);
    }
}

/// What a process has of the host.
struct Process {
    /// Beside the guest's RAM and the file.
    own: Memory,
    file: Memory,
    page_tables: u64,
    threads: u64,
    descriptors: u64,
    areas: u64,
}

impl Process {
    fn of(pid: i32, share: &Path) -> Process {
        let path = |name: &str| format!("/proc/{pid}/{name}");
        let read = |name| fs::read_to_string(path(name)).unwrap();
        let count = |name| fs::read_dir(path(name)).unwrap().count() as u64;
        // `smaps` has whole KiB of each area, so that its sum is too small.
        let (mut own, mut ram, mut file) = (Memory::default(), Memory::default(), Memory::default());
        read("smaps_rollup").lines().for_each(|line| own.add(line));
        let mut area = "";
        let smaps = read("smaps");
        for line in smaps.lines() {
            if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
                area = line;
            } else if area.contains("memfd:guest-ram") {
                ram.add(line);
            } else if area.contains(share.to_str().unwrap()) {
                file.add(line);
            }
        }
        for other in [ram, file] {
            own.resident -= other.resident;
            own.private -= other.private;
            own.share -= other.share;
        }
        let status = read("status");
        let page_tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
        Process {
            own,
            file,
            page_tables: page_tables.split_whitespace().next().unwrap().parse().unwrap(),
            threads: count("task"),
            descriptors: count("fd"),
            areas: read("maps").lines().count() as u64,
        }
    }
}

fn print_figures(program: &str, processes: &[Process]) {
    println!("\n{program:40}{:>8}{:>8}{:>8}", "least", "median", "most");
    type Figure = fn(&Process) -> u64;
    let figures: [(&str, Figure); 7] = [
        ("resident beside RAM and file, KiB", |process| process.own.resident),
        ("of that private, KiB", |process| process.own.private),
        ("the same with its share of the rest, KiB", |process| process.own.share),
        ("page tables, KiB", |process| process.page_tables),
        ("threads", |process| process.threads),
        ("descriptors", |process| process.descriptors),
        ("memory areas", |process| process.areas),
    ];
    for (name, figure) in figures {
        let mut values: Vec<_> = processes.iter().map(figure).collect();
        values.sort_unstable();
        println!("{name:40}{:8}{:8}{:8}", values[0], values[values.len() / 2], values[values.len() - 1]);
    }
}
