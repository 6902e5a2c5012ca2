//! The program is killed and started again with the same command line; the front-end connects anew, and the
//! guest notices nothing (`--state`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hotslot_test_support::program::{Backend, assert_refused};

use crate::fuse::{self, ROOT, quads, u32_at, u64_at, words};
use crate::locks::{END, EXCLUSIVE, FLOCK, NONE, READ, host_lock, is_locked, lock};
use crate::machine::{Answer, MIB, Machine, Place, SHMEM_MAP, SHMEM_UNMAP, fields, start};

const ESTALE: i32 = libc::ESTALE;

/// The shared directory, its guest, and the program between them.
struct World {
    place: Place,
    args: String,
    backend: Option<Backend>,
    machine: Machine,
}

impl World {
    fn new(args: &str) -> Self {
        let place = Place::new();
        let backend = start(&place, args);
        let machine = Machine::mounted(&backend);
        World { place, args: args.to_owned(), backend: Some(backend), machine }
    }

    fn kept() -> Self {
        World::new("--state state")
    }

    fn state(&self) -> PathBuf {
        self.place.top.path().join("state")
    }

    fn kill(&mut self) {
        drop(self.backend.take());
    }

    fn restart(&mut self) {
        let backend = self.backend.insert(start(&self.place, &self.args));
        self.machine.reconnect(backend);
    }

    fn die_and_return(&mut self) {
        self.kill();
        self.restart();
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        self.machine.unique += 2;
        self.machine.ask(opcode, node, body)
    }

    #[track_caller]
    fn ok(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let (error, answer) = self.ask(opcode, node, body);
        assert_eq!(error, 0, "opcode {opcode}");
        answer
    }

    /// Without an answer: FUSE_FORGET.
    fn forget(&mut self, node: u64, count: u64) {
        self.machine.unique += 2;
        self.machine.send(1, fuse::FORGET, node, &quads([count]));
        self.machine.await_used(1);
    }

    #[track_caller]
    fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        u64_at(&self.ok(fuse::LOOKUP, parent, &fuse::name(name)), 0)
    }

    #[track_caller]
    fn open(&mut self, node: u64, flags: i32) -> u64 {
        u64_at(&self.ok(fuse::OPEN, node, &fuse::open(flags)), 0)
    }

    #[track_caller]
    fn read(&mut self, node: u64, handle: u64) -> Vec<u8> {
        self.ok(fuse::READ, node, &fuse::read(handle, 0, 4096))
    }

    fn attributes(&mut self, node: u64) -> Answer {
        self.ask(fuse::GETATTR, node, &quads([0, 0]))
    }

    /// The inode number that the guest sees.
    #[track_caller]
    fn inode(&mut self, node: u64) -> u64 {
        let (error, answer) = self.attributes(node);
        assert_eq!(error, 0);
        u64_at(&answer, 16)
    }
}

fn rename2(new_parent: u64, flags: u32, old: &str, new: &str) -> Vec<u8> {
    [quads([new_parent]), words([flags, 0]), fuse::name(old), fuse::name(new)].concat()
}

#[test]
fn nodes_and_handles_outlive_the_program() {
    let mut world = World::kept();
    fs::create_dir(world.place.path("d")).unwrap();
    world.place.write("d/f", "one");
    world.place.write("g", "two");
    let d = world.lookup(ROOT, "d");
    let (f, g) = (world.lookup(d, "f"), world.lookup(ROOT, "g"));
    let (reads, writes) = (world.open(f, libc::O_RDONLY), world.open(f, libc::O_RDWR));
    let append = world.open(g, libc::O_WRONLY | libc::O_APPEND);
    let directory = u64_at(&world.ok(fuse::OPENDIR, d, &fuse::open(0)), 0);
    for round in 0..3 {
        world.die_and_return();
        let (old, new) = if round % 2 == 0 { ("f", "h") } else { ("h", "f") };
        for (node, path) in [(d, "d"), (f, &*format!("d/{old}")), (g, "g"), (ROOT, "")] {
            assert_eq!(world.inode(node), fs::metadata(world.place.path(path)).unwrap().ino(), "{path}");
        }
        world.ok(fuse::WRITE, f, &fuse::write(writes, 3, format!(" {round}").as_bytes()));
        assert_eq!(world.read(f, reads), format!("one {round}").as_bytes());
        world.ok(fuse::WRITE, g, &fuse::write(append, 3, b"!"));
        // A handle is good for what it was opened for.
        assert_eq!(world.ask(fuse::WRITE, f, &fuse::write(reads, 0, b"x")).0, libc::EBADF);
        assert_eq!(world.ask(fuse::READ, g, &fuse::read(append, 0, 1)).0, libc::EBADF);
        let names = world.ok(fuse::READDIR, d, &fuse::read(directory, 0, 4096));
        assert!(names.windows(1).any(|name| name == old.as_bytes()), "{names:?}");
        // The guest moves what it knows.
        world.ok(fuse::RENAME2, d, &rename2(d, 0, old, new));
    }
    world.ok(fuse::RELEASE, f, &quads([reads, 0, 0]));
    world.die_and_return();
    assert_eq!(world.ask(fuse::READ, f, &fuse::read(reads, 0, 1)).0, libc::EBADF, "it was closed");
    world.ok(fuse::READ, f, &fuse::read(writes, 0, 1));
}

/// Of a directory with many names, half is read before and half after.
#[test]
fn a_directory_is_read_on() {
    let mut world = World::kept();
    for number in 0..300 {
        world.place.write(&format!("name-{number}"), "");
    }
    let handle = u64_at(&world.ok(fuse::OPENDIR, ROOT, &fuse::open(0)), 0);
    let (mut offset, mut seen) = (0, BTreeMap::new());
    loop {
        let bytes = world.ok(fuse::READDIR, ROOT, &fuse::read(handle, offset, 1024));
        if bytes.is_empty() {
            break;
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let len = u32_at(rest, 16) as usize;
            offset = u64_at(rest, 8);
            *seen.entry(rest[24..24 + len].to_vec()).or_insert(0) += 1;
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
        world.die_and_return();
    }
    assert_eq!(seen.len(), 302);
    assert!(seen.values().all(|&times| times == 1));
}

/// Each is forgotten as often as it was looked up: then it is gone, and not before.
#[test]
fn lookups_are_counted_over_the_death() {
    let mut world = World::kept();
    world.place.write("f", "");
    let f = world.lookup(ROOT, "f");
    world.die_and_return();
    assert_eq!(world.lookup(ROOT, "f"), f);
    world.die_and_return();
    world.forget(f, 1);
    world.die_and_return();
    world.inode(f);
    world.forget(f, 1);
    assert_eq!(world.attributes(f).0, ESTALE);
    world.die_and_return();
    assert_eq!(world.attributes(f).0, ESTALE);
    assert_ne!(world.lookup(ROOT, "f"), f, "a number is used once");
}

/// The answer was written down: it is given again, and nothing is executed.
#[test]
fn an_answer_that_was_not_given_is_given() {
    let mut world = World::kept();
    let body = [words([0o755, 0]), fuse::name("d")].concat();
    let answer = world.ok(fuse::MKDIR, ROOT, &body);
    for _ in 0..2 {
        world.kill();
        world.machine.take_answer_back(1);
        world.restart();
        let again = world.machine.finish();
        assert_eq!(again, (0, answer.clone()));
    }
    // A lookup is counted once, and a forget, too.
    let d = u64_at(&answer, 0);
    world.lookup(ROOT, "d");
    world.kill();
    world.machine.take_answer_back(1);
    world.restart();
    world.machine.finish();
    world.forget(d, 1);
    world.kill();
    world.machine.take_answer_back(1);
    world.restart();
    world.machine.await_used(1);
    world.inode(d);
    world.forget(d, 1);
    assert_eq!(world.attributes(d).0, ESTALE);
}

/// Takes the last record off a state: the program died after the request, and before it wrote this.
fn cut_last_record(path: &PathBuf) {
    let bytes = fs::read(path).unwrap();
    let mut at = u64_at(&bytes, 40) as usize;
    loop {
        let next = at + 4 + u32_at(&bytes, at) as usize;
        if next >= bytes.len() || u32_at(&bytes, next) == 0 {
            break;
        }
        at = next;
    }
    File::options().write(true).open(path).unwrap().set_len(at as u64).unwrap();
}

/// A request that was executed, but of which nothing is written down but that it was begun: it is executed
/// again, and the guest does not see that.
#[test]
fn a_request_is_not_executed_twice() {
    const EXCHANGE: u32 = 2;
    const NO_REPLACE: u32 = 1;
    let setxattr = |flags: u32| [words([1, flags, 0, 0]), fuse::name("user.a"), b"v".to_vec()].concat();
    let link = |node: u64, name: &str| [quads([node]), fuse::name(name)].concat();
    let mut world = World::kept();
    world.place.write("f", "data");
    world.place.write("e", "other");
    let (f, e) = (world.lookup(ROOT, "f"), world.lookup(ROOT, "e"));
    let append = world.open(f, libc::O_WRONLY | libc::O_APPEND);
    let append_body = {
        let mut body = fuse::write(append, 4, b"+");
        body[32..36].copy_from_slice(&(libc::O_APPEND as u32).to_le_bytes());
        body
    };
    #[rustfmt::skip]
    let requests: Vec<(&str, u32, u64, Vec<u8>)> = vec![
        ("mkdir", fuse::MKDIR, ROOT, [words([0o755, 0]), fuse::name("d")].concat()),
        ("mknod", fuse::MKNOD, ROOT, [words([libc::S_IFIFO | 0o644, 0, 0, 0]), fuse::name("fifo")].concat()),
        ("symlink", fuse::SYMLINK, ROOT, [fuse::name("s"), fuse::name("target")].concat()),
        ("link", fuse::LINK, ROOT, link(f, "l")),
        ("create", fuse::CREATE, ROOT, fuse::create(libc::O_CREAT | libc::O_EXCL | libc::O_RDWR, 0o644, "c")),
        ("rename", fuse::RENAME2, ROOT, rename2(ROOT, 0, "l", "m")),
        ("rename, no replace", fuse::RENAME2, ROOT, rename2(ROOT, NO_REPLACE, "m", "l")),
        ("rename over", fuse::RENAME2, ROOT, rename2(ROOT, 0, "c", "s")),
        ("exchange", fuse::RENAME2, ROOT, rename2(ROOT, EXCHANGE, "f", "e")),
        ("setxattr", fuse::SETXATTR, f, setxattr(libc::XATTR_CREATE as u32)),
        ("removexattr", fuse::REMOVEXATTR, f, fuse::name("user.a")),
        ("unlink", fuse::UNLINK, ROOT, fuse::name("l")),
        ("rmdir", fuse::RMDIR, ROOT, fuse::name("d")),
        ("append", fuse::WRITE, f, append_body),
    ];
    for (what, opcode, node, body) in requests {
        let (error, answer) = world.ask(opcode, node, &body);
        assert_eq!(error, 0, "{what}");
        world.kill();
        cut_last_record(&world.state());
        world.machine.take_answer_back(1);
        world.restart();
        let again = world.machine.finish();
        assert_eq!((again.0, again.1.len()), (0, answer.len()), "{what}");
        // And it fails where it should.
        if !matches!(opcode, fuse::WRITE) && !what.starts_with("exchange") && !what.starts_with("rename over")
        {
            assert_ne!(world.ask(opcode, node, &body).0, 0, "{what}, for the second time");
        }
        // Nodes are found by their new names.
        assert_eq!(world.inode(f), world.inode(f), "{what}");
        world.inode(e);
    }
    // f and e have changed their names.
    assert_eq!(world.place.read("e"), b"data+");
    assert_eq!(world.place.read("f"), b"other");
    let mut names: Vec<_> =
        fs::read_dir(world.place.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["e", "f", "fifo", "s"]);
}

/// A request that fails was no attempt: it fails after the return, too.
#[test]
fn what_failed_fails_again() {
    let mut world = World::kept();
    fs::create_dir(world.place.path("d")).unwrap();
    let body = [words([0o755, 0]), fuse::name("d")].concat();
    for (opcode, body, error) in [
        (fuse::MKDIR, body, libc::EEXIST),
        (fuse::UNLINK, fuse::name("none"), libc::ENOENT),
        (fuse::RENAME2, rename2(ROOT, 0, "none", "x"), libc::ENOENT),
    ] {
        assert_eq!(world.ask(opcode, ROOT, &body).0, error);
        world.kill();
        world.machine.take_answer_back(1);
        world.restart();
        assert_eq!(world.machine.finish().0, error);
    }
}

/// What the guest has mapped is mapped again, before other requests for the window, and before the front-end
/// has the answers of the start: then it takes old mappings away (SHM-77).
#[test]
fn the_window_is_mapped_again() {
    let mut world = World::kept();
    let bytes: Vec<u8> = (0..4 * MIB).map(|at| (at >> 12) as u8).collect();
    world.place.write("f", &bytes);
    let f = world.lookup(ROOT, "f");
    for (file_offset, offset) in [(0, 2 * MIB), (2 * MIB, 8 * MIB)] {
        let body = fuse::setupmapping(file_offset, 2 * MIB, 1, offset);
        world.machine.asking(fuse::SETUPMAPPING, f, &body, &[(SHMEM_MAP, offset, 2 * MIB, file_offset, 1)]);
    }
    for _ in 0..2 {
        world.kill();
        let backend = world.backend.insert(start(&world.place, &world.args));
        let asked = world.machine.reconnect_and_serve(backend, 2);
        assert_eq!(asked.len(), 2);
        for (message, (file_offset, offset)) in asked.iter().zip([(0, 2 * MIB), (2 * MIB, 8 * MIB)]) {
            assert_eq!(fields(message), (SHMEM_MAP, offset, 2 * MIB, file_offset, 1));
            let mut page = [0; 4096];
            message.file().read_exact_at(&mut page, file_offset + 4096).unwrap();
            assert_eq!(page[..], bytes[file_offset as usize + 4096..][..4096]);
        }
        // The back-end knows them: nothing is asked for a mapping that is there.
        world.machine.unique += 2;
        world.machine.asking(fuse::SETUPMAPPING, f, &fuse::setupmapping(0, 2 * MIB, 1, 2 * MIB), &[]);
    }
}

/// A mapping whose file has no name any more is removed at the return, once. The back-end does not ask for
/// that again when the guest removes it or the program dies again: the front-end would refuse, since
/// nothing is there.
#[test]
fn the_mapping_of_a_lost_file_is_removed_once() {
    let mut world = World::kept();
    world.place.write("f", vec![1; MIB as usize]);
    let f = world.lookup(ROOT, "f");
    let body = fuse::setupmapping(0, MIB, 1, 2 * MIB);
    world.machine.asking(fuse::SETUPMAPPING, f, &body, &[(SHMEM_MAP, 2 * MIB, MIB, 0, 1)]);
    world.ok(fuse::UNLINK, ROOT, &fuse::name("f"));
    world.kill();
    let backend = world.backend.insert(start(&world.place, &world.args));
    let asked = world.machine.reconnect_and_serve(backend, 1);
    assert_eq!(asked.iter().map(fields).collect::<Vec<_>>(), [(SHMEM_UNMAP, 2 * MIB, MIB, 0, 0)]);
    world.die_and_return();
    world.machine.unique += 2;
    world.machine.asking(fuse::REMOVEMAPPING, f, &fuse::removemapping(&[(2 * MIB, MIB)]), &[]);
}

/// A machine that starts anew finds nothing of the last one.
#[test]
fn fuse_init_begins_anew() {
    let mut world = World::kept();
    world.place.write("f", "data");
    let f = world.lookup(ROOT, "f");
    let handle = world.open(f, libc::O_RDONLY);
    world.kill();
    let backend = start(&world.place, &world.args);
    backend.wait_for("a guest that goes on knows 1 files and has 1 open; 0 of these");
    world.machine = Machine::mounted(&backend);
    world.backend = Some(backend);
    assert_eq!(world.attributes(f).0, ESTALE);
    assert_ne!(world.ask(fuse::READ, f, &fuse::read(handle, 0, 1)).0, 0);
    world.die_and_return();
    assert_eq!(world.attributes(f).0, ESTALE);
}

/// Without a state the guest loses its files, and finds no other in their place.
#[test]
fn without_a_state_each_node_but_the_root_is_stale() {
    let mut world = World::new("");
    for name in ["a", "b", "c"] {
        world.place.write(name, name);
    }
    let before = ["a", "b", "c"].map(|name| world.lookup(ROOT, name));
    let handle = world.open(before[0], libc::O_RDONLY);
    world.die_and_return();
    let after = ["c", "b", "a"].map(|name| world.lookup(ROOT, name));
    world.open(after[0], libc::O_RDONLY);
    for node in before {
        assert_eq!(world.attributes(node).0, ESTALE);
        assert_eq!(world.ask(fuse::OPEN, node, &fuse::open(0)).0, ESTALE);
    }
    assert_eq!(world.ask(fuse::READ, before[0], &fuse::read(handle, 0, 1)).0, libc::EBADF);
    assert_eq!(world.inode(ROOT), fs::metadata(world.place.path("")).unwrap().ino());
}

/// A file that has no name any more ends with the program that held it.
#[test]
fn what_has_no_name_is_lost() {
    let mut world = World::kept();
    world.place.write("f", "data");
    let f = world.lookup(ROOT, "f");
    let handle = world.open(f, libc::O_RDONLY);
    world.ok(fuse::UNLINK, ROOT, &fuse::name("f"));
    assert_eq!(world.read(f, handle), b"data");
    world.die_and_return();
    // Not this one, either.
    world.place.write("f", "other");
    assert_eq!(world.ask(fuse::READ, f, &fuse::read(handle, 0, 4)).0, ESTALE);
    assert_eq!(world.attributes(f).0, ESTALE);
    world.ok(fuse::RELEASE, f, &quads([handle, 0, 0]));
}

/// The front-end hangs up, because it took the program for dead, and connects again.
#[test]
fn a_front_end_that_returns_to_the_same_process_goes_on() {
    let mut world = World::kept();
    world.place.write("f", "data");
    let f = world.lookup(ROOT, "f");
    let handle = world.open(f, libc::O_RDONLY);
    world.machine.reconnect(world.backend.as_ref().unwrap());
    assert_eq!(world.read(f, handle), b"data");
    assert_eq!(world.lookup(ROOT, "f"), f);
}

#[test]
fn locks_are_taken_again() {
    let mut world = World::new("--state state --locks host");
    world.place.write("f", "data");
    let file = File::options().read(true).write(true).open(world.place.path("f")).unwrap();
    let f = world.lookup(ROOT, "f");
    let (handle, other) = (world.open(f, libc::O_RDWR), world.open(f, libc::O_RDWR));
    world.ok(fuse::SETLK, f, &lock(handle, 7, (100, 299), EXCLUSIVE, 0));
    world.ok(fuse::SETLK, f, &lock(handle, 7, (150, 159), NONE, 0));
    world.ok(fuse::SETLK, f, &lock(handle, 7, (200, 209), READ, 0));
    world.ok(fuse::SETLK, f, &lock(other, 9, (0, END), EXCLUSIVE, FLOCK));
    for _ in 0..2 {
        world.die_and_return();
        for (first, len, kind, locked) in [
            (0, 100, EXCLUSIVE, false),
            (149, 1, READ, true),
            (150, 10, EXCLUSIVE, false),
            (160, 40, READ, true),
            (200, 10, READ, false),
            (200, 1, EXCLUSIVE, true),
            (299, 1, READ, true),
            (300, 10, EXCLUSIVE, false),
        ] {
            assert_eq!(is_locked(host_lock(&file, first, len, kind)), locked, "{first}");
            host_lock(&file, first, len, NONE).unwrap();
        }
        assert!(rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_err());
    }
    // They go with their owner, and with their handle.
    world.ok(fuse::FLUSH, f, &quads([handle, 0, 7]));
    world.ok(fuse::RELEASE, f, &quads([other, 0, 0]));
    world.die_and_return();
    host_lock(&file, 0, 0, EXCLUSIVE).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();

    // A process that waits goes on waiting.
    world.machine.unique += 2;
    world.machine.send(1, fuse::SETLKW, f, &lock(handle, 7, (0, 9), EXCLUSIVE, 0));
    world.die_and_return();
    assert!(!world.machine.is_used(1));
    host_lock(&file, 0, 0, NONE).unwrap();
    assert_eq!(world.machine.finish().0, 0);
    assert!(is_locked(host_lock(&file, 9, 1, READ)));
    world.kill();
    // Somebody else was faster.
    host_lock(&file, 0, 5, EXCLUSIVE).unwrap();
    world.restart();
    world.backend.as_ref().unwrap().wait_for("1 of these and of its locks are lost");
}

#[test]
fn an_incomplete_record_is_left_out() {
    let mut world = World::kept();
    world.place.write("f", "");
    world.place.write("g", "");
    let (f, g) = (world.lookup(ROOT, "f"), world.lookup(ROOT, "g"));
    world.kill();
    let state = File::options().write(true).open(world.state()).unwrap();
    state.set_len(state.metadata().unwrap().len() - 3).unwrap();
    world.restart();
    world.backend.as_ref().unwrap().wait_for("the last record of \"state\" is incomplete, and is left out");
    world.inode(f);
    assert_eq!(world.attributes(g).0, ESTALE);
}

#[test]
fn a_file_that_is_no_state_is_refused() {
    let mut world = World::kept();
    let dir = &world.place.top;
    assert_refused("fs", dir, "--socket t --dir dir --state state", "another hotslot-backend uses it");
    fs::write(dir.path().join("text"), "some text").unwrap();
    assert_refused("fs", dir, "--socket t --dir dir --state text", "not the state of a hotslot-backend fs");
    assert_eq!(fs::read(dir.path().join("text")).unwrap(), b"some text");
    let other = "--socket t --dir outside --state state";
    world.kill();
    assert_refused("fs", &world.place.top, other, "the state of another directory");
}

/// The file is written anew when most of it is out of date.
#[test]
fn a_state_does_not_grow_without_end() {
    let mut world = World::kept();
    let long = "n".repeat(250);
    world.place.write(&long, "");
    world.place.write("f", "");
    let f = world.lookup(ROOT, "f");
    let mut longest = 0;
    for _ in 0..20_000 {
        let node = world.lookup(ROOT, &long);
        world.forget(node, 1);
        longest = longest.max(fs::metadata(world.state()).unwrap().len());
    }
    assert!((4 * MIB..10 * MIB).contains(&longest), "{longest}");
    world.die_and_return();
    world.inode(f);
    assert!(fs::metadata(world.state()).unwrap().len() < MIB);
}

/// Numbers that look random, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// A file of the model: its node, its contents, and a handle to read and write it.
struct Known {
    node: u64,
    handle: u64,
    data: Vec<u8>,
}

/// Killed at any moment of many requests: none is lost or executed twice.
#[test]
fn killed_at_any_moment_it_goes_on() {
    let mut world = World::kept();
    let mut numbers = Numbers(0x0fed_cba9_8765_4321);
    let mut directories = vec![ROOT];
    for name in ["one", "two"] {
        let body = [words([0o755, 0]), fuse::name(name)].concat();
        directories.push(u64_at(&world.ok(fuse::MKDIR, ROOT, &body), 0));
    }
    let mut files: BTreeMap<(usize, String), Known> = BTreeMap::new();
    let mut kills = 0;
    for step in 0..600u64 {
        let there = (!files.is_empty()).then(|| {
            let at = numbers.next(files.len() as u64) as usize;
            files.keys().nth(at).unwrap().clone()
        });
        let free = (numbers.next(3) as usize, format!("f{step}"));
        let parent = directories[free.0];
        let kind = if files.len() < 3 { 0 } else { numbers.next(6) };
        let what = there.clone().filter(|_| kind != 0);
        let data = vec![step as u8; 1 + numbers.next(100) as usize];
        let (opcode, node, body) = match (kind, &what) {
            (1, Some((directory, name))) => {
                (fuse::RENAME2, directories[*directory], rename2(parent, 0, name, &free.1))
            }
            (2, Some((directory, name))) => (fuse::UNLINK, directories[*directory], fuse::name(name)),
            (3, Some(key)) => (fuse::READ, files[key].node, fuse::read(files[key].handle, 0, 4096)),
            (4, Some(key)) => {
                let known = &files[key];
                let mut body = fuse::write(known.handle, known.data.len() as u64, &data);
                body[32..36].copy_from_slice(&(libc::O_APPEND as u32).to_le_bytes());
                (fuse::WRITE, known.node, body)
            }
            (5, Some((directory, name))) => (fuse::LOOKUP, directories[*directory], fuse::name(name)),
            _ => {
                let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
                (fuse::CREATE, parent, fuse::create(flags, 0o644, &free.1))
            }
        };
        world.machine.unique += 2;
        world.machine.send(1, opcode, node, &body);
        if numbers.next(4) == 0 {
            kills += 1;
            let end = Instant::now() + Duration::from_micros(numbers.next(400));
            while Instant::now() < end {
                std::hint::spin_loop();
            }
            world.die_and_return();
        }
        let (error, answer) = world.machine.finish();
        assert_eq!(error, 0, "step {step}: opcode {opcode}");
        match (kind, what) {
            (1, Some(key)) => {
                let known = files.remove(&key).unwrap();
                files.insert(free, known);
            }
            (2, Some(key)) => {
                let known = files.remove(&key).unwrap();
                world.ok(fuse::RELEASE, known.node, &quads([known.handle, 0, 0]));
            }
            (3, Some(key)) => assert_eq!(answer, files[&key].data, "step {step}"),
            (4, Some(key)) => files.get_mut(&key).unwrap().data.extend(data),
            (5, Some(key)) => assert_eq!(u64_at(&answer, 0), files[&key].node, "step {step}"),
            _ => {
                let known =
                    Known { node: u64_at(&answer, 0), handle: u64_at(&answer, 128), data: Vec::new() };
                files.insert(free, known);
            }
        }
    }
    assert!(kills > 100);
    let mut found = 0;
    for (index, directory) in ["", "one", "two"].iter().enumerate() {
        for entry in fs::read_dir(world.place.path(directory)).unwrap() {
            let entry = entry.unwrap();
            if entry.metadata().unwrap().is_file() {
                let name = entry.file_name().into_string().unwrap();
                let known = &files[&(index, name)];
                assert!(fs::read(entry.path()).unwrap() == known.data);
                found += 1;
            }
        }
    }
    assert_eq!(found, files.len());
}
