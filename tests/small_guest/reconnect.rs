//! The death of a back-end and its return (`reconnect=`, `--backend-loss`), as guest and user see them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use hotslot_test_support::backend::{Answer, Backend, Connection, Offer};
use hotslot_test_support::files::{MIB, PAGE, content, numbered_file};
use hotslot_test_support::guest::{Guest, NEEDS_RESET, RUNNING, register};
use hotslot_test_support::kvm;
use hotslot_test_support::monitor::Operation;
use hotslot_test_support::names::{PROTOCOL_F_CONFIG, backend_request, request};
use hotslot_test_support::wire::{Message, REPLY, VERSION_1, message, page_at, writable};

const AWAY: &str = "device: the back-end hung up; the guest waits for the back-end to come back";

fn offer() -> Offer {
    Offer { regions: vec![(0, 4 * MIB), (7, 2 * MIB)], ..Offer::default() }
}

/// A back-end that maps pages 1 and 2 when it is told of the memory: a page of file 1, and one that can be
/// written.
fn mapping() -> Backend {
    let script = |asked: &Message, peer: &Connection| {
        if asked.request == request::SET_MEM_TABLE {
            assert_eq!(peer.map(page_at(1), &numbered_file(1, 1)), 0);
            assert_eq!(peer.map(writable(page_at(2)), &numbered_file(2, 1)), 0);
        }
        Answer::Usual
    };
    Backend::scripted(offer(), Box::new(script))
}

fn boot(backend: &Backend, keys: &str, options: &[&str]) -> Guest {
    let device = format!("{}{keys}", backend.device("device"));
    Guest::boot(["--vhost-user", &device].iter().chain(options))
}

#[test]
fn an_access_to_a_hole_waits_until_the_back_end_has_mapped_it() {
    // SHM-76, SHM-77
    if !kvm::is_here() {
        return;
    }
    for writes in [false, true] {
        let backend = mapping();
        let mut guest = boot(&backend, ",reconnect=60", &[]);
        let (base, _) = guest.region(0);
        // Not started: nothing is mapped. It is started while it is away.
        backend.hang_up();
        guest.wait_for_log(AWAY);
        guest.start_device();
        match writes {
            false => guest.begin(Operation::Read, 8, base + PAGE + 16, 0),
            true => guest.begin(Operation::Write, 8, base + 2 * PAGE + 16, 0x1234),
        }
        std::thread::sleep(Duration::from_millis(100));
        assert!(!guest.has_answered());
        backend.come_back(offer());
        let answer = guest.answer();
        match writes {
            false => assert_eq!(answer, content(1, 16)),
            true => assert_eq!(guest.read64(base + 2 * PAGE + 16), 0x1234),
        }
        assert_eq!(guest.read64(base + 3 * PAGE), u64::MAX, "what is not mapped is a hole again");
        assert_eq!(guest.register(register::STATUS), RUNNING);
        // What is mapped stays, and is replaced.
        backend.hang_up();
        assert_eq!(guest.read64(base + PAGE), content(1, 0));
        backend.come_back(offer());
        assert_eq!(guest.read64(base + 4 * PAGE), u64::MAX);
        assert_eq!(guest.read64(base + PAGE), content(1, 0));
        let log = guest.exit();
        assert!(log.contains("device: the back-end is back, after "), "{log}");
    }
}

#[test]
fn when_the_time_is_over_holes_are_holes_and_the_device_needs_a_reset() {
    // SHM-76, SHM-77, SHM-94
    if !kvm::is_here() {
        return;
    }
    let backend = mapping();
    let mut guest = boot(&backend, ",reconnect=1", &[]);
    guest.start_device();
    let (base, _) = guest.region(0);
    backend.hang_up();
    guest.wait_for_log(AWAY);
    assert_eq!(guest.read64(base + 3 * PAGE), u64::MAX);
    guest.wait_for_needs_reset();
    assert_eq!(guest.read64(base + PAGE), content(1, 0));
    let log = guest.exit();
    assert!(
        log.contains("device: the back-end did not come back within 1 s: cannot connect: Connection refused"),
        "{log}"
    );
}

#[test]
fn a_vcpu_that_waits_for_a_back_end_does_not_hold_up_the_end() {
    // SHM-77
    if !kvm::is_here() {
        return;
    }
    let backend = mapping();
    let mut guest = boot(&backend, ",reconnect=600", &[]);
    let (base, _) = guest.region(0);
    backend.hang_up();
    guest.wait_for_log(AWAY);
    guest.begin(Operation::Read, 8, base, 0);
    guest.signal(libc::SIGTERM);
    let (status, log) = guest.wait();
    assert_eq!(status.code(), Some(128 + libc::SIGTERM), "{log}");
}

#[test]
fn a_lost_back_end_ends_the_machine_where_the_user_says_so() {
    // SHM-76, SHM-99
    if !kvm::is_here() {
        return;
    }
    for (keys, why) in [
        ("", "the back-end hung up"),
        (",reconnect=1", "the back-end did not come back within 1 s: cannot connect"),
    ] {
        let backend = mapping();
        let mut guest = boot(&backend, keys, &["--backend-loss", "exit"]);
        guest.start_device();
        backend.hang_up();
        let (status, log) = guest.wait();
        assert_eq!(status.code(), Some(40), "{log}");
        let last = log.lines().last().unwrap();
        let expected = format!("hotslot: a device lost its back-end: device: {why}");
        assert!(last.starts_with(&expected), "{log}");
    }
}

#[test]
fn a_changed_configuration_interrupts_the_driver() {
    // SHM-96
    if !kvm::is_here() {
        return;
    }
    let (value, config) = (Arc::new(AtomicU8::new(1)), 0x100);
    let now = Arc::clone(&value);
    let script = move |asked: &Message, _: &Connection| match asked.request {
        request::GET_CONFIG => {
            let mut answer = asked.payload.clone();
            answer[12..].fill(now.load(Ordering::SeqCst));
            Answer::Bytes(message(request::GET_CONFIG, VERSION_1 | REPLY, &answer), None)
        }
        _ => Answer::Usual,
    };
    let protocol = offer().protocol | PROTOCOL_F_CONFIG;
    let backend = Backend::scripted(Offer { protocol, queues: 3, ..offer() }, Box::new(script));
    let device = format!("{},type=vsock,name=device", backend.socket().display());
    let mut guest = Guest::boot(["--vhost-user", &device]);
    guest.start_device();
    assert_eq!(guest.register(config), 0x0101_0101);
    assert_eq!(guest.register(register::INTERRUPT_STATUS) & 2, 0);
    value.store(2, Ordering::SeqCst);
    backend.channel().send(&message(backend_request::CONFIG_CHANGE_MSG, VERSION_1, &[]));
    hotslot_test_support::wait::eventually("the driver is told", || {
        guest.register(register::INTERRUPT_STATUS) & 2 != 0
    });
    assert_eq!(guest.register(config), 0x0202_0202);
    guest.set_register(register::INTERRUPT_ACK, 2);
    assert_eq!(guest.register(register::INTERRUPT_STATUS) & 2, 0);
    assert_eq!(guest.register(register::STATUS) & NEEDS_RESET, 0);
    guest.exit();
}

#[test]
fn queues_that_are_not_used_are_warned_of_once_and_again_if_their_number_differs() {
    // SHM-92
    if !kvm::is_here() {
        return;
    }
    let backend = mapping();
    let mut guest = boot(&backend, ",reconnect=60", &[]);
    guest.start_device();
    backend.hang_up();
    backend.come_back(offer());
    guest.wait_for_log("device: the back-end is back, after ");
    backend.hang_up();
    backend.come_back(Offer { queues: 3, ..offer() });
    guest.wait_for_log("warn: device: the back-end has 3 queues, and 1 are used");
    let log = guest.exit();
    assert_eq!(log.matches("warn: device: the back-end has 2 queues, and 1 are used").count(), 1, "{log}");
    assert_eq!(log.matches("queues, and ").count(), 2, "{log}");
}

#[test]
fn a_device_whose_back_end_did_not_answer_its_reset_starts_no_more() {
    // SHM-69, SHM-76
    if !kvm::is_here() {
        return;
    }
    let script = |asked: &Message, _: &Connection| match asked.request {
        request::GET_VRING_BASE => Answer::Silence,
        _ => Answer::Usual,
    };
    let backend = Backend::scripted(offer(), Box::new(script));
    let mut guest = boot(&backend, "", &[]);
    let (base, _) = guest.region(0);
    guest.start_device();
    assert_eq!(backend.map(page_at(1), &numbered_file(1, 1)), 0);
    assert_eq!(guest.read64(base + PAGE), content(1, 0));
    let (main, channel) = (backend.main(), backend.channel());
    guest.reset_device();
    assert_eq!(guest.read64(base + PAGE), u64::MAX);
    let asked = backend.ids().len();
    assert_eq!(guest.try_start_device(), RUNNING | NEEDS_RESET);
    assert_eq!(backend.ids().len(), asked, "nothing of the new start is said to it");
    // Whatever it says when it goes on, nobody hears it.
    main.wait_for_end();
    channel.wait_for_end();
    assert_eq!(guest.read64(base + PAGE), u64::MAX);
    let log = guest.exit();
    assert!(log.contains("GET_VRING_BASE failed: the back-end did not answer within 5000 ms"), "{log}");
}
