//! `hotslot-backend blk`, seen by a front-end, by a driver and by a user.
//!
//! The driver is made by hand and its memory is a file of the test's, as for `hotslot-backend pmem`.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{
    Backend, FAILS_LATER, FULL, assert_refused, command, directory, file, start_after,
};
use hotslot_test_support::wait::eventually;
use hotslot_test_support::wire::{self, Wire};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, GuestAddress};

const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const NO_STATUS: u8 = 0xee;

const HEADER: u64 = 0x5000;
const STATUS: u64 = 0x5100;
const DATA: u64 = 0x1_0000;
const SECTOR: u64 = 512;

/// A buffer of a request: address and length.
type Buffer = (u64, u32);

/// A range to discard or zero: sector, number of sectors, flags.
type Range = (u64, u32, u32);

struct Machine(Driver);

impl Machine {
    fn connect(backend: &Backend) -> Self {
        let features = VIRTIO_F_VERSION_1 | FLUSH | DISCARD | WRITE_ZEROES | SEG_MAX | BLK_SIZE;
        Self::connect_with(backend, features)
    }

    fn connect_with(backend: &Backend, features: u64) -> Self {
        let protocol = PROTOCOL_F_MQ
            | PROTOCOL_F_REPLY_ACK
            | PROTOCOL_F_BACKEND_REQ
            | PROTOCOL_F_CONFIG
            | PROTOCOL_F_RESET_DEVICE
            | PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        let mut machine = Machine(Driver::connect(backend, features, protocol));
        machine.start();
        machine
    }

    fn config(&mut self) -> Vec<u8> {
        self.0.front_end.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap().1
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        self.0.front_end.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes).unwrap();
    }

    fn start(&mut self) {
        let driver = &mut self.0;
        driver.front_end.set_features(driver.features).unwrap();
        driver.front_end.set_mem_table(&[driver.ram_region()]).unwrap();
        driver.start_queue();
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.0.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// A request with these data, read by the device or written: how many bytes were written, and the status.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u32, u8) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let base = self.0.base;
        self.write(base + HEADER, &header);
        self.write(base + STATUS, &[NO_STATUS]);
        let direction = if matches!(kind, T_IN | T_GET_ID) { WRITE } else { 0 };
        let mut chain = vec![(base + HEADER, 16, 0)];
        chain.extend(data.iter().map(|&(address, len)| (address, len, direction)));
        chain.push((base + STATUS, 1, WRITE));
        self.chain(&chain)
    }

    fn chain(&mut self, chain: &[(u64, u32, u16)]) -> (u32, u8) {
        for (index, &(address, len, flags)) in chain.iter().enumerate() {
            let next = if index + 1 < chain.len() { NEXT } else { 0 };
            let index = index as u16;
            self.0.descriptor(index, (address, len, flags | next, (index + 1) * next));
        }
        self.0.offer(0);
        (self.0.await_used(0), self.read(self.0.base + STATUS, 1)[0])
    }

    fn ranges(&mut self, kind: u32, ranges: &[Range]) -> (u32, u8) {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.write(DATA, &bytes);
        self.request(kind, 0, &[(DATA, bytes.len() as u32)])
    }
}

/// A field of the configuration space.
fn word(space: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
}

/// Bytes of which no two sectors are alike.
fn pattern(len: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// The disk: a file of the pattern.
fn disk(dir: &TempDir) -> (PathBuf, Vec<u8>) {
    let path = file(dir, MIB);
    let bytes = pattern(MIB);
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[test]
fn what_the_driver_reads_and_writes_is_in_the_file() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);

    // Cut anywhere, also inside sectors.
    let data = [(DATA, 512), (DATA + 0x1000, 100), (DATA + 0x1064, 3484)];
    assert_eq!(machine.request(T_IN, 3, &data), (4096 + 1, OK));
    assert_eq!(machine.read(DATA, 512), bytes[3 * 512..4 * 512]);
    assert_eq!(machine.read(DATA + 0x1000, 3584), bytes[4 * 512..11 * 512]);

    machine.write(DATA, &[0xab; 4096]);
    assert_eq!(machine.request(T_OUT, 2047, &[(DATA, 100), (DATA + 2048, 412)]), (1, OK));
    assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, OK));
    let mut expected = bytes.clone();
    expected[2047 * 512..].fill(0xab);
    assert!(fs::read(&path).unwrap() == expected);

    assert_eq!(machine.request(T_GET_ID, 0, &[(DATA, 20)]), (21, OK));
    assert_eq!(machine.read(DATA, 20), b"memory.img\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn the_serial_number_is_the_one_of_the_command_line() {
    let dir = directory();
    disk(&dir);
    for (serial, len) in [("S1", 20), ("a-serial-of-20-bytes", 20), ("a-serial-of-20-bytes", 7)] {
        let backend = Backend::start("blk", &dir, &format!("--serial {serial}"));
        let mut machine = Machine::connect(&backend);
        machine.write(DATA, &[0xee; 32]);
        // In as many buffers as the driver likes.
        let data = [(DATA, 3), (DATA + 16, len - 3)];
        assert_eq!(machine.request(T_GET_ID, 0, &data), (len + 1, OK));
        let mut expected = serial.as_bytes().to_vec();
        expected.resize(20, 0);
        let mut found = machine.read(DATA, 3);
        found.extend(machine.read(DATA + 16, len as usize - 3));
        assert_eq!(found, expected[..len as usize]);
        assert_eq!(machine.read(DATA + 3, 13), [0xee; 13]);
    }
    for (serial, sentence) in [
        ("", "1 to 20 printable ASCII characters"),
        ("a-serial-of-21-bytes!", "1 to 20 printable ASCII characters"),
        ("\u{fc}", "1 to 20 printable ASCII characters"),
    ] {
        let mut command = command("blk", &dir);
        let output = command.args(["--file", "memory.img", "--serial", serial]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(sentence), "{serial:?}: {stderr}");
    }
}

#[test]
fn sectors_are_discarded_and_zeroed() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);
    let before = fs::metadata(&path).unwrap().blocks();
    assert_eq!(machine.ranges(T_DISCARD, &[(0, 1024, 0), (1032, 8, 0)]), (1, OK));
    assert_eq!(machine.ranges(T_WRITE_ZEROES, &[(1048, 1, 1)]), (1, OK));
    let mut expected = bytes.clone();
    for range in [0..1024 * 512, 1032 * 512..1040 * 512, 1048 * 512..1049 * 512] {
        expected[range].fill(0);
    }
    assert!(fs::read(&path).unwrap() == expected);
    assert!(fs::metadata(&path).unwrap().blocks() < before);
    // Not every file system can zero without making a hole; then the driver writes zeroes itself.
    let answer = machine.ranges(T_WRITE_ZEROES, &[(1050, 2, 0)]);
    assert!(matches!(answer, (1, OK | UNSUPP)), "{answer:?}");
    if answer.1 == OK {
        expected[1050 * 512..1052 * 512].fill(0);
    }
    assert!(fs::read(&path).unwrap() == expected);
    assert_eq!(machine.ranges(T_DISCARD, &[(2047, 2, 0)]), (1, IOERR));
}

/// VIRTIO 1.2, section 5.2.6.2; and of a request with one wrong range, none is executed.
#[test]
fn wrong_ranges_change_nothing() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);
    const UNMAP: u32 = 1;
    let good = (0, 8, 0);
    let many = vec![good; 33];
    #[rustfmt::skip]
    let wrong: [(&str, u32, &[Range], u8); 13] = [
        ("unmap in a discard", T_DISCARD, &[good, (8, 8, UNMAP)], UNSUPP),
        ("an unknown flag in a discard", T_DISCARD, &[good, (8, 8, 2)], UNSUPP),
        ("an unknown flag", T_WRITE_ZEROES, &[good, (8, 8, UNMAP | 1 << 31)], UNSUPP),
        ("the end of the disk", T_DISCARD, &[good, (2048, 1, 0)], IOERR),
        ("half beyond the end", T_WRITE_ZEROES, &[good, (2047, 2, 0)], IOERR),
        ("a sum that overflows", T_DISCARD, &[good, (u64::MAX, 2, 0)], IOERR),
        ("an address that overflows", T_WRITE_ZEROES, &[good, (1 << 55, 2, 0)], IOERR),
        ("a count that is too large", T_WRITE_ZEROES, &[good, (0, u32::MAX, 0)], IOERR),
        ("more ranges than told", T_DISCARD, &many, IOERR),
        ("the same, zeroed", T_WRITE_ZEROES, &many, IOERR),
        ("none", T_DISCARD, &[], IOERR),
        ("none to zero", T_WRITE_ZEROES, &[], IOERR),
        ("none after a good one", T_DISCARD, &[good, (4096, 0, 0)], IOERR),
    ];
    for (what, kind, ranges, status) in wrong {
        assert_eq!(machine.ranges(kind, ranges), (1, status), "{what}");
        assert!(fs::read(&path).unwrap() == bytes, "{what}");
    }
    assert_eq!(machine.ranges(T_DISCARD, &vec![(8, 0, 0); 32]), (1, OK));
    assert!(fs::read(&path).unwrap() == bytes);
}

/// A range may have as many sectors as the configuration space says, and no more.
#[test]
fn a_range_has_at_most_max_sectors() {
    let dir = directory();
    file(&dir, 3 << 30);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        assert_ne!(machine.ranges(kind, &[(0, 1 << 21, 0)]), (1, IOERR));
        assert_eq!(machine.ranges(kind, &[(0, (1 << 21) + 1, 0)]), (1, IOERR));
    }
    backend.wait_for("2097153 sectors");
}

#[test]
fn the_configuration_space_says_what_the_disk_can() {
    let dir = directory();
    let (path, _) = disk(&dir);
    // What is left at the end is no sector.
    File::options().write(true).open(path).unwrap().set_len(MIB + 100).unwrap();
    for (arguments, access) in [("", CONFIG_WCE | DISCARD | WRITE_ZEROES), ("--read-only", RO)] {
        let backend = Backend::start("blk", &dir, arguments);
        let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1);
        let features = machine.0.front_end.get_features().unwrap();
        let all = VIRTIO_F_VERSION_1
            | VHOST_USER_F_PROTOCOL_FEATURES
            | VIRTIO_F_INDIRECT_DESC
            | VIRTIO_F_EVENT_IDX
            | SEG_MAX
            | BLK_SIZE
            | TOPOLOGY
            | FLUSH
            | access;
        assert_eq!(features, all);
        let offered = machine.0.front_end.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
        let space = machine.config();
        let word = |at: usize| word(&space, at);
        assert_eq!((word(0), word(4)), (2048, 0), "capacity");
        assert_eq!((word(8), word(12), word(20)), (0, 126, 512), "size_max, seg_max and blk_size");
        // A page of 8 blocks: physical_block_exp, alignment_offset, min_io_size; opt_io_size.
        assert_eq!((&space[24..28], word(28)), (&[3, 0, 8, 0][..], 0), "topology");
        assert_eq!(space[32..36], [1, 0, 1, 0], "writeback and num_queues");
        let discard = (word(36), word(40), word(44));
        assert_eq!(
            discard,
            (1 << 21, 32, 1),
            "max_discard_sectors, max_discard_seg, discard_sector_alignment"
        );
        let zeroes = (word(48), word(52), space[56]);
        assert_eq!(zeroes, (1 << 21, 32, 1), "max_write_zeroes_sectors, max_write_zeroes_seg, may_unmap");
        backend.wait_for("note: the guest does not see the last 100 bytes of \"memory.img\"");
    }
}

/// What is no whole block of the disk is refused, and nothing of it is done; and the end of the file that is
/// none is not seen.
#[test]
fn blocks_of_4096_bytes() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    File::options().write(true).open(&path).unwrap().set_len(MIB + 4095).unwrap();
    let backend = Backend::start("blk", &dir, "--block-size 4096");
    backend.wait_for(
        "note: the guest does not see the last 4095 bytes of \"memory.img\", less than a block of 4096",
    );
    let mut machine = Machine::connect(&backend);
    let space = machine.config();
    assert_eq!(word(&space, 0), 2048, "capacity, in sectors");
    assert_eq!((word(&space, 20), &space[24..28]), (4096, &[0, 0, 1, 0][..]), "blk_size and topology");
    assert_eq!(word(&space, 44), 8, "discard_sector_alignment");

    machine.write(DATA, &[0xab; 8192]);
    for (sector, len) in [(0, 512), (1, 4096), (7, 512), (8, 4096 + 512), (2048, 4096), (2047, 4096)] {
        assert_eq!(machine.request(T_OUT, sector, &[(DATA, len)]), (1, IOERR), "{len} at {sector}");
        assert_eq!(machine.request(T_IN, sector, &[(DATA, len)]), (1, IOERR), "{len} at {sector}");
    }
    for (kind, range) in [(T_DISCARD, (8, 7, 0)), (T_WRITE_ZEROES, (4, 8, 0)), (T_DISCARD, (2048, 8, 0))] {
        assert_eq!(machine.ranges(kind, &[(0, 8, 0), range]), (1, IOERR), "{range:?}");
    }
    assert!(fs::read(&path).unwrap()[..bytes.len()] == bytes);
    backend.wait_for("512 bytes from sector 0 on are not whole blocks, of 4096 bytes, of the disk");

    machine.write(DATA, &[0xcd; 8192]);
    // Cut inside blocks.
    assert_eq!(machine.request(T_OUT, 2040, &[(DATA, 1000), (DATA, 3096)]), (1, OK));
    assert_eq!(machine.request(T_IN, 2032, &[(DATA, 8192)]), (8193, OK));
    assert_eq!(machine.read(DATA, 4096), bytes[2032 * 512..2040 * 512]);
    assert_eq!(machine.read(DATA + 4096, 4096), [0xcd; 4096]);
    assert_eq!(machine.ranges(T_DISCARD, &[(0, 8, 0), (16, 8, 0)]), (1, OK));
    assert!(fs::read(&path).unwrap()[..4096] == [0; 4096]);
}

/// Requests are offered on all queues before any is looked at, and each is executed where it belongs.
#[test]
fn queues_are_served_at_a_time() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "--queues 3");
    let mut first = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | FLUSH | MQ);
    assert_ne!(first.0.front_end.get_features().unwrap() & MQ, 0);
    assert_eq!(first.0.front_end.get_queue_num().unwrap(), 3);
    assert_eq!(first.config()[34..36], [3, 0], "num_queues");
    let mut machines = vec![first];
    for queue in 1..3 {
        let mut other = Machine(machines[0].0.other_queue(queue, queue as u64 * 0x8_0000 / 2));
        other.0.start_queue();
        machines.push(other);
    }
    for round in 0..64 {
        std::thread::scope(|scope| {
            for (queue, machine) in machines.iter_mut().enumerate() {
                let bytes = &bytes;
                scope.spawn(move || {
                    // Each queue has a third of the disk, and its own part of memory.
                    let (sector, at) = (queue as u64 * 680 + round, machine.0.base + DATA);
                    assert_eq!(machine.request(T_IN, sector, &[(at, 100), (at + 100, 924)]), (1025, OK));
                    let from = sector as usize * 512;
                    // It is written below, and the sector behind it in the next round.
                    assert_eq!(machine.read(at, 1024), bytes[from..from + 1024], "queue {queue}");
                    machine.write(at, &[queue as u8 + 1; 512]);
                    assert_eq!(machine.request(T_OUT, sector, &[(at, 512)]), (1, OK));
                    assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, OK));
                });
            }
        });
    }
    let mut expected = bytes.clone();
    for queue in 0..3 {
        expected[queue * 680 * 512..][..64 * 512].fill(queue as u8 + 1);
    }
    assert!(fs::read(&path).unwrap() == expected);
}

/// Of many requests at a time in one queue each is answered as it should, whichever thread does. Where
/// requests are slow, here because they are large, not always the same does.
#[test]
fn a_queue_has_helpers() {
    let dir = directory();
    let (_, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | FLUSH | VIRTIO_F_INDIRECT_DESC);
    let before = waits_of_helpers(&backend).1;
    let (small, large) = (0..4, 4..QUEUE_SIZE);
    let at = |head: u16| DATA + 0x1000 * u64::from(head);
    eventually("a helper's turn", || {
        let driver = &mut machine.0;
        let sector = |head: u16| u64::from(head) * 64;
        for head in small.clone().chain(large.clone()) {
            let first = if small.contains(&head) { sector(head) } else { 0 };
            let header = [&T_IN.to_le_bytes()[..], &[0; 4], &first.to_le_bytes()].concat();
            driver.ram.write_slice(&header, GuestAddress(at(head))).unwrap();
            driver.ram.write_slice(&[NO_STATUS], GuestAddress(at(head) + 16)).unwrap();
            // All of the disk, into one place.
            let data = if small.contains(&head) { (at(head) + 512, 256) } else { (RAM / 2, RAM as u32 / 2) };
            let table = INDIRECT + 0x40 * u64::from(head);
            driver.descriptor_at(table, 0, (at(head), 16, NEXT, 1));
            driver.descriptor_at(table, 1, (data.0, data.1, NEXT | WRITE, 2));
            driver.descriptor_at(table, 2, (data.0, data.1, NEXT | WRITE, 3));
            driver.descriptor_at(table, 3, (at(head) + 16, 1, WRITE, 0));
            driver.descriptor(head, (table, 64, TABLE, 0));
        }
        driver.offer_all(QUEUE_SIZE);
        eventually("all used buffers", || driver.used_index() == driver.avail);
        let mut heads: Vec<u32> = (0..QUEUE_SIZE).map(|place| driver.used(place)).collect();
        heads.sort_unstable();
        assert_eq!(heads, Vec::from_iter(0..u32::from(QUEUE_SIZE)));
        for head in 0..QUEUE_SIZE {
            assert_eq!(machine.read(at(head) + 16, 1), [OK], "request {head}");
        }
        for head in small.clone() {
            // Its second half is where its first was.
            let expected = &bytes[sector(head) as usize * 512 + 256..][..256];
            assert_eq!(machine.read(at(head) + 512, 256), expected, "request {head}");
        }
        waits_of_helpers(&backend).1 > before
    });
    // They end with the session.
    drop(machine);
    let _machine = Machine::connect(&backend);
    eventually("the next session's threads only", || waits_of_helpers(&backend).0 == 7);
}

/// How many threads queues have besides their own, and how often these have waited.
fn waits_of_helpers(backend: &Backend) -> (usize, u64) {
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    // One may end meanwhile.
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let helpers = statuses.filter(|status| status.starts_with("Name:\thelper\n"));
    let waits = helpers.map(|status| -> u64 {
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok()).unwrap()
    });
    let waits = Vec::from_iter(waits);
    (waits.len(), waits.iter().sum())
}

#[test]
fn a_read_only_disk_is_read_and_never_written() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "--read-only");
    let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | RO | FLUSH);
    assert_eq!(machine.request(T_OUT, 0, &[(DATA, 512)]), (1, IOERR));
    assert_eq!(machine.ranges(T_DISCARD, &[(0, 8, 0)]), (1, IOERR));
    assert_eq!(machine.ranges(T_WRITE_ZEROES, &[(0, 8, 0)]), (1, IOERR));
    assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
    assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, OK));
    assert_eq!(machine.read(DATA, 512), bytes[..512]);
    assert!(fs::read(&path).unwrap() == bytes);
}

/// Each fails alone, and the next one works.
#[test]
fn wrong_requests_are_errors_and_the_disk_goes_on() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);
    let nowhere = 1 << 40;
    #[rustfmt::skip]
    let wrong = [
        ("a buffer that is in no memory", T_IN, 0, vec![(nowhere, 4096)], (1, IOERR)),
        ("the same, to write", T_OUT, 0, vec![(nowhere, 4096)], (1, IOERR)),
        ("half of it is", T_IN, 0, vec![(RAM - 512, 1024)], (1, IOERR)),
        ("its end wraps around", T_IN, 0, vec![(u64::MAX - 511, 1024)], (1, IOERR)),
        ("beyond the end", T_IN, 2048, vec![(DATA, 512)], (1, IOERR)),
        ("half beyond the end", T_IN, 2047, vec![(DATA, 1024)], (1, IOERR)),
        ("a sector that overflows", T_OUT, u64::MAX, vec![(DATA, 512)], (1, IOERR)),
        ("half a sector", T_OUT, 0, vec![(DATA, 256)], (1, IOERR)),
        ("an unknown type", 99, 0, vec![], (1, UNSUPP)),
        ("no room for an id", T_GET_ID, 0, vec![], (1, IOERR)),
        ("half a range", T_DISCARD, 0, vec![(DATA, 8)], (1, IOERR)),
        ("ranges in no memory", T_DISCARD, 0, vec![(nowhere, 16)], (1, IOERR)),
    ];
    for (what, kind, sector, data, expected) in wrong {
        assert_eq!(machine.request(kind, sector, &data), expected, "{what}");
        assert_eq!(machine.request(T_IN, 1, &[(DATA, 512)]), (513, OK), "after: {what}");
        assert_eq!(machine.read(DATA, 512), bytes[512..1024], "after: {what}");
    }
    #[rustfmt::skip]
    let chains = [
        ("no status", vec![(HEADER, 16, 0), (DATA, 512, 0)], (0, NO_STATUS)),
        ("a status nowhere", vec![(HEADER, 16, 0), (nowhere, 1, WRITE)], (0, NO_STATUS)),
        ("half a header", vec![(HEADER, 8, 0), (STATUS, 1, WRITE)], (1, IOERR)),
        ("a header nowhere", vec![(nowhere, 16, 0), (STATUS, 1, WRITE)], (1, IOERR)),
    ];
    for (what, chain, expected) in chains {
        machine.write(STATUS, &[NO_STATUS]);
        assert_eq!(machine.chain(&chain), expected, "{what}");
    }
    assert_eq!(machine.request(T_IN, 1, &[(DATA, 512)]), (513, OK), "after all of them");
    assert!(fs::read(&path).unwrap() == bytes);
}

/// Another device's mapping, as a front-end shares it: 2 MiB of a file that is shorter.
#[test]
fn memory_that_is_added_is_used_until_it_is_removed() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);

    let shared = tempfile::tempfile_in(dir.path()).unwrap();
    shared.set_len(5000).unwrap();
    let window = 1 << 40;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: window,
        memory_size: 2 * MIB,
        userspace_addr: USER_ADDRESS + window,
        mmap_offset: 0,
        mmap_handle: shared.as_raw_fd(),
    };
    let one = [(window, 512)];
    for _ in 0..2 {
        assert_eq!(machine.request(T_IN, 1, &one), (1, IOERR));
        machine.0.front_end.add_mem_region(&region).unwrap();

        assert_eq!(machine.request(T_IN, 1, &one), (513, OK));
        let mut found = [0; 512];
        shared.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, bytes[512..1024]);
        shared.write_all_at(&[0xcd; 512], 1024).unwrap();
        assert_eq!(machine.request(T_OUT, 9, &[(window + 1024, 512)]), (1, OK));
        assert_eq!(fs::read(&path).unwrap()[9 * 512..10 * 512], [0xcd; 512]);

        // Past the page in which the file ends, and past all of it after the file was cut short.
        let beyond = [(window + MIB, 512)];
        assert_eq!(machine.request(T_IN, 1, &beyond), (1, IOERR));
        assert_eq!(machine.request(T_OUT, 1, &beyond), (1, IOERR));
        shared.set_len(0).unwrap();
        assert_eq!(machine.request(T_IN, 1, &one), (1, IOERR));
        shared.set_len(5000).unwrap();

        machine.0.front_end.remove_mem_region(&region).unwrap();
        assert_eq!(machine.request(T_IN, 1, &one), (1, IOERR));
    }
    assert_eq!(machine.request(T_IN, 1, &[(DATA, 512)]), (513, OK));
    let before = backend.descriptors();
    machine.0.front_end.add_mem_region(&region).unwrap();
    machine.0.front_end.remove_mem_region(&region).unwrap();
    assert_eq!(backend.descriptors(), before);
}

#[test]
fn a_reset_forgets_the_driver_and_a_new_one_is_served() {
    let dir = directory();
    let (_, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    for _ in 0..2 {
        let mut machine = Machine::connect(&backend);
        for _ in 0..2 {
            assert_eq!(machine.request(T_IN, 5, &[(DATA, 512)]), (513, OK));
            assert_eq!(machine.read(DATA, 512), bytes[5 * SECTOR as usize..6 * SECTOR as usize]);
            machine.0.reset();
            machine.start();
        }
    }
}

/// Of 8 EiB less a byte, the most that a file of Linux can have: to the last block.
#[test]
fn the_largest_file_is_a_disk() {
    let dir = directory();
    const HUGE: &str =
        "mkdir -p full; mount -t tmpfs none full; truncate -s 9223372036854775807 full/memory.img";
    for (arguments, sectors) in [("", u64::MAX >> 10), ("--block-size 4096", (u64::MAX >> 13) << 3)] {
        let arguments = format!("--file full/memory.img {arguments}");
        let Some(backend) = start_after(HUGE, "blk", &dir, &arguments) else {
            return;
        };
        let mut machine = Machine::connect(&backend);
        assert_eq!(machine.config()[..8], sectors.to_le_bytes());
        machine.write(DATA, &[0xab; 4096]);
        let last = (sectors - 8) & !7;
        assert_eq!(machine.request(T_OUT, last, &[(DATA, 4096)]), (1, OK));
        assert_eq!(machine.request(T_IN, last, &[(DATA + 4096, 4096)]), (4097, OK));
        assert_eq!(machine.read(DATA + 4096, 4096), [0xab; 4096]);
        assert_eq!(machine.ranges(T_DISCARD, &[(last, 8, 0)]), (1, OK));
        assert_eq!(machine.request(T_IN, sectors, &[(DATA, 4096)]), (1, IOERR));
    }
}

/// The disk stays the file that was opened.
#[test]
fn a_file_that_takes_the_name_is_another_disk() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);
    let other = dir.path().join("other");
    fs::write(&other, [0xee; 512]).unwrap();
    fs::rename(other, &path).unwrap();
    machine.write(DATA, &[0xab; 512]);
    assert_eq!(machine.request(T_OUT, 0, &[(DATA, 512)]), (1, OK));
    assert_eq!(machine.request(T_IN, 2047, &[(DATA, 512)]), (513, OK));
    assert_eq!(machine.read(DATA, 512), bytes[2047 * 512..]);
    drop(machine);
    let mut machine = Machine::connect(&backend);
    assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
    assert_eq!(machine.read(DATA, 512), [0xab; 512]);
    assert_eq!(fs::read(&path).unwrap(), [0xee; 512]);
}

// ------------------------------------------------------------------------------- the file's size changes

/// The front-end's end of a backend channel, which never answers.
fn channel(machine: &mut Machine) -> Wire {
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.0.front_end.set_backend_request_fd(&theirs).unwrap();
    Wire::new(ours)
}

/// The message, by raw bytes: it asks for no answer.
fn assert_told(channel: &Wire, machine: &mut Machine, sectors: u32) {
    let message = channel.receive().unwrap();
    assert_eq!((message.request, message.flags), (backend_request::CONFIG_CHANGE_MSG, wire::VERSION_1));
    assert!(message.payload.is_empty() && message.fds.is_empty());
    assert_eq!(word(&machine.config(), 0), sectors, "capacity");
}

#[test]
fn the_front_end_is_told_when_the_disk_grows_or_shrinks() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let file = File::options().write(true).open(&path).unwrap();
    let mut machine = Machine::connect(&backend);
    let first = channel(&mut machine);
    assert_eq!(word(&machine.config(), 0), 2048);
    assert_eq!(machine.request(T_OUT, 2048, &[(DATA, 512)]), (1, IOERR));

    file.set_len(2 * MIB + 100).unwrap();
    assert_told(&first, &mut machine, 4096);
    assert_eq!(machine.request(T_IN, 2047, &[(DATA, 1024)]), (1025, OK));
    assert_eq!(machine.read(DATA, 1024), [&bytes[2047 * 512..], &[0; 512]].concat());
    assert_eq!(machine.request(T_OUT, 4095, &[(DATA, 512)]), (1, OK));
    assert_eq!(machine.request(T_OUT, 4096, &[(DATA, 512)]), (1, IOERR));

    // A second channel takes the place of the first; and a reset changes nothing.
    let second = channel(&mut machine);
    machine.0.reset();
    machine.start();
    file.set_len(MIB / 2).unwrap();
    assert_told(&second, &mut machine, 1024);
    assert_eq!(machine.request(T_IN, 1024, &[(DATA, 512)]), (1, IOERR));
    assert_eq!(machine.request(T_IN, 1023, &[(DATA, 512)]), (513, OK));
    backend.wait_for("\"memory.img\" has 1024 sectors now");
    assert!(second.is_silent());
    first.wait_for_end();
}

/// One that hung up its channel and one without: they and the disk go on, and the next front-end sees what is
/// there then.
#[test]
fn a_front_end_that_cannot_be_told_goes_on() {
    let dir = directory();
    let (path, _) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let file = File::options().write(true).open(&path).unwrap();
    // With no front-end there.
    file.set_len(2 * MIB).unwrap();
    for mib in 2..5 {
        let mut machine = Machine::connect(&backend);
        assert_eq!(word(&machine.config(), 0), mib * 2048);
        if mib == 2 {
            drop(channel(&mut machine));
        }
        file.set_len(u64::from(mib + 1) * MIB).unwrap();
        if mib == 2 {
            backend.wait_for("\"memory.img\" has 6144 sectors now");
        }
        assert_eq!(machine.request(T_IN, 1, &[(DATA, 512)]), (513, OK));
    }
}

// ------------------------------------------------------------------------------- failures of the file

/// The guest's request fails, the message names the file and the reason, and the back-end goes on: by a limit
/// of the size of files, which else comes with a deadly signal.
#[test]
fn a_write_beyond_the_limit_fails_and_says_why() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let mut shell = Command::new("sh");
    let program = hotslot_backend();
    let script = format!("ulimit -f 256; exec {program:?} blk --socket s --file memory.img");
    shell.current_dir(dir.path()).args(["-c", &script]);
    let backend = Backend::spawn(shell, &dir);
    let mut machine = Machine::connect(&backend);
    machine.write(DATA, &[0xab; 512]);
    assert_eq!(machine.request(T_OUT, 2047, &[(DATA, 512)]), (1, IOERR));
    backend.wait_for("blk: cannot write \"memory.img\": File too large");
    assert!(fs::read(&path).unwrap() == bytes);
    assert_eq!(machine.request(T_OUT, 0, &[(DATA, 512)]), (1, OK));
    assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, OK));
}

#[test]
fn a_full_disk_fails_writes_and_says_so() {
    let dir = directory();
    let Some(backend) = start_after(FULL, "blk", &dir, "--file full/memory.img") else {
        return;
    };
    let mut machine = Machine::connect(&backend);
    machine.write(DATA, &[0xab; 4096]);
    let mut answers = (0..1024).map(|page| machine.request(T_OUT, page * 8, &[(DATA, 4096)]));
    assert!(answers.any(|answer| answer == (1, IOERR)));
    backend.wait_for("blk: cannot write \"full/memory.img\": No space left on device");
    assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, OK));
    assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
}

/// What the driver accepts, and what it writes to the field `writeback`; whether its writes may wait for a
/// flush (section 5.2.6.2). Also the flushes after the first that fails do: the pages that could not be
/// written back count as clean from then on.
#[test]
fn a_flush_that_fails_is_an_error_and_so_are_all_after_it() {
    for (features, writeback, writes_wait) in [
        (FLUSH, None, true),
        (0, None, false),
        (FLUSH | CONFIG_WCE, None, true),
        (FLUSH | CONFIG_WCE, Some(0), false),
        (CONFIG_WCE, None, false),
        (CONFIG_WCE, Some(1), true),
        // Without CONFIG_WCE there is no such field.
        (FLUSH, Some(0), true),
    ] {
        let dir = directory();
        let Some(backend) = start_after(FAILS_LATER, "blk", &dir, "--file full/disk/memory.img") else {
            return;
        };
        let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | features);
        if let Some(value) = writeback {
            machine.set_config(32, &[value]);
        }
        let told = machine.config()[32];
        if features & CONFIG_WCE != 0 {
            assert_eq!(told, u8::from(writes_wait), "{features:#x} {writeback:?}");
        } else {
            assert_eq!(backend.stderr().contains("where CONFIG_WCE was accepted"), writeback.is_some());
        }
        machine.write(DATA, &[0xab; 0x8_0000]);
        let mut answers = (0..60).map(|i| machine.request(T_OUT, i * 1024, &[(DATA, 0x8_0000)]));
        let all_written = answers.all(|answer| answer == (1, OK));
        assert_eq!(all_written, writes_wait, "{features:#x} {writeback:?}");
        for _ in 0..3 {
            assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, IOERR));
        }
        backend.wait_for("blk: cannot flush \"full/disk/memory.img\"");
        assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
    }
}

/// Nothing but 0 and 1 in the field `writeback` is taken, and what was taken outlives a reset: the front-end
/// may have remembered it, and a driver that is told 0 does not flush.
#[test]
fn the_configuration_space_is_written_in_one_place_only() {
    let dir = directory();
    disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | FLUSH | CONFIG_WCE);
    let before = machine.config();
    for (offset, bytes) in
        [(0, &[0; 8][..]), (32, &[2]), (32, &[0, 0]), (31, &[0]), (33, &[0]), (59, &[1]), (255, &[1])]
    {
        machine.set_config(offset, bytes);
        assert_eq!(machine.config(), before, "{bytes:?} at {offset}");
    }
    backend.wait_for("the driver writes 8 bytes at 0x0 of the configuration space; only 0 or 1");
    machine.set_config(32, &[0]);
    assert_eq!(machine.config()[32], 0);
    machine.0.reset();
    machine.start();
    assert_eq!(machine.config()[32], 0);
    machine.set_config(32, &[1]);
    assert_eq!(machine.config(), before);
    assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
}

#[test]
fn a_file_that_was_cut_short_fails_reads_and_says_so() {
    let dir = directory();
    let (path, _) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let mut machine = Machine::connect(&backend);
    File::options().write(true).open(path).unwrap().set_len(1000).unwrap();
    assert_eq!(machine.request(T_IN, 1, &[(DATA, 512)]), (1, IOERR));
    backend.wait_for("blk: \"memory.img\" has become shorter than the disk");
    assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
}

// ----------------------------------------------------------------------- which process has the file open

#[test]
fn a_second_back_end_on_the_file_is_refused_unless_both_may_run() {
    let (dir, other) = (directory(), directory());
    let path = file(&dir, 2 * MIB);
    // The lock is on the file, whatever its name.
    symlink(&path, other.path().join("memory.img")).unwrap();
    let (writing, reading) = (Some("for writing"), Some("for reading"));
    for (device, first, second, refused) in [
        ("blk", "", "", writing),
        ("pmem", "", "", writing),
        ("blk", "", "--read-only", writing),
        ("blk", "", "--shared", writing),
        ("pmem", "", "--shared --read-only", writing),
        ("blk", "--read-only", "", reading),
        ("pmem", "--read-only", "--size 4M", reading),
        ("blk", "--shared", "", reading),
        ("blk", "--read-only", "--read-only", None),
        ("blk", "--shared", "--shared", None),
        ("pmem", "--shared", "--shared --read-only", None),
    ] {
        let _first = Backend::start("blk", &dir, first);
        match refused {
            Some(how) => {
                let arguments = format!("--socket s --file memory.img {second}");
                let sentence = format!("error: \"memory.img\" is in use: another process has it open {how}");
                assert_refused(device, &other, &arguments, &sentence);
            }
            None => drop(Backend::start(device, &other, second)),
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 2 * MIB, "extended before it was locked");
    }
    drop(Backend::start("blk", &other, ""));
}

/// A lock of another kind, of a process whose number the kernel tells.
#[test]
fn a_process_with_a_lock_is_named() {
    let dir = directory();
    let (path, _) = disk(&dir);
    let file = File::options().read(true).write(true).open(path).unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let sentence = format!(
        "\"memory.img\" is in use: another process (pid {}) has it open for writing\nhint: ",
        std::process::id()
    );
    assert_refused("blk", &dir, "--socket s --file memory.img", &sentence);
}

// ------------------------------------------------------------------------------- block devices

/// A loop device, made by root.
struct Loop(String);

impl Loop {
    fn new(path: &Path, options: &[&str]) -> Option<Self> {
        let output = Command::new("losetup").args(options).args(["--find", "--show"]).arg(path).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            output => {
                eprintln!("SKIPPED: no loop device can be had here: {output:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let (dir, other) = (directory(), directory());
    let (path, bytes) = disk(&dir);
    for (options, block) in [(&[][..], 512), (&["--sector-size", "4096"], 4096)] {
        fs::write(&path, &bytes).unwrap();
        let Some(device) = Loop::new(&path, options) else {
            return;
        };
        let link = other.path().join("memory.img");
        let _ = fs::remove_file(&link);
        symlink(&device.0, link).unwrap();
        let backend = Backend::start("blk", &other, "");
        let mut machine = Machine::connect(&backend);
        let space = machine.config();
        let word = |at: usize| word(&space, at);
        assert_eq!((word(0), word(4)), (2048, 0), "capacity");
        assert_eq!((word(20), word(44)), (block, block / 512), "blk_size and discard_sector_alignment");
        let physical = block << space[24];
        assert!(physical >= block && u32::from(space[26]) == physical / block, "{space:?}");

        assert_eq!(machine.request(T_IN, 2040, &[(DATA, 4096)]), (4097, OK));
        assert_eq!(machine.read(DATA, 4096), bytes[2040 * 512..]);
        machine.write(DATA, &[0xab; 4096]);
        assert_eq!(machine.request(T_OUT, 8, &[(DATA, 4096)]), (1, OK));
        assert_eq!(machine.ranges(T_DISCARD, &[(1024, 512, 0)]), (1, OK));
        assert_eq!(machine.ranges(T_WRITE_ZEROES, &[(16, 8, 1)]), (1, OK));
        assert_eq!(machine.request(T_OUT, 2048, &[(DATA, 4096)]), (1, IOERR));
        assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, OK));
        let mut expected = bytes.clone();
        expected[8 * 512..16 * 512].fill(0xab);
        expected[16 * 512..24 * 512].fill(0);
        expected[1024 * 512..1536 * 512].fill(0);
        assert!(fs::read(&path).unwrap() == expected);

        let in_use = "is in use: another process has it open for writing";
        assert_refused("blk", &other, "--socket t --file memory.img --read-only", in_use);
        assert_refused("pmem", &other, "--socket t --file memory.img", "a block device; only a regular file");
        drop((machine, backend));

        let backend = Backend::start("blk", &other, "--read-only");
        let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | RO | FLUSH);
        assert_eq!(machine.request(T_IN, 8, &[(DATA, 4096)]), (4097, OK));
        assert_eq!(machine.request(T_OUT, 8, &[(DATA, 4096)]), (1, IOERR));
        drop((machine, backend));

        if block == 4096 {
            let small = "--block-size 512 is less than the 4096 of the block device \"memory.img\"";
            assert_refused("blk", &other, "--socket t --file memory.img --block-size 512", small);
        } else {
            let backend = Backend::start("blk", &other, "--block-size 4096");
            assert_eq!(Machine::connect(&backend).config()[20..24], 4096u32.to_le_bytes());
        }
    }
}

/// Another's claim to a device, for which a lock would be too late: a mounted file system.
#[test]
fn a_mounted_block_device_is_refused() {
    let dir = directory();
    let path = file(&dir, 4 * MIB);
    let Some(device) = Loop::new(&path, &[]) else {
        return;
    };
    let mount = format!(
        "PATH=$PATH:/usr/sbin:/sbin; mkfs.ext4 -q {0} && mkdir m && mount {0} m && echo ready && read end",
        device.0
    );
    let mut mounted = Command::new("unshare")
        .current_dir(dir.path())
        .args(["--mount", "sh", "-c", &mount])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(mounted.stdout.as_mut().unwrap()), &mut ready)
        .unwrap();
    if ready == "ready\n" {
        let arguments = format!("--socket s --file {}", device.0);
        assert_refused("blk", &dir, &arguments, "is in use: it is mounted, or a program has claimed it");
    } else {
        eprintln!("SKIPPED: {} cannot be mounted here", device.0);
    }
    drop(mounted.stdin.take());
    mounted.wait().unwrap();
}

#[test]
fn on_a_read_only_file_system_a_disk_is_read_only() {
    let dir = directory();
    const READ_ONLY: &str = "mkdir -p full; mount -t tmpfs none full; truncate -s 1M full/memory.img;
        mount -o remount,ro full";
    let Some(backend) = start_after(READ_ONLY, "blk", &dir, "--file full/memory.img --read-only") else {
        return;
    };
    let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | RO | FLUSH);
    assert_eq!(machine.request(T_IN, 8, &[(DATA, 512)]), (513, OK));
    drop((machine, backend));
    // The same without --read-only, whose words end the script's own output.
    let words = format!(
        "{READ_ONLY}; ! {:?} blk --socket t --file full/memory.img 2>words || exit 1",
        hotslot_backend()
    );
    drop(start_after(&words, "blk", &dir, "--file full/memory.img --read-only").unwrap());
    let words = fs::read_to_string(dir.path().join("words")).unwrap();
    assert!(
        words.contains("cannot open for reading and writing \"full/memory.img\": Read-only file system")
            && words.contains("hint: --read-only"),
        "{words}"
    );
}

#[test]
fn bad_command_lines_are_refused() {
    let dir = directory();
    file(&dir, MIB);
    fs::write(dir.path().join("short"), [0; 511]).unwrap();
    fs::write(dir.path().join("empty"), "").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for (arguments, sentence) in [
        ("--socket s --file missing", "error: there is no file \"missing\"\nhint: truncate"),
        ("--socket s --file .", "\".\" is a directory; only a regular file or a block device can be served"),
        (
            "--socket s --file /dev/zero",
            "\"/dev/zero\" is a character device; only a regular file or a block",
        ),
        ("--socket s --file short", "\"short\" has 511 bytes, less than a block of 512\nhint: truncate"),
        ("--socket s --file empty", "\"empty\" has 0 bytes, less than a block of 512\nhint: truncate"),
        ("--socket s --file short --block-size 4096", "less than a block of 4096\nhint: truncate"),
        ("--socket s --file fifo", "\"fifo\" is a FIFO; only a regular file or a block device can be served"),
        ("--socket s --file short --block-size 1024", "a block has 512 or 4096 bytes"),
        ("--socket s --file memory.img --queues 0", "0 is not in 1..=32"),
        ("--socket s --file memory.img --queues 33", "33 is not in 1..=32"),
        ("--socket memory.img --file memory.img", "there is a file that is not a socket"),
    ] {
        assert_refused("blk", &dir, arguments, sentence);
    }
    assert!(!dir.path().join("missing").exists());
}
