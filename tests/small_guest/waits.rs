//! Back-ends whose descriptors and files make a system call wait: the guest, the other devices and the end of
//! the machine do not wait with it.

use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use hotslot_test_support::backend::{Answer, Backend, Connection, Offer};
use hotslot_test_support::files::{MIB, PAGE, content, numbered_file};
use hotslot_test_support::fuse::{Fuse, byte_of, opcode};
use hotslot_test_support::guest::{Guest, NEEDS_RESET, RUNNING, register};
use hotslot_test_support::kvm;
use hotslot_test_support::monitor::Operation;
use hotslot_test_support::names::request;
use hotslot_test_support::wait::eventually;
use hotslot_test_support::wire::{
    MMap, Message, NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, message, page_at, writable,
};

const EPERM: i64 = -(libc::EPERM as i64);
const SIGTERM: i32 = 128 + libc::SIGTERM;

/// A machine with two devices; the first has these further keys.
fn two(first: &Backend, keys: &str, second: &Backend) -> Guest {
    let devices = [format!("{}{keys}", first.device("first")), second.device("second")];
    let mut guest = Guest::boot(devices.iter().flat_map(|device| ["--vhost-user", device]));
    for device in [1, 0] {
        guest.select(device);
        guest.start_device();
    }
    guest
}

/// The device with this number still does its work.
fn assert_works(guest: &mut Guest, device: u64, backend: &Backend) {
    guest.select(device);
    let (base, _) = guest.region(0);
    assert_eq!(backend.map(page_at(5), &numbered_file(9, 1)), 0);
    assert_eq!(guest.read64(base + 5 * PAGE), content(9, 0));
    assert_eq!(backend.unmap(page_at(5)), 0);
    assert_eq!(guest.read64(base + 5 * PAGE), u64::MAX);
}

/// SIGTERM ends the machine, with its status and its line.
fn end(guest: Guest) -> String {
    guest.signal(libc::SIGTERM);
    let (status, log) = guest.wait();
    assert_eq!(status.code(), Some(SIGTERM), "{log}");
    assert_eq!(log.lines().last(), Some("hotslot: ended by SIGTERM"), "{log}");
    log
}

#[test]
fn a_file_whose_server_may_not_answer_is_refused_without_asking_it() {
    // SHM-83: on a mount here, and on one of another mount namespace.
    if !kvm::is_here() {
        return;
    }
    for here in [true, false] {
        let (first, second) = (Backend::start(), Backend::start());
        let mut guest = two(&first, "", &second);
        // Before there is that mount: what is mounted is looked at again when it changes.
        assert_eq!(first.map(page_at(7), &tempfile::tempfile().unwrap()), 0);
        let Some(fuse) = Fuse::mount(here) else { return };
        fuse.hold(&[opcode::GETATTR, opcode::STATFS, opcode::READ]);
        for _ in 0..2 {
            assert_eq!(first.map(page_at(0), fuse.file()), EPERM);
        }
        guest.wait_for_log(match here {
            true => "its file is on a file system of type fuse",
            false => "its file is on a file system that is not mounted here",
        });
        guest.wait_for_log("foreign-files=on");
        assert_works(&mut guest, 0, &first);
        assert_works(&mut guest, 1, &second);
        guest.reset_device();
        end(guest);
    }
}

#[test]
fn a_file_of_another_process_s_file_system_is_mapped_where_the_user_says_so() {
    // SHM-83
    if !kvm::is_here() {
        return;
    }
    let Some(fuse) = Fuse::mount(true) else { return };
    let (first, second) = (Backend::start(), Backend::start());
    let mut guest = two(&first, ",foreign-files=on", &second);
    let (base, _) = guest.region(0);
    assert_eq!(first.map(writable(page_at(3)), fuse.file()), 0);
    assert_eq!(guest.read8(base + 3 * PAGE), byte_of(0));
    guest.write8(base + 3 * PAGE, 99);
    // FUSE writes it back when the mapping goes.
    assert_eq!(first.unmap(page_at(3)), 0);
    assert_eq!(first.map(page_at(3), fuse.file()), 0);
    assert_eq!(guest.read8(base + 3 * PAGE), 99);
    assert_works(&mut guest, 1, &second);
    end(guest);
}

#[test]
fn a_vcpu_that_waits_for_a_page_does_not_hold_up_the_end() {
    // SHM-86
    if !kvm::is_here() {
        return;
    }
    let Some(fuse) = Fuse::mount(true) else { return };
    let (first, second) = (Backend::start(), Backend::start());
    let mut guest = two(&first, ",foreign-files=on", &second);
    let (base, _) = guest.region(0);
    assert_eq!(first.map(page_at(3), fuse.file()), 0);
    fuse.hold(&[opcode::READ]);
    guest.begin(Operation::Read, 8, base + 3 * PAGE, 0);
    fuse.wait_until_held();
    end_though_the_kernel_keeps_it(guest, &fuse);
}

/// SIGTERM ends the machine: its line is there. A request that a FUSE server has read and does not answer
/// keeps the process, whatever it does.
fn end_though_the_kernel_keeps_it(guest: Guest, fuse: &Fuse) {
    guest.signal(libc::SIGTERM);
    guest.wait_for_log("hotslot: ended by SIGTERM");
    fuse.hold(&[]);
    let (status, log) = guest.wait();
    assert_eq!(status.code(), Some(SIGTERM), "{log}");
}

#[test]
fn a_mapping_that_cannot_be_unmapped_does_not_hold_up_the_end() {
    // SHM-86
    if !kvm::is_here() {
        return;
    }
    for by_reset in [false, true] {
        let Some(fuse) = Fuse::mount(true) else { return };
        let (first, second) = (Backend::start(), Backend::start());
        let mut guest = two(&first, ",foreign-files=on", &second);
        let (base, _) = guest.region(0);
        assert_eq!(first.map(writable(page_at(3)), fuse.file()), 0);
        guest.write8(base + 3 * PAGE, 99);
        fuse.hold(&[opcode::WRITE]);
        if by_reset {
            guest.reset_device();
            guest.wait_for_log("first: a call on a file or a descriptor of its back-end does not return");
            assert_eq!(guest.read64(base + 3 * PAGE), u64::MAX);
        } else {
            first.channel().ask(SHMEM_UNMAP, page_at(3), &[]);
        }
        fuse.wait_until_held();
        end_though_the_kernel_keeps_it(guest, &fuse);
    }
}

/// A TCP socket whose last close waits for a peer that reads nothing; and that peer.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 1 << 16]).is_ok() {}
    ours.set_nonblocking(false).unwrap();
    let linger = libc::linger { l_onoff: 1, l_linger: 120 };
    // SAFETY: the structure lives through the call.
    let result = unsafe {
        libc::setsockopt(
            ours.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as u32,
        )
    };
    assert_eq!(result, 0);
    (ours.into(), theirs)
}

/// Stops hotslot; none of its threads runs when this returns.
fn stop(guest: &Guest) {
    guest.signal(libc::SIGSTOP);
    eventually("all threads are stopped", || {
        let threads = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
        let mut stats =
            threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap());
        stats.all(|stat| stat.contains(") T "))
    });
}

#[test]
fn a_descriptor_whose_close_waits_holds_up_its_own_device_only() {
    // SHM-84, SHM-86: refused for its kind; and beside one that is refused, too.
    if !kvm::is_here() {
        return;
    }
    for with_another in [false, true] {
        let (first, second) = (Backend::start(), Backend::start());
        let mut guest = two(&first, "", &second);
        let (base, _) = guest.region(0);
        assert_eq!(first.map(page_at(1), &numbered_file(1, 1)), 0);
        let (socket, _peer) = lingering();
        let before = with_another.then(|| OwnedFd::from(numbered_file(2, 1)));
        let descriptors: Vec<OwnedFd> = before.into_iter().chain([socket]).collect();
        let fds: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        // So that hotslot has the last one: it is stopped until ours are closed.
        stop(&guest);
        first.channel().ask(SHMEM_MAP, page_at(0), &fds);
        drop(descriptors);
        guest.signal(libc::SIGCONT);
        assert_works(&mut guest, 1, &second);
        if with_another {
            guest.exit();
            continue;
        }
        guest.select(0);
        guest.reset_device();
        assert_eq!(guest.read64(base + PAGE), u64::MAX);
        guest.wait_for_log("first: a call on a file or a descriptor of its back-end does not return");
        // It is given up, and nobody waits for it again.
        assert_ne!(guest.try_start_device(), RUNNING);
        guest.reset_device();
        assert_works(&mut guest, 1, &second);
        end(guest);
    }
}

#[test]
fn a_descriptor_with_an_answer_is_not_closed_by_the_vcpu_that_waits_for_it() {
    // SHM-84
    if !kvm::is_here() {
        return;
    }
    let (socket, _peer) = lingering();
    let mut socket = Some(socket);
    let script = move |asked: &Message, _: &Connection| match (asked.request, socket.take()) {
        (request::GET_VRING_BASE, Some(socket)) => {
            let answer = message(asked.request, VERSION_1 | REPLY, &asked.payload);
            // SAFETY: the descriptor has no other owner; it is closed after it was sent.
            Answer::Bytes(answer, Some(unsafe { File::from_raw_fd(socket.into_raw_fd()) }))
        }
        (_, kept) => {
            socket = kept;
            Answer::Usual
        }
    };
    let offer = Offer { regions: vec![(0, 4 * MIB)], ..Offer::default() };
    let (first, second) = (Backend::scripted(offer, Box::new(script)), Backend::start());
    let mut guest = two(&first, "", &second);
    guest.reset_device();
    guest.wait_for_log("first: ");
    guest.wait_for_log("attached file descriptors to an answer");
    assert_works(&mut guest, 1, &second);
    end(guest);
}

#[test]
fn a_kick_that_blocks_does_not_hold_up_a_reset() {
    // SHM-86: O_NONBLOCK belongs to both sides.
    if !kvm::is_here() {
        return;
    }
    let script = |asked: &Message, _: &Connection| {
        for fd in &asked.fds {
            // SAFETY: no memory is involved.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
        }
        Answer::Usual
    };
    let backend = Backend::scripted(Offer::default(), Box::new(script));
    let mut guest = Guest::with(&backend);
    for _ in 0..2 {
        guest.reset_device();
        guest.start_device();
    }
    assert_eq!(guest.register(register::STATUS) & NEEDS_RESET, 0);
    end(guest);
}

#[test]
fn a_refused_answer_to_each_of_many_resets_is_a_few_lines() {
    if !kvm::is_here() {
        return;
    }
    let script = |asked: &Message, _: &Connection| match asked.request {
        request::RESET_DEVICE if asked.flags & NEED_REPLY != 0 => {
            Answer::Bytes(message(asked.request, VERSION_1 | REPLY, &1_u64.to_ne_bytes()), None)
        }
        _ => Answer::Usual,
    };
    let backend = Backend::scripted(Offer::default(), Box::new(script));
    let mut guest = Guest::with(&backend);
    let start = std::time::Instant::now();
    for _ in 0..300 {
        guest.reset_device();
    }
    let allowed = 10 + start.elapsed().as_secs() as usize + 1;
    let log = end(guest);
    let lines = log.lines().filter(|line| line.contains("while the device is reset")).count();
    assert!((1..=allowed).contains(&lines), "{lines} lines, not {allowed}:\n{log}");
}

#[test]
fn the_rest_of_a_message_that_never_comes_keeps_no_descriptor() {
    // SHM-84: 253 with half a message, then the sender is gone, and so are they.
    if !kvm::is_here() {
        return;
    }
    let (first, second) = (Backend::start(), Backend::start());
    let mut guest = two(&first, "", &second);
    let open = |guest: &Guest| fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap().count();
    let before = open(&guest);
    let file = numbered_file(1, 1);
    let map = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &MMap::default().bytes());
    for byte in &map[..20] {
        first.channel().send_with(&[*byte], &vec![file.as_raw_fd(); 200]).unwrap();
        // Only so many can be on their way at a time.
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(open(&guest) <= before + 2, "{} descriptors, {before} before", open(&guest));
    first.hang_up();
    guest.wait_for_needs_reset();
    guest.reset_device();
    assert!(open(&guest) <= before, "{} descriptors, {before} before", open(&guest));
    assert_works(&mut guest, 1, &second);
    end(guest);
}
