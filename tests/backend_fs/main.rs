//! `hotslot-backend fs`, seen by a front-end, a guest and a user.
//!
//! The front-end here is the `vhost` crate's, and raw bytes where a byte matters; the queues and FUSE are
//! made by hand: never hotslot's own codec, nor what the back-end uses.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

mod dax;
mod descriptors;
mod hostile;
mod locks;
mod machine;
mod restart;
mod semantics;
mod window;

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::fuse_request as fuse;
use hotslot_test_support::names::PROTOCOL_F_SHMEM;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};

use fuse::{ROOT, name, quads, u32_at, u64_at, words};
use machine::{MIB, Machine, Place, start, start_as};

/// An ordinary user, when the tests run as root.
const NOBODY: u32 = 65534;

// -------------------------------------------------------------------------------------- what is offered

fn config(machine: &mut Machine) -> (String, u32) {
    let (_, space) = machine.front_end.get_config(0, 40, VhostUserConfigFlags::empty(), &[0xff; 40]).unwrap();
    let tag = String::from_utf8(space[..36].to_vec()).unwrap();
    (tag.trim_end_matches('\0').to_owned(), u32_at(&space, 36))
}

#[test]
fn configuration_has_tag_and_queues() {
    let longest = "t".repeat(36);
    for (args, queues, tag) in
        [("", 2, "share"), ("--tag x --queues 5", 6, "x"), (&format!("--tag {longest}"), 2, &longest)]
    {
        let place = Place::new();
        let backend = start(&place, args);
        let mut machine = Machine::connect(&backend, queues);
        assert_eq!(machine.front_end.get_queue_num().unwrap(), queues as u64);
        assert_eq!(config(&mut machine), (tag.to_owned(), queues as u32 - 1));
    }
}

#[test]
fn the_window_is_region_0() {
    for (args, size) in [("", 8 << 30), ("--window 64M", 64 * MIB)] {
        let place = Place::new();
        let backend = start(&place, args);
        let mut machine = Machine::connect(&backend, 2);
        let config = machine.front_end.get_shmem_config().unwrap();
        assert_eq!({ config.nregions }, 1);
        assert_eq!({ config.memory_sizes }[0], size);
    }
}

#[test]
fn without_a_window_there_is_no_region_and_no_dax() {
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "--window 0");
    let mut machine = Machine::connect(&backend, 2);
    let offered = machine.front_end.get_protocol_features().unwrap();
    assert!(!offered.contains(VhostUserProtocolFeatures::from_bits_retain(PROTOCOL_F_SHMEM)));
    machine.start();
    let answer = machine.ok(fuse::INIT, 0, &fuse::init());
    assert_eq!(u32_at(&answer, 12) & fuse::MAP_ALIGNMENT, 0);
    let node = machine.lookup("f");
    let body = fuse::setupmapping(0, 2 * MIB, 0, 0);
    assert_ne!(machine.error(fuse::SETUPMAPPING, node, &body), 0);
    let handle = machine.open(node, libc::O_RDONLY);
    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 100)), b"data");
}

#[test]
fn init_agrees_on_pages_for_mappings_and_requests_of_1_mib() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::connect(&backend, 2);
    machine.start();
    let answer = machine.ok(fuse::INIT, 0, &fuse::init());
    assert_eq!(answer.len(), 64);
    assert_eq!(u32_at(&answer, 0), 7, "major");
    assert_eq!(u32_at(&answer, 20), 1 << 20, "max_write");
    let pages = u32_at(&answer, 28);
    assert_eq!((pages & 0xffff, pages >> 16), (256, 12), "max_pages, map_alignment");
    let flags = u32_at(&answer, 12);
    assert_ne!(flags & fuse::MAP_ALIGNMENT, 0);
    // What the guest must not count on: remote locks, an open that truncates before all is checked, "..", an
    // own cache of writes.
    for absent in [1 << 1, 1 << 3, 1 << 4, 1 << 10, 1 << 16] {
        assert_eq!(flags & absent, 0, "{absent:#x} of {flags:#x}");
    }
}

/// What the guest may keep: how long attributes and names are good, and what an open says.
#[test]
fn caching_is_what_the_command_line_says() {
    const DIRECT_IO: u32 = 1;
    const KEEP_CACHE: u32 = 2;
    for (args, seconds, open_flags) in [
        ("--cache never", 0, DIRECT_IO),
        ("--cache none", 0, DIRECT_IO),
        ("", 1, 0),
        ("--cache auto", 1, 0),
        ("--cache always", 86400, KEEP_CACHE),
    ] {
        let place = Place::new();
        place.write("f", "");
        let backend = start(&place, args);
        let mut machine = Machine::mounted(&backend);
        let entry = machine.ok(fuse::LOOKUP, ROOT, &name("f"));
        assert_eq!((u64_at(&entry, 16), u64_at(&entry, 24)), (seconds, seconds), "{args}");
        let open = machine.ok(fuse::OPEN, u64_at(&entry, 0), &fuse::open(libc::O_RDONLY));
        assert_eq!(u32_at(&open, 8), open_flags, "{args}");
    }
}

#[test]
fn a_command_line_that_cannot_be_served_is_refused() {
    let place = Place::new();
    place.write("file", "");
    for (args, says) in [
        ("--dir nowhere", "cannot serve the directory"),
        ("--dir dir/file", "cannot serve the directory"),
        ("--dir dir --window 1M", "not a multiple of 2M"),
        ("--dir dir --tag ttttttttttttttttttttttttttttttttttttt", "37 bytes"),
        ("--dir dir --tag=", "0 bytes"),
        ("--dir dir --queues 0", "0 is not in 1..=32"),
        ("--dir dir --cache some", "invalid value 'some'"),
        ("--dir dir --uid-map 0:1", "not INSIDE:OUTSIDE:COUNT"),
        ("--dir dir --uid-map 0:1:0", "it has none"),
        ("--dir dir --gid-map 0:4294967295:1", "between 0 and 4294967294"),
        ("--dir dir --uid-map 0:1000:2 --uid-map 5:1001:1", "--uid-map: 0:1000:2 and 5:1001:1 overlap"),
        ("--dir dir --inode-file-handles some", "invalid value 'some'"),
        ("--dir /proc/self --inode-file-handles mandatory", "cannot be opened by handles"),
        ("", "--dir"),
    ] {
        let output = Command::new(hotslot_backend())
            .current_dir(place.top.path())
            .args(["fs", "--socket", "s"])
            .args(args.split_whitespace())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args}: {stderr}");
        assert!(stderr.contains(says), "{args}: {stderr}");
        assert!(!place.top.path().join("s").exists(), "{args}");
    }
}

// ------------------------------------------------------------------------------------------- the session

#[test]
fn the_socket_goes_with_the_program() {
    let place = Place::new();
    let backend = start(&place, "");
    assert!(fs::symlink_metadata(place.top.path().join("s")).unwrap().file_type().is_socket());
    drop(Machine::mounted(&backend));
    let pid = rustix_pid(backend.pid());
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(backend.wait().code(), Some(0));
    assert!(!place.top.path().join("s").exists());
}

fn rustix_pid(pid: u32) -> rustix::process::Pid {
    rustix::process::Pid::from_raw(pid as i32).unwrap()
}

#[test]
fn the_next_front_end_finds_nothing_of_the_last() {
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "");
    let mut last = 2;
    let mut session = || {
        let mut machine = Machine::mounted(&backend);
        assert_eq!(machine.error(fuse::GETATTR, last, &quads([0, 0])), libc::ESTALE);
        let node = machine.lookup("f");
        assert_ne!(node, last);
        last = node;
        machine.open(node, libc::O_RDWR);
        let body = fuse::setupmapping(0, 2 * MIB, 0, 0);
        machine.asking(fuse::SETUPMAPPING, node, &body, &[(machine::SHMEM_MAP, 0, 2 * MIB, 0, 1)]);
        // One session has ended before the next begins.
        backend.descriptors()
    };
    let first = session();
    for _ in 0..3 {
        assert_eq!(session(), first, "descriptors");
    }
}

#[test]
fn a_reset_forgets_what_the_guest_had() {
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDONLY);
    machine.reset();
    machine.start();
    machine.ok(fuse::INIT, 0, &fuse::init());
    assert_eq!(machine.error(fuse::GETATTR, node, &quads([0, 0])), libc::ESTALE);
    assert_eq!(machine.error(fuse::READ, node, &fuse::read(handle, 0, 1)), libc::EBADF);
    assert_ne!(machine.lookup("f"), node, "a node is not used twice");
}

/// One that waits for the front-end keeps no other queue waiting.
#[test]
fn each_queue_goes_its_own_way() {
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "--queues 2");
    let mut machine = Machine::connect(&backend, 3);
    machine.start();
    machine.ok(fuse::INIT, 0, &fuse::init());
    let node = machine.lookup("f");
    machine.send(1, fuse::SETUPMAPPING, node, &fuse::setupmapping(0, 2 * MIB, 0, 0));
    let asked = machine.channel.receive().unwrap();

    machine.send(2, fuse::GETATTR, node, &quads([0, 0]));
    let (_, written) = machine.await_used(2);
    let (error, attributes) = machine.answer(2, written);
    assert_eq!((error, u64_at(&attributes, 24)), (0, 4), "the size");
    machine.send(0, fuse::FORGET, node, &quads([1]));
    assert_eq!(machine.await_used(0), (0, 0));
    assert!(!machine.is_used(1));

    machine.channel.reply(&asked, 0);
    assert_eq!(machine.finish().0, 0);
}

// --------------------------------------------------------------------------------------------- the files

#[test]
fn files_are_created_written_read_and_removed() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let (node, handle) = machine.create("f", libc::O_RDWR, 0o640);
    let data: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
    let answer = machine.ok(fuse::WRITE, node, &fuse::write(handle, 1000, &data));
    assert_eq!(u32_at(&answer, 0), 300_000);
    assert_eq!(place.read("f")[1000..], data);
    assert_eq!(fs::metadata(place.path("f")).unwrap().mode() & 0o7777, 0o640);

    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 1000, 400_000)), data);
    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 300_999, 10)), data[299_999..]);
    assert!(machine.ok(fuse::READ, node, &fuse::read(handle, 400_000, 10)).is_empty());
    machine.ok(fuse::FSYNC, node, &[quads([handle]), words([0, 0])].concat());

    machine.ok(fuse::SETATTR, node, &fuse::set_size(1001));
    assert_eq!(place.read("f").len(), 1001);
    let attributes = machine.ok(fuse::GETATTR, node, &quads([0, 0]));
    assert_eq!(u64_at(&attributes, 24), 1001);

    machine.ok(fuse::UNLINK, ROOT, &name("f"));
    assert!(!place.path("f").exists());
    assert_eq!(machine.error(fuse::LOOKUP, ROOT, &name("f")), libc::ENOENT);
    // Still open.
    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 1000, 10)), [0]);
    machine.ok(fuse::RELEASE, node, &quads([handle, 0, 0]));
    assert_eq!(machine.error(fuse::READ, node, &fuse::read(handle, 0, 1)), libc::EBADF);
    machine.send(1, fuse::FORGET, node, &quads([1]));
    assert_eq!(machine.await_used(1), (0, 0));
    assert_eq!(machine.error(fuse::GETATTR, node, &quads([0, 0])), libc::ESTALE);
}

#[test]
fn appends_go_to_the_end_that_the_host_sees() {
    const APPEND: i32 = libc::O_WRONLY | libc::O_APPEND;
    let place = Place::new();
    place.write("f", "one ");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, APPEND);
    place.write("f", "one two ");
    // Linux repeats the flags of the open, as fcntl has changed them since.
    let mut append = fuse::write(handle, 4, b"three");
    append[32..36].copy_from_slice(&APPEND.to_le_bytes());
    assert_eq!(machine.ok(fuse::WRITE, node, &append)[..4], [5, 0, 0, 0]);
    assert_eq!(place.read("f"), b"one two three");
    machine.ok(fuse::WRITE, node, &fuse::write(handle, 4, b"TWO"));
    assert_eq!(place.read("f"), b"one TWO three");
}

/// What Linux writes back from a mapping has an offset, by whatever handle: it would be appended if the
/// host's file were open with O_APPEND.
#[test]
fn a_write_goes_where_the_guest_says_in_a_file_that_it_appends_to() {
    const APPEND: i32 = libc::O_RDWR | libc::O_APPEND;
    let place = Place::new();
    for name in ["opened", "created over", "truncated"] {
        place.write(name, "AAAA");
    }
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("opened");
    let opened = (node, machine.open(node, APPEND));
    let node = machine.lookup("truncated");
    let truncated = (node, machine.open(node, APPEND | libc::O_TRUNC));
    let over = machine.create("created over", APPEND, 0o644);
    let created = machine.create("created", APPEND, 0o644);
    let exclusive = machine.create("exclusive", APPEND | libc::O_EXCL, 0o644);
    let answer = machine.ok(fuse::TMPFILE, ROOT, &fuse::create(APPEND, 0o600, ""));
    let unnamed = (u64_at(&answer, 0), u64_at(&answer, 128));
    for (what, (node, handle)) in [
        ("opened", opened),
        ("truncated", truncated),
        ("created over", over),
        ("created", created),
        ("exclusive", exclusive),
        ("unnamed", unnamed),
    ] {
        // FUSE_WRITE_CACHE: a write from the guest's cache. Linux repeats the flags of the open with others.
        for (offset, data, flags) in [(0, b"AAAA", 1), (4, b"AAAA", 1), (2, b"bb__", 1), (4, b"AAAA", 1)] {
            let mut body = fuse::write(handle, offset, data);
            body[20..24].copy_from_slice(&u32::to_le_bytes(flags));
            body[32..36].copy_from_slice(&APPEND.to_le_bytes());
            assert_eq!(machine.ok(fuse::WRITE, node, &body)[..4], [4, 0, 0, 0], "{what}");
        }
        let found = machine.ok(fuse::READ, node, &fuse::read(handle, 0, 100));
        assert_eq!(String::from_utf8_lossy(&found), "AAbbAAAA", "{what}");
    }
    // By the host's own account: no file is open with O_APPEND.
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", backend.pid())).unwrap() {
        // Some descriptors may be gone by now.
        let Ok(info) = fs::read_to_string(entry.unwrap().path()) else {
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        assert_eq!(flags & libc::O_APPEND, 0, "{info}");
    }
}

#[test]
fn names_are_made_moved_and_linked() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let dir = u64_at(&machine.ok(fuse::MKDIR, ROOT, &[words([0o755, 0]), name("d")].concat()), 0);
    let (node, _) = machine.create("f", libc::O_RDWR, 0o644);
    machine.ok(fuse::RENAME, ROOT, &[quads([dir]), name("f"), name("g")].concat());
    assert!(place.path("d/g").exists());
    machine.ok(fuse::LINK, ROOT, &[quads([node]), name("hard")].concat());
    assert_eq!(fs::metadata(place.path("hard")).unwrap().nlink(), 2);
    assert_eq!(machine.lookup("hard"), node);
    let link = u64_at(&machine.ok(fuse::SYMLINK, ROOT, &[name("soft"), name("d/g")].concat()), 0);
    assert_eq!(machine.ok(fuse::READLINK, link, &[]), b"d/g");
    assert_eq!(fs::read_link(place.path("soft")).unwrap().to_str(), Some("d/g"));

    // RENAME_EXCHANGE and RENAME_NOREPLACE.
    place.write("other", "other");
    let rename =
        |flags: u32, from: &str, to: &str| [quads([ROOT]), words([flags, 0]), name(from), name(to)].concat();
    machine.ok(fuse::RENAME2, ROOT, &rename(2, "other", "hard"));
    assert_eq!(place.read("hard"), b"other");
    assert_eq!(machine.error(fuse::RENAME2, ROOT, &rename(1, "other", "hard")), libc::EEXIST);

    assert_eq!(machine.error(fuse::RMDIR, ROOT, &name("d")), libc::ENOTEMPTY);
    machine.ok(fuse::UNLINK, dir, &name("g"));
    machine.ok(fuse::RMDIR, ROOT, &name("d"));
    assert!(!place.path("d").exists());
}

/// O_TMPFILE, and linkat(2) of it.
#[test]
fn a_file_without_a_name_can_be_given_one() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let body = fuse::create(libc::O_RDWR | libc::O_TMPFILE, 0o600, "/");
    let answer = machine.ok(fuse::TMPFILE, ROOT, &body);
    let (node, handle) = (u64_at(&answer, 0), u64_at(&answer, 128));
    machine.ok(fuse::WRITE, node, &fuse::write(handle, 0, b"data"));
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 0);
    machine.ok(fuse::LINK, ROOT, &[quads([node]), name("named")].concat());
    assert_eq!(place.read("named"), b"data");
}

/// All names of a directory, by READDIR or READDIRPLUS, in answers of `size` bytes.
fn names(machine: &mut Machine, opcode: u32, size: u32) -> Vec<(String, u64)> {
    let handle = u64_at(&machine.ok(fuse::OPENDIR, ROOT, &fuse::open(libc::O_RDONLY)), 0);
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let answer = machine.ok(opcode, ROOT, &fuse::read(handle, offset, size));
        if answer.is_empty() {
            return names;
        }
        assert!(answer.len() <= size as usize);
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let mut node = 0;
            if opcode == fuse::READDIRPLUS {
                node = u64_at(rest, 0);
                rest = &rest[128..];
            }
            offset = u64_at(rest, 8);
            let len = u32_at(rest, 16) as usize;
            names.push((String::from_utf8(rest[24..24 + len].to_vec()).unwrap(), node));
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
    }
}

#[test]
fn directories_are_read_in_pieces() {
    let place = Place::new();
    let mut expected = BTreeSet::from([".".to_owned(), "..".to_owned()]);
    for index in 0..200 {
        let file = format!("a-name-that-is-not-short-{index}");
        place.write(&file, "");
        expected.insert(file);
    }
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    for (opcode, size) in
        [(fuse::READDIR, 4096), (fuse::READDIR, 200), (fuse::READDIRPLUS, 4096), (fuse::READDIRPLUS, 100_000)]
    {
        let names = names(&mut machine, opcode, size);
        assert_eq!(names.len(), expected.len(), "each is told once");
        assert_eq!(names.iter().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>(), expected);
        if opcode == fuse::READDIRPLUS {
            for (name, node) in names {
                let is_known = !name.starts_with('.');
                assert_eq!(node != 0, is_known, "{name}");
                if is_known {
                    assert_eq!(machine.lookup(&name), node);
                }
            }
        }
    }
}

#[test]
fn extended_attributes() {
    let place = Place::new();
    place.write("f", "");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let set = fuse::setxattr("user.colour", b"green", 0);
    match machine.error(fuse::SETXATTR, node, &set) {
        libc::EOPNOTSUPP => {
            eprintln!("skipped: the file system of the build directory has no extended attributes");
            return;
        }
        error => assert_eq!(error, 0),
    }
    let get = |size: u32| [words([size, 0]), name("user.colour")].concat();
    assert_eq!(machine.ok(fuse::GETXATTR, node, &get(100)), b"green");
    assert_eq!(u32_at(&machine.ok(fuse::GETXATTR, node, &get(0)), 0), 5);
    assert_eq!(machine.error(fuse::GETXATTR, node, &get(2)), libc::ERANGE);
    assert_eq!(machine.ok(fuse::GETXATTR, node, &get(u32::MAX)), b"green");
    let names = machine.ok(fuse::LISTXATTR, node, &words([100, 0]));
    assert!(names.windows(12).any(|window| window == b"user.colour\0"));
    machine.ok(fuse::REMOVEXATTR, node, &name("user.colour"));
    assert_eq!(machine.error(fuse::GETXATTR, node, &get(100)), libc::ENODATA);
}

#[test]
fn space_is_allocated_found_copied_and_counted() {
    let place = Place::new();
    place.write("from", "0123456789");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let (node, handle) = machine.create("f", libc::O_RDWR, 0o644);
    machine.ok(fuse::FALLOCATE, node, &[quads([handle, 0, 8192]), words([0, 0])].concat());
    assert_eq!(place.read("f").len(), 8192);

    machine.ok(fuse::SETATTR, node, &fuse::set_size(MIB));
    let seek = |offset: u64, whence: i32| [quads([handle, offset]), words([whence as u32, 0])].concat();
    let hole = u64_at(&machine.ok(fuse::LSEEK, node, &seek(0, libc::SEEK_HOLE)), 0);
    assert!(hole <= MIB);
    assert_eq!(machine.error(fuse::LSEEK, node, &seek(0, libc::SEEK_END)), libc::EINVAL);

    let from = machine.lookup("from");
    let source = machine.open(from, libc::O_RDONLY);
    let copy = quads([source, 2, node, handle, 1, 5, 0]);
    assert_eq!(u32_at(&machine.ok(fuse::COPY_FILE_RANGE, from, &copy), 0), 5);
    assert_eq!(place.read("f")[..7], *b"\x0023456\0");

    let stat = machine.ok(fuse::STATFS, ROOT, &[]);
    assert_eq!(stat.len(), 80);
    assert_eq!(u32_at(&stat, 44), 255, "namelen");
    assert!(u64_at(&stat, 0) > 0, "blocks");
    machine.ok(fuse::SYNCFS, ROOT, &quads([0]));
}

// ------------------------------------------------------------------------------------------- who may what

/// Every operation that changes something, on a file system that is read-only.
#[test]
fn read_only_means_that_nothing_changes() {
    let place = Place::new();
    place.write("f", "data");
    fs::create_dir(place.path("d")).unwrap();
    let backend = start(&place, "--read-only");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDONLY);
    let make = |bytes: Vec<u8>| [bytes, name("new")].concat();
    let changes = [
        (fuse::SETATTR, node, fuse::set_size(0)),
        (fuse::SYMLINK, ROOT, [name("new"), name("f")].concat()),
        (fuse::MKNOD, ROOT, make(words([libc::S_IFIFO | 0o644, 0, 0, 0]))),
        (fuse::MKDIR, ROOT, make(words([0o755, 0]))),
        (fuse::UNLINK, ROOT, name("f")),
        (fuse::RMDIR, ROOT, name("d")),
        (fuse::RENAME, ROOT, [quads([ROOT]), name("f"), name("new")].concat()),
        (fuse::RENAME2, ROOT, [quads([ROOT, 0]), name("f"), name("new")].concat()),
        (fuse::LINK, ROOT, make(quads([node]))),
        (fuse::OPEN, node, fuse::open(libc::O_RDWR)),
        (fuse::OPEN, node, fuse::open(libc::O_WRONLY)),
        (fuse::OPEN, node, fuse::open(libc::O_RDONLY | libc::O_TRUNC)),
        (fuse::WRITE, node, fuse::write(handle, 0, b"x")),
        (fuse::SETXATTR, node, fuse::setxattr("user.x", b"x", 0)),
        (fuse::REMOVEXATTR, node, name("user.x")),
        (fuse::CREATE, ROOT, fuse::create(libc::O_RDONLY | libc::O_CREAT, 0o644, "new")),
        (fuse::TMPFILE, ROOT, fuse::create(libc::O_RDWR, 0o644, "new")),
        (fuse::FALLOCATE, node, [quads([handle, 0, 8192]), words([0, 0])].concat()),
        (fuse::COPY_FILE_RANGE, node, quads([handle, 0, node, handle, 0, 1, 0])),
        (fuse::SETUPMAPPING, node, fuse::setupmapping(0, 2 * MIB, 1, 0)),
    ];
    for (opcode, node, body) in changes {
        assert_eq!(machine.error(opcode, node, &body), libc::EROFS, "opcode {opcode}");
    }
    // O_TMPFILE and O_CREAT in an open are no way around.
    let sneaky = fuse::open(libc::O_RDONLY | libc::O_TMPFILE | libc::O_CREAT);
    let _ = machine.error(fuse::OPENDIR, ROOT, &sneaky);
    assert!(machine.channel.is_silent());
    let names: BTreeSet<_> = fs::read_dir(place.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["d", "f"].map(Into::into).into());
    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 100)), b"data");

    // To map for reading is fine, with a descriptor that cannot write.
    let body = fuse::setupmapping(0, 2 * MIB, 0, 0);
    let asked = machine.asking(fuse::SETUPMAPPING, node, &body, &[(machine::SHMEM_MAP, 0, 2 * MIB, 0, 0)]);
    assert_eq!(access_of(&asked[0]), libc::O_RDONLY);
}

/// The access mode of the descriptor of a SHMEM_MAP.
pub fn access_of(asked: &machine::Message) -> i32 {
    let flags = rustix::fs::fcntl_getfl(asked.file()).unwrap();
    (flags & rustix::fs::OFlags::RWMODE).bits() as i32
}

/// Gives the place to an ordinary user, if the tests run as root, and says which. None, with a word on
/// stderr, where that user cannot come.
pub fn ordinary_user(place: &Place) -> Option<Option<u32>> {
    if !rustix::process::geteuid().is_root() {
        return Some(None);
    }
    let reachable = Command::new(hotslot_backend())
        .arg("--version")
        .current_dir(place.top.path().parent().unwrap())
        .uid(NOBODY)
        .output();
    if !reachable.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: an ordinary user cannot reach the build directory");
        return None;
    }
    for path in [place.top.path().to_owned(), place.path("")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    Some(Some(NOBODY))
}

/// As an ordinary user: the guest's root, and its other users, do what that user can.
#[test]
fn what_an_ordinary_user_cannot_do_is_refused_at_the_start() {
    let place = Place::new();
    let Some(user) = ordinary_user(&place) else {
        return;
    };
    for option in ["--uid-map 0:1000:1", "--gid-map 0:1000:1", "--device-nodes"] {
        let mut command = Command::new(hotslot_backend());
        command.current_dir(place.top.path()).args(["fs", "--socket", "s", "--dir", "dir"]);
        command.args(option.split_whitespace());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{option}: {stderr}");
        assert!(stderr.contains("needs root's capabilities"), "{option}: {stderr}");
    }
}

#[test]
fn an_ordinary_user_serves_own_files() {
    let place = Place::new();
    let Some(user) = ordinary_user(&place) else {
        return;
    };
    let as_root = user.is_some();
    if as_root {
        place.write("root's", "data");
        fs::set_permissions(place.path("root's"), Permissions::from_mode(0o600)).unwrap();
    }
    let backend = start_as(&place, "", user);
    let us = fs::metadata(place.path("")).unwrap().uid();
    let mut machine = Machine::mounted(&backend);
    for (user, file) in [(0, "a"), (us, "b"), (12345, "c")] {
        machine.user = (user, user);
        let (node, handle) = machine.create(file, libc::O_RDWR, 0o444);
        machine.ok(fuse::WRITE, node, &fuse::write(handle, 0, b"data"));
        assert_eq!(fs::metadata(place.path(file)).unwrap().uid(), us);
        // It cannot be opened for writing any more, but is.
        let body = fuse::setupmapping(0, 2 * MIB, 1, 0);
        machine.asking(fuse::SETUPMAPPING, node, &body, &[(machine::SHMEM_MAP, 0, 2 * MIB, 0, 1)]);
        machine.asking(
            fuse::REMOVEMAPPING,
            node,
            &fuse::removemapping(&[(0, 2 * MIB)]),
            &[(machine::SHMEM_UNMAP, 0, 2 * MIB, 0, 0)],
        );
        machine.ok(fuse::SETATTR, node, &fuse::set_size(2));
        machine.ok(fuse::LINK, ROOT, &[quads([node]), name(&format!("{file}2"))].concat());
        machine.ok(fuse::MKDIR, ROOT, &[words([0o755, 0]), name(&format!("{file}3"))].concat());
        machine.ok(fuse::SYMLINK, ROOT, &[name(&format!("{file}4")), name(file)].concat());
    }
    // As an open with O_TRUNC does: no right to read is needed.
    place.write("written", "data");
    std::os::unix::fs::chown(place.path("written"), Some(us), None).unwrap();
    fs::set_permissions(place.path("written"), Permissions::from_mode(0o200)).unwrap();
    let node = machine.lookup("written");
    machine.ok(fuse::SETATTR, node, &fuse::set_size(0));
    assert_eq!(fs::metadata(place.path("written")).unwrap().len(), 0);
    if as_root {
        let node = machine.lookup("root's");
        assert_eq!(machine.error(fuse::OPEN, node, &fuse::open(libc::O_RDONLY)), libc::EACCES);
    }
}

/// As root: what a user of the guest makes belongs to that user. Whether it may be is for the guest's kernel
/// to say, which knows the user's groups.
#[test]
fn as_root_what_a_user_makes_is_the_users() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: for root only");
        return;
    }
    let place = Place::new();
    fs::create_dir(place.path("theirs")).unwrap();
    std::os::unix::fs::chown(place.path("theirs"), Some(1234), Some(4321)).unwrap();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let dir = machine.lookup("theirs");
    machine.user = (1234, 4321);
    machine.ok(fuse::CREATE, dir, &fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, "file"));
    machine.ok(fuse::MKDIR, dir, &[words([0o755, 0]), name("dir")].concat());
    machine.ok(fuse::SYMLINK, dir, &[name("link"), name("file")].concat());
    let fifo = words([libc::S_IFIFO | 0o644, 0, 0, 0]);
    machine.ok(fuse::MKNOD, dir, &[fifo, name("fifo")].concat());
    for file in ["file", "dir", "link", "fifo"] {
        let metadata = fs::symlink_metadata(place.path("theirs").join(file)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321), "{file}");
    }
    // The shared directory itself is another group's, in which the user may be.
    std::os::unix::fs::chown(place.path(""), Some(0), Some(77)).unwrap();
    fs::set_permissions(place.path(""), Permissions::from_mode(0o2770)).unwrap();
    machine.create("file", libc::O_RDWR, 0o644);
    let metadata = fs::metadata(place.path("file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 77));
    // And the thread is root again, with all that root keeps.
    machine.user = (0, 0);
    let (node, _) = machine.create("root's", libc::O_RDWR, 0o644);
    assert_eq!(fs::metadata(place.path("root's")).unwrap().uid(), 0);
    // FATTR_UID.
    let mut chown = words([1 << 1, 0]);
    chown.extend([0; 68]);
    chown.extend(words([5, 0, 0]));
    machine.ok(fuse::SETATTR, node, &chown);
    assert_eq!(fs::metadata(place.path("root's")).unwrap().uid(), 5);
    let body = fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, "file");
    machine.user = (u32::MAX, u32::MAX);
    assert_eq!(machine.error(fuse::CREATE, ROOT, &body), libc::EINVAL);
}

#[test]
fn special_files_are_made_but_not_opened() {
    let place = Place::new();
    symlink("f", place.path("link")).unwrap();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let make =
        |mode: u32, device: u32, file: &str| [words([mode | 0o666, device, 0, 0]), name(file)].concat();
    for (mode, file) in [(libc::S_IFIFO, "fifo"), (libc::S_IFSOCK, "socket")] {
        let node = u64_at(&machine.ok(fuse::MKNOD, ROOT, &make(mode, 0, file)), 0);
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            assert_eq!(machine.error(fuse::OPEN, node, &fuse::open(flags)), libc::ENXIO, "{file}");
        }
        let body = fuse::create(libc::O_WRONLY | libc::O_CREAT, 0o644, file);
        assert_eq!(machine.error(fuse::CREATE, ROOT, &body), libc::ENXIO, "{file}");
        assert_ne!(machine.error(fuse::SETUPMAPPING, node, &fuse::setupmapping(0, 4096, 0, 0)), 0);
        assert_ne!(machine.error(fuse::SETATTR, node, &fuse::set_size(0)), 0, "{file}");
    }
    let link = machine.lookup("link");
    assert_eq!(machine.error(fuse::OPEN, link, &fuse::open(libc::O_RDONLY)), libc::ELOOP);
    for mode in [libc::S_IFBLK, libc::S_IFCHR] {
        assert_eq!(machine.error(fuse::MKNOD, ROOT, &make(mode, 0x103, "device")), libc::EPERM);
    }
    assert!(!place.path("device").exists());
}
