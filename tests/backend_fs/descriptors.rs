//! A guest that knows more files than the back-end may have descriptors, and one that opens as many as it
//! can.
//!
//! The back-ends here may have [`LIMIT`] descriptors. `src/manual/backends.md`: half of them are for files
//! that the guest has open, an eighth for files that it knows, an eighth for files that it knows and that
//! have no name.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hotslot_test_support::program::{Backend, command};

use crate::fuse::{self, ROOT, name, quads, u32_at, u64_at, words};
use crate::machine::{MIB, Machine, Place, SECRET, SHMEM_MAP, start_with};
use crate::ordinary_user;

const LIMIT: u32 = 600;
const OPEN: usize = 300;
const KNOWN: usize = 75;

/// GETATTR: the error, and the inode number.
fn inode(machine: &mut Machine, node: u64) -> (i32, u64) {
    match machine.ask(fuse::GETATTR, node, &quads([0, 0])) {
        (0, attributes) => (0, u64_at(&attributes, 16)),
        (error, _) => (error, 0),
    }
}

#[track_caller]
fn lookup_in(machine: &mut Machine, dir: u64, file: impl AsRef<[u8]>) -> u64 {
    u64_at(&machine.ok(fuse::LOOKUP, dir, &fuse::raw_name(file.as_ref())), 0)
}

/// Puts twice as many files into the directory `crowd` as are held, for [`crowd_out`].
fn crowd(place: &Place) {
    fs::create_dir(place.path("crowd")).unwrap();
    for index in 0..2 * KNOWN {
        place.write(&format!("crowd/{index}"), "");
    }
}

/// Has the guest look up so many others that no descriptor of a file is kept.
fn crowd_out(machine: &mut Machine, backend: &Backend, path: &Path) {
    let dir = machine.lookup("crowd");
    for index in 0..2 * KNOWN {
        lookup_in(machine, dir, index.to_string());
    }
    assert!(!holds(backend, path), "{path:?} is held");
}

/// Whether the back-end has a file open, by the path that it has now.
fn holds(backend: &Backend, path: &Path) -> bool {
    let path = fs::canonicalize(path.parent().unwrap()).unwrap().join(path.file_name().unwrap());
    let fds = fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap();
    fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).any(|held| held == path)
}

fn user_of(backend: &Backend) -> u32 {
    fs::metadata(format!("/proc/{}", backend.pid())).unwrap().uid()
}

/// Gives all files to the back-end's user.
fn give(place: &Place, backend: &Backend) {
    let user = user_of(backend);
    if rustix::process::geteuid().is_root() {
        let mut chown = Command::new("chown");
        chown.args(["-R", "--no-dereference", &user.to_string()]).arg(place.path(""));
        assert!(chown.status().unwrap().success());
    }
}

/// As root by handles and by names, and as an ordinary user.
fn each_way(test: impl Fn(&Place, Backend)) {
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        for args in ["--inode-file-handles mandatory", "--inode-file-handles never"] {
            let place = Place::new();
            crowd(&place);
            test(&place, start_with(LIMIT, &place, args, None));
        }
    }
    let place = Place::new();
    if let Some(user) = ordinary_user(&place) {
        crowd(&place);
        test(&place, start_with(LIMIT, &place, "--inode-file-handles prefer", user));
    }
}

#[test]
fn a_guest_knows_more_files_than_there_are_descriptors() {
    each_way(|place, backend| {
        // Names that are long, and of all bytes that there are in names.
        let odd = (1..=255u8).filter(|&byte| byte != b'/').collect::<Vec<u8>>();
        let mut names = vec![vec![b'l'; 255], odd, b" ".to_vec(), b"...".to_vec(), b"\xff\n".to_vec()];
        names.extend((0..1000).map(|index: u32| index.to_string().into_bytes()));
        for dir in ["a", "a/b", "a/b/c"] {
            fs::create_dir(place.path(dir)).unwrap();
            for name in &names {
                let path = place.path(dir).join(OsString::from_vec(name.clone()));
                fs::write(path, name).unwrap();
            }
        }
        give(place, &backend);
        let mut machine = Machine::mounted(&backend);
        let mut known = Vec::new();
        let mut dir = ROOT;
        for sub in ["a", "b", "c"] {
            dir = lookup_in(&mut machine, dir, sub);
            for name in &names {
                known.push((lookup_in(&mut machine, dir, name), name));
            }
        }
        assert_eq!(known.iter().map(|(node, _)| node).collect::<BTreeSet<_>>().len(), 3 * names.len());
        for (index, &(node, name)) in known.iter().chain(known.iter().rev()).enumerate() {
            assert_eq!(inode(&mut machine, node).0, 0);
            if index % 10 != 0 {
                continue;
            }
            let handle = machine.open(node, libc::O_RDWR);
            assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 1000)), *name);
            machine.ok(fuse::RELEASE, node, &quads([handle, 0, 0]));
            machine.ok(fuse::SETATTR, node, &fuse::set_size(name.len() as u64));
        }
        assert!(backend.descriptors() < OPEN, "{} descriptors", backend.descriptors());
    });
}

/// A deep directory is found again, however deep; and no depth is too much for a stack.
#[test]
fn a_deep_directory_is_found_again() {
    each_way(|place, backend| {
        let mut machine = Machine::mounted(&backend);
        let mut dir = ROOT;
        for _ in 0..3000 {
            dir = u64_at(&machine.ok(fuse::MKDIR, dir, &[words([0o755, 0]), name("d")].concat()), 0);
        }
        let (error, inode_number) = inode(&mut machine, dir);
        assert_eq!(error, 0);
        crowd_out(&mut machine, &backend, &place.path("d"));
        assert_eq!(inode(&mut machine, dir), (0, inode_number));
        machine.ok(fuse::MKDIR, dir, &[words([0o755, 0]), name("last")].concat());
        // Paths are too long for `remove_dir_all`.
        let output = Command::new("rm").arg("-rf").arg(place.path("d")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    });
}

#[test]
fn too_many_open_files_are_an_error_of_open_alone() {
    each_way(|place, backend| {
        place.write("f", "data");
        give(place, &backend);
        let mut machine = Machine::mounted(&backend);
        let node = machine.lookup("f");
        let first = machine.open(node, libc::O_RDWR);
        let mut last = 0;
        for _ in 1..OPEN {
            last = machine.open(node, libc::O_RDONLY);
        }
        assert_eq!(machine.error(fuse::OPEN, node, &fuse::open(libc::O_RDONLY)), libc::ENFILE);
        assert_eq!(machine.error(fuse::OPENDIR, ROOT, &fuse::open(libc::O_RDONLY)), libc::ENFILE);
        let create = fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, "new");
        assert_eq!(machine.error(fuse::CREATE, ROOT, &create), libc::ENFILE);
        assert!(!place.path("new").exists());
        let unnamed = fuse::create(libc::O_RDWR, 0o600, "");
        assert_eq!(machine.error(fuse::TMPFILE, ROOT, &unnamed), libc::ENFILE);

        // Nothing else is disturbed, also with many files known.
        crowd_out(&mut machine, &backend, &place.path("crowd/0"));
        assert_eq!(u32_at(&machine.ok(fuse::WRITE, node, &fuse::write(first, 0, b"DATA")), 0), 4);
        assert_eq!(machine.ok(fuse::READ, node, &fuse::read(last, 0, 100)), b"DATA");
        assert_eq!(inode(&mut machine, node).0, 0);
        machine.ok(fuse::SETATTR, node, &fuse::set_size(3));
        let map = fuse::setupmapping(0, 2 * MIB, 1, 0);
        machine.asking(fuse::SETUPMAPPING, node, &map, &[(SHMEM_MAP, 0, 2 * MIB, 0, 1)]);
        machine.ok(fuse::MKNOD, ROOT, &[words([libc::S_IFREG | 0o644, 0, 0, 0]), name("made")].concat());
        machine.ok(fuse::RENAME, ROOT, &[quads([ROOT]), name("made"), name("moved")].concat());
        machine.ok(fuse::UNLINK, ROOT, &name("moved"));

        machine.ok(fuse::RELEASE, node, &quads([last, 0, 0]));
        machine.ok(fuse::CREATE, ROOT, &create);
    });
}

/// The host takes away every descriptor that is not in use.
#[test]
fn what_is_open_needs_no_other_descriptor() {
    each_way(|place, backend| {
        place.write("f", "data");
        give(place, &backend);
        let mut machine = Machine::mounted(&backend);
        let node = machine.lookup("f");
        let handle = machine.open(node, libc::O_RDWR);
        crowd_out(&mut machine, &backend, &place.path("crowd/0"));
        let user = user_of(&backend);
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &backend.pid().to_string(), &format!("--nofile=0:{LIMIT}")]);
        assert!(prlimit.uid(user).gid(user).status().unwrap().success());
        machine.ok(fuse::WRITE, node, &fuse::write(handle, 4, b" and more"));
        assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 100)), b"data and more");
        machine.ok(fuse::FSYNC, node, &[quads([handle]), words([0, 0])].concat());
        assert_eq!(inode(&mut machine, node).0, 0);
        let mut size = fuse::set_size(4);
        size[..16].copy_from_slice(&[words([fuse::SET_SIZE | 1 << 6, 0]), quads([handle])].concat());
        machine.ok(fuse::SETATTR, node, &size);
        assert_eq!(place.read("f"), b"data");
        assert_ne!(machine.error(fuse::OPEN, node, &fuse::open(libc::O_RDONLY)), 0);
    });
}

/// While the back-end holds no descriptor of a file, the guest gives it other names, and moves what it is in.
#[test]
fn what_the_guest_moves_is_found_again() {
    each_way(|place, backend| {
        fs::create_dir(place.path("d")).unwrap();
        fs::create_dir(place.path("e")).unwrap();
        place.write("d/f", "data");
        place.write("d/g", "other");
        give(place, &backend);
        let mut machine = Machine::mounted(&backend);
        let (d, e) = (machine.lookup("d"), machine.lookup("e"));
        let (f, g) = (lookup_in(&mut machine, d, "f"), lookup_in(&mut machine, d, "g"));
        let inodes = ["d/f", "d/g"].map(|path| fs::metadata(place.path(path)).unwrap().ino());
        let check = |machine: &mut Machine, path: &str, other: &str| {
            for path in [path, other] {
                assert_eq!(place.path(path).exists(), !path.is_empty(), "{path}");
            }
            crowd_out(machine, &backend, &place.path(path));
            assert_eq!(inode(machine, f), (0, inodes[0]), "{path}");
            crowd_out(machine, &backend, &place.path(other));
            assert_eq!(inode(machine, g), (0, inodes[1]), "{path}");
            crowd_out(machine, &backend, &place.path(path));
        };
        check(&mut machine, "d/f", "d/g");
        machine.ok(fuse::RENAME, d, &[quads([e]), name("f"), name("F")].concat());
        check(&mut machine, "e/F", "d/g");
        // RENAME_EXCHANGE.
        let exchange = [quads([e]), words([2, 0]), name("g"), name("F")].concat();
        machine.ok(fuse::RENAME2, d, &exchange);
        check(&mut machine, "d/g", "e/F");
        // A directory above it.
        machine.ok(fuse::RENAME, ROOT, &[quads([e]), name("d"), name("D")].concat());
        check(&mut machine, "e/D/g", "e/F");
        // A name more, a name less, and a file in the place of another.
        machine.ok(fuse::LINK, ROOT, &[quads([f]), name("hard")].concat());
        machine.ok(fuse::UNLINK, d, &name("g"));
        check(&mut machine, "hard", "e/F");
        machine.create("victim", libc::O_RDWR, 0o644);
        machine.ok(fuse::RENAME, ROOT, &[quads([ROOT]), name("hard"), name("victim")].concat());
        check(&mut machine, "victim", "e/F");
        // A name that is moved onto another of the same file stays.
        machine.ok(fuse::LINK, ROOT, &[quads([f]), name("second")].concat());
        machine.ok(fuse::RENAME, ROOT, &[quads([ROOT]), name("second"), name("victim")].concat());
        machine.ok(fuse::UNLINK, ROOT, &name("victim"));
        check(&mut machine, "second", "e/F");
        assert!(!backend.stderr().contains("ESTALE"), "{}", backend.stderr());
    });
}

/// As long as the guest knows it.
#[test]
fn a_file_that_the_guest_removes_lives_on() {
    each_way(|place, backend| {
        let mut machine = Machine::mounted(&backend);
        fs::create_dir(place.path("d")).unwrap();
        fs::create_dir(place.path("over")).unwrap();
        for file in ["unlinked", "replaced", "by"] {
            place.write(file, file);
        }
        let nodes = ["unlinked", "replaced", "d", "over"].map(|file| machine.lookup(file));
        let (by, _) = (machine.lookup("by"), machine.lookup("crowd"));
        let before = nodes.map(|node| inode(&mut machine, node));
        crowd_out(&mut machine, &backend, &place.path("unlinked"));
        machine.ok(fuse::UNLINK, ROOT, &name("unlinked"));
        machine.ok(fuse::RMDIR, ROOT, &name("d"));
        machine.ok(fuse::RENAME, ROOT, &[quads([ROOT]), name("by"), name("replaced")].concat());
        machine.ok(fuse::MKDIR, ROOT, &[words([0o755, 0]), name("new")].concat());
        machine.ok(fuse::RENAME, ROOT, &[quads([ROOT]), name("new"), name("over")].concat());
        let answer = machine.ok(fuse::TMPFILE, ROOT, &fuse::create(libc::O_RDWR, 0o600, ""));
        let (unnamed, handle) = (u64_at(&answer, 0), u64_at(&answer, 128));
        machine.ok(fuse::RELEASE, unnamed, &quads([handle, 0, 0]));
        crowd_out(&mut machine, &backend, &place.path("replaced"));
        assert_eq!(nodes.map(|node| inode(&mut machine, node)), before);
        assert_eq!(inode(&mut machine, unnamed).0, 0);
        assert_eq!(machine.lookup("replaced"), by);
        let handle = machine.open(nodes[1], libc::O_RDONLY);
        assert_eq!(machine.ok(fuse::READ, nodes[1], &fuse::read(handle, 0, 100)), b"replaced");
        machine.ok(fuse::LINK, ROOT, &[quads([unnamed]), name("named")].concat());
        crowd_out(&mut machine, &backend, &place.path("named"));
        assert_eq!(inode(&mut machine, unnamed).0, 0);
    });
}

/// More names than are kept of a file: those that are kept go first.
#[test]
fn a_file_with_many_names_is_known_by_some() {
    const NAMES: usize = 20;
    each_way(|place, backend| {
        place.write("0", "data");
        for index in 1..NAMES {
            fs::hard_link(place.path("0"), place.path(&index.to_string())).unwrap();
        }
        give(place, &backend);
        let mut machine = Machine::mounted(&backend);
        let nodes: Vec<u64> = (0..NAMES).map(|index| machine.lookup(&index.to_string())).collect();
        assert_eq!(nodes, [nodes[0]; NAMES]);
        for index in (0..NAMES).rev() {
            machine.ok(fuse::UNLINK, ROOT, &name(&index.to_string()));
            crowd_out(&mut machine, &backend, &place.path(&index.to_string()));
            assert_eq!(inode(&mut machine, nodes[0]).0, 0, "without {index}");
        }
    });
}

/// A guest that removes files and never forgets them takes no more than an eighth of the descriptors.
#[test]
fn removed_files_that_are_never_forgotten_are_bounded() {
    each_way(|_, backend| {
        let mut machine = Machine::mounted(&backend);
        let before = backend.descriptors();
        let mut nodes = Vec::new();
        for _ in 0..3 * KNOWN {
            let (node, handle) = machine.create("f", libc::O_RDWR, 0o644);
            machine.ok(fuse::UNLINK, ROOT, &name("f"));
            machine.ok(fuse::RELEASE, node, &quads([handle, 0, 0]));
            nodes.push(inode(&mut machine, node).0);
        }
        assert_eq!(nodes[0], 0);
        assert_eq!(nodes[3 * KNOWN - 1], libc::ESTALE);
        assert!(backend.descriptors() <= before + 2 * KNOWN, "{} descriptors", backend.descriptors());
        // An open file is as good as ever.
        let (node, handle) = machine.create("f", libc::O_RDWR, 0o644);
        machine.ok(fuse::UNLINK, ROOT, &name("f"));
        assert_eq!(inode(&mut machine, node).0, 0);
        machine.ok(fuse::WRITE, node, &fuse::write(handle, 0, b"data"));
        machine.ok(fuse::SETATTR, node, &fuse::set_size(2));
        assert_eq!(machine.ok(fuse::READ, node, &fuse::read(handle, 0, 100)), b"da");
    });
}

/// The host's programs move files that the guest knows and the back-end does not hold. By names they are lost
/// until the guest looks for them again; by handles they are found.
#[test]
fn what_the_host_moves_is_stale_or_found_by_its_handle() {
    each_way(|place, backend| {
        let by_handles = is_by_handles(&backend);
        fs::create_dir(place.path("d")).unwrap();
        place.write("d/f", "data");
        place.write("g", "other");
        let mut machine = Machine::mounted(&backend);
        let d = machine.lookup("d");
        let (f, g) = (lookup_in(&mut machine, d, "f"), machine.lookup("g"));
        let [(_, f_inode), (_, g_inode)] = [f, g].map(|node| inode(&mut machine, node));
        let moved = |inode: u64| if by_handles { (0, inode) } else { (libc::ESTALE, 0) };

        crowd_out(&mut machine, &backend, &place.path("d/f"));
        fs::rename(place.path("g"), place.path("G")).unwrap();
        assert_eq!(inode(&mut machine, g), moved(g_inode));
        assert_eq!(machine.lookup("G"), g);
        crowd_out(&mut machine, &backend, &place.path("G"));
        assert_eq!(inode(&mut machine, g), (0, g_inode));

        crowd_out(&mut machine, &backend, &place.path("d"));
        fs::rename(place.path("d"), place.path("D")).unwrap();
        assert_eq!(inode(&mut machine, f), moved(f_inode));
        assert_eq!(machine.lookup("D"), d);
        assert_eq!(lookup_in(&mut machine, d, "f"), f);
        assert_eq!(inode(&mut machine, f), (0, f_inode));

        // Open files are held.
        let handle = machine.open(g, libc::O_RDONLY);
        crowd_out(&mut machine, &backend, &place.path("D/f"));
        fs::rename(place.path("G"), place.path("gg")).unwrap();
        assert_eq!(inode(&mut machine, g), (0, g_inode));
        assert_eq!(machine.ok(fuse::READ, g, &fuse::read(handle, 0, 100)), b"other");
        let complaints = backend.stderr().matches("the guest gets ESTALE").count();
        assert_eq!(complaints, usize::from(!by_handles), "{}", backend.stderr());
    });
}

fn is_by_handles(backend: &Backend) -> bool {
    let command_line = fs::read(format!("/proc/{}/cmdline", backend.pid())).unwrap();
    command_line.split(|&byte| byte == 0).any(|arg| arg == b"mandatory")
}

/// Another file in the place of one that the guest knows is not that file, whatever the other is.
#[test]
fn what_takes_the_place_of_a_file_is_not_that_file() {
    each_way(|place, backend| {
        let mut machine = Machine::mounted(&backend);
        for (index, replace) in [
            |path: &Path, _: &Path| fs::write(path, "another").unwrap(),
            |path: &Path, outside: &Path| symlink(outside.join("secret"), path).unwrap(),
            |path: &Path, outside: &Path| symlink(outside, path).unwrap(),
            |path: &Path, outside: &Path| fs::hard_link(outside.join("secret"), path).unwrap(),
            |path: &Path, _: &Path| fs::create_dir(path).unwrap(),
        ]
        .into_iter()
        .enumerate()
        {
            let (file, dir) = (format!("file {index}"), format!("dir {index}"));
            place.write(&file, "data");
            fs::create_dir(place.path(&dir)).unwrap();
            place.write(&format!("{dir}/secret"), "data");
            // The inode numbers stay in use.
            let _kept =
                [&file, &dir, &format!("{dir}/secret")].map(|path| File::open(place.path(path)).unwrap());
            let (node, parent) = (machine.lookup(&file), machine.lookup(&dir));
            let child = lookup_in(&mut machine, parent, "secret");
            crowd_out(&mut machine, &backend, &place.path(&file));
            fs::remove_file(place.path(&file)).unwrap();
            fs::remove_dir_all(place.path(&dir)).unwrap();
            replace(&place.path(&file), &place.outside());
            replace(&place.path(&dir), &place.outside());
            give(place, &backend);
            let is_gone = |machine: &mut Machine, node: u64| {
                let (error, answer) = machine.ask(fuse::OPEN, node, &fuse::open(libc::O_RDWR));
                if is_by_handles(&backend) {
                    // The file that was removed, which the host has open.
                    assert_eq!(error, 0);
                    let read = fuse::read(u64_at(&answer, 0), 0, 100);
                    assert_eq!(machine.ok(fuse::READ, node, &read), b"data", "{index}");
                } else {
                    assert_eq!(error, libc::ESTALE, "{index}");
                }
            };
            is_gone(&mut machine, node);
            is_gone(&mut machine, child);
            if !is_by_handles(&backend) {
                let create = fuse::create(libc::O_RDWR | libc::O_CREAT, 0o644, "new");
                assert_eq!(machine.error(fuse::CREATE, parent, &create), libc::ESTALE, "{index}");
            }
            assert_ne!(machine.lookup(&file), node, "{index}");
        }
        assert_eq!(fs::read_to_string(place.outside().join("secret")).unwrap(), SECRET);
        assert_eq!(fs::read_dir(place.outside()).unwrap().count(), 1);
    });
}

/// The host gives an inode number to another file as soon as the first is gone.
#[test]
fn a_file_with_the_inode_number_of_another_is_another() {
    each_way(|place, backend| {
        place.write("f", "data");
        if fs::metadata(place.path("f")).unwrap().created().is_err() && !is_by_handles(&backend) {
            eprintln!("skipped: this file system has no times of birth");
            return;
        }
        // Births are told by a clock that may have ticks of 10 ms.
        std::thread::sleep(Duration::from_millis(20));
        let mut machine = Machine::mounted(&backend);
        let node = machine.lookup("f");
        let (_, number) = inode(&mut machine, node);
        crowd_out(&mut machine, &backend, &place.path("f"));
        fs::remove_file(place.path("f")).unwrap();
        let reused = (0..100).find(|index| {
            let path = place.path(&format!("new {index}"));
            fs::write(&path, "another").unwrap();
            fs::metadata(path).unwrap().ino() == number
        });
        let Some(reused) = reused else {
            eprintln!("skipped: this file system does not use inode numbers again");
            return;
        };
        fs::rename(place.path(&format!("new {reused}")), place.path("f")).unwrap();
        assert_eq!(inode(&mut machine, node), (libc::ESTALE, 0), "by its old name");
        let new = machine.lookup("f");
        assert_ne!(new, node);
        assert_eq!(inode(&mut machine, new), (0, number));
        assert_eq!(inode(&mut machine, node), (libc::ESTALE, 0));
        // What the guest still has to say about the first does not concern the second.
        machine.send(0, fuse::FORGET, node, &quads([1]));
        machine.await_used(0);
        crowd_out(&mut machine, &backend, &place.path("f"));
        assert_eq!(inode(&mut machine, new), (0, number));
        assert_eq!(machine.lookup("f"), new);
    });
}

/// One queue moves a file while another asks for its attributes, and no descriptor of it is held.
#[test]
fn a_file_is_found_while_it_is_moved() {
    let place = Place::new();
    crowd(&place);
    place.write("0", "data");
    let backend = start_with(LIMIT, &place, "--queues 2", None);
    let mut machine = Machine::connect(&backend, 3);
    machine.start();
    machine.ok(fuse::INIT, 0, &fuse::init());
    let node = machine.lookup("0");
    for turn in 0..100 {
        crowd_out(&mut machine, &backend, &place.path(&turn.to_string()));
        let (from, to) = (name(&turn.to_string()), name(&(turn + 1).to_string()));
        machine.send(1, fuse::RENAME, ROOT, &[quads([ROOT]), from, to].concat());
        machine.send(2, fuse::GETATTR, node, &quads([0, 0]));
        let (_, written) = machine.await_used(2);
        assert_eq!(machine.answer(2, written).0, 0, "turn {turn}");
        assert_eq!(machine.finish().0, 0, "turn {turn}");
    }
}

/// Each name that stays is told once, whatever comes and goes meanwhile, and each entry's node is its file.
#[test]
fn a_large_directory_is_read_while_it_changes() {
    each_way(|place, backend| {
        fs::create_dir(place.path("d")).unwrap();
        let stays = |index: u32| format!("d/stays {index}");
        for index in 0..3000 {
            place.write(&stays(index), index.to_string());
            place.write(&format!("d/goes {index}"), "");
        }
        let mut machine = Machine::mounted(&backend);
        let dir = machine.lookup("d");
        let handle = u64_at(&machine.ok(fuse::OPENDIR, dir, &fuse::open(libc::O_RDONLY)), 0);
        let (mut offset, mut told, mut turn) = (0, Vec::new(), 0);
        loop {
            let answer = machine.ok(fuse::READDIRPLUS, dir, &fuse::read(handle, offset, 20_000));
            if answer.is_empty() {
                break;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let node = u64_at(rest, 0);
                offset = u64_at(rest, 128 + 8);
                let len = u32_at(rest, 128 + 16) as usize;
                let name = String::from_utf8(rest[152..152 + len].to_vec()).unwrap();
                if name.starts_with("stays") {
                    told.push((format!("d/{name}"), node));
                }
                rest = &rest[(152 + len).next_multiple_of(8)..];
            }
            for index in turn * 50..(turn + 1) * 50 {
                let _ = fs::remove_file(place.path(&format!("d/goes {index}")));
                place.write(&format!("d/comes {index}"), "");
            }
            turn += 1;
        }
        assert!(turn > 10, "{turn}");
        let names: BTreeSet<_> = told.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!((told.len(), names), (3000, (0..3000).map(stays).collect()));
        for (path, node) in told {
            let number = fs::metadata(place.path(&path)).unwrap().ino();
            assert_eq!(inode(&mut machine, node), (0, number), "{path}");
        }
    });
}

/// CAP_DAC_READ_SEARCH, of the threads that serve.
#[test]
fn the_capability_for_handles_is_kept_for_handles_only() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: for root only");
        return;
    }
    for (args, kept) in [("", 0), ("--inode-file-handles prefer", 1 << 2)] {
        let place = Place::new();
        let backend = start_with(LIMIT, &place, args, None);
        let _machine = Machine::mounted(&backend);
        let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
        let statuses = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
        let main = format!("Pid:\t{}\n", backend.pid());
        let serving: Vec<String> = statuses.filter(|status| !status.contains(&main)).collect();
        assert!(serving.len() >= 3);
        for status in serving {
            let permitted = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap();
            let permitted = u64::from_str_radix(permitted.trim(), 16).unwrap();
            assert_eq!(permitted & 1 << 2, kept, "{args}: {status}");
        }
    }
}

#[test]
fn handles_that_cannot_be_had_are_a_note_or_an_error() {
    let place = Place::new();
    let Some(Some(user)) = ordinary_user(&place) else {
        eprintln!("skipped: for root only");
        return;
    };
    let backend = start_with(LIMIT, &place, "--inode-file-handles prefer", Some(user));
    backend.wait_for("cannot be opened by handles");
    let mut mandatory = command("fs", &place.top);
    mandatory.args(["--dir", "dir", "--inode-file-handles", "mandatory"]);
    let output = mandatory.uid(user).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("cannot be opened by handles, as --inode-file-handles mandatory"), "{stderr}");
}
