//! A back-end that is killed, at every message at which it can be.

use std::os::unix::process::ExitStatusExt;

use hotslot_test_support::guest::{Guest, NEEDS_RESET, RUNNING, register};
use hotslot_test_support::kvm;
use hotslot_test_support::torture::Torture;

use crate::requests::pattern;

const HOLE: u64 = u64::MAX;

/// The moments of a message of the front-end.
const MOMENTS: [&str; 3] = ["before", "half", "after"];

/// What the guest may read where the pattern was to be mapped.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sees {
    Pattern,
    Hole,
    Either,
}

/// When it dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Before the guest has started it, or soon after.
    Start(Sees),
    /// While the guest resets it.
    Reset,
}

/// Kills back-ends at these moments, one device each, all in one machine, which has another device that
/// works.
fn survives(deaths: &[(Vec<String>, Phase)]) {
    if !kvm::is_here() {
        return;
    }
    let living = Torture::start(&["--once"]);
    let mut dying = Vec::new();
    let mut options = vec!["--vhost-user".to_string(), living.device("living")];
    for (index, (steps, _)) in deaths.iter().enumerate() {
        let steps: Vec<_> = steps.iter().map(String::as_str).collect();
        let torture = Torture::doing(&steps);
        options.extend(["--vhost-user".to_string(), torture.device(&format!("dying{index}"))]);
        dying.push(torture);
    }
    let mut guest = Guest::boot(options);
    guest.start_device();
    for ((device, torture), (steps, phase)) in (1..).zip(&dying).zip(deaths) {
        guest.select(device);
        let (base, _) = guest.region(0);
        guest.set_register(register::STATUS, 0);
        let status = guest.try_start_device();
        match phase {
            Phase::Start(sees) => {
                killed(torture);
                guest.wait_for_needs_reset();
                let seen = guest.read64(base + 0x1008);
                let sees_pattern = seen == pattern(0x1008);
                assert!(sees_pattern || seen == HOLE, "{steps:?}: {seen:#x}");
                let expected = *sees == Sees::Either || (*sees == Sees::Pattern) == sees_pattern;
                assert!(expected, "{steps:?}: {seen:#x}");
                // What is there stays. A request that was on its way may come true after the guest was told
                // of the death.
                let later = guest.read64(base + 0x1008);
                let came_late = *sees == Sees::Either && later == pattern(0x1008);
                assert!(later == seen || came_late, "{steps:?}: {seen:#x}, then {later:#x}");
            }
            Phase::Reset => {
                assert_eq!(status, RUNNING, "{steps:?}\n{}", guest.log());
                assert_eq!(guest.read64(base), pattern(0), "{steps:?}");
                guest.set_register(register::STATUS, 0);
                assert_eq!(guest.read64(base), HOLE, "{steps:?}");
                killed(torture);
            }
        }
        // The guest may reset the device, which is of no use any more.
        guest.set_register(register::STATUS, 0);
        assert_eq!(guest.register(register::STATUS) & !NEEDS_RESET, 0, "{steps:?}");
        assert_eq!(guest.read64(base), HOLE, "{steps:?}");
        guest.try_start_device();
        guest.wait_for_needs_reset();
        guest.wait_for_log(&format!("dying{}", device - 1));
        works(&mut guest);
    }
    guest.exit();
}

/// It ended by SIGKILL.
fn killed(torture: &Torture) {
    let (status, output) = torture.wait();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{output}");
}

/// The first device works, and its memory is mapped.
fn works(guest: &mut Guest) {
    guest.select(0);
    assert_eq!(guest.register(register::STATUS), RUNNING);
    assert_eq!(guest.have_filled(0x180_0000, 64), 64);
    let (base, _) = guest.region(0);
    assert_eq!(guest.read64(base + 0x2000), pattern(0x2000));
}

fn at_each_moment(messages: &[&str], phase: impl Fn(&str, &str) -> Phase) -> Vec<(Vec<String>, Phase)> {
    let each = messages.iter().flat_map(|message| MOMENTS.map(|moment| (message, moment)));
    each.map(|(message, moment)| (vec![format!("die@{message}:{moment}")], phase(message, moment))).collect()
}

#[test]
fn at_each_message_of_the_set_up() {
    // SHM-64
    if !kvm::is_here() {
        return;
    }
    for message in [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "GET_SHMEM_CONFIG",
        "GET_CONFIG",
        "SET_VRING_NUM",
        "SET_BACKEND_REQ_FD",
    ] {
        for moment in MOMENTS {
            match (message, moment) {
                // They have no answer yet: REPLY_ACK is not negotiated.
                ("SET_OWNER" | "SET_PROTOCOL_FEATURES", "half") => continue,
                // Nobody waits any more: the guest is told.
                ("SET_BACKEND_REQ_FD", "after") => continue,
                _ => {}
            }
            let torture = Torture::doing(&[&format!("die@{message}:{moment}")]);
            // That type has a configuration space to ask for.
            let device = torture.device("gizmo").replace("type=rng", "type=blk");
            let (status, log) = Guest::boot(["--vhost-user", &device]).wait();
            assert_eq!(status.code(), Some(2), "{message}:{moment}\n{log}");
            for word in ["error: device gizmo", torture.socket().to_str().unwrap(), "hung up"] {
                assert!(log.contains(word), "{message}:{moment}: no '{word}' in:\n{log}");
            }
            killed(&torture);
        }
    }
}

#[test]
fn after_the_set_up() {
    // SHM-76
    survives(&[(vec!["die@SET_BACKEND_REQ_FD:after".to_string()], Phase::Start(Sees::Hole))]);
}

#[test]
fn at_each_message_of_a_start_before_its_rings() {
    // SHM-64, SHM-66, SHM-76. The first SET_VRING_NUM was the set-up's.
    let messages = [
        &["RESET_DEVICE", "SET_STATUS", "SET_FEATURES", "SET_STATUS#2", "GET_STATUS"][..],
        &["SET_FEATURES#2", "SET_MEM_TABLE", "SET_VRING_NUM#2"],
    ];
    for messages in messages {
        survives(&at_each_moment(messages, |_, _| Phase::Start(Sees::Hole)));
    }
}

#[test]
fn at_each_message_of_a_start_from_its_rings_on() {
    // SHM-64, SHM-66, SHM-76
    let messages = [
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_CALL",
        "SET_VRING_KICK",
        "SET_VRING_ENABLE",
        // The first one was the reset's, the second that of FEATURES_OK.
        "SET_STATUS#3",
    ];
    survives(&at_each_moment(&messages, |message, moment| {
        // The pattern is mapped before SET_VRING_KICK is answered.
        Phase::Start(match (message, moment) {
            ("SET_VRING_KICK", "half" | "after") | ("SET_VRING_ENABLE" | "SET_STATUS#3", _) => Sees::Pattern,
            _ => Sees::Hole,
        })
    }));
}

#[test]
fn during_a_mapping() {
    // SHM-64, SHM-76
    let deaths = [
        (&["die@MAP:before"][..], Sees::Hole),
        (&["die@MAP:half"], Sees::Hole),
        // It may be served or not.
        (&["die@MAP:sent"], Sees::Either),
        (&["die@MAP:after"], Sees::Pattern),
        (&["map", "die@MAP#2:before"], Sees::Pattern),
        (&["map", "die@MAP#2:half"], Sees::Pattern),
        (&["map", "die@MAP#2:sent"], Sees::Pattern),
        (&["map", "die@UNMAP:before"], Sees::Pattern),
        (&["map", "die@UNMAP:half"], Sees::Pattern),
        (&["map", "die@UNMAP:sent"], Sees::Pattern),
        (&["map", "die@UNMAP:after"], Sees::Pattern),
        (&["many", "die@MAP#100:sent"], Sees::Pattern),
        (&["flood=forever", "die@UNMAP#1000:half"], Sees::Pattern),
        (&["stall", "die@SET_STATUS#3:after"], Sees::Pattern),
    ];
    let deaths =
        deaths.map(|(steps, sees)| (steps.iter().map(|step| step.to_string()).collect(), Phase::Start(sees)));
    survives(&deaths);
}

#[test]
fn at_each_message_of_a_reset() {
    // SHM-64, SHM-69, SHM-76 The first RESET_DEVICE, and the first three SET_STATUS, were those of the start.
    let messages = ["GET_VRING_BASE", "RESET_DEVICE#2", "SET_STATUS#4"];
    survives(&at_each_moment(&messages, |_, _| Phase::Reset));
}

#[test]
fn from_outside_while_the_guest_uses_its_memory() {
    // SHM-40, SHM-46, SHM-76
    if !kvm::is_here() {
        return;
    }
    let living = Torture::start(&["--once"]);
    let dying = Torture::start(&["--read-write", "--do", "flood=forever"]);
    let devices = [living.device("living"), dying.device("dying")];
    let mut guest = Guest::boot(["--vhost-user", &devices[0], "--vhost-user", &devices[1]]);
    guest.start_device();
    guest.select(1);
    guest.start_device();
    let (base, _) = guest.region(0);
    const WORDS: u64 = 64;
    let use_memory = |guest: &mut Guest, rounds: std::ops::Range<u64>| {
        for round in rounds {
            let offset = round % WORDS * 8;
            let address = base + offset;
            let expected = if round < WORDS { pattern(offset) } else { round - WORDS };
            assert_eq!(guest.read64(address), expected, "{offset:#x}");
            guest.write64(address, round);
            assert_eq!(guest.read64(address), round);
        }
    };
    use_memory(&mut guest, 0..20);
    let killer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        dying.kill();
    });
    use_memory(&mut guest, 20..100);
    killer.join().unwrap();
    guest.wait_for_needs_reset();
    // The driver is told by an interrupt, the user by a line.
    assert_ne!(guest.register(register::INTERRUPT_STATUS) & 2, 0);
    guest.wait_for_log("needs a reset");
    assert!(guest.log().contains("dying"), "{}", guest.log());
    use_memory(&mut guest, 100..120);
    works(&mut guest);

    guest.select(1);
    guest.reset_device();
    assert_eq!(guest.read64(base), HOLE);
    works(&mut guest);
    guest.exit();
}
