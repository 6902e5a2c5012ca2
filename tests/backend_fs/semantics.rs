//! What a program of the guest finds as on the host's own file system: set-id bits, ACLs, attributes, ids.

use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::time::{Duration, UNIX_EPOCH};

use hotslot_test_support::program::{self, Backend};
use rustix::fs::{AtFlags, IFlags, StatxFlags, XattrFlags, getxattr, ioctl_getflags, setxattr};

use crate::fuse::{self, ROOT, name, quads, u32_at, u64_at, words};
use crate::machine::{Machine, Place, start};

/// In an answer that has an entry, and in one that has only attributes.
const ENTRY: usize = 40;
const ATTRIBUTES: usize = 16;

/// FATTR_MODE, FATTR_UID, FATTR_GID.
const MODE: u32 = 1 << 0;
const UID: u32 = 1 << 1;
const GID: u32 = 1 << 2;

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: for root only");
    }
    is_root
}

fn mode(answer: &[u8], at: usize) -> u32 {
    u32_at(answer, at + 60) & 0o7777
}

fn owner(answer: &[u8], at: usize) -> (u32, u32) {
    (u32_at(answer, at + 68), u32_at(answer, at + 72))
}

impl Place {
    fn mode(&self, file: &str) -> u32 {
        fs::symlink_metadata(self.path(file)).unwrap().mode() & 0o7777
    }

    fn set_mode(&self, file: &str, mode: u32) {
        fs::set_permissions(self.path(file), Permissions::from_mode(mode)).unwrap();
    }

    fn attribute(&self, file: &str, name: &str) -> rustix::io::Result<Vec<u8>> {
        let mut value = [0; 1024];
        getxattr(self.path(file), name, &mut value[..]).map(|len| value[..len].to_vec())
    }
}

// ------------------------------------------------------------------------------------------- set-id bits

/// Linux sends a FUSE_SETATTR that sets nothing before it writes to such a file for a user who may not leave
/// the bits: with DAX it sends nothing else.
#[test]
fn set_id_bits_go_before_a_write_through_the_window() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    let backend = start(&place, "");
    let mut machine = Machine::connect(&backend, 2);
    machine.start();
    let answer = machine.ok(fuse::INIT, 0, &fuse::init());
    assert_ne!(u32_at(&answer, 12) & 1 << 28, 0, "FUSE_HANDLE_KILLPRIV_V2");
    for (before, after) in [
        (0o6777, 0o777),
        (0o4755, 0o755),
        (0o2755, 0o755),
        (0o2745, 0o2745),
        (0o6705, 0o2705),
        (0o1644, 0o1644),
    ] {
        place.write("f", "data");
        place.set_mode("f", before);
        let node = machine.lookup("f");
        let answer = machine.ok(fuse::SETATTR, node, &fuse::setattr(0, 0, (0, 0)));
        assert_eq!((mode(&answer, ATTRIBUTES), place.mode("f")), (after, after), "{before:o}");
    }
    place.set_mode("dir", 0o6777);
    let node = machine.lookup("dir");
    machine.ok(fuse::SETATTR, node, &fuse::setattr(0, 0, (0, 0)));
    assert_eq!(place.mode("dir"), 0o6777, "of a directory they mean something else");
}

#[test]
fn set_id_bits_go_with_a_write_a_truncation_and_another_owner() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let (node, handle) = machine.create("f", libc::O_RDWR, 0o644);
    // FUSE_WRITE_KILL_SUIDGID, FUSE_OPEN_KILL_SUIDGID with O_TRUNC, FATTR_KILL_SUIDGID with FATTR_SIZE.
    let mut write = fuse::write(handle, 0, b"data");
    write[20..24].copy_from_slice(&u32::to_le_bytes(1 << 2));
    let truncate = words([libc::O_RDWR as u32 | libc::O_TRUNC as u32, 1]);
    let size = fuse::setattr(1 << 3 | 1 << 11, 0, (0, 0));
    let keeping = fuse::write(handle, 0, b"data");
    let owner = fuse::setattr(UID | 1 << 11, 0, (1, 0));
    for (opcode, body, after) in [
        (fuse::WRITE, write, 0o777),
        (fuse::OPEN, truncate, 0o777),
        (fuse::SETATTR, size, 0o777),
        (fuse::WRITE, keeping, 0o6777),
        (fuse::SETATTR, owner, 0o777),
    ] {
        place.set_mode("f", 0o6777);
        machine.ok(opcode, node, &body);
        assert_eq!(place.mode("f"), after, "opcode {opcode}");
    }
}

// -------------------------------------------------------------------------------------- modes and groups

const ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";

/// `struct posix_acl_xattr_header` and entries of tag, permissions and id.
fn acl<const N: usize>(entries: [(u16, u16, u32); N]) -> Vec<u8> {
    let mut bytes = words([2]);
    for (tag, permissions, id) in entries {
        bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// For a user, a group, and the others as `rw-r--r--`; the mask is `rw-`.
fn acl_for(user: u32, group: u32) -> Vec<u8> {
    acl([
        (USER_OBJ, 6, NO_ID),
        (USER, 0, user),
        (GROUP_OBJ, 4, NO_ID),
        (GROUP, 6, group),
        (MASK, 6, NO_ID),
        (OTHER, 4, NO_ID),
    ])
}

/// Whether the file system of the build directory has ACLs.
fn has_acls(place: &Place) -> bool {
    place.write("probe", "");
    let has = setxattr(place.path("probe"), ACL, &acl_for(1, 1), XattrFlags::empty()).is_ok();
    fs::remove_file(place.path("probe")).unwrap();
    if !has {
        eprintln!("skipped: the file system of the build directory has no ACLs");
    }
    has
}

#[test]
fn acls_are_the_hosts_and_the_guest_is_to_enforce_them() {
    let place = Place::new();
    if !has_acls(&place) {
        return;
    }
    place.write("f", "data");
    let backend = start(&place, "");
    let mut machine = Machine::connect(&backend, 2);
    machine.start();
    let answer = machine.ok(fuse::INIT, 0, &fuse::init());
    for (bit, what) in [(6, "FUSE_DONT_MASK"), (20, "FUSE_POSIX_ACL"), (29, "FUSE_SETXATTR_EXT")] {
        assert_ne!(u32_at(&answer, 12) & 1 << bit, 0, "{what}");
    }
    let node = machine.lookup("f");
    place.set_mode("f", 0o2755);
    let get = [words([100, 0]), name(ACL)].concat();
    assert_eq!(machine.error(fuse::GETXATTR, node, &get), libc::ENODATA);
    // FUSE_SETXATTR_ACL_KILL_SGID is for the mode, which a default ACL does not change.
    for (kills, after) in [(0, 0o2664), (1, 0o664)] {
        machine.ok(fuse::SETXATTR, node, &fuse::setxattr(ACL, &acl_for(1000, 2000), kills));
        assert_eq!(place.attribute("f", ACL).unwrap(), acl_for(1000, 2000));
        assert_eq!(place.mode("f"), after, "the mask is the group's part of the mode");
        assert_eq!(machine.ok(fuse::GETXATTR, node, &get), acl_for(1000, 2000));
    }
    let bad = acl([(USER_OBJ, 6, NO_ID), (USER, 0, 1000)]);
    assert_eq!(machine.error(fuse::SETXATTR, node, &fuse::setxattr(ACL, &bad, 0)), libc::EINVAL);
    machine.ok(fuse::REMOVEXATTR, node, &name(ACL));
    assert_eq!(machine.error(fuse::GETXATTR, node, &get), libc::ENODATA);
}

/// A kernel that lacks FUSE_SETXATTR_EXT has the shorter arguments.
#[test]
fn the_older_setxattr_is_understood() {
    let place = Place::new();
    place.write("f", "");
    if setxattr(place.path("f"), "user.probe", b"", XattrFlags::empty()).is_err() {
        eprintln!("skipped: the file system of the build directory has no extended attributes");
        return;
    }
    let backend = start(&place, "");
    let mut machine = Machine::connect(&backend, 2);
    machine.start();
    machine.ok(fuse::INIT, 0, &words([7, 31, 1 << 20, !(1 << 30 | 1 << 29)]));
    let node = machine.lookup("f");
    let set = [words([5, 0]), name("user.colour"), b"green".to_vec()].concat();
    machine.ok(fuse::SETXATTR, node, &set);
    assert_eq!(place.attribute("f", "user.colour").unwrap(), b"green");
    let short = [words([6, 0]), name("user.colour"), b"green".to_vec()].concat();
    assert_eq!(machine.error(fuse::SETXATTR, node, &short), libc::EINVAL);
}

/// The four requests that create a file with a mode, as `mode` with `umask` under the name `made`.
fn creations(mode: u32, umask: u32) -> [(u32, Vec<u8>); 4] {
    let create = libc::O_RDWR as u32 | libc::O_CREAT as u32;
    let temporary = libc::O_RDWR as u32;
    [
        (fuse::CREATE, [words([create, mode, umask, 0]), name("made")].concat()),
        (fuse::MKNOD, [words([libc::S_IFREG | mode, 0, umask, 0]), name("made")].concat()),
        (fuse::MKDIR, [words([mode, umask]), name("made")].concat()),
        (fuse::TMPFILE, [words([temporary, mode, umask, 0]), name("")].concat()),
    ]
}

#[test]
fn the_umask_applies_unless_the_directory_has_a_default_acl() {
    let place = Place::new();
    if !has_acls(&place) {
        return;
    }
    for dir in ["plain", "ruled"] {
        fs::create_dir(place.path(dir)).unwrap();
    }
    let rule = acl([(USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 5, NO_ID)]);
    setxattr(place.path("ruled"), DEFAULT_ACL, &rule, XattrFlags::empty()).unwrap();
    let backend = start(&place, "--queues 2");
    let mut machine = Machine::connect(&backend, 3);
    machine.start();
    machine.ok(fuse::INIT, 0, &fuse::init());
    let (plain, ruled) = (machine.lookup("plain"), machine.lookup("ruled"));
    for (dir, expected) in [(plain, 0o700), (ruled, 0o755), (plain, 0o700)] {
        for (opcode, body) in creations(0o777, 0o077) {
            let answer = machine.ok(opcode, dir, &body);
            assert_eq!(mode(&answer, ENTRY), expected, "opcode {opcode}");
            if opcode != fuse::TMPFILE {
                let how = if opcode == fuse::MKDIR { fuse::RMDIR } else { fuse::UNLINK };
                machine.ok(how, dir, &name("made"));
            }
        }
        // Another queue has another thread, and a umask of its own.
        machine.send(2, fuse::MKDIR, plain, &[words([0o777, 0o007]), name("made")].concat());
        let (_, written) = machine.await_used(2);
        let (error, answer) = machine.answer(2, written);
        assert_eq!((error, mode(&answer, ENTRY)), (0, 0o770));
        machine.ok(fuse::RMDIR, plain, &name("made"));
    }
}

/// A directory gives its group; the set-group-id bit stays in the mode if the process is in that group.
#[test]
fn a_user_s_other_group_counts() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    chown(place.path(""), Some(0), Some(77)).unwrap();
    place.set_mode("", 0o2777);
    let backend = start(&place, "");
    let mut machine = Machine::connect(&backend, 2);
    machine.start();
    let answer = machine.ok(fuse::INIT, 0, &fuse::init_ext());
    assert_ne!(u32_at(&answer, 32) & 1 << 2, 0, "FUSE_CREATE_SUPP_GROUP");
    machine.user = (1234, 4321);
    // `struct fuse_ext_header`, `struct fuse_supp_groups`.
    let extension = |group: u32| words([16, 32, 1, group]);
    for (group, expected) in [(Some(77), 0o2755), (None, 0o755), (Some(78), 0o755), (Some(77), 0o2755)] {
        for (opcode, mut body) in creations(0o2755, 0) {
            if opcode == fuse::MKDIR || opcode == fuse::TMPFILE {
                continue;
            }
            // Linux begins it at a multiple of 8.
            body.resize(body.len().next_multiple_of(8), 0);
            let extensions = group.map(extension).unwrap_or_default();
            body.extend(&extensions);
            let mut request = fuse::request(opcode, ROOT, machine.user, &body);
            request[36..38].copy_from_slice(&(extensions.len() as u16 / 8).to_le_bytes());
            machine.fill(1, &request);
            machine.send_filled(1, request.len() as u32);
            let (error, answer) = machine.finish();
            assert_eq!(error, 0, "opcode {opcode}");
            assert_eq!(owner(&answer, ENTRY), (1234, 77));
            assert_eq!(mode(&answer, ENTRY), expected, "opcode {opcode}, group {group:?}");
            machine.ok(fuse::UNLINK, ROOT, &name("made"));
        }
    }
}

// ------------------------------------------------------------------------------------ attributes of files

#[test]
fn attributes_that_the_host_does_not_allow_are_kept_under_other_names() {
    let place = Place::new();
    place.write("f", "");
    if setxattr(place.path("f"), "user.seen", b"1", XattrFlags::empty()).is_err() {
        eprintln!("skipped: the file system of the build directory has no extended attributes");
        return;
    }
    let mapped = ["trusted.overlay.opaque", "security.selinux", "security.ima"];
    let get = |attribute: &str| [words([100, 0]), name(attribute)].concat();
    let backend = start(&place, "--xattr mapped");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    for attribute in mapped {
        assert_eq!(machine.error(fuse::GETXATTR, node, &get(attribute)), libc::ENODATA);
        machine.ok(fuse::SETXATTR, node, &fuse::setxattr(attribute, b"value", 0));
        assert_eq!(machine.ok(fuse::GETXATTR, node, &get(attribute)), b"value");
        let outside = format!("user.hotslot.{attribute}");
        assert_eq!(place.attribute("f", &outside).unwrap(), b"value");
        // The guest's other users may set user.*.
        assert_eq!(machine.error(fuse::GETXATTR, node, &get(&outside)), libc::ENODATA);
        let set = fuse::setxattr(&outside, b"forged", 0);
        assert_eq!(machine.error(fuse::SETXATTR, node, &set), libc::EPERM);
        assert_eq!(machine.error(fuse::REMOVEXATTR, node, &name(&outside)), libc::EPERM);
    }
    let names = machine.ok(fuse::LISTXATTR, node, &words([1000, 0]));
    let mut found: Vec<_> = names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    found.sort_unstable();
    let expected: [&[u8]; 4] =
        [b"security.ima", b"security.selinux", b"trusted.overlay.opaque", b"user.seen"];
    assert_eq!(found, expected);
    assert_eq!(u32_at(&machine.ok(fuse::LISTXATTR, node, &words([0, 0])), 0), names.len() as u32);
    let too_small = names.len() as u32 - 1;
    assert_eq!(machine.error(fuse::LISTXATTR, node, &words([too_small, 0])), libc::ERANGE);
    machine.ok(fuse::REMOVEXATTR, node, &name(mapped[0]));
    assert_eq!(place.attribute("f", "user.hotslot.trusted.overlay.opaque"), Err(rustix::io::Errno::NODATA));
}

/// A program's capabilities: as root the host's own, which the host takes away when the file is written.
#[test]
fn as_root_capabilities_are_the_hosts() {
    if !is_root() {
        return;
    }
    const CAPABILITY: &str = "security.capability";
    // VFS_CAP_REVISION_2, CAP_NET_RAW.
    let value = words([0x0200_0000, 1 << 13, 0, 0, 0]);
    for args in ["", "--xattr mapped"] {
        let place = Place::new();
        let backend = start(&place, args);
        let mut machine = Machine::mounted(&backend);
        let (node, handle) = machine.create("f", libc::O_RDWR, 0o755);
        match machine.error(fuse::SETXATTR, node, &fuse::setxattr(CAPABILITY, &value, 0)) {
            libc::EPERM | libc::EOPNOTSUPP => {
                eprintln!("skipped: root here may not set capabilities");
                return;
            }
            error => assert_eq!(error, 0, "{args}"),
        }
        assert_eq!(place.attribute("f", CAPABILITY).unwrap(), value, "{args}");
        let names = machine.ok(fuse::LISTXATTR, node, &words([1000, 0]));
        assert!(names.windows(20).any(|window| window == b"security.capability\0"), "{args}");
        machine.ok(fuse::WRITE, node, &fuse::write(handle, 0, b"data"));
        assert_eq!(place.attribute("f", CAPABILITY), Err(rustix::io::Errno::NODATA), "{args}");
    }
}

#[test]
fn without_attributes_the_guest_is_told_not_to_ask() {
    let place = Place::new();
    place.write("f", "");
    let backend = start(&place, "--xattr off");
    let mut machine = Machine::connect(&backend, 2);
    machine.start();
    let answer = machine.ok(fuse::INIT, 0, &fuse::init());
    assert_eq!(u32_at(&answer, 12) & 1 << 20, 0, "FUSE_POSIX_ACL");
    let node = machine.lookup("f");
    for (opcode, body) in [
        (fuse::SETXATTR, fuse::setxattr("user.x", b"x", 0)),
        (fuse::GETXATTR, [words([100, 0]), name("user.x")].concat()),
        (fuse::LISTXATTR, words([100, 0])),
        (fuse::REMOVEXATTR, name("user.x")),
    ] {
        assert_eq!(machine.error(opcode, node, &body), libc::ENOSYS, "opcode {opcode}");
    }
}

#[test]
fn flags_of_files_are_shown_and_set() {
    // FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NODUMP_FL; FIGETBSZ, which is not served.
    const GETFLAGS: u32 = 0x8008_6601;
    const SETFLAGS: u32 = 0x4008_6602;
    // FS_IOC_FSGETXATTR, FS_XFLAG_NODUMP: Linux asks before it sets.
    const FSGETXATTR: u32 = 0x801c_581f;
    const XFLAG_NODUMP: u32 = 0x80;
    let place = Place::new();
    place.write("f", "");
    let Ok(before) = ioctl_getflags(File::open(place.path("f")).unwrap()) else {
        eprintln!("skipped: the file system of the build directory has no flags");
        return;
    };
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDONLY);
    let ask = |command: u32, argument: &[u8], room: u32| {
        let numbers = [quads([handle]), words([0, command]), quads([0])].concat();
        [&numbers[..], &words([argument.len() as u32, room]), argument].concat()
    };
    for room in [4, 8] {
        let answer = machine.ok(fuse::IOCTL, node, &ask(GETFLAGS, &[], room));
        assert_eq!(answer.len(), 16 + room as usize, "exactly what there is room for");
        assert_eq!((u32_at(&answer, 0), u32_at(&answer, 16)), (0, before.bits()));
    }
    let wanted = before | IFlags::NODUMP;
    assert_eq!(machine.ok(fuse::IOCTL, node, &ask(SETFLAGS, &words([wanted.bits()]), 0)).len(), 16);
    assert_eq!(ioctl_getflags(File::open(place.path("f")).unwrap()).unwrap(), wanted);
    let answer = machine.ok(fuse::IOCTL, node, &ask(FSGETXATTR, &[], 28));
    assert_eq!((answer.len(), u32_at(&answer, 16) & XFLAG_NODUMP), (16 + 28, XFLAG_NODUMP));
    for body in [ask(2, &[], 4), ask(GETFLAGS, &[], u32::MAX), ask(SETFLAGS, &[0; 65], 0)] {
        assert_eq!(machine.error(fuse::IOCTL, node, &body), libc::ENOTTY);
    }
    assert_eq!(machine.error(fuse::IOCTL, node, &ask(SETFLAGS, &[0; 3], 0)), libc::EINVAL);
}

#[test]
fn the_time_when_a_file_was_made_is_the_hosts() {
    let place = Place::new();
    place.write("f", "data");
    let [accessed, modified] = [1_000, 2_000].map(|seconds| UNIX_EPOCH + Duration::new(seconds, 5));
    let times = FileTimes::new().set_accessed(accessed).set_modified(modified);
    File::options().write(true).open(place.path("f")).unwrap().set_times(times).unwrap();
    let backend = start(&place, "");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let host = rustix::fs::statx(rustix::fs::CWD, place.path("f"), AtFlags::empty(), wanted).unwrap();
    let answer = machine.ok(fuse::STATX, node, &[quads([0, 0]), words([0, wanted.bits()])].concat());
    assert_eq!(answer.len(), 32 + 256);
    assert_eq!(u64_at(&answer, 0), 1, "seconds for which it is valid");
    let stat = &answer[32..];
    assert_eq!(u32_at(stat, 0), host.stx_mask & wanted.bits());
    assert_eq!([16, 20, 24].map(|at| u32_at(stat, at)), [host.stx_nlink, host.stx_uid, host.stx_gid]);
    assert_eq!(u32_at(stat, 28), u32::from(host.stx_mode));
    assert_eq!([32, 40, 48].map(|at| u64_at(stat, at)), [host.stx_ino, host.stx_size, host.stx_blocks]);
    let times = [host.stx_atime, host.stx_btime, host.stx_ctime, host.stx_mtime];
    for (index, time) in times.into_iter().enumerate() {
        let at = 64 + 16 * index;
        assert_eq!((u64_at(stat, at), u32_at(stat, at + 8)), (time.tv_sec as u64, time.tv_nsec), "{index}");
    }
    assert_eq!([136, 140].map(|at| u32_at(stat, at)), [host.stx_dev_major, host.stx_dev_minor]);
}

/// `/proc` is mounted wherever this runs: the back-end needs it.
#[test]
fn another_file_system_below_the_directory_is_announced_if_wanted() {
    let place = Place::new();
    // FUSE_ATTR_SUBMOUNT.
    let flags = |machine: &mut Machine, node, file| {
        let entry = machine.ok(fuse::LOOKUP, node, &name(file));
        (u64_at(&entry, 0), u32_at(&entry, ENTRY + 84))
    };
    for (option, expected) in [(Some("--announce-submounts"), 1), (None, 0)] {
        let mut command = program::command("fs", &place.top);
        command.args(["--dir", "/", "--read-only"]).args(option);
        let backend = Backend::spawn(command, &place.top);
        let mut machine = Machine::connect(&backend, 2);
        machine.start();
        let answer = machine.ok(fuse::INIT, 0, &fuse::init());
        assert_eq!(u32_at(&answer, 12) >> 27 & 1, expected, "FUSE_SUBMOUNTS");
        let (proc, is_mount) = flags(&mut machine, ROOT, "proc");
        assert_eq!(is_mount, expected);
        assert_eq!(flags(&mut machine, proc, "sys").1, 0);
        assert_eq!(flags(&mut machine, proc, "uptime").1, 0);
    }
}

// ------------------------------------------------------------------------------------------- device nodes

#[test]
fn device_nodes_are_for_root_and_only_if_allowed() {
    let place = Place::new();
    place.write("there", "");
    let make =
        |mode: u32, device: u32, file: &str| [words([mode | 0o600, device, 0, 0]), name(file)].concat();
    let long = "n".repeat(256);
    {
        let backend = start(&place, "");
        let mut machine = Machine::mounted(&backend);
        let file = machine.lookup("there");
        for kind in [libc::S_IFBLK, libc::S_IFCHR] {
            // In the order of mknod(2).
            for (parent, file, error) in [
                (ROOT, "there", libc::EEXIST),
                (ROOT, &long, libc::ENAMETOOLONG),
                (file, "new", libc::ENOTDIR),
                (ROOT, "new", libc::EPERM),
            ] {
                assert_eq!(machine.error(fuse::MKNOD, parent, &make(kind, 0x103, file)), error, "{file}");
            }
        }
    }
    if !is_root() {
        return;
    }
    let backend = start(&place, "--device-nodes");
    let mut machine = Machine::mounted(&backend);
    // Major 8, minor 300, as mknod(2) has it.
    const DEVICE: u32 = 8 << 8 | 300 & 0xff | (300 & !0xff) << 12;
    for (kind, file) in [(libc::S_IFBLK, "block"), (libc::S_IFCHR, "character")] {
        match machine.ask(fuse::MKNOD, ROOT, &make(kind, DEVICE, file)) {
            (libc::EPERM, _) => {
                eprintln!("skipped: root here may not make devices");
                return;
            }
            (error, answer) => {
                assert_eq!((error, u32_at(&answer, ENTRY + 76)), (0, DEVICE), "{file}");
            }
        }
        let metadata = fs::symlink_metadata(place.path(file)).unwrap();
        assert_eq!((metadata.mode(), metadata.rdev()), (kind | 0o600, DEVICE.into()), "{file}");
        let node = machine.lookup(file);
        assert_eq!(machine.error(fuse::OPEN, node, &fuse::open(libc::O_RDWR)), libc::ENXIO, "{file}");
    }
}

// ------------------------------------------------------------------------------------------- maps of ids

#[test]
fn ids_of_the_guest_stand_for_others_of_the_host() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let acls = has_acls(&place);
    place.write("host's", "");
    chown(place.path("host's"), Some(7), Some(100_007)).unwrap();
    let maps = "--uid-map 0:100000:1000 --uid-map 5000:200000:1 --gid-map 0:100000:1000";
    let backend = start(&place, maps);
    let mut machine = Machine::mounted(&backend);
    for (user, host) in
        [((0, 0), (100_000, 100_000)), ((999, 1), (100_999, 100_001)), ((5000, 5), (200_000, 100_005))]
    {
        machine.user = user;
        let answer = machine.ok(fuse::MKDIR, ROOT, &[words([0o755, 0]), name("made")].concat());
        assert_eq!(owner(&answer, ENTRY), user);
        let metadata = fs::metadata(place.path("made")).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), host);
        machine.ok(fuse::RMDIR, ROOT, &name("made"));
    }
    for user in [(1000, 0), (0, 1000), (4999, 0), (100_000, 0)] {
        machine.user = user;
        let make = [words([0o755, 0]), name("made")].concat();
        assert_eq!(machine.error(fuse::MKDIR, ROOT, &make), libc::EOVERFLOW, "{user:?}");
    }
    machine.user = (0, 0);
    let entry = machine.ok(fuse::LOOKUP, ROOT, &name("host's"));
    assert_eq!(owner(&entry, ENTRY), (65534, 7));
    let node = u64_at(&entry, 0);
    let answer = machine.ok(fuse::GETATTR, node, &quads([0, 0]));
    assert_eq!(owner(&answer, ATTRIBUTES), (65534, 7));
    let answer = machine.ok(fuse::STATX, node, &quads([0, 0, 0]));
    assert_eq!((u32_at(&answer, 32 + 20), u32_at(&answer, 32 + 24)), (65534, 7));
    for (valid, ids, error) in
        [(UID, (1000, 0), libc::EINVAL), (GID, (0, 1000), libc::EINVAL), (UID | GID, (2, 3), 0)]
    {
        assert_eq!(machine.error(fuse::SETATTR, node, &fuse::setattr(valid, 0, ids)), error, "{ids:?}");
    }
    let metadata = fs::metadata(place.path("host's")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (100_002, 100_003));
    machine.ok(fuse::SETATTR, node, &fuse::setattr(MODE, 0o600, (9999, 9999)));
    if acls {
        machine.ok(fuse::SETXATTR, node, &fuse::setxattr(ACL, &acl_for(10, 20), 0));
        assert_eq!(place.attribute("host's", ACL).unwrap(), acl_for(100_010, 100_020));
        setxattr(place.path("host's"), ACL, &acl_for(200_000, 1), XattrFlags::empty()).unwrap();
        let get = [words([100, 0]), name(ACL)].concat();
        assert_eq!(machine.ok(fuse::GETXATTR, node, &get), acl_for(5000, 65534));
        let set = fuse::setxattr(ACL, &acl_for(1000, 20), 0);
        assert_eq!(machine.error(fuse::SETXATTR, node, &set), libc::EINVAL);
    }
}
