//! Which file is the disk, and which process has it open; command lines.

use std::fs::{self, File};
use std::os::unix::fs::symlink;

use hotslot_test_support::files::MIB;
use hotslot_test_support::program::{Backend, assert_refused, directory, file, start_after};

use super::machine::*;

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
