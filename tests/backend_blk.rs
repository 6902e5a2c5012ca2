//! `hotslot-backend blk`, seen by a front-end, by a driver and by a user.
//!
//! The driver is made by hand and its memory is a file of the test's, as for `hotslot-backend pmem`.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{
    Backend, FAILS_LATER, FULL, assert_refused, command, directory, file, start_after,
};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, GuestAddress};

const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
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
        let protocol = PROTOCOL_F_REPLY_ACK
            | PROTOCOL_F_CONFIG
            | PROTOCOL_F_RESET_DEVICE
            | PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        let mut machine = Machine(Driver::connect(backend, features, protocol));
        machine.start();
        machine
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
        self.write(HEADER, &header);
        self.write(STATUS, &[NO_STATUS]);
        let direction = if matches!(kind, T_IN | T_GET_ID) { WRITE } else { 0 };
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(data.iter().map(|&(address, len)| (address, len, direction)));
        chain.push((STATUS, 1, WRITE));
        self.chain(&chain)
    }

    fn chain(&mut self, chain: &[(u64, u32, u16)]) -> (u32, u8) {
        for (index, &(address, len, flags)) in chain.iter().enumerate() {
            let next = if index + 1 < chain.len() { NEXT } else { 0 };
            let index = index as u16;
            self.0.descriptor(index, (address, len, flags | next, (index + 1) * next));
        }
        self.0.offer(0);
        (self.0.await_used(0), self.read(STATUS, 1)[0])
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
    for (arguments, access) in [("", DISCARD | WRITE_ZEROES), ("--read-only", RO)] {
        let backend = Backend::start("blk", &dir, arguments);
        let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1);
        let features = machine.0.front_end.get_features().unwrap();
        let all = VIRTIO_F_VERSION_1
            | VHOST_USER_F_PROTOCOL_FEATURES
            | VIRTIO_F_INDIRECT_DESC
            | VIRTIO_F_EVENT_IDX
            | SEG_MAX
            | BLK_SIZE
            | FLUSH
            | access;
        assert_eq!(features, all);
        let offered = machine.0.front_end.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
        let (_, space) =
            machine.0.front_end.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (2048, 0), "capacity");
        assert_eq!((word(12), word(20)), (126, 512), "seg_max and blk_size");
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

/// Also the flushes after the first: the pages that could not be written back count as clean from then on.
#[test]
fn a_flush_that_fails_is_an_error_and_so_are_all_after_it() {
    for features in [VIRTIO_F_VERSION_1 | FLUSH, VIRTIO_F_VERSION_1] {
        let dir = directory();
        let Some(backend) = start_after(FAILS_LATER, "blk", &dir, "--file full/disk/memory.img") else {
            return;
        };
        let mut machine = Machine::connect_with(&backend, features);
        machine.write(DATA, &[0xab; 0x8_0000]);
        let mut answers = (0..60).map(|i| machine.request(T_OUT, i * 1024, &[(DATA, 0x8_0000)]));
        let all_written = answers.all(|answer| answer == (1, OK));
        assert_eq!(all_written, features & FLUSH != 0, "without a flush, each write is durable");
        for _ in 0..3 {
            assert_eq!(machine.request(T_FLUSH, 0, &[]), (1, IOERR));
        }
        backend.wait_for("blk: cannot flush \"full/disk/memory.img\"");
        assert_eq!(machine.request(T_IN, 0, &[(DATA, 512)]), (513, OK));
    }
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
        let empty = VhostUserConfigFlags::empty();
        let (_, space) = machine.0.front_end.get_config(0, 60, empty, &[0; 60]).unwrap();
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (2048, 0), "capacity");
        assert_eq!((word(20), word(44)), (block, block / 512), "blk_size and discard_sector_alignment");

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
        assert_eq!(machine.request(T_IN, 8, &[(DATA, 512)]), (513, OK));
        assert_eq!(machine.request(T_OUT, 8, &[(DATA, 512)]), (1, IOERR));
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
fn bad_command_lines_are_refused() {
    let dir = directory();
    file(&dir, MIB);
    fs::write(dir.path().join("short"), [0; 511]).unwrap();
    for (arguments, sentence) in [
        ("--socket s --file missing", "error: there is no file \"missing\"\nhint: truncate"),
        ("--socket s --file .", "\".\" is a directory; only a regular file or a block device can be served"),
        (
            "--socket s --file /dev/zero",
            "\"/dev/zero\" is a character device; only a regular file or a block",
        ),
        ("--socket s --file short", "\"short\" has 511 bytes, less than a sector of 512\nhint: truncate"),
        ("--socket memory.img --file memory.img", "there is a file that is not a socket"),
    ] {
        assert_refused("blk", &dir, arguments, sentence);
    }
    assert!(!dir.path().join("missing").exists());
}
