//! Reset, start, and the death of a back-end, as the guest sees them.

use std::sync::{Arc, Mutex};

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::files::{content, numbered_file};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::names::backend_request::SHARED_OBJECT_LOOKUP;
use hotslot_test_support::names::request::{ADD_MEM_REG, GET_VRING_BASE, REM_MEM_REG};
use hotslot_test_support::names::{
    PROTOCOL_F_BACKEND_REQ, PROTOCOL_F_CONFIGURE_MEM_SLOTS, PROTOCOL_F_MQ, PROTOCOL_F_REPLY_ACK,
    PROTOCOL_F_SHMEM,
};
use hotslot_test_support::wire::{page_at, writable};

const HOLE: u64 = u64::MAX;

#[test]
fn a_reset_has_removed_every_mapping_when_the_status_write_completes() {
    // SHM-69, SHM-71, SHM-72, SHM-75
    if !kvm::is_here() {
        return;
    }
    // What is mapped while the device is being stopped is refused, or gone as well.
    let late = Arc::new(Mutex::new(None));
    let answer = Arc::clone(&late);
    let data = numbered_file(3, 1);
    let backend = Backend::acting(GET_VRING_BASE, move |connection| {
        *answer.lock().unwrap() = Some(connection.map(page_at(2), &data));
    });
    let mut guest = Guest::with(&backend);
    let (base, _) = guest.region(0);
    let (first, second) = (numbered_file(1, 1), numbered_file(2, 1));
    assert_eq!(backend.map(page_at(0), &first), 0);
    assert_eq!(backend.map(page_at(1), &second), 0);
    assert_eq!(guest.read64(base), content(1, 0));

    guest.reset_device();
    for index in 0..3 {
        assert_eq!(guest.read64(base + index * 0x1000), HOLE);
    }
    let busy = -i64::from(libc::EBUSY);
    assert_eq!(*late.lock().unwrap(), Some(busy));
    assert_eq!(backend.map(page_at(0), &first), busy);
    assert_eq!(backend.unmap(page_at(0)), -i64::from(libc::ENOENT));
    assert_eq!(guest.read64(base), HOLE);

    guest.start_device();
    assert_eq!(guest.read64(base), HOLE);
    assert_eq!(backend.map(page_at(0), &second), 0);
    assert_eq!(guest.read64(base), content(2, 0));
    guest.exit();
}

#[test]
fn a_device_shows_its_mappings_to_those_that_can_see_them() {
    // SHM-79, SHM-80
    if !kvm::is_here() {
        return;
    }
    let can_see = || {
        let mut offer = Offer::default();
        offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        Backend::offering(offer)
    };
    let [owner, seeing, blind] = [can_see(), can_see(), Backend::start()];
    let devices = [owner.device("owner") + ",share-shmem=on", seeing.device("seeing"), blind.device("blind")];
    let mut guest = Guest::boot(devices.iter().flat_map(|device| ["--vhost-user", device]));
    for device in 0..3 {
        guest.select(device);
        guest.start_device();
    }
    let told = |backend: &Backend| {
        let mut seen = backend.ids();
        seen.retain(|id| [ADD_MEM_REG, REM_MEM_REG].contains(id));
        seen
    };
    assert_eq!(owner.map(page_at(0), &numbered_file(1, 1)), 0);
    assert_eq!(seeing.map(page_at(0), &numbered_file(2, 1)), 0);
    assert_eq!(told(&seeing), [ADD_MEM_REG]);
    guest.wait_for_map("mapping, read-only, shared, file offset 0x0");
    assert_eq!(guest.log().matches(", shared,").count(), 1, "{}", guest.log());
    guest.select(0);
    guest.reset_device();
    assert_eq!(told(&seeing), [ADD_MEM_REG, REM_MEM_REG]);
    assert_eq!((told(&owner), told(&blind)), (vec![], vec![]));
    assert_eq!(owner.map(page_at(0), &numbered_file(1, 1)), -i64::from(libc::EBUSY));
    guest.start_device();
    assert_eq!(owner.map(page_at(0), &numbered_file(1, 1)), 0);
    // Everybody is let go in peace.
    let log = guest.exit();
    let cannot = "does not offer protocol feature CONFIGURE_MEM_SLOTS";
    assert!(log.contains(&format!("blind: the back-end {cannot}")), "{log}");
    assert_eq!(log.matches(cannot).count(), 1, "{log}");
    assert!(!log.contains("needs a reset"), "{log}");
}

#[test]
fn what_is_agreed_and_done_is_said() {
    if !kvm::is_here() {
        return;
    }
    let mapping = Backend::start();
    let mut offer = Offer::default();
    offer.features |= 1 << 1 | 1 << 29 | 1 << 34;
    offer.protocol = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_SHMEM | 1 << 12;
    let cannot_map = Backend::offering(offer.clone());
    // GET_VRING_BASE_INFLIGHT and GPA_ADDRESSES in the specification, SHMEM in drafts (SHM-1).
    offer.protocol = PROTOCOL_F_BACKEND_REQ | 1 << 20 | 1 << 21;
    let draft = Backend::offering(offer.clone());
    let newer = Backend::offering(offer.clone());
    offer.protocol = PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_SHMEM;
    let merged = Backend::offering(offer);
    let devices = [
        mapping.device("mapping"),
        cannot_map.device("cannot"),
        draft.device("draft").replace("rng", "fs,tag=draft,reconnect=1"),
        newer.device("newer"),
        merged.device("merged") + ",shmem-bit=21",
    ];
    let quiet = Guest::boot(devices.iter().flat_map(|device| ["--vhost-user", device])).exit();
    for warning in [
        "warn: mapping: the back-end has 2 queues, and 1 are used",
        "warn: cannot: the back-end offers SHMEM, but not BACKEND_REQ",
        "warn: draft: the back-end does not offer SHMEM as protocol feature bit 22: if it means SHMEM by bit 21, as drafts \
         did and not as the specification does (GPA_ADDRESSES), say shmem-bit=21",
        "warn: draft: the back-end does not offer INFLIGHT_SHMFD: when it dies and comes back (reconnect), requests that it \
         has begun may be lost or done twice",
        "warn: merged: the back-end does not offer SHMEM as protocol feature bit 21: it offers SHMEM as the specification \
         has it: say shmem-bit=22",
    ] {
        assert_eq!(quiet.matches(warning).count(), 1, "{warning}\n{quiet}");
    }
    assert_eq!(quiet.matches("warn").count(), 6, "{quiet}");

    let mapping = Backend::start();
    let mut guest = Guest::boot(["-vv", "--vhost-user", &mapping.device("mapping")]);
    guest.start_device();
    assert_eq!(mapping.map(writable(page_at(3)), &numbered_file(1, 1)), 0);
    assert_eq!(mapping.map(page_at(3), &numbered_file(1, 1)), -i64::from(libc::EEXIST));
    assert_eq!(mapping.unmap(page_at(3)), 0);
    mapping.channel().ask(SHARED_OBJECT_LOOKUP, page_at(0), &[]);
    assert_eq!(mapping.channel().answer(SHARED_OBJECT_LOOKUP), -i64::from(libc::EOPNOTSUPP));
    let loud = guest.exit();
    for line in [
        "info: mapping: rng (device type 4); queues: 1 of up to 128; configuration: 0 bytes; features: VERSION_1 \
         RING_RESET; offered and not used: none; protocol features: MQ REPLY_ACK BACKEND_REQ BACKEND_SEND_FD \
         RESET_DEVICE STATUS SHMEM; offered and not used: none",
        "debug: mapping: mapped 0x1000 bytes from 0x3000 on of region 0, read-write, from 0x0 on of a file",
        "debug: mapping: unmapped 0x1000 bytes from 0x3000 on of region 0",
        "warn: mapping: BACKEND_SHARED_OBJECT_LOOKUP is refused: SHARED_OBJECT was not negotiated",
    ] {
        assert_eq!(loud.matches(line).count(), 1, "{line}\n{loud}");
    }
}

#[test]
fn an_error_that_a_back_end_reports_of_a_queue_is_said_once() {
    // SHM-88
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    for _ in 0..2 {
        backend.report_error();
        guest.wait_for_log("the back-end reports an error of a queue (SET_VRING_ERR)");
        guest.reset_device();
        guest.start_device();
    }
    let log = guest.exit();
    assert_eq!(log.matches("SET_VRING_ERR").count(), 1, "{log}");
}
