//! `hotslot-backend blk`, seen by a front-end, by a driver and by a user.
//!
//! The driver is made by hand and its memory is a file of the test's, as for `hotslot-backend pmem`.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, assert_refused, directory, file};
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

    /// Ranges to discard or zero: sector, number of sectors, flags.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> (u32, u8) {
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

#[test]
fn bad_command_lines_are_refused() {
    let dir = directory();
    file(&dir, MIB);
    fs::write(dir.path().join("short"), [0; 511]).unwrap();
    for (arguments, sentence) in [
        ("--socket s --file missing", "error: there is no file \"missing\"\nhint: truncate"),
        ("--socket s --file .", "\".\" is a directory; only a regular file"),
        ("--socket s --file short", "\"short\" has 511 bytes, less than a sector of 512\nhint: truncate"),
        ("--socket memory.img --file memory.img", "there is a file that is not a socket"),
    ] {
        assert_refused("blk", &dir, arguments, sentence);
    }
    assert!(!dir.path().join("missing").exists());
}
