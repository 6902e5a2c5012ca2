//! Locks that the host and the guest see of each other (`--locks host`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use hotslot_test_support::wait::eventually;
use rustix::fs::{FlockOperation, flock};
use vhost::VhostBackend;

use crate::fuse::{self, ROOT, quads, u32_at, u64_at, words};
use crate::machine::{ANSWER, ANSWER_LEN, Machine, NEXT, Place, REQUEST, WRITE, start_with};

pub const READ: i32 = libc::F_RDLCK;
pub const EXCLUSIVE: i32 = libc::F_WRLCK;
pub const NONE: i32 = libc::F_UNLCK;
/// The last byte that a file can have.
pub const END: u64 = i64::MAX as u64;
/// FUSE_LK_FLOCK.
pub const FLOCK: u32 = 1;

/// `struct fuse_lk_in`.
pub fn lock(handle: u64, owner: u64, (first, last): (u64, u64), kind: i32, flags: u32) -> Vec<u8> {
    [quads([handle, owner, first, last]), words([kind as u32, 0, flags, 0])].concat()
}

/// `struct fuse_flush_in`.
fn flush(handle: u64, owner: u64) -> Vec<u8> {
    quads([handle, 0, owner])
}

/// An OFD lock of a process of the host, or the release of one.
pub fn host_lock(file: &File, first: i64, len: i64, kind: i32) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: first,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: The structure is ours and outlives the call; the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn is_locked(result: io::Result<()>) -> bool {
    result.is_err_and(|e| e.raw_os_error() == Some(libc::EAGAIN))
}

struct Shared {
    backend: hotslot_test_support::program::Backend,
    machine: Machine,
    /// Of FUSE_INIT.
    flags: u32,
    /// Of the host, open for reading and writing.
    file: File,
    node: u64,
    handle: u64,
    _place: Place,
}

fn shared(args: &str) -> Shared {
    shared_with(1024, args)
}

/// With at most so many descriptors.
fn shared_with(descriptors: u32, args: &str) -> Shared {
    let place = Place::new();
    place.write("f", "data");
    let backend = start_with(descriptors, &place, &format!("--queues 2 {args}"), None);
    let mut machine = Machine::connect(&backend, 3);
    machine.start();
    let flags = u32_at(&machine.ok(fuse::INIT, 0, &fuse::init()), 12);
    let node = machine.lookup("f");
    let handle = machine.open(node, libc::O_RDWR);
    let file = File::options().read(true).write(true).open(place.path("f")).unwrap();
    Shared { backend, machine, flags, file, node, handle, _place: place }
}

#[test]
fn the_host_sees_the_guests_locks() {
    let mut shared = shared("--locks host");
    let (node, handle, flags) = (shared.node, shared.handle, shared.flags);
    let Shared { machine, file, .. } = &mut shared;
    assert_eq!(flags & (1 << 1 | 1 << 10), 1 << 1 | 1 << 10, "POSIX_LOCKS, FLOCK_LOCKS");
    machine.ok(fuse::SETLK, node, &lock(handle, 7, (100, 199), EXCLUSIVE, 0));
    assert!(is_locked(host_lock(file, 150, 1, READ)));
    host_lock(file, 200, 1, EXCLUSIVE).unwrap();
    host_lock(file, 200, 1, NONE).unwrap();
    // A part is released, then all of the process.
    machine.ok(fuse::SETLK, node, &lock(handle, 7, (100, 149), NONE, 0));
    host_lock(file, 100, 50, EXCLUSIVE).unwrap();
    assert!(is_locked(host_lock(file, 150, 1, READ)));
    machine.ok(fuse::FLUSH, node, &flush(handle, 8));
    assert!(is_locked(host_lock(file, 150, 1, READ)), "another process closed the file");
    machine.ok(fuse::FLUSH, node, &flush(handle, 7));
    host_lock(file, 0, 0, EXCLUSIVE).unwrap();
    host_lock(file, 0, 0, NONE).unwrap();

    // An owner that is an open file of the guest is not in a FUSE_FLUSH.
    machine.ok(fuse::SETLK, node, &lock(handle, 9, (0, END), READ, 0));
    machine.ok(fuse::SETLK, node, &lock(handle, 9, (0, END), EXCLUSIVE, FLOCK));
    assert!(flock(&*file, FlockOperation::NonBlockingLockShared).is_err());
    machine.ok(fuse::FLUSH, node, &flush(handle, 9));
    assert!(flock(&*file, FlockOperation::NonBlockingLockShared).is_err());
    machine.ok(fuse::SETLK, node, &lock(handle, 9, (0, END), READ, 0));
    machine.ok(fuse::RELEASE, node, &quads([handle, 0, 0]));
    flock(&*file, FlockOperation::NonBlockingLockExclusive).unwrap();
    host_lock(file, 0, 0, EXCLUSIVE).unwrap();
}

#[test]
fn the_guest_sees_the_hosts_locks_and_its_own() {
    let mut shared = shared("--locks host");
    let (node, handle) = (shared.node, shared.handle);
    let Shared { machine, file, .. } = &mut shared;
    host_lock(file, 10, 10, EXCLUSIVE).unwrap();
    let get = machine.ok(fuse::GETLK, node, &lock(handle, 1, (0, END), READ, 0));
    assert_eq!((u64_at(&get, 0), u64_at(&get, 8), u32_at(&get, 16)), (10, 19, EXCLUSIVE as u32));
    assert_eq!(machine.error(fuse::SETLK, node, &lock(handle, 1, (0, 10), READ, 0)), libc::EAGAIN);
    machine.ok(fuse::SETLK, node, &lock(handle, 1, (20, END), EXCLUSIVE, 0));
    // Another of the guest's processes, and the same one.
    let get = machine.ok(fuse::GETLK, node, &lock(handle, 2, (20, 29), READ, 0));
    assert_eq!((u64_at(&get, 0), u64_at(&get, 8), u32_at(&get, 16)), (20, END, EXCLUSIVE as u32));
    let get = machine.ok(fuse::GETLK, node, &lock(handle, 1, (20, 29), READ, 0));
    assert_eq!(u32_at(&get, 16), NONE as u32);
    assert_eq!(machine.error(fuse::SETLK, node, &lock(handle, 2, (20, 20), READ, 0)), libc::EAGAIN);

    flock(&*file, FlockOperation::LockShared).unwrap();
    machine.ok(fuse::SETLK, node, &lock(handle, 1, (0, END), READ, FLOCK));
    let exclusive = lock(handle, 1, (0, END), EXCLUSIVE, FLOCK);
    assert_eq!(machine.error(fuse::SETLK, node, &exclusive), libc::EAGAIN);
    machine.ok(fuse::SETLK, node, &lock(handle, 1, (0, END), NONE, FLOCK));
    flock(&*file, FlockOperation::NonBlockingLockExclusive).unwrap();
}

/// A request on the same queue while another waits there.
fn ask_beside(machine: &mut Machine, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
    const BESIDE: u64 = 0x8000;
    let request = fuse::request(opcode, node, machine.user, body);
    let [from, to] = [REQUEST, ANSWER].map(|offset| machine.address(1, offset) + BESIDE);
    machine.put(from, &request);
    machine.descriptor(1, 0, 2, (from, request.len() as u32, NEXT, 3));
    machine.descriptor(1, 0, 3, (to, ANSWER_LEN - BESIDE as u32, WRITE, 0));
    machine.offer(1, 2);
    let (head, written) = machine.await_used(1);
    assert_eq!(head, 2);
    let header: [u8; 16] = machine.bytes(to);
    assert_eq!(u32_at(&header, 0), written);
    (-(u32_at(&header, 4) as i32), Vec::new())
}

#[test]
fn a_lock_is_waited_for_while_the_queue_goes_on() {
    let mut shared = shared("--locks host");
    let (node, handle) = (shared.node, shared.handle);
    let Shared { machine, file, .. } = &mut shared;
    host_lock(file, 0, 0, EXCLUSIVE).unwrap();
    machine.send(1, fuse::SETLKW, node, &lock(handle, 1, (0, END), EXCLUSIVE, 0));
    assert_eq!(ask_beside(machine, fuse::GETATTR, node, &quads([0, 0])).0, 0);
    assert!(!machine.is_used(1));
    host_lock(file, 0, 0, NONE).unwrap();
    assert_eq!(machine.finish().0, 0);
    assert!(is_locked(host_lock(file, 0, 0, READ)));

    // For a lock of the guest's own, by flock.
    machine.ok(fuse::SETLKW, node, &lock(handle, 1, (0, END), EXCLUSIVE, FLOCK));
    machine.send(1, fuse::SETLKW, node, &lock(handle, 2, (0, END), READ, FLOCK));
    machine.send(2, fuse::SETLK, node, &lock(handle, 1, (0, END), NONE, FLOCK));
    let (_, written) = machine.await_used(2);
    assert_eq!(machine.answer(2, written).0, 0);
    assert_eq!(machine.finish().0, 0);
}

/// The driver takes its buffers back when it stops a queue: none may be written later.
#[test]
fn what_waits_is_answered_when_the_queue_stops() {
    let mut shared = shared("--locks host");
    let (node, handle) = (shared.node, shared.handle);
    let Shared { machine, file, .. } = &mut shared;
    host_lock(file, 0, 0, EXCLUSIVE).unwrap();
    machine.send(1, fuse::SETLKW, node, &lock(handle, 1, (0, END), EXCLUSIVE, 0));
    assert_eq!(ask_beside(machine, fuse::GETATTR, node, &quads([0, 0])).0, 0);
    machine.front_end.get_vring_base(1).unwrap();
    assert!(machine.is_used(1));
    assert_eq!(machine.finish().0, libc::ENOLCK);
}

#[test]
fn a_session_that_ends_leaves_no_lock() {
    let Shared { backend, mut machine, file, node, handle, _place, .. } = shared("--locks host");
    machine.ok(fuse::SETLK, node, &lock(handle, 1, (0, END), EXCLUSIVE, 0));
    flock(&file, FlockOperation::LockExclusive).unwrap();
    machine.send(1, fuse::SETLKW, node, &lock(handle, 1, (0, END), EXCLUSIVE, FLOCK));
    assert_eq!(ask_beside(&mut machine, fuse::GETATTR, node, &quads([0, 0])).0, 0);
    drop(machine);
    eventually("the guest's lock is gone", || host_lock(&file, 0, 0, EXCLUSIVE).is_ok());
    let mut machine = Machine::mounted(&backend);
    assert_ne!(machine.lookup("f"), ROOT);
}

#[test]
fn locks_that_make_no_sense_are_refused() {
    let mut shared = shared_with(600, "--locks host");
    let (node, handle) = (shared.node, shared.handle);
    let Shared { machine, .. } = &mut shared;
    for (body, error) in [
        (lock(handle + 1, 1, (0, 1), READ, 0), libc::EBADF),
        (lock(handle, 1, (2, 1), READ, 0), libc::EINVAL),
        (lock(handle, 1, (0, u64::MAX), READ, 0), libc::EINVAL),
        (lock(handle, 1, (0, 1), 3, 0), libc::EINVAL),
        (lock(handle, 1, (0, 1), -1, 0), libc::EINVAL),
    ] {
        for opcode in [fuse::GETLK, fuse::SETLK, fuse::SETLKW] {
            assert_eq!(machine.error(opcode, node, &body), error, "opcode {opcode}");
        }
    }
    assert_eq!(machine.error(fuse::SETLKW, node, &[]), libc::EINVAL);
    assert_eq!(machine.error(fuse::SETLKW, ROOT, &lock(handle, 1, (0, 1), READ, 0)), libc::EBADF);
    // A descriptor each, of a share of all; the guest's other files go on.
    let refused =
        (0..100).map(|owner| machine.error(fuse::SETLK, node, &lock(handle, owner, (0, 1), READ, 0)));
    assert_eq!(refused.filter(|&error| error == libc::ENOLCK).count(), 100 - 600 / 16);
    machine.ok(fuse::RELEASE, node, &quads([handle, 0, 0]));
    let handle = machine.open(node, libc::O_RDWR);
    machine.ok(fuse::SETLK, node, &lock(handle, 1, (0, 1), EXCLUSIVE, 0));
}

#[test]
fn by_default_the_guests_kernel_keeps_its_locks() {
    let mut shared = shared("");
    let (node, handle, flags) = (shared.node, shared.handle, shared.flags);
    let Shared { machine, .. } = &mut shared;
    assert_eq!(flags & (1 << 1 | 1 << 10), 0, "POSIX_LOCKS, FLOCK_LOCKS");
    for opcode in [fuse::GETLK, fuse::SETLK, fuse::SETLKW, fuse::FLUSH] {
        assert_eq!(machine.error(opcode, node, &lock(handle, 1, (0, 1), READ, 0)), libc::ENOSYS);
    }
}
