//! Start, stop, reset, and the end of a back-end: the requests it is sent, and what becomes of the mappings.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::names::request::*;
use hotslot_test_support::wire::{NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, message};

const EBUSY: i64 = -(libc::EBUSY as i64);
const ENOENT: i64 = -(libc::ENOENT as i64);

/// A back-end that maps page `page` of region 0 on the thread that serves the main socket, before it answers
/// `request`. The answer to the SHMEM_MAP ends up in the number; u64::MAX before.
fn maps_inside(request: u32, page: u64) -> (Setup, Arc<AtomicU64>) {
    let answered = Arc::new(AtomicU64::new(u64::MAX));
    let store = Arc::clone(&answered);
    let setup = Setup::default().on(request, move |peer| {
        let result = peer.map(page_at(page), &file_of(1, 7));
        store.store(result.unsigned_abs(), Ordering::SeqCst);
        Answer::Usual
    });
    (setup, answered)
}

#[test]
fn a_start_tells_the_memory_then_each_ring_then_the_status() {
    let bench = Setup::default().start();
    let asked = bench.asked(|| bench.start().unwrap());
    assert_eq!(ids(&asked), start());
    // SHM-75: each is over before the driver goes on.
    assert!(asked.iter().all(|seen| seen.flags == VERSION_1 | NEED_REPLY));
    let table = &asked[1];
    assert_eq!((table.payload.len(), table.fds), (8 + 32, 1));
    assert_eq!(asked[5].fds + asked[6].fds + asked[7].fds, 3, "call, error and kick");
}

#[test]
fn a_back_end_with_status_says_whether_it_takes_the_drivers_features() {
    // SHM-100: it takes all but EVENT_IDX.
    let mut taken = 0;
    let mut offer = Offer::default();
    offer.features |= VIRTIO_F_EVENT_IDX;
    let bench = Setup::default()
        .offering(offer.clone())
        .script(move |asked, _| match asked.request {
            SET_FEATURES => {
                taken = if asked.quad(0) & VIRTIO_F_EVENT_IDX == 0 { 0xb } else { 3 };
                Answer::Usual
            }
            GET_STATUS => {
                Answer::Bytes(message(GET_STATUS, VERSION_1 | REPLY, &u64::to_ne_bytes(taken)), None)
            }
            _ => Answer::Usual,
        })
        .start();
    bench.reset();
    for (more, is_taken) in [(VIRTIO_F_EVENT_IDX, false), (0, true)] {
        let mut accepted = Ok(());
        let asked = bench.asked(|| accepted = bench.device().accept_features(VIRTIO_F_VERSION_1 | more));
        assert_eq!(ids(&asked), [SET_FEATURES, SET_STATUS, GET_STATUS]);
        // ACKNOWLEDGE, DRIVER, FEATURES_OK
        assert_eq!(asked[1].payload, 0xbu64.to_ne_bytes());
        assert_eq!(accepted.is_ok(), is_taken);
        if let Err(error) = accepted {
            let error = error.to_string();
            assert!(error.contains("does not keep FEATURES_OK (GET_STATUS says 0x3)"), "{error}");
            assert!(error.contains("features 0x120000000"), "{error}");
        }
    }
    // SHM-75: the start has begun.
    assert_eq!(bench.map_page(0, 1), 0);
    bench.start().unwrap();
    assert!(!bench.needs_reset());
    let without = Setup::default().offering(offer).without(PROTOCOL_F_STATUS).start();
    let asked = without.asked(|| without.device().accept_features(VIRTIO_F_VERSION_1).unwrap());
    assert!(asked.is_empty());
    // One that is lost is found at the start.
    bench.hang_up();
    bench.wait_until_failed();
    bench.device().accept_features(VIRTIO_F_VERSION_1).unwrap();
    bench.start().unwrap_err();
}

#[test]
fn features_that_are_accepted_while_the_back_end_is_away_are_its_next_ones() {
    // SHM-97, SHM-100
    let bench = Setup::default().reconnect(60).start();
    bench.kill();
    bench.device().accept_features(VIRTIO_F_VERSION_1).unwrap();
    bench.start().unwrap();
    bench.come_back(Offer::default());
    bench.wait_until_back();
    bench.assert_works();
}

#[test]
fn a_queue_size_that_is_refused_at_the_start_is_a_sentence_with_both_numbers_and_the_key() {
    // SHM-90: it took 64 before the guest ran.
    let mut tried = 0;
    let bench = Setup::default()
        .on(SET_VRING_NUM, move |_| {
            tried += 1;
            let refuses = u64::from(tried > 2);
            Answer::Bytes(message(SET_VRING_NUM, VERSION_1 | REPLY, &refuses.to_ne_bytes()), None)
        })
        .start();
    let mut queue = bench.queue(1);
    queue.size = 32;
    let error = bench.device().start(VIRTIO_F_VERSION_1, &[queue]).unwrap_err().to_string();
    assert!(error.contains("refuses SET_VRING_NUM of 32 entries for queue 1"), "{error}");
    assert!(error.contains("it took 64") && error.contains("queue-size=N"), "{error}");
}

#[test]
fn a_start_without_reply_ack_is_over_once_the_back_end_has_handled_it() {
    // SHM-88: else a back-end may meet the driver's first kick before the ring is enabled, and lose it.
    let bench = Setup::default().without(PROTOCOL_F_REPLY_ACK).start();
    let asked = bench.asked(|| bench.start().unwrap());
    assert_eq!(ids(&asked), [start(), vec![GET_FEATURES]].concat());
    // One that dies before it has handled all fails the start. It is asked three times in the set-up.
    let mut asked = 0;
    let dying = Setup::default().without(PROTOCOL_F_REPLY_ACK).on(GET_FEATURES, move |_| {
        asked += 1;
        if asked > 3 { Answer::HangUp } else { Answer::Usual }
    });
    dying.start().start().unwrap_err();
}

#[test]
fn mappings_are_not_in_their_owners_memory_table() {
    // SHM-79
    let bench = Setup::default().start();
    let before = bench.asked(|| bench.start().unwrap());
    assert_eq!(bench.map_page(0, 1), 0);
    let after = bench.asked(|| {
        bench.reset();
        bench.start().unwrap();
    });
    let table =
        |seen: &[Seen]| seen.iter().find(|seen| seen.request == SET_MEM_TABLE).unwrap().payload.clone();
    assert_eq!(table(&before), table(&after));
    assert!(!ids(&after).iter().any(|id| [ADD_MEM_REG, REM_MEM_REG].contains(id)));
}

#[test]
fn a_reset_stops_each_ring_then_resets_as_was_agreed_then_unmaps() {
    // SHM-70
    for (lacks, told) in [
        (0, vec![RESET_DEVICE, SET_STATUS]),
        (PROTOCOL_F_STATUS, vec![RESET_DEVICE]),
        (PROTOCOL_F_RESET_DEVICE, vec![SET_STATUS]),
        (PROTOCOL_F_RESET_DEVICE | PROTOCOL_F_STATUS, vec![]),
        (PROTOCOL_F_RESET_DEVICE | PROTOCOL_F_STATUS | PROTOCOL_F_REPLY_ACK, vec![]),
    ] {
        let bench = Setup::default().without(lacks).start();
        bench.start().unwrap();
        let file = file_of(1, 1);
        let bytes = message(SHMEM_MAP, VERSION_1, &page_at(0).bytes());
        bench.channel().send_with(&bytes, &[file.as_raw_fd()]).unwrap();
        eventually("it is mapped", || bench.guest().count() == 1);
        let asked = bench.asked(|| bench.reset());
        assert_eq!(bench.guest().count(), 0); // SHM-69
        assert_eq!(ids(&asked), [&[GET_VRING_BASE; 2][..], &told].concat());
        assert_eq!((asked[0].payload[0], asked[1].payload[0]), (0, 1), "both rings");
        if let Some(status) = asked.iter().find(|seen| seen.request == SET_STATUS) {
            assert_eq!(status.payload, [0; 8]);
        }
        assert!(!bench.needs_reset());
    }
}

#[test]
fn mappings_are_still_there_while_the_back_end_is_told_of_the_reset() {
    // SHM-69: it may still use them until it has answered.
    let seen = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&seen);
    let setup = Setup::default();
    let guest = Arc::clone(&setup.guest);
    let bench = setup
        .on(RESET_DEVICE, move |_| {
            count.store(guest.count() as u64, Ordering::SeqCst);
            Answer::Usual
        })
        .start();
    assert_eq!(bench.map_page(0, 1), 0);
    bench.reset();
    assert_eq!((seen.load(Ordering::SeqCst), bench.guest().count()), (1, 0));
}

#[test]
fn only_rings_that_run_are_stopped() {
    let bench = Setup::default().start();
    assert_eq!(ids(&bench.asked(|| bench.reset())), [RESET_DEVICE, SET_STATUS]);
    bench.start().unwrap();
    bench.device().stop_queue(0).unwrap();
    let asked = bench.asked(|| bench.reset());
    assert_eq!(ids(&asked), [GET_VRING_BASE, RESET_DEVICE, SET_STATUS]);
    assert_eq!(asked[0].payload[0], 1);
    assert_eq!(ids(&bench.asked(|| bench.reset())), [RESET_DEVICE, SET_STATUS]);
}

#[test]
fn a_ring_whose_start_was_refused_half_way_is_stopped_by_the_reset() {
    let refuse = Arc::new(AtomicBool::new(true));
    let refused = Arc::clone(&refuse);
    let bench = Setup::default()
        .script(move |request, _| {
            match request.request == SET_VRING_ENABLE && refused.load(Ordering::SeqCst) {
                true => {
                    Answer::Bytes(message(SET_VRING_ENABLE, VERSION_1 | REPLY, &1u64.to_ne_bytes()), None)
                }
                false => Answer::Usual,
            }
        })
        .start();
    let error = bench.start().unwrap_err().to_string();
    assert!(error.contains("SET_VRING_ENABLE"), "{error}");
    let asked = bench.asked(|| bench.reset());
    assert_eq!(ids(&asked), [GET_VRING_BASE, RESET_DEVICE, SET_STATUS]);
    refuse.store(false, Ordering::SeqCst);
    bench.start().unwrap();
    bench.assert_works();
}

#[test]
fn a_refused_reset_does_not_keep_the_rest_from_being_done() {
    // SHM-69, SHM-70
    let bench = Setup::default()
        .on(RESET_DEVICE, |_| {
            Answer::Bytes(message(RESET_DEVICE, VERSION_1 | REPLY, &1u64.to_ne_bytes()), None)
        })
        .start();
    assert_eq!(bench.map_page(0, 1), 0);
    assert_eq!(ids(&bench.asked(|| bench.reset())), [RESET_DEVICE, SET_STATUS]);
    assert_eq!(bench.guest().count(), 0);
    bench.start().unwrap();
    bench.assert_works();
}

#[test]
fn a_back_end_may_map_as_soon_as_it_has_its_channel() {
    // SHM-67, SHM-68: before it answers SET_BACKEND_REQ_FD, and long before it is started.
    let (setup, answered) = maps_inside(SET_BACKEND_REQ_FD, 5);
    let bench = setup.start();
    assert_eq!(answered.load(Ordering::SeqCst), 0);
    assert_eq!(bench.reads(0, 5 * PAGE), Some(7));
}

#[test]
fn a_back_end_may_map_while_it_handles_our_requests() {
    // SHM-67: it waits for us while we wait for it. SHM-75: a start is what allows it again.
    for (request, expected) in [
        (SET_MEM_TABLE, 0),
        (SET_VRING_ENABLE, 0),
        (GET_VRING_BASE, EBUSY),
        (RESET_DEVICE, EBUSY),
        (SET_STATUS, 0),
    ] {
        let (setup, answered) = maps_inside(request, request.into());
        let bench = setup.start();
        if request != GET_VRING_BASE && request != RESET_DEVICE {
            bench.reset();
            let _ = answered.swap(u64::MAX, Ordering::SeqCst);
            let asked = bench.asked(|| bench.start().unwrap());
            assert!(ids(&asked).contains(&request));
            // The second ring's SET_VRING_ENABLE finds it mapped already.
            let result = answered.load(Ordering::SeqCst) as i64;
            assert!([expected, i64::from(libc::EEXIST)].contains(&result), "{request}: {result}");
            assert_eq!(bench.reads(0, u64::from(request) * PAGE), Some(7), "there when the driver goes on");
        } else {
            bench.start().unwrap();
            bench.reset();
            assert_eq!(-(answered.load(Ordering::SeqCst) as i64), expected); // SHM-71
        }
        bench.reset();
        assert_eq!(bench.guest().count(), 0);
        assert!(!bench.needs_reset());
    }
}

#[test]
fn a_back_end_may_unmap_while_it_is_reset() {
    // SHM-67, SHM-71
    let answered = Arc::new(AtomicU64::new(u64::MAX));
    let store = Arc::clone(&answered);
    let bench = Setup::default()
        .on(RESET_DEVICE, move |peer| {
            let result = peer.unmap(page_at(2));
            store.store(result.unsigned_abs(), Ordering::SeqCst);
            Answer::Usual
        })
        .start();
    assert_eq!(bench.map_page(2, 1), 0);
    bench.reset();
    assert_eq!((answered.load(Ordering::SeqCst), bench.guest().count()), (0, 0));
}

#[test]
fn what_is_queued_before_the_reset_is_over_leaves_nothing_behind() {
    // SHM-71
    let bench = Setup::default()
        .on(RESET_DEVICE, |peer| {
            let file = file_of(1, 1);
            for page in 0..16 {
                peer.channel().ask(SHMEM_MAP, page_at(page), &[file.as_raw_fd()]);
            }
            Answer::Usual
        })
        .start();
    bench.start().unwrap();
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
    bench.start().unwrap();
    let channel = bench.channel();
    for _ in 0..16 {
        assert_eq!(channel.answer(SHMEM_MAP), EBUSY);
    }
    assert_eq!(bench.guest().count(), 0);
    bench.assert_works();
}

#[test]
fn a_reset_is_not_over_before_what_was_sent_until_then_was_read() {
    // SHM-71: the device's thread has no room for its answers, so a SHMEM_MAP waits behind them. The reset
    // waits, too; were it over, the SHMEM_MAP would come after the next start, which allows it.
    const BEFORE: usize = 1000;
    let (tell, told) = std::sync::mpsc::channel();
    let bench = Setup::default()
        .on(RESET_DEVICE, move |_| {
            tell.send(()).unwrap();
            Answer::Usual
        })
        .start();
    bench.start().unwrap();
    let channel = bench.channel();
    let file = file_of(1, 1);
    channel.send(&message(backend_request::UNKNOWN, VERSION_1 | NEED_REPLY, &[]).repeat(BEFORE));
    channel.ask(SHMEM_MAP, page_at(0), &[file.as_raw_fd()]);
    let reader = std::thread::spawn(move || {
        told.recv().unwrap();
        // Long enough for a reset that does not wait, and for the start after it.
        std::thread::sleep(std::time::Duration::from_millis(300));
        for _ in 0..BEFORE {
            channel.answer(backend_request::UNKNOWN);
        }
        channel.answer(SHMEM_MAP)
    });
    bench.reset();
    bench.start().unwrap();
    assert_eq!(reader.join().unwrap(), EBUSY);
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn between_reset_and_start_nothing_is_mapped_and_from_the_start_on_everything_is_new() {
    let bench = Setup::default().start();
    assert_eq!(bench.map_page(0, 1), 0); // SHM-68: before the first start
    bench.start().unwrap();
    assert_eq!(bench.reads(0, 0), Some(1));
    bench.reset();
    assert_eq!(bench.map_page(0, 2), EBUSY); // SHM-75
    assert_eq!(bench.unmap(page_at(0)), ENOENT); // SHM-72
    assert_eq!(bench.guest().count(), 0);
    bench.start().unwrap();
    assert_eq!(bench.unmap(page_at(0)), ENOENT); // SHM-72
    assert_eq!(bench.map_page(0, 3), 0); // SHM-72
    assert_eq!(bench.reads(0, 0), Some(3));
    bench.reset();
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn half_a_request_from_before_the_reset_is_refused_when_its_other_half_comes() {
    // SHM-71, SHM-75
    for cut in [1, 12, 40, 51] {
        let bench = Setup::default().start();
        bench.start().unwrap();
        let channel = bench.channel();
        let file = file_of(1, 1);
        let bytes = message(SHMEM_MAP, VERSION_1 | NEED_REPLY, &page_at(0).bytes());
        channel.send_with(&bytes[..cut], &[file.as_raw_fd()]).unwrap();
        bench.reset();
        bench.start().unwrap();
        channel.send(&bytes[cut..]);
        assert_eq!(channel.answer(SHMEM_MAP), EBUSY, "cut at {cut}");
        assert_eq!(bench.guest().count(), 0);
        assert_eq!(bench.map_page(0, 2), 0, "the next one is new");
    }
}

#[test]
fn neither_a_queues_reset_nor_a_stopped_ring_unmaps() {
    // SHM-73, SHM-74, SHM-75
    let bench = Setup::default().start();
    bench.start().unwrap();
    assert_eq!(bench.map_page(0, 1), 0);
    assert_eq!(ids(&bench.asked(|| bench.device().stop_queue(0).unwrap())), [GET_VRING_BASE]);
    bench.device().stop_queue(1).unwrap();
    assert_eq!(bench.reads(0, 0), Some(1));
    assert_eq!(bench.map_page(1, 2), 0);
    bench.device().start_queue(bench.queue(0)).unwrap();
    assert_eq!((bench.reads(0, 0), bench.reads(0, PAGE)), (Some(1), Some(2)));
}

#[test]
fn a_ring_outside_ram_fails_the_start_and_nothing_else() {
    let bench = Setup::default().start();
    let mut queue = bench.queue(0);
    queue.device_area = (16 << 20) - 6;
    let result = bench.device().start(VIRTIO_F_VERSION_1, &[queue]);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("used ring") && error.contains("0xfffffa"), "{error}");
    assert_eq!(ids(&bench.asked(|| bench.reset())), [RESET_DEVICE, SET_STATUS]);
    bench.start().unwrap();
    bench.assert_works();
}

#[test]
fn a_back_end_that_dies_leaves_its_mappings_until_the_reset() {
    // SHM-76
    let other = Setup::default().start();
    for request in [GET_VRING_BASE, SET_STATUS] {
        let bench = Setup::default().on(request, |_| Answer::HangUp).start();
        let started = bench.start();
        assert_eq!(started.is_err(), request == SET_STATUS);
        if request == GET_VRING_BASE {
            assert_eq!(bench.map_page(5, 5), 0);
            bench.device().stop_queue(0).unwrap_err();
            bench.wait_until_failed();
            assert_eq!(bench.reads(0, 5 * PAGE), Some(5));
        }
        bench.wait_until_failed();
        bench.reset();
        assert_eq!(bench.guest().count(), 0);
        assert!(bench.start().is_err());
        bench.reset();
        other.assert_works();
    }
}

/// A started device with page 5 mapped.
fn with_page_5() -> Bench {
    let bench = Setup::default().start();
    bench.start().unwrap();
    assert_eq!(bench.map_page(5, 5), 0);
    bench
}

#[test]
fn a_back_end_that_dies_unasked_is_noticed() {
    // SHM-76, SHM-8
    let bench = with_page_5();
    // The last things that it says are still heard.
    let file = file_of(1, 6);
    let channel = bench.channel();
    for page in 6..64 {
        let bytes = message(SHMEM_MAP, VERSION_1, &page_at(page).bytes());
        channel.send_with(&bytes, &[file.as_raw_fd()]).unwrap();
    }
    bench.main().socket().shutdown(std::net::Shutdown::Both).unwrap();
    bench.wait_until_failed();
    assert_eq!((bench.reads(0, 5 * PAGE), bench.reads(0, 63 * PAGE)), (Some(5), Some(6)));
    channel.wait_for_end();
    bench.reset();
    assert_eq!(bench.guest().count(), 0);
}

#[test]
fn a_back_end_that_hangs_up_halfway_is_given_up() {
    // SHM-76: it still listens on the main socket, and will never answer.
    let bench = with_page_5();
    let channel = bench.channel();
    bench.main().socket().shutdown(std::net::Shutdown::Write).unwrap();
    bench.wait_until_failed();
    assert_eq!(bench.reads(0, 5 * PAGE), Some(5));
    channel.wait_for_end();
}

#[test]
fn mappings_go_even_if_the_back_end_never_answers_a_reset() {
    // SHM-69, SHM-70: the vCPU waits for a bounded time. The cases wait at the same time.
    std::thread::scope(|scope| {
        for request in [GET_VRING_BASE, RESET_DEVICE, SET_STATUS] {
            scope.spawn(move || {
                let silent = Arc::new(AtomicBool::new(false));
                let is_silent = Arc::clone(&silent);
                let bench = Setup::default()
                    .script(move |message, _| {
                        match message.request == request && is_silent.load(Ordering::SeqCst) {
                            true => Answer::Silence,
                            false => Answer::Usual,
                        }
                    })
                    .start();
                bench.start().unwrap();
                assert_eq!(bench.map_page(0, 1), 0);
                silent.store(true, Ordering::SeqCst);
                let channel = bench.channel();
                bench.reset();
                assert_eq!(bench.guest().count(), 0);
                // It is cut off, and cannot come back.
                channel.wait_for_end();
                assert!(bench.needs_reset());
                bench.start().unwrap_err();
            });
        }
    });
}

#[test]
fn a_wrong_answer_to_what_we_ask_cuts_the_back_end_off() {
    // SHM-69: the stream is out of step. The mappings go all the same.
    for wrong in [
        message(GET_VRING_BASE, VERSION_1 | REPLY, &[]),
        message(GET_VRING_BASE, VERSION_1 | REPLY, &[0; 16]),
        message(GET_VRING_BASE, VERSION_1, &[0; 8]),
        message(SET_STATUS, VERSION_1 | REPLY, &[0; 8]),
        message(GET_VRING_BASE, REPLY, &[0; 8]),
    ] {
        let bytes = wrong.clone();
        let bench = Setup::default().on(GET_VRING_BASE, move |_| Answer::Bytes(bytes.clone(), None)).start();
        bench.start().unwrap();
        assert_eq!(bench.map_page(0, 1), 0);
        let channel = bench.channel();
        let asked = bench.asked(|| bench.reset());
        assert_eq!(ids(&asked), [GET_VRING_BASE], "{wrong:?}");
        channel.wait_for_end();
        assert_eq!(bench.guest().count(), 0, "{wrong:?}");
        assert!(bench.start().is_err(), "{wrong:?}");
    }
}

#[test]
fn a_malformed_message_during_a_reset_fails_the_device() {
    // SHM-64, SHM-71: the vCPU thread or the device's thread may read it.
    for bytes in [message(SHMEM_UNMAP, VERSION_1 | REPLY, &[]), message(SHMEM_UNMAP, 0, &[])] {
        for _ in 0..20 {
            let noise = bytes.clone();
            let bench = Setup::default()
                .on(SET_STATUS, move |peer| {
                    peer.channel().send(&noise);
                    Answer::Usual
                })
                .start();
            let channel = bench.channel();
            bench.reset();
            channel.wait_for_end();
            assert!(bench.start().is_err());
        }
    }
}

#[test]
fn the_configuration_space_is_the_back_ends() {
    let mut setup = Setup::default();
    setup.kind = "vsock";
    setup.keys = String::new();
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    setup.offer.queues = 3;
    let bench = setup.start();
    assert_eq!(bench.device().config(), [0; 8]);
    let asked = bench.asked(|| bench.device().write_config(4, &[1, 2]).unwrap());
    assert_eq!(asked[0].request, SET_CONFIG);
    assert_eq!(asked[0].payload, [&[4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0][..], &[1, 2]].concat());
    assert_eq!(bench.device().config(), [0, 0, 0, 0, 1, 2, 0, 0]);
    for (offset, len) in [(7, 2), (8, 1), (u64::MAX, 4)] {
        let asked = bench.asked(|| bench.device().write_config(offset, &vec![0; len]).unwrap());
        assert!(asked.is_empty(), "beyond its end");
    }
}

#[test]
fn a_scsi_drivers_settings_are_told_only_where_they_change_something() {
    // Linux writes sense_size and cdb_size at each start; vhost-device-scsi 0.1.0 ends at SET_CONFIG.
    let mut setup = Setup::default();
    setup.kind = "scsi";
    setup.keys = String::new();
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    setup.offer.queues = 3;
    let bench = setup.start();
    let ids = |data: &[u8]| ids(&bench.asked(|| bench.device().write_config(20, data).unwrap()));
    assert!(ids(&[0, 0, 0, 0]).is_empty());
    assert_eq!(ids(&[96, 0, 0, 0]), [SET_CONFIG]);
    assert!(ids(&[96, 0, 0, 0]).is_empty());
}
