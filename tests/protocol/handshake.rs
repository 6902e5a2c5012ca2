//! Connecting and negotiating: what is asked, what is agreed, what is taken for an answer.

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::wire::{REPLY, VERSION_1, message, quads, shmem_config, words};

/// The bits that SET_PROTOCOL_FEATURES said; `None` where it was not sent.
fn acked(seen: &[Seen]) -> Option<u64> {
    let seen = seen.iter().find(|seen| seen.request == 16)?;
    Some(u64::from_ne_bytes(seen.payload.as_slice().try_into().unwrap()))
}

#[test]
fn only_what_the_back_end_offers_is_accepted_and_shmem_only_under_its_own_bit() {
    let without_shmem = MQ | REPLY_ACK | BACKEND_REQ | SEND_FD | CONFIG | RESET_DEVICE | STATUS;
    let (bit20, bit21) = (1 << 20, 1 << 21);
    // Offered, the bit that means SHMEM, accepted.
    for (offered, shmem_bit, expected) in [
        (u64::MAX, 22, without_shmem | SHMEM),                  // SHM-1, SHM-5
        (u64::MAX, 20, without_shmem | bit20),                  // SHM-1
        (u64::MAX, 21, without_shmem | bit21),                  // SHM-1
        (BACKEND_REQ | bit20 | bit21, 22, BACKEND_REQ),         // SHM-1
        (BACKEND_REQ | bit20 | SHMEM, 20, BACKEND_REQ | bit20), // SHM-1
        (BACKEND_REQ | SHMEM, 22, BACKEND_REQ | SHMEM),         // SHM-3
        (SHMEM | REPLY_ACK, 22, REPLY_ACK),                     // SHM-4
        (0, 22, 0),                                             // SHM-3
    ] {
        let mut setup = Setup::default();
        (setup.offer.protocol, setup.shmem_bit) = (offered, shmem_bit);
        let (handshake, backend) = setup.connect();
        let has_shmem = expected & 1 << shmem_bit != 0;
        assert_eq!(handshake.unwrap().region_sizes.is_empty(), !has_shmem);
        eventually("the features are set", || backend.ids().contains(&16));
        assert_eq!(acked(&backend.seen()), Some(expected), "{offered:#x}");
        assert_eq!(backend.ids().contains(&44), has_shmem, "{offered:#x}"); // SHM-6
    }
}

#[test]
fn a_back_end_without_protocol_features_is_asked_for_none() {
    // SHM-2
    let mut setup = Setup::default();
    setup.offer.features = F_VERSION_1;
    let bench = setup.start();
    bench.start().unwrap();
    bench.reset();
    assert!(bench.ids().iter().all(|id| [1, 2, 3, 5, 8, 9, 10, 11, 12, 13].contains(id)));
    assert!(!bench.needs_reset());
}

#[test]
fn protocol_features_are_set_before_what_depends_on_them() {
    let bench = Setup::default().start();
    let ids = bench.ids();
    let at = |id| ids.iter().position(|&other| other == id).unwrap();
    assert!(at(1) < at(15) && at(15) < at(16));
    assert!(at(16) < at(44) && at(16) < at(21)); // SHM-7, SHM-10
    assert!(at(44) < at(21)); // SHM-17
    let asked = bench.seen().into_iter().find(|seen| seen.request == 44).unwrap();
    assert_eq!((asked.flags, asked.payload.len(), asked.fds), (0x1, 0, 0)); // SHM-10
    // SHM-5: an answer is asked for once REPLY_ACK is agreed on, not with what agrees on it.
    let flags = |id| bench.seen().iter().find(|seen| seen.request == id).unwrap().flags;
    assert_eq!((flags(16), flags(21)), (0x1, 0x9));
    bench.start().unwrap();
    bench.reset();
    assert_eq!(bench.ids().iter().filter(|&&id| id == 44).count(), 1); // SHM-17
}

#[test]
fn the_back_end_has_the_only_copy_of_its_end_of_the_channel() {
    // SHM-8
    use std::os::unix::fs::MetadataExt;
    let bench = Setup::default().start();
    let channel = bench.channel();
    let inode =
        std::fs::metadata(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(channel.socket())));
    let inode = inode.unwrap().ino();
    let copies = || {
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        open.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
            .filter(|metadata| metadata.ino() == inode && metadata.mode() & libc::S_IFMT == libc::S_IFSOCK)
            .count()
    };
    // The script's, and this test's.
    eventually("two copies are open", || copies() == 2);
}

#[test]
fn a_back_end_that_lacks_all_that_is_optional_works() {
    // SHM-5, SHM-59
    let bench = Setup::default().without(MQ | REPLY_ACK | SEND_FD | RESET_DEVICE | STATUS).start();
    bench.start().unwrap();
    let bytes = message(9, 0x9, &page_at(3).bytes());
    let file = file_of(1, 7);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    bench.channel().send_with(&bytes, &[fd]).unwrap();
    eventually("the guest sees it", || bench.reads(0, 3 * PAGE) == Some(7));
    bench.reset();
    assert_eq!(bench.reads(0, 3 * PAGE), None);
    assert!(!bench.needs_reset() && bench.channel().is_silent());
}

#[test]
fn without_shmem_its_requests_are_refused() {
    // SHM-6
    let bench = Setup::default().without(SHMEM).start();
    eventually("the back-end has its channel", || bench.ids().contains(&21));
    bench.start().unwrap();
    assert_eq!(bench.map_page(0, 1), -i64::from(libc::EOPNOTSUPP));
    assert_eq!(bench.unmap(page_at(0)), -i64::from(libc::EOPNOTSUPP));
    assert_eq!((bench.guest().count(), bench.needs_reset()), (0, false));
}

#[test]
fn regions_are_what_the_back_end_says_whatever_their_ids() {
    // SHM-11, SHM-13, SHM-19: padding is ignored; gaps are fine; all 256, too.
    let all: Vec<(u8, u64)> = (0..=255).map(|id| (id, (u64::from(id) + 1) * PAGE)).collect();
    for regions in [vec![(3, PAGE), (200, 5 * PAGE)], vec![(255, PAGE)], vec![], all] {
        let reply = shmem_config(regions.len() as u32, 0xdead_beef, &regions);
        let bench = {
            let (handshake, backend) = Setup::default()
                .on(44, move |_| Answer::Bytes(message(44, VERSION_1 | REPLY, &reply), None))
                .connect();
            backend.device(handshake.unwrap()).unwrap()
        };
        let device = bench.device();
        for id in 0..=255 {
            let expected = regions.iter().find(|region| region.0 == id).map(|region| region.1);
            assert_eq!(device.shared_memory(id).map(|range| range.len()), expected); // SHM-20, SHM-21
        }
        drop(device);
        if let Some(&(shmid, _)) = regions.last() {
            eventually("the back-end has its channel", || bench.ids().contains(&21));
            let request = hotslot_test_support::wire::MMap { shmid, ..page_at(0) };
            assert_eq!(bench.map(request, &file_of(1, 9)), 0);
            assert_eq!(bench.reads(shmid, 0), Some(9));
        }
    }
}

#[test]
fn a_count_that_does_not_match_fails_the_set_up() {
    // SHM-14
    for nregions in [0, 1, 3, 256, u32::MAX] {
        let reply = shmem_config(nregions, 0, &[(0, PAGE), (9, PAGE)]);
        let (handshake, backend) = Setup::default()
            .on(44, move |_| Answer::Bytes(message(44, VERSION_1 | REPLY, &reply), None))
            .connect();
        let error = handshake.unwrap_err().to_string();
        assert!(error.contains(&nregions.to_string()) && error.contains('2'), "{error}");
        assert!(!backend.ids().contains(&21));
    }
}

#[test]
fn sizes_that_cannot_be_fail_the_set_up() {
    // SHM-15, SHM-16
    let most = 1 << 40;
    for regions in [
        vec![(0, 1)],
        vec![(0, PAGE), (1, PAGE + 1)],
        vec![(0, u64::MAX)],
        vec![(0, 1 << 63)],
        vec![(0, most)],
        vec![(0, most / 2), (1, most / 2)],
        vec![(0, 1 << 63), (1, 1 << 63)],
    ] {
        let mut setup = Setup::default();
        setup.offer.regions = regions;
        let (handshake, backend) = setup.connect();
        let error = backend.device(handshake.unwrap()).err().unwrap().to_string();
        assert!(error.contains("shared memory region"), "{error}");
    }
}

#[test]
fn a_back_end_with_fewer_queues_than_the_device_is_refused() {
    let mut setup = Setup::default();
    setup.offer.queues = 1;
    let error = setup.connect().0.unwrap_err().to_string();
    assert!(error.contains("1 queue") && error.contains('2'), "{error}");
    // Without MQ it does not say how many it has.
    let mut setup = Setup::default().without(MQ);
    setup.offer.queues = 1;
    assert_eq!(setup.connect().0.unwrap().queues, 2);
}

#[test]
fn what_is_no_answer_fails_the_set_up_with_the_requests_name() {
    // SHM-12
    let good = shmem_config(1, 0, &[(0, PAGE)]);
    let reply = VERSION_1 | REPLY;
    let wrong: Vec<(&str, Vec<u8>)> = vec![
        ("empty", message(44, reply, &[])),
        ("a u64", message(44, reply, &quads([0]))),
        ("a byte short", message(44, reply, &good[..2055])),
        ("a byte long", message(44, reply, &[&good[..], &[0]].concat())),
        ("oversized", words([44, reply, 1 << 20])),
        ("as large as can be", words([44, reply, u32::MAX])),
        ("another id", message(43, reply, &good)),
        ("no reply", message(44, VERSION_1, &good)),
        ("version 0", message(44, REPLY, &good)),
        ("version 2", message(44, 2 | REPLY, &good)),
        ("version 3", message(44, 3 | REPLY, &good)),
    ];
    for (what, bytes) in wrong {
        let (handshake, _backend) =
            Setup::default().on(44, move |_| Answer::Bytes(bytes.clone(), None)).connect();
        let error = handshake.expect_err(what).to_string();
        assert!(error.contains("GET_SHMEM_CONFIG"), "{what}: {error}");
    }
    // With a descriptor; and the end, between messages or inside one.
    let bytes = message(44, reply, &good);
    let half = bytes[..1000].to_vec();
    let setups = [
        Setup::default().on(44, move |_| Answer::Bytes(bytes.clone(), Some(memfd(0)))),
        Setup::default().on(44, |_| Answer::HangUp),
        Setup::default().on(44, move |peer| {
            peer.main.send(&half);
            Answer::HangUp
        }),
    ];
    for setup in setups {
        let error = setup.connect().0.unwrap_err().to_string();
        assert!(error.contains("GET_SHMEM_CONFIG"), "{error}");
    }
}

#[test]
fn a_reply_in_many_pieces_is_one_reply() {
    // SHM-65, on the main socket.
    let bytes = message(44, VERSION_1 | REPLY, &shmem_config(1, 0, &[(9, 3 * PAGE)]));
    let (handshake, _backend) = Setup::default()
        .on(44, move |peer| {
            for piece in bytes.chunks(7) {
                peer.main.send(piece);
            }
            Answer::Silence
        })
        .connect();
    assert_eq!(handshake.unwrap().region_sizes[9], 3 * PAGE);
}

#[test]
fn a_silent_back_end_is_not_waited_for_without_end() {
    // SHM-12: nothing, or not all of it. The cases wait at the same time.
    let half = message(44, VERSION_1 | REPLY, &[])[..7].to_vec();
    let setups = [
        ("GET_FEATURES", Setup::default().on(1, |_| Answer::Silence)),
        ("GET_PROTOCOL_FEATURES", Setup::default().on(15, |_| Answer::Silence)),
        ("GET_QUEUE_NUM", Setup::default().on(17, |_| Answer::Silence)),
        ("GET_SHMEM_CONFIG", Setup::default().on(44, |_| Answer::Silence)),
        ("GET_SHMEM_CONFIG", Setup::default().on(44, move |_| Answer::Bytes(half.clone(), None))),
    ];
    std::thread::scope(|scope| {
        for (name, setup) in setups {
            scope.spawn(move || {
                let error = setup.connect().0.unwrap_err().to_string();
                assert!(error.contains(name), "{error}");
            });
        }
        scope.spawn(|| {
            let (handshake, backend) = Setup::default().on(21, |_| Answer::Silence).connect();
            let error = backend.device(handshake.unwrap()).err().unwrap().to_string();
            assert!(error.contains("SET_BACKEND_REQ_FD"), "{error}");
        });
    });
}
