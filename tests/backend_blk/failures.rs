//! Failures of the file.

use std::fs::{self, File};
use std::process::Command;

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, FAILS_LATER, FULL, directory, start_after};

use super::machine::*;

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
