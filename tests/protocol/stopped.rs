//! Back-ends of hotslot that stand still (SIGSTOP) while they owe hotslot an answer and the guest a
//! request, for longer than hotslot waits. They go on where the guest is.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::child::Running;
use hotslot_test_support::program::{self, DEADLINE};
use tempfile::TempDir;

const F_SHMEM_REGION: u64 = 1;
const FUSE_INIT: u32 = 26;
const T_FLUSH: u32 = 4;

/// The data of requests, in RAM.
const REQUEST: u64 = 0x8_0000;
const ANSWER: u64 = 0x9_0000;

/// A device of a type with its back-end, and the driver of one queue.
struct World {
    bench: Bench,
    program: Running,
    queue: u16,
    /// What the driver asks all the time, and how many bytes of its buffers may be written.
    request: (Vec<u8>, u32),
    offered: u16,
    _dir: TempDir,
}

impl World {
    /// With `reconnect`.
    fn new(kind: &'static str, queue: u16, request: (Vec<u8>, u32)) -> World {
        World::with(Setup::default().reconnect(60), &[], kind, queue, request)
    }

    fn with(
        mut setup: Setup,
        options: &[&str],
        kind: &'static str,
        queue: u16,
        request: (Vec<u8>, u32),
    ) -> World {
        let dir = program::directory();
        program::file(&dir, 4 << 20);
        fs::create_dir(dir.path().join("share")).unwrap();
        let mut program = None;
        (setup.kind, setup.keys) = (kind, String::new());
        let bench = setup.foreign(|socket| program = Some(start(kind, socket, dir.path(), options)));
        World { bench, program: program.unwrap(), queue, request, offered: 0, _dir: dir }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.bench.ram().write_all_at(bytes, address).unwrap();
    }

    /// Makes the request available once more.
    fn ask(&mut self) {
        let queue = self.bench.queue(self.queue);
        let (bytes, room) = &self.request;
        self.write(REQUEST, bytes);
        self.write(ANSWER, &vec![0xee; *room as usize]);
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            let parts =
                [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
            parts.concat()
        };
        let table = [descriptor(REQUEST, bytes.len() as u32, 1, 1), descriptor(ANSWER, *room, 2, 0)];
        self.write(queue.descriptors, &table.concat());
        self.write(queue.driver_area + 4 + 2 * u64::from(self.offered % queue.size), &[0; 2]);
        self.offered += 1;
        self.write(queue.driver_area + 2, &self.offered.to_le_bytes());
        queue.kick.write(1).unwrap();
    }

    fn used(&self) -> u16 {
        let mut index = [0; 2];
        self.bench.ram().read_exact_at(&mut index, self.bench.queue(self.queue).device_area + 2).unwrap();
        u16::from_le_bytes(index)
    }

    /// All that was asked is answered, the last request with these bytes.
    fn assert_answered(&self, answer: &[u8]) {
        eventually("all requests are answered", || self.used() == self.offered);
        let mut bytes = vec![0; answer.len()];
        self.bench.ram().read_exact_at(&mut bytes, ANSWER).unwrap();
        assert_eq!(bytes, answer);
    }

    /// The back-end stands still with a request, and does not answer what `action` has hotslot ask.
    fn stand_still(&mut self, action: impl FnOnce(&Bench)) {
        self.stop();
        self.ask();
        action(&self.bench);
        assert!(self.bench.shmem().is_expecting(), "it is away");
    }

    fn stop(&self) {
        self.program.signal(libc::SIGSTOP);
        eventually("all its threads stand still", || stands_still(self.program.pid()));
    }

    fn go_on(&self) {
        self.program.signal(libc::SIGCONT);
        self.bench.wait_until_back();
        assert!(!self.bench.needs_reset());
    }
}

/// proc_pid_stat(5): the state stands behind the name, which ends with the last parenthesis.
fn stands_still(pid: i32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|thread| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        stat.rsplit(')').next().unwrap().starts_with(" T ")
    })
}

fn start(kind: &str, socket: &Path, dir: &Path, options: &[&str]) -> Running {
    let mut command = Command::new(hotslot_backend());
    command.current_dir(dir).arg(kind).arg("--socket").arg(socket).args(options);
    match kind {
        "fs" => command.args(["--dir", "share", "--state", "state"]),
        _ => command.args(["--file", "memory.img"]),
    };
    let program = Running::start(&mut command).for_at_most(DEADLINE);
    program.wait_for("listening on ");
    program
}

#[test]
fn a_stopped_disk_leaves_a_config_write_unanswered() {
    // SHM-94
    let flush = [&T_FLUSH.to_le_bytes()[..], &[0; 12]].concat();
    let mut world = World::new("blk", 0, (flush, 1));
    world.bench.device().start(VIRTIO_F_VERSION_1, &[world.bench.queue(0)]).unwrap();
    world.ask();
    world.assert_answered(&[0]);
    // VIRTIO section 5.2.4.
    let place_of_writeback = 32;
    world.stand_still(|bench| bench.device().write_config(place_of_writeback, &[0]).unwrap());
    world.go_on();
    world.assert_answered(&[0]);
    assert_eq!(world.bench.device().config()[place_of_writeback as usize], 0);
    world.ask();
    world.assert_answered(&[0]);
}

#[test]
fn a_stopped_share_leaves_the_stop_of_a_queue_unanswered() {
    // SHM-94, SHM-97
    let numbers = [104, FUSE_INIT, 1, 0, 0, 0, 0, 0, 0, 0, 7, 38].map(u32::to_le_bytes).concat();
    let init = [&numbers[..], &vec![0; 104 - numbers.len()]].concat();
    let mut world = World::new("fs", 1, (init, 80));
    let queues = [world.bench.queue(0), world.bench.queue(1)];
    world.bench.device().start(VIRTIO_F_VERSION_1, &queues).unwrap();
    let no_error = [80, 0].map(u32::to_le_bytes).concat();
    world.ask();
    world.assert_answered(&no_error);
    world.stand_still(|bench| bench.device().stop_queue(0).unwrap());
    world.go_on();
    world.assert_answered(&no_error);
    // What is available in the stopped queue waits for its start.
    let offered = world.offered;
    (world.queue, world.offered) = (0, 0);
    world.ask();
    (world.queue, world.offered) = (1, offered);
    world.ask();
    world.assert_answered(&no_error);
    (world.queue, world.offered) = (0, 1);
    assert_eq!(world.used(), 0);
    world.bench.device().start_queue(world.bench.queue(0)).unwrap();
    world.assert_answered(&no_error);
}

#[test]
fn a_stopped_pmem_leaves_a_reset_and_a_start_unanswered() {
    // SHM-69, SHM-76, SHM-94, SHM-97
    let mut world = World::new("pmem", 0, (vec![0; 4], 4));
    let features = VIRTIO_F_VERSION_1 | F_SHMEM_REGION;
    let begin = |bench: &Bench| bench.device().start(features, &[bench.queue(0)]).unwrap();
    begin(&world.bench);
    let mapped = world.bench.sees(0);
    assert_eq!(mapped.len(), 1);
    world.ask();
    world.assert_answered(&[0; 4]);
    world.stand_still(|bench| bench.reset());
    assert_eq!(world.bench.sees(0), []);
    // The driver begins anew, with rings of zeroes.
    let queue = world.bench.queue(0);
    world.write(queue.descriptors, &[0; 0xc000]);
    world.offered = 0;
    begin(&world.bench);
    world.ask();
    world.go_on();
    world.assert_answered(&[0; 4]);
    assert_eq!(world.bench.sees(0), mapped);

    // The same at the start.
    world.bench.reset();
    world.write(queue.descriptors, &[0; 0xc000]);
    world.offered = 0;
    world.stand_still(begin);
    world.go_on();
    world.assert_answered(&[0; 4]);
    assert_eq!(world.bench.sees(0), mapped);
}

#[test]
fn a_pmem_stopped_at_a_reset_is_lost_without_reconnect() {
    // SHM-69, SHM-75, SHM-76
    let mut world = World::with(Setup::default(), &["--once"], "pmem", 0, (vec![0; 4], 4));
    let begin = |bench: &Bench| bench.device().start(VIRTIO_F_VERSION_1 | F_SHMEM_REGION, &[bench.queue(0)]);
    begin(&world.bench).unwrap();
    assert_eq!(world.bench.sees(0).len(), 1);
    world.ask();
    world.assert_answered(&[0; 4]);
    world.stop();
    world.bench.reset();
    assert!(world.bench.needs_reset() && world.bench.loss().is_some());
    assert_eq!(world.bench.sees(0), []);
    begin(&world.bench).unwrap_err();
    // It goes on, and is told of no other start: it finds its connection closed, and ends (--once).
    world.program.signal(libc::SIGCONT);
    world.program.wait_until("it ends", || !world.program.is_running());
    begin(&world.bench).unwrap_err();
    assert_eq!(world.bench.sees(0), []);
}
