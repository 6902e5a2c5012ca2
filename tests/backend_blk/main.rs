//! `hotslot-backend blk`, seen by a front-end, by a driver and by a user.
//!
//! The driver is made by hand and its memory is a file of the test's, as for `hotslot-backend pmem`.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

mod devices;
mod failures;
mod files;
mod machine;
mod size;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, command, directory, file};
use hotslot_test_support::wait::eventually;
use vhost::VhostBackend;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};

use machine::*;

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
