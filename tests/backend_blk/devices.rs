//! Block devices, and file systems that can only be read.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, assert_refused, directory, file, start_after};

use super::machine::*;

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
