//! Connecting and negotiating: which requests are sent, which features are agreed on, which answers are
//! accepted.

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::names::request::*;
use hotslot_test_support::wire::{
    NEED_REPLY, REPLY, SHMEM_MAP, VERSION_1, message, quads, shmem_config, words,
};

/// The bits that SET_PROTOCOL_FEATURES said; `None` where it was not sent.
fn acked(seen: &[Seen]) -> Option<u64> {
    let seen = seen.iter().find(|seen| seen.request == SET_PROTOCOL_FEATURES)?;
    Some(u64::from_ne_bytes(seen.payload.as_slice().try_into().unwrap()))
}

#[test]
fn only_what_the_back_end_offers_is_accepted_and_shmem_only_under_its_own_bit() {
    let without_shmem = PROTOCOL_F_MQ
        | PROTOCOL_F_REPLY_ACK
        | PROTOCOL_F_BACKEND_REQ
        | PROTOCOL_F_BACKEND_SEND_FD
        | PROTOCOL_F_CONFIG
        | PROTOCOL_F_RESET_DEVICE
        | PROTOCOL_F_STATUS;
    let (bit20, bit21) = (1 << 20, 1 << 21);
    // SHM-82
    let all = without_shmem | PROTOCOL_F_CONFIGURE_MEM_SLOTS | PROTOCOL_F_SHMEM_ADDRESSES;
    // Offered, the bit that means SHMEM, accepted.
    for (offered, shmem_bit, expected) in [
        (u64::MAX, 22, all | PROTOCOL_F_SHMEM), // SHM-1, SHM-5
        (u64::MAX, 20, all | bit20),            // SHM-1
        (u64::MAX, 21, all | bit21),            // SHM-1
        (PROTOCOL_F_BACKEND_REQ | bit20 | bit21, 22, PROTOCOL_F_BACKEND_REQ), // SHM-1
        (PROTOCOL_F_BACKEND_REQ | bit20 | PROTOCOL_F_SHMEM, 20, PROTOCOL_F_BACKEND_REQ | bit20), // SHM-1
        (PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_SHMEM, 22, PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_SHMEM), // SHM-3
        (PROTOCOL_F_SHMEM | PROTOCOL_F_REPLY_ACK, 22, PROTOCOL_F_REPLY_ACK), // SHM-4
        (0, 22, 0),                             // SHM-3
    ] {
        let mut setup = Setup::default();
        (setup.offer.protocol, setup.shmem_bit) = (offered, shmem_bit);
        let (handshake, backend) = setup.connect();
        let has_shmem = expected & 1 << shmem_bit != 0;
        assert_eq!(handshake.unwrap().region_sizes.is_empty(), !has_shmem);
        eventually("the features are set", || backend.ids().contains(&SET_PROTOCOL_FEATURES));
        assert_eq!(acked(&backend.seen()), Some(expected), "{offered:#x}");
        assert_eq!(backend.ids().contains(&GET_SHMEM_CONFIG), has_shmem, "{offered:#x}"); // SHM-6
    }
}

#[test]
fn a_back_end_without_protocol_features_is_asked_for_none() {
    // SHM-2
    let mut setup = Setup::default();
    setup.offer.features = VIRTIO_F_VERSION_1;
    let bench = setup.start();
    bench.start().unwrap();
    bench.reset();
    let without_protocol_features = [
        GET_FEATURES,
        SET_FEATURES,
        SET_OWNER,
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_ADDR,
        SET_VRING_BASE,
        GET_VRING_BASE,
        SET_VRING_KICK,
        SET_VRING_CALL,
        SET_VRING_ERR,
    ];
    assert!(bench.ids().iter().all(|id| without_protocol_features.contains(id)));
    assert!(!bench.needs_reset());
}

#[test]
fn protocol_features_are_set_before_what_depends_on_them() {
    let bench = Setup::default().start();
    let ids = bench.ids();
    let at = |id| ids.iter().position(|&other| other == id).unwrap();
    assert!(at(GET_FEATURES) < at(GET_PROTOCOL_FEATURES));
    assert!(at(GET_PROTOCOL_FEATURES) < at(SET_PROTOCOL_FEATURES));
    assert!(at(SET_PROTOCOL_FEATURES) < at(GET_SHMEM_CONFIG)); // SHM-10
    assert!(at(SET_PROTOCOL_FEATURES) < at(SET_BACKEND_REQ_FD)); // SHM-7
    assert!(at(GET_SHMEM_CONFIG) < at(SET_BACKEND_REQ_FD)); // SHM-17
    let asked = bench.seen().into_iter().find(|seen| seen.request == GET_SHMEM_CONFIG).unwrap();
    assert_eq!((asked.flags, asked.payload.len(), asked.fds), (VERSION_1, 0, 0)); // SHM-10
    // SHM-5: an answer is asked for once REPLY_ACK is agreed on, not with what agrees on it.
    let flags = |id| bench.seen().iter().find(|seen| seen.request == id).unwrap().flags;
    assert_eq!(
        (flags(SET_PROTOCOL_FEATURES), flags(SET_BACKEND_REQ_FD)),
        (VERSION_1, VERSION_1 | NEED_REPLY)
    );
    bench.start().unwrap();
    bench.reset();
    assert_eq!(bench.ids().iter().filter(|&&id| id == GET_SHMEM_CONFIG).count(), 1); // SHM-17
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
    let bench = Setup::default()
        .without(
            PROTOCOL_F_MQ
                | PROTOCOL_F_REPLY_ACK
                | PROTOCOL_F_BACKEND_SEND_FD
                | PROTOCOL_F_RESET_DEVICE
                | PROTOCOL_F_STATUS,
        )
        .start();
    bench.start().unwrap();
    let bytes = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &page_at(3).bytes());
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
    let bench = Setup::default().without(PROTOCOL_F_SHMEM).start();
    eventually("the back-end has its channel", || bench.ids().contains(&SET_BACKEND_REQ_FD));
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
                .on(GET_SHMEM_CONFIG, move |_| {
                    Answer::Bytes(message(GET_SHMEM_CONFIG, VERSION_1 | REPLY, &reply), None)
                })
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
            eventually("the back-end has its channel", || bench.ids().contains(&SET_BACKEND_REQ_FD));
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
            .on(GET_SHMEM_CONFIG, move |_| {
                Answer::Bytes(message(GET_SHMEM_CONFIG, VERSION_1 | REPLY, &reply), None)
            })
            .connect();
        let error = handshake.unwrap_err().to_string();
        assert!(error.contains(&nregions.to_string()) && error.contains('2'), "{error}");
        assert!(!backend.ids().contains(&SET_BACKEND_REQ_FD));
    }
}

#[test]
fn impossible_sizes_fail_the_set_up() {
    let most = 1 << 40;
    let (not_pages, does_not_fit) = ("is not a multiple of the page size", "does not fit into the guest's");
    for (regions, reason) in [
        (vec![(0, 1)], not_pages),                                // SHM-15
        (vec![(0, PAGE), (1, PAGE + 1)], not_pages),              // SHM-15
        (vec![(0, PAGE), (9, PAGE - 1)], not_pages),              // SHM-15
        (vec![(0, u64::MAX)], not_pages),                         // SHM-15
        (vec![(0, 1 << 63)], does_not_fit),                       // SHM-16
        (vec![(0, most)], does_not_fit),                          // SHM-16
        (vec![(0, most / 2), (1, most / 2)], does_not_fit),       // SHM-16
        (vec![(0, most - (1 << 32)), (1, PAGE)], does_not_fit),   // SHM-16
        (vec![(0, 1 << 63), (1, 1 << 63)], does_not_fit),         // SHM-16
        (vec![(0, !(PAGE - 1)), (1, !(PAGE - 1))], does_not_fit), // SHM-16
    ] {
        let mut setup = Setup::default();
        setup.offer.regions = regions;
        let (handshake, backend) = setup.connect();
        let error = backend.device(handshake.unwrap()).err().unwrap().to_string();
        assert!(error.contains("shared memory region") && error.contains(reason), "{error}");
    }
}

#[test]
fn a_back_end_with_fewer_queues_than_the_device_is_refused() {
    let mut setup = Setup::default();
    setup.offer.queues = 1;
    let error = setup.connect().0.unwrap_err().to_string();
    assert!(error.contains("has 1 of the 2 queues"), "{error}");
    // Without MQ it does not say how many it has.
    let mut setup = Setup::default().without(PROTOCOL_F_MQ);
    setup.offer.queues = 1;
    assert_eq!(setup.connect().0.unwrap().queue_sizes, [64; 2]);
}

#[test]
fn a_malformed_answer_fails_the_set_up_and_the_error_names_the_request() {
    // SHM-12
    let good = shmem_config(1, 0, &[(0, PAGE)]);
    let reply = VERSION_1 | REPLY;
    let wrong: Vec<(&str, Vec<u8>)> = vec![
        ("empty", message(GET_SHMEM_CONFIG, reply, &[])),
        ("a u64", message(GET_SHMEM_CONFIG, reply, &quads([0]))),
        ("a byte short", message(GET_SHMEM_CONFIG, reply, &good[..2055])),
        ("a byte long", message(GET_SHMEM_CONFIG, reply, &[&good[..], &[0]].concat())),
        ("oversized", words([GET_SHMEM_CONFIG, reply, 1 << 20])),
        ("as large as can be", words([GET_SHMEM_CONFIG, reply, u32::MAX])),
        ("another id", message(GET_SHMEM_CONFIG - 1, reply, &good)),
        ("no reply", message(GET_SHMEM_CONFIG, VERSION_1, &good)),
        ("version 0", message(GET_SHMEM_CONFIG, REPLY, &good)),
        ("version 2", message(GET_SHMEM_CONFIG, 2 | REPLY, &good)),
        ("version 3", message(GET_SHMEM_CONFIG, 3 | REPLY, &good)),
    ];
    for (what, bytes) in wrong {
        let (handshake, _backend) =
            Setup::default().on(GET_SHMEM_CONFIG, move |_| Answer::Bytes(bytes.clone(), None)).connect();
        let error = handshake.expect_err(what).to_string();
        assert!(error.contains("GET_SHMEM_CONFIG"), "{what}: {error}");
    }
    // With a descriptor; and the end, between messages or inside one.
    let bytes = message(GET_SHMEM_CONFIG, reply, &good);
    let half = bytes[..1000].to_vec();
    let setups = [
        Setup::default().on(GET_SHMEM_CONFIG, move |_| Answer::Bytes(bytes.clone(), Some(memfd(0)))),
        Setup::default().on(GET_SHMEM_CONFIG, |_| Answer::HangUp),
        Setup::default().on(GET_SHMEM_CONFIG, move |peer| {
            peer.main().send(&half);
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
    let bytes = message(GET_SHMEM_CONFIG, VERSION_1 | REPLY, &shmem_config(1, 0, &[(9, 3 * PAGE)]));
    let (handshake, _backend) = Setup::default()
        .on(GET_SHMEM_CONFIG, move |peer| {
            for piece in bytes.chunks(7) {
                peer.main().send(piece);
            }
            Answer::Silence
        })
        .connect();
    assert_eq!(handshake.unwrap().region_sizes[9], 3 * PAGE);
}

#[test]
fn a_silent_back_end_is_not_waited_for_without_end() {
    // SHM-12: nothing, or not all of it. The cases wait at the same time.
    let half = message(GET_SHMEM_CONFIG, VERSION_1 | REPLY, &[])[..7].to_vec();
    let setups = [
        ("GET_FEATURES", Setup::default().on(GET_FEATURES, |_| Answer::Silence)),
        ("GET_PROTOCOL_FEATURES", Setup::default().on(GET_PROTOCOL_FEATURES, |_| Answer::Silence)),
        ("GET_QUEUE_NUM", Setup::default().on(GET_QUEUE_NUM, |_| Answer::Silence)),
        ("GET_SHMEM_CONFIG", Setup::default().on(GET_SHMEM_CONFIG, |_| Answer::Silence)),
        (
            "GET_SHMEM_CONFIG",
            Setup::default().on(GET_SHMEM_CONFIG, move |_| Answer::Bytes(half.clone(), None)),
        ),
    ];
    std::thread::scope(|scope| {
        for (name, setup) in setups {
            scope.spawn(move || {
                let error = setup.connect().0.unwrap_err().to_string();
                assert!(error.contains(name), "{error}");
            });
        }
        scope.spawn(|| {
            let (handshake, backend) = Setup::default().on(SET_BACKEND_REQ_FD, |_| Answer::Silence).connect();
            let error = backend.device(handshake.unwrap()).err().unwrap().to_string();
            assert!(error.contains("SET_BACKEND_REQ_FD"), "{error}");
        });
    });
}
