//! Back-ends that break the rules: refused in the set-up, survived afterwards.

use hotslot_test_support::guest::{Guest, NEEDS_RESET, RUNNING, register};
use hotslot_test_support::kvm;
use hotslot_test_support::torture::Torture;

use crate::requests::pattern;

/// Boots hotslot with a back-end that does this; hotslot must refuse it, with these words. What the back-end
/// printed.
fn refused(step: &str, words: &[&str]) -> String {
    let torture = Torture::doing(&[step]);
    let (status, log) = Guest::boot(["--vhost-user", &torture.device("gizmo")]).wait();
    assert_eq!(status.code(), Some(2), "{step}: {log}");
    let socket = torture.socket();
    for word in [&["error: device gizmo", socket.to_str().unwrap()], words].concat() {
        assert!(log.contains(word), "{step}: no '{word}' in:\n{log}");
    }
    let (status, output) = torture.wait();
    assert_eq!(status.code(), Some(0), "{step}: {output}");
    output
}

#[test]
fn wrong_answers_in_the_set_up_are_refused() {
    // SHM-12
    if !kvm::is_here() {
        return;
    }
    for message in ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_SHMEM_CONFIG"] {
        for wrong in ["short", "long", "id", "fd", "error", "request", "version"] {
            let output = refused(&format!("answer={wrong}@{message}"), &[message]);
            assert!(output.contains("then the front-end closed the connection"), "{message}: {output}");
        }
    }
    for wrong in ["short", "long", "id", "fd", "request", "version"] {
        refused(&format!("answer={wrong}@SET_VRING_NUM"), &["SET_VRING_NUM"]);
    }
    refused("answer=error@SET_BACKEND_REQ_FD", &["SET_BACKEND_REQ_FD", "refused", "0x1"]);
}

#[test]
fn silence_in_the_set_up_is_not_waited_for_forever() {
    // SHM-12
    if !kvm::is_here() {
        return;
    }
    let cases = ["silence@GET_FEATURES", "answer=half@GET_SHMEM_CONFIG", "mute@SET_OWNER"];
    std::thread::scope(|scope| {
        for (step, message) in cases.into_iter().zip(["GET_FEATURES", "GET_SHMEM_CONFIG", "GET_FEATURES"]) {
            scope.spawn(move || {
                let output = refused(step, &[message, "did not answer within 5000 ms"]);
                assert!(output.contains("then the front-end closed the connection"), "{step}: {output}");
            });
        }
    });
}

#[test]
fn absurd_configurations_are_refused() {
    // SHM-14, SHM-15, SHM-16
    if !kvm::is_here() {
        return;
    }
    for (step, words) in [
        ("shmem-config=count", &["2 shared memory regions", "1 have a size"][..]),
        ("shmem-config=unaligned", &["region 0", "0x1001", "page size 0x1000"]),
        ("shmem-config=overflow", &["region 0", "does not fit", "0x8000000000000000"]),
        ("shmem-config=huge", &["region 0", "does not fit", "0x8000000000000000"]),
        ("queue-num=0", &["has 0 of the 1 queues"]),
    ] {
        refused(step, words);
    }
}

#[test]
fn extreme_configurations_work() {
    // SHM-13, SHM-19
    if !kvm::is_here() {
        return;
    }
    let all = Torture::doing(&["shmem-config=all", "queue-num=0xffffffffffffffff"]);
    let mut guest = Guest::boot(["--vhost-user", &all.device("all")]);
    guest.start_device();
    for shmid in [0, 1, 255] {
        assert_eq!(guest.region(shmid).1, 0x1000);
    }
    assert_eq!(guest.have_filled(0x180_0000, 16), 16);
    guest.exit();
    let (status, output) = all.wait();
    assert!(status.success() && output.contains("shmem-config: as specified"), "{output}");
}

/// What becomes of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// It works on; it can be reset, and works again.
    Works,
    /// It needs a reset, and is of no use after that.
    Lost,
    /// It needs a reset, after which it works.
    Failed,
}

struct Device {
    index: u64,
    torture: Torture,
    step: &'static str,
}

/// Starts a machine with these back-ends; the first device is another one that works.
fn machine(steps: &[&'static str]) -> (Guest, Vec<Device>, Torture) {
    let living = Torture::start(&["--once"]);
    let mut options = vec!["--vhost-user".to_string(), living.device("living")];
    let mut devices = Vec::new();
    for (index, &step) in (1..).zip(steps) {
        // After a stall no answer comes: it need not wait for one for long.
        let patience = if step.starts_with("stall") { "1" } else { "30" };
        let torture = Torture::start(&["--once", "--patience", patience, "--do", step]);
        options.extend(["--vhost-user".to_string(), torture.device(&format!("bad{index}"))]);
        devices.push(Device { index, torture, step });
    }
    let mut guest = Guest::boot(options);
    guest.start_device();
    (guest, devices, living)
}

/// Drives the devices as they start; each must meet its fate, and the first device must work throughout.
fn survives(cases: &[(&'static str, &str, Fate)]) {
    if !kvm::is_here() {
        return;
    }
    let steps: Vec<_> = cases.iter().map(|(step, ..)| *step).collect();
    let (mut guest, devices, _living) = machine(&steps);
    for (device, &(_, done, fate)) in devices.iter().zip(cases) {
        let step = device.step;
        guest.select(device.index);
        guest.set_register(register::STATUS, 0);
        guest.try_start_device();
        device.torture.wait_for(done);
        match fate {
            Fate::Works => works(&mut guest, device.index, step),
            Fate::Lost | Fate::Failed => guest.wait_for_needs_reset(),
        }
        works(&mut guest, 0, step);
        guest.select(device.index);
        let (base, _) = guest.region(0);
        guest.set_register(register::STATUS, 0);
        assert_eq!(guest.register(register::STATUS), 0, "{step}");
        assert_eq!(guest.read64(base), u64::MAX, "{step}");
        let status = guest.try_start_device();
        match fate {
            Fate::Lost => assert_ne!(status & NEEDS_RESET, 0, "{step}"),
            // A stalled or closed channel maps nothing any more.
            _ => assert_eq!((status, guest.have_filled(0x181_0000, 8)), (RUNNING, 8), "{step}"),
        }
    }
    works(&mut guest, 0, "in the end");
    guest.exit();
}

fn works(guest: &mut Guest, device: u64, step: &str) {
    guest.select(device);
    assert_eq!(guest.register(register::STATUS), RUNNING, "{step}\n{}", guest.log());
    assert_eq!(guest.have_filled(0x180_0000, 64), 64, "{step}");
    let (base, _) = guest.region(0);
    assert_eq!(guest.read64(base + 8), pattern(8), "{step}");
}

#[test]
fn what_happens_on_the_channel() {
    // SHM-61, SHM-64, SHM-65, SHM-66
    survives(&[
        ("stall", "stall: ", Fate::Works),
        ("stall=1", "stall: ", Fate::Works),
        ("stall=51", "stall: ", Fate::Works),
        ("version", "version: the front-end closed the channel", Fate::Lost),
        ("reply-flag", "reply-flag: the front-end closed the channel", Fate::Lost),
        ("oversized", "oversized: the front-end closed the channel", Fate::Lost),
        ("oversized=0xffffffff", "oversized: the front-end closed the channel", Fate::Lost),
        ("oversized=4097", "oversized: the front-end closed the channel", Fate::Lost),
        ("flood=500", "500 pairs of MAP and UNMAP answered", Fate::Works),
        ("flood-unread=10", "took all 10 requests", Fate::Works),
        ("flood-unread=forever", "flood-unread: ", Fate::Lost),
        ("close-channel", "close-channel: ", Fate::Works),
        ("hang-up", "hang-up: ", Fate::Lost),
    ]);
}

#[test]
fn wrong_answers_at_the_start() {
    // SHM-66
    survives(&[
        ("answer=short@SET_FEATURES#2", "answer: ", Fate::Lost),
        ("answer=long@SET_MEM_TABLE", "answer: ", Fate::Lost),
        ("answer=id@SET_VRING_NUM#2", "answer: ", Fate::Lost),
        ("answer=fd@SET_VRING_BASE", "answer: ", Fate::Lost),
        ("answer=request@SET_VRING_ADDR", "answer: ", Fate::Lost),
        ("answer=version@SET_VRING_CALL", "answer: ", Fate::Lost),
        ("answer=error@SET_FEATURES#2", "answer: ", Fate::Failed),
        ("answer=error@SET_MEM_TABLE", "answer: ", Fate::Failed),
        ("answer=error@SET_VRING_KICK", "answer: ", Fate::Failed),
        ("answer=error@SET_VRING_ENABLE", "answer: ", Fate::Failed),
        ("answer=short@GET_STATUS", "answer: ", Fate::Lost),
        ("answer=error@SET_STATUS#3", "answer: ", Fate::Failed),
    ]);
}

#[test]
fn silence_while_the_device_is_reset() {
    // SHM-66, SHM-69
    if !kvm::is_here() {
        return;
    }
    std::thread::scope(|scope| {
        for step in ["silence@GET_VRING_BASE", "mute@kick", "answer=half@RESET_DEVICE#2"] {
            scope.spawn(move || is_reset_in_silence(step));
        }
    });
}

fn is_reset_in_silence(step: &'static str) {
    let (mut guest, devices, _living) = machine(&[step]);
    guest.select(1);
    guest.start_device();
    let (base, _) = guest.region(0);
    assert_eq!(guest.read64(base), pattern(0), "{step}");
    guest.set_register(register::QUEUE_NOTIFY, 0);
    if step.starts_with("mute") {
        devices[0].torture.wait_for("mute: ");
    }
    guest.reset_device();
    assert_eq!(guest.read64(base), u64::MAX, "{step}");
    guest.wait_for_log("did not answer within");
    works(&mut guest, 0, step);
    guest.exit();
}

#[test]
fn a_file_that_becomes_shorter() {
    // SHM-45
    if !kvm::is_here() {
        return;
    }
    let steps = ["truncate=nothing", "truncate=half", "truncate=pages"];
    let (mut guest, devices, _living) = machine(&steps);
    for (device, kept) in devices.iter().zip([0, 0x8000, 0]) {
        guest.select(device.index);
        guest.start_device();
        device.torture.wait_for("truncate: the file of the pattern, 0x10000 bytes long and mapped, has");
        let (base, _) = guest.region(0);
        for offset in (8..0x10000).step_by(0x1000) {
            let expected = if offset < kept { pattern(offset) } else { 0 };
            assert_eq!(guest.read64(base + offset), expected, "{}: {offset:#x}", device.step);
        }
        assert_eq!(guest.register(register::STATUS), RUNNING);
        works(&mut guest, 0, device.step);
        // A new start maps a new file.
        guest.select(device.index);
        guest.start_device();
        works(&mut guest, device.index, device.step);
    }
    guest.exit();
}
