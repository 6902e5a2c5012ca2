//! The system calls that a back-end's threads may make once it listens: the tables, and which thread gets
//! which. How it works is in `hotslot::sandbox`.
//!
//! `server` confines the main thread, and the thread `front-ends`, which all others come from: those of the
//! queues, and `torture`'s. `fs` confines that thread itself, after it has Landlock's rule for its directory.

use hotslot::sandbox::every_thread::{EVERY_THREAD, STARTS_THREADS};
use hotslot::sandbox::rule::{Argument, Rule, call, call_if, fcntl, ioctl, on_self};
use hotslot::sandbox::{confine, confine_calls};
use syscalls::Sysno;

/// Confines the main thread, which waits for a signal and then removes the socket.
pub fn main_thread() {
    confine_calls(&[EVERY_THREAD, MAIN]);
}

/// For `fs`: does nothing.
pub fn not_yet() {}

/// Confines the thread that serves `pmem`.
pub fn pmem() {
    confine(&[EVERY_THREAD, STARTS_THREADS, SERVES, DISK]);
}

/// Confines the thread that serves `blk`.
pub fn blk() {
    confine(&[EVERY_THREAD, STARTS_THREADS, SERVES, DISK, BLK]);
}

/// Confines the thread that serves `console`, whose socket is open.
pub fn console() {
    confine(&[EVERY_THREAD, STARTS_THREADS, SERVES]);
}

/// Confines the thread that serves `fs`, which has given up all files but those of its directory.
pub fn fs() {
    confine_calls(&[EVERY_THREAD, STARTS_THREADS, SERVES, DISK, DIRECTORY]);
}

/// Confines the thread that serves `torture`. It opens a few files: those that it sends, and random bytes.
pub fn torture() {
    confine_calls(&[EVERY_THREAD, STARTS_THREADS, TORTURE]);
}

const MAIN: &[Rule] = &[call(Sysno::statx, "is the socket still ours"), call(Sysno::unlink, "removes it")];

/// One front-end after another.
const SERVES: &[Rule] = &[
    call(Sysno::accept4, "a front-end connects"),
    call(Sysno::recvmsg, "its messages"),
    call(Sysno::recvfrom, "the same"),
    call(Sysno::shutdown, "the end of a session"),
    call(Sysno::getsockopt, "is the descriptor of the backend channel a socket"),
    call(Sysno::sendmsg, "answers, and requests on the backend channel"),
    call(Sysno::epoll_create1, "a queue's thread waits for notifications"),
    call(Sysno::epoll_ctl, "the same"),
    call(Sysno::epoll_pwait, "the same"),
    call(Sysno::eventfd2, "wakes the thread of a queue"),
    call(Sysno::memfd_create, "GET_INFLIGHT_FD; the rings of requests that are taken again"),
    call(Sysno::ftruncate, "makes that memory as long as it is needed"),
    call(Sysno::statx, "is the memory of SET_INFLIGHT_FD long enough"),
    call(Sysno::fstat, "the same"),
    fcntl(libc::F_DUPFD_CLOEXEC, "a descriptor of a front-end's that is kept"),
];

/// A file that is open.
const DISK: &[Rule] = &[call(Sysno::fdatasync, "a flush")];

const BLK: &[Rule] = &[
    call(Sysno::pread64, "a read of the guest's"),
    call(Sysno::pwrite64, "a write"),
    call(Sysno::lseek, "where it starts; how long is the file now"),
    call(Sysno::getdents64, "which descriptor is the backend channel's: /proc/self/fd, which is open"),
    call(Sysno::readlinkat, "the same"),
    call(Sysno::sendto, "on that channel: the disk has another size"),
    call(Sysno::fallocate, "discarded and zeroed ranges"),
];

/// What the guest may ask of a directory, by way of `fs/directory.rs` and `fs/passthrough.rs`.
const DIRECTORY: &[Rule] = &[
    // To find and to open.
    call(Sysno::openat, "a name in a directory; a file again, by its number in /proc/self/fd"),
    call(Sysno::statx, "attributes"),
    call(Sysno::newfstatat, "the same"),
    call(Sysno::fstat, "the same"),
    call(Sysno::fstatfs, "how full is the file system"),
    call(Sysno::faccessat, "access"),
    call(Sysno::faccessat2, "the same, by its flags"),
    call(Sysno::getdents64, "the names in a directory"),
    call(Sysno::readlinkat, "where a link goes"),
    call(Sysno::getxattr, "extended attributes"),
    call(Sysno::listxattr, "the same"),
    fcntl(libc::F_GETFL, "how is a file open"),
    fcntl(libc::F_SETFL, "O_APPEND comes and goes"),
    call(Sysno::name_to_handle_at, "a handle by which a file is found again"),
    call(Sysno::open_by_handle_at, "a file, by its handle"),
    // To read and to write.
    call(Sysno::pread64, "a read"),
    call(Sysno::preadv, "the same"),
    call(Sysno::preadv2, "the same"),
    call(Sysno::pwrite64, "a write"),
    call(Sysno::pwritev, "the same"),
    call(Sysno::pwritev2, "the same, also to the end of the file"),
    call(Sysno::copy_file_range, "from file to file"),
    call(Sysno::lseek, "data and holes; a place in a directory"),
    call(Sysno::fallocate, "room in a file, and holes"),
    call(Sysno::ftruncate, "a file's size"),
    call(Sysno::fsync, "makes it durable"),
    call(Sysno::syncfs, "all of it"),
    // Locks and flags.
    call(Sysno::flock, "a guest's lock on the host"),
    fcntl(libc::F_OFD_SETLK, "the same"),
    fcntl(libc::F_OFD_GETLK, "the same"),
    ioctl(libc::FS_IOC_GETFLAGS as u32, "lsattr"),
    ioctl(libc::FS_IOC_SETFLAGS as u32, "chattr"),
    // To change a directory.
    call(Sysno::mkdirat, "a directory"),
    call(Sysno::mknodat, "a FIFO, a socket, a file, a device node"),
    call(Sysno::symlinkat, "a symbolic link"),
    call(Sysno::linkat, "a second name"),
    call(Sysno::renameat, "another name"),
    call(Sysno::renameat2, "the same, by its flags"),
    call(Sysno::unlinkat, "no name"),
    call(Sysno::fchmod, "its mode"),
    call(Sysno::fchmodat, "the same"),
    call(Sysno::fchownat, "its owner"),
    call(Sysno::utimensat, "its times"),
    call(Sysno::setxattr, "extended attributes"),
    call(Sysno::removexattr, "the same"),
    // As a user of the guest.
    call(Sysno::setresuid, "this thread's user, for one request"),
    call(Sysno::setresgid, "its group"),
    call(Sysno::setgroups, "its groups"),
    call_if(Sysno::unshare, Argument::Is(0, libc::CLONE_FS as u32), "a umask of this thread's own"),
    call(Sysno::umask, "the umask of the guest's process"),
    call(Sysno::capget, "its capabilities"),
    call(Sysno::capset, "the same"),
];

/// What misbehaviour takes.
const TORTURE: &[Rule] = &[
    call(Sysno::accept4, "a front-end connects"),
    call(Sysno::recvmsg, "its messages"),
    call(Sysno::recvfrom, "the same"),
    call(Sysno::sendmsg, "answers, requests, and what must not be sent"),
    call_if(
        Sysno::setsockopt,
        Argument::Is(2, libc::SO_SNDTIMEO as u32),
        "an answer that the front-end does not take",
    ),
    call(Sysno::shutdown, "the end of a session"),
    call(Sysno::memfd_create, "a file to map"),
    call(Sysno::ftruncate, "it is cut while it is mapped"),
    call(Sysno::openat, "random bytes; a file again, to read only; a device to send"),
    call(Sysno::open, "a directory to send: rustix"),
    call(Sysno::socketpair, "a socket to send"),
    call(Sysno::pipe2, "a pipe to send"),
    on_self(Sysno::kill, "its own death"),
];
