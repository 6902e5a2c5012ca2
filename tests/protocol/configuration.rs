//! A configuration space that changes while the guest runs (BACKEND_CONFIG_CHANGE_MSG).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use hotslot::virtio::device::VirtioDevice;
use hotslot_test_support::bench::*;
use hotslot_test_support::names::backend_request::CONFIG_CHANGE_MSG;
use hotslot_test_support::names::request::*;
use hotslot_test_support::wire::{NEED_REPLY, REPLY, VERSION_1, message};

/// A device whose configuration is 8 times the byte that the test sets.
fn setup() -> (Setup, Arc<AtomicU8>) {
    let byte = Arc::new(AtomicU8::new(1));
    let now = Arc::clone(&byte);
    let mut setup = Setup::default().script(move |asked, _| match asked.request {
        GET_CONFIG => {
            let config = [&asked.payload[..12], &[now.load(Ordering::SeqCst); 8]].concat();
            Answer::Bytes(message(GET_CONFIG, VERSION_1 | REPLY, &config), None)
        }
        _ => Answer::Usual,
    });
    setup.kind = "vsock";
    setup.keys = String::new();
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    setup.offer.queues = 3;
    (setup, byte)
}

fn announce(bench: &Bench, flags: u32) {
    bench.channel().send(&message(CONFIG_CHANGE_MSG, VERSION_1 | flags, &[]));
}

#[test]
fn a_changed_configuration_is_shown_under_a_new_generation() {
    // SHM-96
    let (setup, byte) = setup();
    let bench = setup.start();
    bench.start().unwrap();
    assert_eq!(bench.device().config(), [1; 8]);
    for (value, flags) in [(2, NEED_REPLY), (3, 0)] {
        let generation = bench.register(Register::ConfigGeneration);
        byte.store(value, Ordering::SeqCst);
        announce(&bench, flags);
        if flags != 0 {
            assert_eq!(bench.channel().answer(CONFIG_CHANGE_MSG), 0);
        }
        eventually("it is shown", || bench.register(Register::ConfigGeneration) != generation);
        assert_eq!(bench.device().config(), [value; 8]);
    }
    bench.assert_works();
}

#[test]
fn what_did_not_change_is_not_told() {
    // SHM-96: a back-end that says so all the time does not drown the guest in interrupts.
    let (setup, _) = setup();
    let bench = setup.start();
    bench.start().unwrap();
    let generation = bench.register(Register::ConfigGeneration);
    let asked = bench.asked(|| {
        announce(&bench, 0);
        eventually("it is asked", || bench.ids().last() == Some(&GET_CONFIG));
    });
    assert_eq!(ids(&asked), [GET_CONFIG]);
    // The next answer is asked for after this one was handled.
    announce(&bench, 0);
    eventually("it is asked again", || ids(&bench.seen()).ends_with(&[GET_CONFIG, GET_CONFIG]));
    assert_eq!((bench.interrupts(), bench.register(Register::ConfigGeneration)), (0, generation));
}

#[test]
fn the_channel_is_served_while_the_configuration_is_asked_for() {
    // SHM-67, SHM-96: a back-end of one thread maps before it answers GET_CONFIG.
    let (tell, told) = mpsc::channel();
    let mut is_set_up = false;
    let mut setup = Setup::default().script(move |asked, peer| {
        if asked.request == GET_CONFIG && std::mem::replace(&mut is_set_up, true) {
            tell.send(peer.map(page_at(4), &file_of(1, 4))).unwrap();
        }
        Answer::Usual
    });
    setup.kind = "vsock";
    setup.keys = String::new();
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    setup.offer.queues = 3;
    let bench = setup.start();
    announce(&bench, 0);
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 0);
    assert_eq!(bench.reads(0, 4 * PAGE), Some(4));
}

#[test]
fn without_config_there_is_no_configuration_to_change() {
    let bench = Setup::default().start();
    announce(&bench, NEED_REPLY);
    assert_eq!(bench.channel().answer(CONFIG_CHANGE_MSG), -i64::from(libc::EOPNOTSUPP));
    bench.assert_works();
}

#[test]
fn what_an_input_driver_writes_is_a_question_with_an_answer_in_the_same_space() {
    // VIRTIO section 5.8.5: `select` and `subsel` choose what the other fields say. A back-end is given
    // the whole space, and answers a question that it does not know with zeroes only, as
    // `vhost-device-input` does.
    let asked_for = Arc::new(Mutex::new([0; 2]));
    let mut setup = Setup::default().script(move |asked, _| match asked.request {
        SET_CONFIG => {
            assert_eq!((asked.payload.len(), &asked.payload[..4]), (12 + 136, &[0; 4][..]));
            asked_for.lock().unwrap().copy_from_slice(&asked.payload[12..14]);
            Answer::Usual
        }
        GET_CONFIG => {
            let mut config = vec![0; asked.payload.len() - 12];
            if let question @ ([1, 0] | [0x11, 1..=2]) = *asked_for.lock().unwrap() {
                config[..2].copy_from_slice(&question);
                config[2..].fill(question[0].wrapping_mul(16) + question[1]);
            }
            let config = [&asked.payload[..12], &config].concat();
            Answer::Bytes(message(GET_CONFIG, VERSION_1 | REPLY, &config), None)
        }
        _ => Answer::Usual,
    });
    setup.kind = "input";
    setup.keys = String::new();
    setup.offer.protocol |= PROTOCOL_F_CONFIG;
    let bench = setup.start();
    bench.start().unwrap();
    let generation = bench.register(Register::ConfigGeneration);
    let answers = |select: u8, subsel: u8, value: u8| {
        bench.device().write_config(0, &[select]).unwrap();
        bench.device().write_config(1, &[subsel]).unwrap();
        let config = bench.device().config();
        assert_eq!((&config[..2], &config[2..]), (&[select, subsel][..], &[value; 134][..]));
    };
    answers(1, 0, 0x10);
    // The driver writes `select` first, and 0x11 with the 0 of before is no question that this back-end
    // knows.
    answers(0x11, 1, 0x11);
    answers(0x11, 2, 0x12);
    answers(0x11, 3, 0);
    answers(0x11, 1, 0x11);
    assert_eq!(bench.register(Register::ConfigGeneration), generation, "no interrupt for an answer");
}
