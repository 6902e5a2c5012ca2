//! A back-end that dies and comes back (`reconnect=`): where the device goes on, what the guest sees
//! meanwhile, and which back-ends do not take another's place.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use hotslot::memory::Access;
use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::names::request::*;
use hotslot_test_support::wire::{NEED_REPLY, REPLY, SHMEM_MAP, VERSION_1, message};

use crate::sharing::{Devices, address};

fn setup() -> Setup {
    Setup::default().reconnect(60)
}

/// The values of SET_VRING_BASE.
fn bases(seen: &[Seen]) -> Vec<u64> {
    let bases = seen.iter().filter(|seen| seen.request == SET_VRING_BASE);
    bases.map(|seen| u64::from_ne_bytes(seen.payload[..8].try_into().unwrap()) >> 32).collect()
}

#[test]
fn a_back_end_that_comes_back_goes_on_where_its_rings_stand() {
    // SHM-94, SHM-95
    let bench = setup().start();
    bench.start().unwrap();
    assert_eq!(bases(&bench.seen()), [0, 0]);
    bench.set_used_index(0, 7);
    bench.set_used_index(1, 0xffff);
    let _ = (bench.kicks(0), bench.kicks(1), bench.interrupts());
    bench.kill();
    assert!(!bench.needs_reset());
    let asked = bench.asked(|| {
        bench.come_back(Offer::default());
        bench.wait_until_back();
    });
    assert_eq!(bases(&asked), [7, 0xffff]);
    let first = ids(&bench.seen());
    let second = ids(&asked);
    let start = [vec![SET_FEATURES, SET_STATUS, GET_STATUS], start()].concat();
    let handshake = &second[..second.len() - start.len() - 2];
    assert_eq!(handshake, &first[..handshake.len()], "the same handshake");
    assert_eq!(second[handshake.len()], SET_BACKEND_REQ_FD);
    assert_eq!(second[handshake.len() + 1..second.len() - 1], start);
    // What was made available, and used, while nobody looked.
    assert_eq!([bench.kicks(0), bench.kicks(1), bench.interrupts()], [1, 1, 1]);
    bench.assert_works();
    bench.reset();
    bench.start().unwrap();
    assert_eq!(bases(&bench.seen())[4..], [0, 0]);
}

#[test]
fn one_that_dies_again_and_again_is_taken_up_each_time() {
    // SHM-94
    let bench = setup().start();
    bench.start().unwrap();
    for round in 0..20 {
        bench.set_used_index(0, round);
        bench.kill();
        let asked = bench.asked(|| {
            bench.come_back(Offer::default());
            bench.wait_until_back();
        });
        assert_eq!(bases(&asked)[0], u64::from(round));
    }
    bench.assert_works();
}

#[test]
fn a_death_at_any_message_of_a_start_or_of_a_return_is_survived() {
    // SHM-94: before it answers the message, and after.
    for answers in [false, true] {
        for by_return in [false, true] {
            // A return begins with a look at the size of both queues.
            let looks = if by_return { &[SET_VRING_NUM; 2][..] } else { &[] };
            for (at, request) in looks.iter().copied().chain(start()).enumerate() {
                // How many more of a start's messages it handles; then it dies, once.
                let left = Arc::new(AtomicU64::new(u64::MAX));
                let counter = Arc::clone(&left);
                let bench = setup()
                    .script(move |asked, peer| {
                        let is_counted = start().contains(&asked.request);
                        if !is_counted || counter.load(Ordering::SeqCst) > 1 << 32 {
                            return Answer::Usual;
                        }
                        if counter.fetch_sub(1, Ordering::SeqCst) > 0 {
                            return Answer::Usual;
                        }
                        if answers && asked.flags & NEED_REPLY != 0 {
                            let answer = message(asked.request, VERSION_1 | REPLY, &[0; 8]);
                            // The test may have hung up by now.
                            let _ = peer.main().send_with(&answer, &[]);
                        }
                        Answer::HangUp
                    })
                    .start();
                let what = format!("{request} ({at}), answered: {answers}, at the return: {by_return}");
                if !by_return {
                    left.store(at as u64, Ordering::SeqCst);
                }
                bench.start().unwrap();
                if by_return {
                    bench.kill();
                    left.store(at as u64, Ordering::SeqCst);
                    bench.come_back(Offer::default());
                    eventually("it died again", || left.load(Ordering::SeqCst) > 1 << 32);
                } else {
                    eventually("it is away", || bench.shmem().is_expecting());
                }
                let asked = bench.asked(|| {
                    bench.come_back(Offer::default());
                    bench.wait_until_back();
                });
                assert!(ids(&asked).ends_with(&[SET_STATUS, GET_FEATURES]), "{what}");
                assert!(!bench.needs_reset(), "{what}");
                bench.assert_works();
            }
        }
    }
}

#[test]
fn mappings_stay_and_those_made_anew_replace_them_without_a_hole() {
    // SHM-76, SHM-77
    let remaps = Arc::new(AtomicBool::new(false));
    let does = Arc::clone(&remaps);
    let mut setup = setup().script(move |asked, peer| {
        if asked.request == SET_MEM_TABLE && does.load(Ordering::SeqCst) {
            // The same place; one that an old mapping overlaps; one with other rights.
            assert_eq!(peer.map(page_at(1), &file_of(1, 11)), 0);
            let over = hotslot_test_support::wire::MMap { len: 2 * PAGE, ..page_at(2) };
            assert_eq!(peer.map(over, &file_of(2, 12)), 0);
            assert_eq!(peer.map(writable(page_at(5)), &file_of(1, 15)), 0);
            assert_eq!(peer.map(page_at(1), &file_of(1, 99)), -i64::from(libc::EEXIST));
            // What it does not make anew it may take away itself.
            assert_eq!([0; 2].map(|_| peer.unmap(page_at(9))), [0, -i64::from(libc::ENOENT)]);
        }
        Answer::Usual
    });
    setup.quota = 5;
    let bench = setup.start();
    bench.start().unwrap();
    for page in [1, 3, 5, 7, 9] {
        assert_eq!(bench.map_page(page, page as u8), 0);
    }
    bench.kill();
    let see = |pages: &[u64]| pages.iter().map(|page| bench.reads(0, page * PAGE)).collect::<Vec<_>>();
    assert_eq!(see(&[1, 3, 5, 7, 9]), [1, 3, 5, 7, 9].map(Some));
    remaps.store(true, Ordering::SeqCst);
    bench.come_back(Offer::default());
    bench.wait_until_back();
    assert_eq!(see(&[1, 2, 3, 5, 7, 9]), [Some(11), Some(12), Some(12), Some(15), None, None]);
    assert_eq!(bench.sees(0)[2], (5 * PAGE, PAGE, Access::ReadWrite));
    assert_eq!(bench.unmap(page_at(1)), 0);
    assert_eq!(bench.unmap(page_at(7)), -i64::from(libc::ENOENT));
    assert_eq!(bench.map_page(9, 19), 0);
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn a_mapping_that_is_made_anew_keeps_its_slot() {
    // SHM-77: the guest never finds a hole there, since no slot goes.
    let mut byte = 0;
    let bench = setup()
        .on(SET_MEM_TABLE, move |peer| {
            byte += 1;
            assert_eq!(peer.map(writable(page_at(1)), &file_of(1, byte)), 0);
            Answer::Usual
        })
        .start();
    bench.start().unwrap();
    bench.guest().deletes_no_slot.store(true, Ordering::Relaxed);
    for byte in 2..5 {
        bench.kill();
        bench.come_back(Offer::default());
        bench.wait_until_back();
        assert_eq!((bench.reads(0, PAGE), bench.guest().count()), (Some(byte), 1));
    }
    bench.guest().deletes_no_slot.store(false, Ordering::Relaxed);
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn what_a_back_end_sends_without_waiting_is_mapped_before_old_mappings_go() {
    // SHM-77
    let bench = setup()
        .on(SET_BACKEND_REQ_FD, |peer| {
            let file = file_of(1, 42);
            for page in 0..40 {
                peer.channel().ask(SHMEM_MAP, page_at(page), &[file.as_raw_fd()]);
            }
            Answer::Usual
        })
        .start();
    bench.start().unwrap();
    bench.kill();
    bench.come_back(Offer::default());
    bench.wait_until_back();
    assert_eq!(bench.guest().count(), 40);
    assert_eq!(bench.reads(0, 39 * PAGE), Some(42));
}

#[test]
fn a_reset_while_it_is_away_is_over_at_once_and_it_comes_back_to_a_stopped_device() {
    // SHM-69, SHM-75, SHM-97
    let bench = setup().start();
    bench.start().unwrap();
    assert_eq!(bench.map_page(3, 3), 0);
    bench.kill();
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
    assert!(!bench.shmem().is_expecting());
    let asked = bench.asked(|| {
        bench.come_back(Offer::default());
        eventually("it is back", || ids(&bench.seen()).ends_with(&[SET_BACKEND_REQ_FD, GET_FEATURES]));
    });
    assert!(!ids(&asked).contains(&SET_MEM_TABLE));
    assert_eq!(bench.map_page(3, 3), -i64::from(libc::EBUSY));
    assert_eq!(bases(&bench.asked(|| bench.start().unwrap())), [0, 0]);
    bench.assert_works();
}

#[test]
fn what_the_driver_does_while_it_is_away_is_done_when_it_is_back() {
    // SHM-97: nothing waits for it.
    let mut setup = setup();
    setup.kind = "vsock";
    setup.keys = String::new();
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    setup.offer.queues = 3;
    let offer = setup.offer.clone();
    let bench = setup.start();
    bench.device().write_config(1, &[1]).unwrap();
    bench.kill();
    bench.start().unwrap();
    bench.device().stop_queue(0).unwrap();
    bench.device().write_config(3, &[7, 8]).unwrap();
    assert_eq!(bench.device().config(), [0, 1, 0, 7, 8, 0, 0, 0]);
    let asked = bench.asked(|| {
        bench.come_back(offer);
        bench.wait_until_back();
    });
    let written = asked.iter().filter(|seen| seen.request == SET_CONFIG);
    let written: Vec<_> = written.map(|seen| (seen.payload[0], seen.payload[12..].to_vec())).collect();
    assert_eq!(written, [(1, vec![1]), (3, vec![7, 8])]);
    // What they mean may depend on the features.
    let place = |request| asked.iter().rposition(|seen| seen.request == request).unwrap();
    let order = [SET_FEATURES, SET_CONFIG, SET_VRING_KICK].map(place);
    assert!(order.is_sorted(), "{order:?}");
    assert_eq!(bench.device().config(), [0, 1, 0, 7, 8, 0, 0, 0]);
    let kicks = asked.iter().filter(|seen| seen.request == SET_VRING_KICK);
    assert_eq!(kicks.map(|seen| seen.payload[0]).collect::<Vec<_>>(), [1]);
    bench.device().start_queue(bench.queue(0)).unwrap();
    bench.assert_works();
}

#[test]
fn a_queue_started_while_it_is_away_is_started_when_it_is_back() {
    // SHM-97
    let bench = setup().start();
    bench.start().unwrap();
    bench.device().stop_queue(1).unwrap();
    bench.kill();
    bench.device().start_queue(bench.queue(1)).unwrap();
    let asked = bench.asked(|| {
        bench.come_back(Offer::default());
        bench.wait_until_back();
    });
    assert_eq!(bases(&asked), [0, 0]);
}

#[test]
fn one_that_does_not_answer_is_away_and_not_lost() {
    // SHM-94: past the deadline of a request.
    let silent = Arc::new(AtomicBool::new(true));
    let is_silent = Arc::clone(&silent);
    let bench = setup()
        .on(GET_VRING_BASE, move |_| match is_silent.swap(false, Ordering::SeqCst) {
            true => Answer::Silence,
            false => Answer::Usual,
        })
        .start();
    bench.start().unwrap();
    bench.set_used_index(1, 5);
    bench.device().stop_queue(0).unwrap();
    assert!(bench.shmem().is_expecting() && !bench.needs_reset());
    let asked = bench.asked(|| {
        bench.come_back(Offer::default());
        bench.wait_until_back();
    });
    assert_eq!(bases(&asked), [5]);
}

#[test]
fn a_broken_stream_is_a_loss_that_it_may_come_back_from() {
    // SHM-64, SHM-94
    let bench = setup().start();
    bench.start().unwrap();
    bench.channel().send(&message(SHMEM_MAP, VERSION_1 | REPLY, &[]));
    eventually("it is cut off", || bench.shmem().is_expecting());
    bench.come_back(Offer::default());
    bench.wait_until_back();
    bench.assert_works();
}

#[test]
fn another_back_end_than_before_is_refused_by_what_differs() {
    // SHM-18, SHM-95
    let offers = |change: fn(&mut Offer)| {
        let mut offer = Offer::default();
        change(&mut offer);
        offer
    };
    let first = offers(|offer| {
        offer.features |= VIRTIO_F_INDIRECT_DESC;
        offer.protocol |= PROTOCOL_F_CONFIG;
    });
    for (offer, part) in [
        (offers(|offer| offer.protocol |= PROTOCOL_F_CONFIG), "INDIRECT_DESC"),
        (offers(|offer| offer.features |= VIRTIO_F_INDIRECT_DESC), "does not offer CONFIG"),
        (
            Offer { regions: vec![(0, REGION), (7, 2 * REGION)], ..first.clone() },
            "524288 bytes in shared memory region 7, the one before it had 262144",
        ),
        (
            Offer { regions: vec![(0, REGION)], ..first.clone() },
            "0 bytes in shared memory region 7, the one before it had 262144",
        ),
        (
            Offer { regions: vec![(0, REGION), (7, REGION), (9, REGION)], ..first.clone() },
            "262144 bytes in shared memory region 9, the one before it had 0",
        ),
        (Offer { queues: 1, ..first.clone() }, "has 1 of the 2 queues that the device is to have"),
    ] {
        let bench = setup().offering(first.clone()).start();
        bench.start().unwrap();
        assert_eq!(bench.map_page(3, 3), 0);
        bench.kill();
        let asked = bench.asked(|| {
            bench.come_back(offer);
            let why = bench.wait_for_loss();
            assert!(why.contains(part), "{why}");
        });
        assert!(!ids(&asked).contains(&SET_MEM_TABLE));
        assert_eq!(bench.reads(0, 3 * PAGE), Some(3)); // SHM-76
        assert!(!bench.shmem().is_expecting());
        bench.reset();
        assert_eq!(bench.guest().count(), 0);
        bench.start().unwrap_err();
    }
}

#[test]
fn one_that_does_not_take_the_drivers_features_is_refused() {
    // SHM-95, SHM-100
    let status = Arc::new(AtomicU64::new(0xb));
    let now = Arc::clone(&status);
    let answer = move |_: &_| {
        let status = now.load(Ordering::SeqCst).to_ne_bytes();
        Answer::Bytes(message(GET_STATUS, VERSION_1 | REPLY, &status), None)
    };
    let bench = setup().on(GET_STATUS, answer).start();
    bench.start().unwrap();
    bench.kill();
    status.store(3, Ordering::SeqCst);
    bench.come_back(Offer::default());
    let why = bench.wait_for_loss();
    assert!(why.contains("does not keep FEATURES_OK (GET_STATUS says 0x3)"), "{why}");
}

#[test]
fn one_with_less_room_than_before_is_refused_by_what_it_lacks() {
    // SHM-95: memory slots; a queue that takes less; queues that the configuration space announces.
    let mut devices = Devices::new();
    let recipient = devices.recipient(setup());
    let offer = Offer { slots: 508, ..recipient.offer.clone() };
    let bench = recipient.start();
    bench.start().unwrap();
    bench.kill();
    bench.come_back(offer);
    let why = bench.wait_for_loss();
    assert!(
        why.contains("(GET_MAX_MEM_SLOTS): the back-end that came back has 508, the one before it had 509"),
        "{why}"
    );

    let most = Arc::new(AtomicU64::new(64));
    let now = Arc::clone(&most);
    let bench = setup()
        .script(move |asked, _| {
            // Of queue 1.
            let refuses = asked.request == SET_VRING_NUM
                && asked.payload[0] == 1
                && u64::from(asked.payload[4]) > now.load(Ordering::SeqCst);
            match refuses {
                true => Answer::Bytes(message(SET_VRING_NUM, VERSION_1 | REPLY, &1u64.to_ne_bytes()), None),
                false => Answer::Usual,
            }
        })
        .start();
    bench.start().unwrap();
    bench.kill();
    most.store(32, Ordering::SeqCst);
    bench.come_back(Offer::default());
    let why = bench.wait_for_loss();
    assert!(
        why.contains(
            "came back refuses SET_VRING_NUM of 64 entries for queue 1, which the one before it took"
        ),
        "{why}"
    );

    let count = Arc::new(AtomicU64::new(2));
    let now = Arc::clone(&count);
    let mut setup = setup().on(GET_CONFIG, move |peer| {
        let asked = peer.seen().last().unwrap().payload.clone();
        let mut config = asked.clone();
        config[12 + 34] = now.load(Ordering::SeqCst) as u8;
        Answer::Bytes(message(GET_CONFIG, VERSION_1 | REPLY, &config), None)
    });
    (setup.kind, setup.keys) = ("blk", String::new());
    setup.offer.features |= 1 << 12;
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    let offer = setup.offer.clone();
    let bench = setup.start();
    bench.start().unwrap();
    bench.kill();
    count.store(1, Ordering::SeqCst);
    bench.come_back(offer);
    let why = bench.wait_for_loss();
    assert!(
        why.contains("queues that the configuration space announces: the back-end that came back has 1"),
        "{why}"
    );
}

#[test]
fn one_with_more_features_agrees_to_those_that_its_predecessor_had() {
    // SHM-95
    let offer = Offer { protocol: Offer::default().protocol | PROTOCOL_F_CONFIG, ..Offer::default() };
    let bench = setup().start();
    bench.start().unwrap();
    bench.kill();
    let asked = bench.asked(|| {
        bench.come_back(offer);
        bench.wait_until_back();
    });
    let acked = |seen: &[Seen]| {
        let found = seen.iter().find(|seen| seen.request == SET_PROTOCOL_FEATURES);
        u64::from_ne_bytes(found.unwrap().payload[..].try_into().unwrap())
    };
    assert_eq!(acked(&asked), acked(&bench.seen()));
}

#[test]
fn one_that_does_not_come_back_in_time_is_lost() {
    // SHM-76, SHM-94
    let bench = Setup::default().reconnect(1).start();
    bench.start().unwrap();
    let start = Instant::now();
    bench.kill();
    bench.start().unwrap();
    let why = bench.wait_for_loss();
    assert!(why.contains("the back-end did not come back within 1 s: cannot connect"), "{why}");
    assert!(start.elapsed().as_secs() >= 1);
    assert!(!bench.shmem().is_expecting());
    bench.come_back(Offer::default());
    assert!(bench.start().is_err(), "it is too late");
}

#[test]
fn one_that_comes_back_and_is_silent_is_not_called_absent_or_dead() {
    // SHM-94. Each waits for as long as a request may take; so both at the same time.
    thread::scope(|scope| {
        for (request, part) in [
            (GET_FEATURES, "GET_FEATURES failed: the back-end did not answer within 5000 ms"),
            (
                SET_BACKEND_REQ_FD,
                "is gone again: SET_BACKEND_REQ_FD failed: the back-end did not answer within 5000 ms",
            ),
        ] {
            scope.spawn(move || {
                let silent = Arc::new(AtomicBool::new(false));
                let is_silent = Arc::clone(&silent);
                let bench = Setup::default()
                    .reconnect(1)
                    .on(request, move |_| match is_silent.load(Ordering::SeqCst) {
                        true => Answer::Silence,
                        false => Answer::Usual,
                    })
                    .start();
                bench.start().unwrap();
                silent.store(true, Ordering::SeqCst);
                bench.kill();
                bench.come_back(Offer::default());
                let why = bench.wait_for_loss();
                assert!(
                    why.contains("came back and did not go on, after 5.") && why.contains(" s of 1 s: "),
                    "{why}"
                );
                assert!(
                    why.contains(part) && !why.contains("did not come back") && !why.contains("died"),
                    "{why}"
                );
            });
        }
    });
}

#[test]
fn one_that_refuses_to_go_on_is_lost() {
    // SHM-95
    let refuses = Arc::new(AtomicBool::new(false));
    let does = Arc::clone(&refuses);
    let bench = setup()
        .on(SET_VRING_NUM, move |_| match does.load(Ordering::SeqCst) {
            true => Answer::Bytes(message(SET_VRING_NUM, VERSION_1 | REPLY, &1u64.to_ne_bytes()), None),
            false => Answer::Usual,
        })
        .start();
    bench.start().unwrap();
    bench.kill();
    refuses.store(true, Ordering::SeqCst);
    bench.come_back(Offer::default());
    let why = bench.wait_for_loss();
    assert!(why.contains("SET_VRING_NUM"), "{why}");
}

/// A back-end with a record of requests in flight, into which it writes 0x77 when it gets one; what it finds
/// there before.
fn with_inflight() -> (Setup, Arc<Mutex<Vec<u8>>>) {
    let found = Arc::new(Mutex::new(Vec::new()));
    let finds = Arc::clone(&found);
    let mut setup = setup().script(move |asked, _| {
        match asked.request {
            GET_INFLIGHT_FD => {
                // Two queues of 64 entries; 20 bytes, and the padding of C.
                assert_eq!(asked.payload.len(), 24);
                assert_eq!(asked.payload[16..20], [2, 0, 64, 0]);
                let mut answer = asked.payload.clone();
                answer[..8].copy_from_slice(&PAGE.to_ne_bytes());
                let answer = message(GET_INFLIGHT_FD, VERSION_1 | REPLY, &answer);
                return Answer::Bytes(answer, Some(file_of(1, 0xee)));
            }
            SET_INFLIGHT_FD => {
                assert_eq!(
                    (asked.quad(0), asked.quad(8), &asked.payload[16..20]),
                    (PAGE, 0, &[2, 0, 64, 0][..])
                );
                let (file, mut byte): (File, _) = (asked.file(), [0]);
                assert_eq!(file.metadata().unwrap().len(), PAGE);
                file.read_exact_at(&mut byte, 100).unwrap();
                file.write_all_at(&[0x77], 100).unwrap();
                finds.lock().unwrap().push(byte[0]);
            }
            _ => {}
        }
        Answer::Usual
    });
    setup.offer.protocol |= PROTOCOL_F_INFLIGHT_SHMFD;
    (setup, found)
}

#[test]
fn the_record_of_requests_in_flight_comes_back_and_is_new_after_a_reset() {
    // SHM-98
    let (setup, found) = with_inflight();
    let offer = setup.offer.clone();
    let bench = setup.start();
    bench.start().unwrap();
    for _ in 0..2 {
        bench.kill();
        let asked = bench.asked(|| {
            bench.come_back(offer.clone());
            bench.wait_until_back();
        });
        let ids = ids(&asked);
        let place = |id| ids.iter().position(|&other| other == id).unwrap();
        assert!(
            place(SET_MEM_TABLE) < place(SET_INFLIGHT_FD) && place(SET_INFLIGHT_FD) < place(SET_VRING_KICK)
        );
    }
    bench.reset();
    bench.start().unwrap();
    bench.kill();
    bench.reset();
    bench.start().unwrap();
    bench.come_back(offer);
    bench.wait_until_back();
    assert_eq!(*found.lock().unwrap(), [0, 0x77, 0x77, 0, 0]);
}

#[test]
fn a_record_of_requests_in_flight_that_no_queue_needs_is_refused_before_the_guest_runs() {
    // SHM-98
    for (size, is_taken) in [(1 << 30, true), ((1 << 30) + 1, false), (1 << 63, false), (u64::MAX, false)] {
        let (mut setup, _) = with_inflight();
        setup = setup.on(GET_INFLIGHT_FD, move |peer| {
            let mut answer = peer.seen().last().unwrap().payload.clone();
            answer[..8].copy_from_slice(&u64::to_ne_bytes(size));
            Answer::Bytes(message(GET_INFLIGHT_FD, VERSION_1 | REPLY, &answer), Some(file_of(1, 0)))
        });
        let connected = setup.connect().0;
        assert_eq!(connected.is_ok(), is_taken);
        if let Err(error) = connected {
            let error = error.to_string();
            let sentence =
                format!("asks for {size:#x} bytes for its record of requests in flight (GET_INFLIGHT_FD)");
            assert!(error.contains(&sentence) && error.contains("0x40000000"), "{error}");
        }
    }
}

#[test]
fn without_reconnect_no_record_of_requests_in_flight_is_agreed_on() {
    // SHM-98
    let offer = with_inflight().0.offer;
    let bench = Setup::default().offering(offer).start();
    bench.start().unwrap();
    assert!(!bench.ids().contains(&GET_INFLIGHT_FD) && !bench.ids().contains(&SET_INFLIGHT_FD));
}

#[test]
fn others_see_the_mappings_of_a_device_that_came_back_and_it_sees_theirs() {
    // SHM-80, SHM-94
    let mut devices = Devices::new();
    let mut owner = devices.owner(setup());
    owner = owner.on(SET_MEM_TABLE, |peer| {
        let _ = peer.map(writable(page_at(1)), &file_of(1, 1));
        Answer::Usual
    });
    let recipient = devices.recipient(setup());
    let (offer, owner, other) = (recipient.offer.clone(), owner.start(), recipient.start());
    other.start().unwrap();
    owner.start().unwrap();
    let told = |asked: &[Seen]| {
        let changes = asked.iter().filter(|seen| [ADD_MEM_REG, REM_MEM_REG].contains(&seen.request));
        let place = |seen: &Seen| u64::from_ne_bytes(seen.payload[8..16].try_into().unwrap());
        changes.map(|seen| (seen.request, place(seen))).collect::<Vec<_>>()
    };
    let page = address(&owner, 1);
    assert_eq!(told(&other.seen()), [(ADD_MEM_REG, page)]);
    owner.kill();
    let asked = other.asked(|| {
        owner.come_back(Offer::default());
        owner.wait_until_back();
    });
    assert_eq!(told(&asked), [(REM_MEM_REG, page), (ADD_MEM_REG, page)]);
    other.kill();
    assert_eq!(owner.unmap(writable(page_at(1))), 0, "nobody waits for a recipient that is away");
    assert_eq!(owner.map(writable(page_at(2)), &file_of(1, 2)), 0);
    let asked = other.asked(|| {
        other.come_back(offer);
        other.wait_until_back();
    });
    assert_eq!(told(&asked), [(ADD_MEM_REG, address(&owner, 2))]);
}
