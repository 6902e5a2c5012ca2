//! Messages in pieces, malformed messages, and peers that stop in the middle of one.

use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::wire::{
    Leash, NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, Wire, message, words,
};

#[test]
fn a_message_may_come_in_any_two_pieces_with_its_descriptor_in_either() {
    // SHM-65
    let bench = Setup::default().start();
    let channel = bench.channel();
    let file = file_of(1, 1);
    let map = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    let unmap = message(SHMEM_UNMAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    for at in 1..map.len() {
        let (first, second) = map.split_at(at);
        let fd = [file.as_raw_fd()];
        if at % 2 == 0 {
            channel.send_with(first, &fd).unwrap();
            channel.send(second);
        } else {
            channel.send(first);
            channel.send_with(second, &fd).unwrap();
        }
        assert_eq!(channel.answer(SHMEM_MAP), 0, "split at {at}");
        channel.send(&unmap[..at]);
        channel.send(&unmap[at..]);
        assert_eq!(channel.answer(SHMEM_UNMAP), 0, "split at {at}");
    }
}

#[test]
fn a_message_may_come_byte_by_byte() {
    // SHM-65
    let bench = Setup::default().start();
    let channel = bench.channel();
    let file = file_of(1, 1);
    let map = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    for (at, byte) in map.iter().enumerate() {
        let fds = [file.as_raw_fd()];
        let fds = if at == 30 { &fds[..] } else { &[] };
        channel.send_with(&[*byte], fds).unwrap();
    }
    assert_eq!(channel.answer(SHMEM_MAP), 0);
}

#[test]
fn several_messages_in_one_write_keep_their_descriptors() {
    // SHM-61, SHM-65: the last of them has the descriptor, then the others wait for none.
    let bench = Setup::default().start();
    let channel = bench.channel();
    let file = file_of(1, 1);
    let map = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    let unknown = message(backend_request::UNKNOWN, VERSION_1 | NEED_REPLY, &[]);
    channel.send(&[&unknown[..], &unknown].concat());
    channel.send_with(&map, &[file.as_raw_fd()]).unwrap();
    channel.send(&[&unknown[..], &map].concat());
    use backend_request::UNKNOWN;
    let ids = [UNKNOWN, UNKNOWN, SHMEM_MAP, UNKNOWN, SHMEM_MAP];
    let (no, ebadf) = (-i64::from(libc::EOPNOTSUPP), -i64::from(libc::EBADF));
    assert_eq!(ids.map(|id| channel.answer(id)), [no, no, 0, no, ebadf]);
}

#[test]
fn several_messages_in_one_read_are_all_answered() {
    // SHM-61: nothing more comes that would wake anybody.
    let bench = Setup::default().start();
    let channel = bench.channel();
    for count in [2, 3, 4, 5, 9, 100] {
        channel.send(&message(backend_request::UNKNOWN, VERSION_1 | NEED_REPLY, &[]).repeat(count));
        for _ in 0..count {
            assert_eq!(channel.answer(backend_request::UNKNOWN), -i64::from(libc::EOPNOTSUPP));
        }
    }
}

#[test]
fn a_malformed_message_ends_the_channel_and_fails_this_device_only() {
    // SHM-64
    let other = Setup::default().start();
    let page = page_at(0).bytes();
    let no_messages = [
        ("version 0", message(SHMEM_MAP, NEED_REPLY, &page)),
        ("version 2", message(SHMEM_MAP, 2 | NEED_REPLY, &page)),
        ("version 3", message(SHMEM_MAP, 3 | NEED_REPLY, &page)),
        ("a reply", message(SHMEM_MAP, VERSION_1 | REPLY, &page)),
        ("a reply that wants one", message(backend_request::UNKNOWN, VERSION_1 | REPLY | NEED_REPLY, &[])),
        ("oversized", words([SHMEM_MAP, VERSION_1 | NEED_REPLY, 4097])),
        ("as large as can be", words([SHMEM_MAP, VERSION_1 | NEED_REPLY, u32::MAX])),
    ];
    for (what, bytes) in no_messages {
        let bench = Setup::default().start();
        bench.start().unwrap();
        assert_eq!(bench.map_page(3, 3), 0);
        let (fd, leash) = Leash::new();
        let channel = bench.channel();
        channel.send_with(&bytes, &[fd.as_raw_fd()]).unwrap();
        channel.wait_for_end();
        bench.wait_until_failed();
        drop(fd);
        assert_eq!(bench.reads(0, 3 * PAGE), Some(3), "{what}"); // SHM-76
        bench.reset();
        assert_eq!(bench.guest().count(), 0, "{what}"); // SHM-69
        assert!(bench.start().is_err(), "{what}");
        drop(bench.end());
        leash.wait_until_closed(); // SHM-27
        other.assert_works();
    }
}

#[test]
fn a_device_that_fails_hangs_up_on_the_main_socket_too() {
    // SHM-64: from now on no request could stop its back-end.
    let bench = Setup::default().start();
    let main = bench.main();
    bench.channel().send(&message(SHMEM_MAP, 0, &[]));
    bench.wait_until_failed();
    main.wait_for_end();
}

#[test]
fn the_end_inside_a_message_fails_the_device_and_between_two_it_does_not() {
    for cut in [1, 11, 12, 51] {
        // SHM-64
        let bench = Setup::default().start();
        let channel = bench.channel();
        channel.send(&message(SHMEM_UNMAP, VERSION_1, &page_at(0).bytes())[..cut]);
        channel.socket().shutdown(std::net::Shutdown::Write).unwrap();
        bench.wait_until_failed();
        channel.wait_for_end();
    }
    // A back-end may do without the channel.
    let bench = Setup::default().start();
    assert_eq!(bench.map_page(0, 1), 0);
    bench.channel().socket().shutdown(std::net::Shutdown::Both).unwrap();
    // Often enough that the device's thread has noticed meanwhile.
    for _ in 0..50 {
        bench.start().unwrap();
        bench.reset();
    }
    assert_eq!((bench.guest().count(), bench.needs_reset()), (0, false));
    // SHM-76: its end is seen all the same.
    bench.hang_up();
    bench.wait_until_failed();
}

#[test]
fn requests_before_a_malformed_message_are_carried_out_and_answered() {
    // SHM-61, SHM-64
    let bench = Setup::default().start();
    let channel = bench.channel();
    let unmap = message(SHMEM_UNMAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    assert_eq!(bench.map_page(0, 1), 0);
    channel.send(&[&unmap[..], &words([1, 0, 0])].concat());
    assert_eq!(channel.answer(SHMEM_UNMAP), 0);
    bench.wait_until_failed();
}

#[test]
fn a_peer_that_stalls_inside_a_message_delays_no_reset_and_no_other_device() {
    // SHM-66
    let bench = Setup::default().start();
    let other = Setup::default().start();
    bench.start().unwrap();
    for stop in [1, 12, 30, 51] {
        let channel = bench.channel();
        let unmap = message(SHMEM_UNMAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
        channel.send(&unmap[..stop]);
        other.assert_works();
        bench.reset();
        bench.start().unwrap();
        bench.device().stop_queue(0).unwrap();
        channel.send(&unmap[stop..]);
        assert!(channel.answer(SHMEM_UNMAP) < 0);
    }
    bench.assert_works();
}

#[test]
fn a_peer_that_never_reads_its_answers_fails_its_own_device_only() {
    // SHM-66
    let other = Setup::default().start();
    let bench = Setup::default().start();
    bench.start().unwrap();
    let channel = bench.channel();
    let flood = thread::spawn(move || {
        // 20 bytes come back for each 12: at some point there is no room for them.
        let requests = message(backend_request::UNKNOWN, VERSION_1 | NEED_REPLY, &[]).repeat(1000);
        while channel.send_with(&requests, &[]).is_ok() {}
    });
    other.assert_works();
    bench.wait_until_failed();
    bench.reset();
    flood.join().unwrap();
    other.assert_works();
}

#[test]
fn a_flood_of_requests_does_not_keep_a_reset_waiting() {
    // SHM-66, SHM-71
    let bench = Setup::default().start();
    bench.start().unwrap();
    assert_eq!(bench.map_page(0, 1), 0);
    let channel = bench.channel();
    let flood = thread::spawn(move || {
        // Of a size that no read ends with.
        let requests = message(backend_request::UNKNOWN, VERSION_1, &[]).repeat(1000);
        while channel.send_with(&requests, &[]).is_ok() {}
    });
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
    drop(bench.end());
    flood.join().unwrap();
}

/// A device that serves so many requests a second, and a back-end that sent so many at once.
fn paced(rate: u32, requests: usize) -> (Bench, Wire) {
    let mut setup = Setup::default();
    setup.rate = Some(rate);
    let bench = setup.start();
    bench.start().unwrap();
    let channel = bench.channel();
    let unmap = message(SHMEM_UNMAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    channel.send(&unmap.repeat(requests));
    (bench, channel)
}

#[test]
fn requests_that_come_faster_than_the_rate_wait_for_their_turn() {
    // SHM-66
    let start = Instant::now();
    let (bench, channel) = paced(20, 8);
    for _ in 0..8 {
        assert_eq!(channel.answer(SHMEM_UNMAP), -i64::from(libc::ENOENT));
    }
    // Not how fast it is, but that it is not faster.
    assert!(start.elapsed() >= Duration::from_millis(7 * 50));
    bench.assert_works();
}

#[test]
fn a_reset_waits_for_no_rate() {
    // SHM-66, SHM-71
    let (bench, channel) = paced(1, 100);
    bench.reset();
    for _ in 0..100 {
        // It is there already.
        let answer = channel.receive_within(Some(Duration::from_millis(100))).unwrap();
        assert_eq!(answer.request, SHMEM_UNMAP);
    }
    bench.start().unwrap();
    bench.assert_works();
}

#[test]
fn the_end_of_a_back_end_waits_for_no_rate_and_what_it_sent_is_served() {
    // SHM-66, SHM-76
    let mut setup = Setup::default();
    setup.rate = Some(1);
    let bench = setup.start();
    bench.start().unwrap();
    let (channel, file) = (bench.channel(), file_of(1, 7));
    for page in 0..60 {
        let map = message(SHMEM_MAP, VERSION_1, &page_at(page).bytes());
        channel.send_with(&map, &[file.as_raw_fd()]).unwrap();
    }
    bench.main().socket().shutdown(std::net::Shutdown::Both).unwrap();
    bench.wait_until_failed();
    assert_eq!(bench.guest().count(), 60);
    assert_eq!(bench.reads(0, 59 * PAGE), Some(7));
}

#[test]
fn one_descriptor_waits_for_its_message_and_is_closed() {
    // SHM-27, SHM-48, SHM-84: one byte at a time, each with many.
    let bench = Setup::default().start();
    let channel = bench.channel();
    let (fd, leash) = Leash::new();
    let inode = |fd: i32| {
        let file = std::fs::metadata(format!("/proc/self/fd/{fd}"));
        file.map(|file| std::os::unix::fs::MetadataExt::ino(&file))
    };
    let ours = inode(fd.as_raw_fd()).unwrap();
    let map = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
    for byte in &map[..12] {
        // There is a limit to those that are on their way as well.
        let fds = vec![fd.as_raw_fd(); 100];
        eventually("they are sent", || channel.send_with(&[*byte], &fds).is_ok());
    }
    let open = || (0..8192).filter(|&fd| inode(fd).is_ok_and(|inode| inode == ours)).count();
    // Both ends of ours, and one that was taken.
    eventually("one is taken", || open() == 3);
    channel.send(&map[12..]);
    assert_eq!(channel.answer(SHMEM_MAP), -i64::from(libc::EBADF));
    drop(fd);
    leash.wait_until_closed();
    bench.assert_works();
}
