//! Guests that try to leave the share, or make no sense.

use std::fs;
use std::os::unix::fs::symlink;

use hotslot_test_support::program::Backend;

use crate::fuse::{self, HEADER, ROOT, name, quads, u64_at, words};
use crate::machine::{
    ANSWER, ANSWER_LEN, INDIRECT, MIB, Machine, NEXT, Place, RAM, REQUEST, SECRET, TABLE, WRITE, start,
};

impl Machine {
    /// After whatever happened, it serves as before.
    #[track_caller]
    fn assert_served(&mut self, backend: &Backend) {
        assert!(backend.is_running());
        self.ok(fuse::GETATTR, ROOT, &quads([0, 0]));
    }
}

#[test]
fn names_are_no_paths() {
    let place = Place::new();
    fs::create_dir(place.path("sub")).unwrap();
    place.write("f", "");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let (sub, file) = (machine.lookup("sub"), machine.lookup("f"));
    for bad in ["..", ".", "", "../outside/secret", "sub/../../outside/secret", "/etc/passwd", "sub/", "/"] {
        for parent in [ROOT, sub] {
            let mut refused = |opcode, body: &[u8]| {
                let error = machine.error(opcode, parent, body);
                assert_eq!(error, libc::EINVAL, "opcode {opcode}, {bad:?}");
            };
            refused(fuse::LOOKUP, &name(bad));
            refused(fuse::UNLINK, &name(bad));
            refused(fuse::RMDIR, &name(bad));
            refused(fuse::MKDIR, &[words([0o755, 0]), name(bad)].concat());
            refused(fuse::MKNOD, &[words([libc::S_IFREG | 0o644, 0, 0, 0]), name(bad)].concat());
            refused(fuse::CREATE, &fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, bad));
            refused(fuse::SYMLINK, &[name(bad), name("target")].concat());
            refused(fuse::LINK, &[quads([file]), name(bad)].concat());
            refused(fuse::RENAME, &[quads([ROOT]), name("f"), name(bad)].concat());
            refused(fuse::RENAME, &[quads([ROOT]), name(bad), name("x")].concat());
        }
    }
    assert_eq!(fs::read_to_string(place.outside().join("secret")).unwrap(), SECRET);
    assert_eq!(fs::read_dir(place.outside()).unwrap().count(), 1);
}

/// A link is a link, whatever it points to, and whatever flags a file is created with.
#[test]
fn links_lead_nowhere() {
    let place = Place::new();
    symlink("../outside/secret", place.path("file")).unwrap();
    symlink("../outside", place.path("dir")).unwrap();
    symlink(place.outside(), place.path("absolute")).unwrap();
    symlink("../outside/new", place.path("dangling")).unwrap();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    for link in ["file", "dir", "absolute", "dangling"] {
        let node = machine.lookup(link);
        assert_eq!(machine.error(fuse::OPEN, node, &fuse::open(libc::O_RDONLY)), libc::ELOOP);
        assert_ne!(machine.error(fuse::OPENDIR, node, &fuse::open(libc::O_RDONLY)), 0);
        assert_eq!(machine.error(fuse::LOOKUP, node, &name("secret")), libc::ENOTDIR);
        assert_ne!(machine.error(fuse::SETUPMAPPING, node, &fuse::setupmapping(0, 4096, 0, 0)), 0);
        assert_ne!(machine.error(fuse::SETATTR, node, &fuse::set_size(0)), 0);
        let create = fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, "new");
        assert_eq!(machine.error(fuse::CREATE, node, &create), libc::ENOTDIR);
        assert_ne!(machine.error(fuse::TMPFILE, node, &create), 0);
        // What of these succeeds is about the link itself.
        for flags in [libc::O_PATH, libc::O_TMPFILE, libc::O_DIRECTORY, libc::O_NOFOLLOW, libc::O_TRUNC, -1] {
            for exclusive in [0, libc::O_EXCL] {
                let body = fuse::create(libc::O_RDWR | libc::O_CREAT | flags | exclusive, 0o644, link);
                assert_ne!(machine.error(fuse::CREATE, ROOT, &body), 0, "{link}, {flags:#x}");
            }
        }
        let xattr = fuse::setxattr("user.x", b"x", 0);
        assert_ne!(machine.error(fuse::SETXATTR, node, &xattr), 0);
    }
    assert_eq!(fs::read_to_string(place.outside().join("secret")).unwrap(), SECRET);
    assert_eq!(fs::read_dir(place.outside()).unwrap().count(), 1);
    machine.assert_served(&backend);
}

/// The host moves a directory away in which the guest is: its parent is not reached, nor what lies beside it.
#[test]
fn a_directory_that_is_moved_away_is_no_way_out() {
    let place = Place::new();
    fs::create_dir(place.path("sub")).unwrap();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let sub = machine.lookup("sub");
    fs::rename(place.path("sub"), place.outside().join("sub")).unwrap();
    for escape in ["..", "../secret"] {
        assert_eq!(machine.error(fuse::LOOKUP, sub, &name(escape)), libc::EINVAL);
    }
    let guarded = !backend.stderr().contains("Landlock cannot guard");
    let create = fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, "new");
    let error = machine.error(fuse::CREATE, sub, &create);
    assert!(!guarded || error == libc::EACCES, "created outside: {error}");
    machine.assert_served(&backend);
}

/// Each operation, known or not, with bodies that are none, on nodes that are none.
#[test]
fn requests_without_sense_are_answered() {
    let place = Place::new();
    place.write("f", "data");
    let start_of_all = std::time::Instant::now();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let bodies: [Vec<u8>; 7] =
        [vec![], vec![0; 3], vec![0; 200], vec![0xff; 7], vec![0xff; 200], vec![b'a'; 5000], vec![b'/'; 300]];
    // Without what has the host write its disks, once is enough elsewhere.
    for opcode in (0..fuse::LAST).chain([4096, u32::MAX]).filter(|&opcode| opcode != fuse::SYNCFS) {
        let silent = [fuse::FORGET, fuse::BATCH_FORGET, fuse::INTERRUPT].contains(&opcode);
        for body in &bodies {
            for node in [0, ROOT, 2, u64::MAX] {
                machine.send(1, opcode, node, body);
                let (head, written) = machine.await_used(1);
                assert_eq!(head, 0);
                if silent {
                    assert_eq!(written, 0, "opcode {opcode}");
                } else {
                    machine.answer(1, written);
                }
            }
        }
    }
    machine.ok(fuse::INIT, 0, &fuse::init());
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDONLY);
    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 9)), b"data");
    assert_eq!(fs::read_dir(place.outside()).unwrap().count(), 1);
    // Some lines at once, then one a second; what is said later tells how many were left out.
    let most = 20 + start_of_all.elapsed().as_secs() as usize;
    assert!(backend.stderr().lines().count() < most, "{}", backend.stderr());
    std::thread::sleep(std::time::Duration::from_secs(2));
    machine.send(1, u32::MAX, ROOT, &[]);
    machine.await_used(1);
    machine.send(1, fuse::OPEN, ROOT, &[0; 3]);
    machine.await_used(1);
    assert!(backend.stderr().contains("lines before this one left out"), "{}", backend.stderr());
}

/// Numbers that lie about what follows.
#[test]
fn lengths_that_lie() {
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDWR);
    for len in [0, 1, 39, 41, 45, 1 << 20, (1 << 20) + 4097, u32::MAX] {
        for opcode in [fuse::LOOKUP, fuse::GETXATTR, fuse::BATCH_FORGET, fuse::WRITE, fuse::RENAME] {
            let mut request = fuse::request(opcode, ROOT, (0, 0), &name("f"));
            request[..4].copy_from_slice(&len.to_le_bytes());
            machine.fill(1, &request);
            machine.send_filled(1, request.len() as u32);
            machine.await_used(1);
        }
    }
    // A write of more than there is writes what there is.
    let mut write = fuse::write(handle, 0, b"DATA");
    write[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    machine.ok(fuse::WRITE, node, &write);
    assert_eq!(place.read("f"), b"DATA");
    // Reads of everything everywhere.
    for (offset, size) in [(0, u32::MAX), (u64::MAX, 1), (1 << 63, u32::MAX), (i64::MAX as u64, 4096)] {
        machine.ask(fuse::READ, node, &fuse::read(handle, offset, size));
        machine.ask(fuse::WRITE, node, &fuse::write(handle, offset | 1 << 63, b"x"));
        let dir = u64_at(&machine.ok(fuse::OPENDIR, ROOT, &fuse::open(0)), 0);
        machine.ask(fuse::READDIR, ROOT, &fuse::read(dir, offset, size));
        machine.ask(fuse::READDIRPLUS, ROOT, &fuse::read(dir, offset, size));
        machine.ask(fuse::LISTXATTR, node, &words([size, 0]));
        machine.ask(
            fuse::FALLOCATE,
            node,
            &[quads([handle, offset | 1 << 63, u64::MAX]), words([0, 0])].concat(),
        );
        machine.ask(fuse::COPY_FILE_RANGE, node, &quads([handle, offset, node, handle, 0, u64::MAX, 0]));
    }
    for count in [1, 65536, u32::MAX] {
        machine.ask(fuse::REMOVEMAPPING, node, &words([count]));
        machine.send(1, fuse::BATCH_FORGET, 0, &words([count, 0]));
        machine.await_used(1);
    }
    // A handle of one file is none of another's, nor of a directory.
    assert_eq!(machine.error(fuse::READ, ROOT, &fuse::read(handle, 0, 1)), libc::EBADF);
    assert_eq!(machine.error(fuse::READDIR, ROOT, &fuse::read(handle, 0, 100)), libc::EBADF);
    assert_eq!(machine.error(fuse::READ, node, &fuse::read(u64::MAX, 0, 1)), libc::EBADF);
    // Forgetting too often, and the root, is no way to free what is still used.
    for (node, count) in [(ROOT, u64::MAX), (node, u64::MAX), (node, 1), (12345, 1)] {
        machine.send(0, fuse::FORGET, node, &quads([count]));
        machine.await_used(0);
    }
    machine.assert_served(&backend);
    assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 100))[..4], *b"DATA");
}

/// Chains of descriptors that are none, each followed by a good request.
#[test]
fn chains_without_sense_come_back_or_are_skipped() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let request = machine.address(1, REQUEST);
    let answer = machine.address(1, ANSWER);
    let table = machine.address(1, INDIRECT);
    let len = HEADER as u32 + 16;
    let good = [(request, len, NEXT, 1), (answer, ANSWER_LEN, WRITE, 0)];
    let chains: Vec<(&str, Vec<_>)> = vec![
        ("no room for an answer", vec![(request, len, 0, 0)]),
        ("too little room", vec![(request, len, NEXT, 1), (answer, 15, WRITE, 0)]),
        ("room for a header only", vec![(request, len, NEXT, 1), (answer, 16, WRITE, 0)]),
        ("no request", vec![(answer, ANSWER_LEN, WRITE, 0)]),
        ("half a header", vec![(request, 39, NEXT, 1), (answer, ANSWER_LEN, WRITE, 0)]),
        ("nothing", vec![(request, 0, NEXT, 1), (answer, 0, WRITE, 0)]),
        ("a loop", vec![(request, len, NEXT, 0)]),
        ("a long loop", vec![(request, len, NEXT, 1), (answer, 64, WRITE | NEXT, 0)]),
        ("the answer first", vec![(answer, 64, WRITE | NEXT, 1), (request, len, 0, 0)]),
        ("out of the table", vec![(request, len, NEXT, 999)]),
        ("a request out of memory", vec![(RAM, len, NEXT, 1), good[1]]),
        ("a request half out of memory", vec![(RAM - 8, len, NEXT, 1), good[1]]),
        ("a request at the end of the world", vec![(u64::MAX - 8, len, NEXT, 1), good[1]]),
        ("an answer out of memory", vec![good[0], (RAM, 4096, WRITE, 0)]),
        ("an answer over the end", vec![good[0], (RAM - 16, 4096, WRITE, 0)]),
        ("a huge request", vec![(request, u32::MAX, NEXT, 1), good[1]]),
        ("a huge answer", vec![good[0], (answer, u32::MAX, WRITE, 0)]),
        ("a request of all memory", vec![(0, RAM as u32, NEXT, 1), good[1]]),
        ("a table out of memory", vec![(RAM, 32, TABLE, 0)]),
        ("a table of half a descriptor", vec![(table, 8, TABLE, 0)]),
        ("a table of nothing", vec![(table, 0, TABLE, 0)]),
        ("a huge table", vec![(table, !15, TABLE, 0)]),
        ("a table that goes on", vec![(table, 32, TABLE | NEXT, 1), good[1]]),
    ];
    let complete = |machine: &mut Machine, what: &str| {
        machine.await_used(1);
        assert!(backend.is_running(), "{what}");
        machine.assert_served(&backend);
    };
    for (what, chain) in chains {
        machine.fill(1, &fuse::request(fuse::GETATTR, ROOT, (0, 0), &quads([0, 0])));
        for (index, descriptor) in chain.into_iter().enumerate() {
            machine.descriptor(1, 0, index as u16, descriptor);
        }
        // In the table: a good request, and a table in a table.
        machine.descriptor(1, INDIRECT, 0, (table, 32, TABLE, 0));
        machine.descriptor(1, INDIRECT, 1, good[1]);
        machine.offer(1, 0);
        complete(&mut machine, what);
    }

    // A good table is good.
    machine.fill(1, &fuse::request(fuse::GETATTR, ROOT, (0, 0), &quads([0, 0])));
    for (index, descriptor) in good.into_iter().enumerate() {
        machine.descriptor(1, INDIRECT, index as u16, descriptor);
    }
    machine.descriptor(1, 0, 0, (table, 32, TABLE, 0));
    machine.offer(1, 0);
    assert_eq!(machine.finish().0, 0);

    // A head that is no descriptor cannot come back.
    machine.offer(1, 999);
    machine.assert_served(&backend);
}

/// Linux before 7.1 takes an answer of no bytes for success, and its length for 0 - 16. So a request that
/// fails is answered with a header, whatever else cannot be reached, as long as the header's own place can
/// be.
#[test]
fn what_cannot_be_reached_is_answered_with_an_error() {
    /// Where half of a header, and an answer's header, are the last that can be reached.
    const END: u64 = RAM - 16;
    const FORGOTTEN: (u32, i32, u64) = (0, 0, 0);
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDWR);
    let read = fuse::request(fuse::READ, node, (0, 0), &fuse::read(handle, 0, 4096));
    let write = fuse::request(fuse::WRITE, node, (0, 0), &fuse::write(handle, 0, &[b'x'; 4096]));
    let getattr = fuse::request(fuse::GETATTR, node, (0, 0), &quads([0, 0]));
    let statfs = fuse::request(fuse::STATFS, ROOT, (0, 0), &[]);
    let forget = fuse::request(fuse::FORGET, node, (0, 0), &quads([1]));
    let (request, answer) = (machine.address(1, REQUEST), machine.address(1, ANSWER));
    // As Linux lays them out: header, arguments and data are apart.
    let (header, args) = ((request, 40, 0), (request + 40, 40, 0));
    let (out, out_args) = ((answer, 16, WRITE), (answer + 16, 8, WRITE));
    let fault = (16, libc::EFAULT, fuse::UNIQUE);
    let invalid = (16, libc::EINVAL, fuse::UNIQUE);
    // What cannot be reached, the request, its buffers, and the answer's length, error and `unique`.
    type Case<'a> = (&'a str, &'a [u8], Vec<(u64, u32, u16)>, (u32, i32, u64));
    let cases: Vec<Case> = vec![
        ("data to write", &write, vec![header, args, (RAM, 4096, 0), out, out_args], fault),
        (
            "half of the data to write",
            &write,
            vec![header, args, (RAM - 2048, 4096, 0), out, out_args],
            fault,
        ),
        (
            "data to write, at the end of the world",
            &write,
            vec![header, args, (u64::MAX - 8, 4096, 0), out],
            fault,
        ),
        ("a place for data", &read, vec![header, args, out, (RAM, 4096, WRITE)], fault),
        ("half of a place for data", &read, vec![header, args, out, (RAM - 2048, 4096, WRITE)], fault),
        (
            "a place behind one that can be",
            &read,
            vec![header, args, out, (answer + 16, 2048, WRITE), (RAM, 2048, WRITE)],
            fault,
        ),
        ("all but an answer's header", &read, vec![header, args, (END, 4096, WRITE)], fault),
        (
            "all but an answer's header in two parts",
            &read,
            vec![header, args, (answer, 7, WRITE), (answer + 7, 9, WRITE), (RAM, 4096, WRITE)],
            fault,
        ),
        ("arguments", &getattr, vec![header, (RAM, 16, 0), out, (answer + 16, 104, WRITE)], fault),
        ("a request", &getattr, vec![(RAM, 56, 0), out, (answer + 16, 104, WRITE)], (16, libc::EFAULT, 0)),
        ("a header before another", &getattr, vec![(RAM, 40, 0), header, out], (16, libc::EFAULT, 0)),
        (
            "a header behind its first half",
            &getattr,
            vec![(END, 56, 0), out, (answer + 16, 104, WRITE)],
            fault,
        ),
        (
            "a header within its first word",
            &getattr,
            vec![(request, 7, 0), (RAM, 49, 0), out],
            (16, libc::EFAULT, 0),
        ),
        ("an answer's header", &getattr, vec![header, (request + 40, 16, 0), (RAM, 120, WRITE)], (0, 0, 0)),
        (
            "an answer's header behind its first byte",
            &getattr,
            vec![header, (request + 40, 16, 0), (answer, 1, WRITE), (RAM, 119, WRITE)],
            (0, 0, 0),
        ),
        ("what to forget", &forget, vec![header, (RAM, 8, 0), out], FORGOTTEN),
        // What can be reached but makes no sense.
        ("half a header", &getattr, vec![(request, 39, 0), out], invalid),
        ("less than half a header", &getattr, vec![(request, 15, 0), out], (16, libc::EINVAL, 0)),
        ("no request", &getattr, vec![out], (16, libc::EINVAL, 0)),
        ("a huge request", &getattr, vec![header, (0, 2 << 20, 0), out], invalid),
        (
            "too little room for attributes",
            &getattr,
            vec![header, (request + 40, 16, 0), (answer, 119, WRITE)],
            invalid,
        ),
        ("too little room for figures", &statfs, vec![header, (answer, 95, WRITE)], invalid),
        (
            "too little room for a header",
            &getattr,
            vec![header, (request + 40, 16, 0), (answer, 15, WRITE)],
            (0, 0, 0),
        ),
        ("half of what to forget", &forget, vec![header, (request + 40, 4, 0), out], FORGOTTEN),
    ];
    for (what, bytes, chain, expected) in cases {
        machine.fill(1, bytes);
        // What is at the end is the same as what is first, or nothing.
        machine.put(END, &bytes[..16]);
        let last = chain.len() - 1;
        for (index, &(address, len, flags)) in chain.iter().enumerate() {
            let next = if index == last { 0 } else { NEXT };
            machine.descriptor(1, 0, index as u16, (address, len, flags | next, index as u16 + 1));
        }
        machine.offer(1, 0);
        let (head, written) = machine.await_used(1);
        let place = chain.iter().find(|(.., flags)| *flags == WRITE).map_or(answer, |writable| writable.0);
        let found = if written == 0 {
            // Not even half of a header, of which Linux would make something.
            let untouched = place >= RAM || machine.bytes::<1>(place) == [0xee];
            assert!(untouched, "{what}");
            (0, 0, 0)
        } else {
            let found = machine.bytes::<16>(place);
            assert_eq!(fuse::u32_at(&found, 0), written, "{what}: the length in the header");
            (written, -(fuse::u32_at(&found, 4) as i32), u64_at(&found, 8))
        };
        assert_eq!((head, found), (0, expected), "{what}");
    }
    assert_eq!(place.read("f"), b"data");
    machine.assert_served(&backend);
    let stderr = backend.stderr();
    assert!(stderr.contains("a request is not in the guest's memory"), "{stderr}");
    assert!(stderr.lines().count() < 20, "{stderr}");
}

/// Where even the answer's header has no place, the user at least is told.
#[test]
fn an_answer_without_a_place_is_a_complaint() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    machine.fill(1, &fuse::request(fuse::GETATTR, ROOT, (0, 0), &quads([0, 0])));
    machine.descriptor(1, 0, 0, (machine.address(1, REQUEST), 56, NEXT, 1));
    machine.descriptor(1, 0, 1, (RAM, 120, WRITE, 0));
    machine.offer(1, 0);
    assert_eq!(machine.await_used(1), (0, 0));
    let stderr = backend.stderr();
    assert!(stderr.contains("a request is not in the guest's memory"), "{stderr}");
    assert!(stderr.contains("it gets no answer"), "{stderr}");
    machine.assert_served(&backend);
}

#[test]
fn an_end_is_answered_with_its_length() {
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    assert!(machine.ok(fuse::DESTROY, 0, &[]).is_empty());
}

/// Memory is not taken because a guest says so: reads and names into buffers that add up to gigabytes.
#[test]
fn sizes_of_the_guest_are_not_believed() {
    let place = Place::new();
    place.write("f", "data");
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDONLY);
    let dir = u64_at(&machine.ok(fuse::OPENDIR, ROOT, &fuse::open(0)), 0);
    let half = (RAM / 2) as u32;
    for (opcode, node, body) in [
        (fuse::READ, node, fuse::read(handle, 0, 50 << 20)),
        (fuse::READDIR, ROOT, fuse::read(dir, 0, 50 << 20)),
        (fuse::READDIRPLUS, ROOT, fuse::read(dir, 0, 50 << 20)),
        (fuse::GETXATTR, node, [words([u32::MAX, 0]), name("user.x")].concat()),
        (fuse::LISTXATTR, node, words([u32::MAX, 0])),
    ] {
        let request = fuse::request(opcode, node, (0, 0), &body);
        machine.fill(1, &request);
        let answer = machine.address(1, ANSWER);
        machine.descriptor(1, 0, 0, (machine.address(1, REQUEST), request.len() as u32, NEXT, 1));
        machine.descriptor(1, 0, 1, (answer, ANSWER_LEN, WRITE | NEXT, 2));
        for index in 2..15 {
            machine.descriptor(1, 0, index, (RAM / 2, half, WRITE | NEXT, index + 1));
        }
        machine.descriptor(1, 0, 15, (RAM / 2, half, WRITE, 0));
        machine.offer(1, 0);
        machine.await_used(1);
    }
    let status = fs::read_to_string(format!("/proc/{}/status", backend.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 100 * MIB / 1024, "{peak} KiB");
    machine.assert_served(&backend);
}
