//! What a back-end is told of its own shared memory regions (protocol feature SHMEM_ADDRESSES, which is
//! hotslot's own).

use std::sync::mpsc;

use hotslot_test_support::bench::*;
use hotslot_test_support::names::request::*;
use hotslot_test_support::wire::{NEED_REPLY, REPLY, VERSION_1, message, writable};
use rustix::fs::SealFlags;

use crate::sharing::{Devices, address};

const BOTH: u64 = PROTOCOL_F_CONFIGURE_MEM_SLOTS | PROTOCOL_F_SHMEM_ADDRESSES;

fn offering(protocol: u64) -> Setup {
    let mut setup = Setup::default();
    setup.offer.protocol |= protocol;
    setup
}

fn quad(payload: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap())
}

/// The guest addresses of all ADD_MEM_REG.
fn added(seen: &[Seen]) -> Vec<u64> {
    let added = seen.iter().filter(|seen| seen.request == ADD_MEM_REG);
    added.map(|seen| quad(&seen.payload, 8)).collect()
}

#[test]
fn a_back_end_is_told_where_its_regions_are_at_each_start() {
    // SHM-82
    let (tell, is_told) = mpsc::channel();
    let bench = offering(BOTH)
        .script(move |request, _| {
            if request.request == ADD_MEM_REG {
                let file = request.file();
                let seals = rustix::fs::fcntl_get_seals(&file).unwrap();
                let stat = rustix::fs::fstat(&file).unwrap();
                tell.send((seals, stat.st_mode & 0o7777, stat.st_size, stat.st_blocks)).unwrap();
            }
            Answer::Usual
        })
        .start();
    assert!(added(&bench.seen()).is_empty(), "before it is started");
    let starts = [1, 2].map(|_| {
        let seen = bench.asked(|| bench.start().unwrap());
        bench.reset();
        seen
    });
    let regions = [0, 7].map(|shmid| bench.shmem().region(shmid).unwrap());
    for seen in starts {
        let at = |id| ids(&seen).iter().position(|&other| other == id).unwrap();
        let (table, first) = (at(SET_MEM_TABLE), at(ADD_MEM_REG));
        assert_eq!(first, table + 1);
        assert!(first + 1 < at(SET_VRING_NUM));
        assert_eq!(added(&seen), regions.map(|region| region.start()));
        for (seen, region) in seen[first..first + 2].iter().zip(regions) {
            assert_eq!((seen.flags, seen.fds, seen.payload.len()), (VERSION_1 | NEED_REPLY, 1, 40));
            let [padding, guest, size, user, offset] = [0, 8, 16, 24, 32].map(|at| quad(&seen.payload, at));
            assert_eq!((padding, guest, size, offset), (0, region.start(), region.len(), 0));
            assert_eq!(user % PAGE, 0);
            assert_ne!(user, 0);
        }
    }
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    for (seals, mode, size, blocks) in is_told.try_iter().take(4) {
        assert_eq!((seals & sealed, mode, size as u64, blocks), (sealed, 0, REGION, 0));
    }
    assert!(!bench.needs_reset());
}

#[test]
fn a_back_end_that_does_not_understand_is_told_nothing() {
    // SHM-82: it needs all of CONFIGURE_MEM_SLOTS, SHMEM and the feature itself.
    let all = Setup::default().offer.protocol | BOTH;
    for lacking in [PROTOCOL_F_SHMEM_ADDRESSES, PROTOCOL_F_CONFIGURE_MEM_SLOTS, PROTOCOL_F_SHMEM] {
        let bench = offering(all).without(lacking).start();
        bench.start().unwrap();
        let seen = bench.seen();
        let acked = seen.iter().find(|seen| seen.request == SET_PROTOCOL_FEATURES).unwrap();
        assert_eq!(quad(&acked.payload, 0) & BOTH, 0, "{lacking:#x}");
        assert!(added(&seen).is_empty(), "{lacking:#x}");
    }
}

#[test]
fn a_mapping_costs_no_further_message() {
    // SHM-79, SHM-82
    let bench = offering(BOTH).start();
    bench.start().unwrap();
    let seen = bench.asked(|| bench.assert_works());
    assert!(seen.is_empty(), "{seen:?}");
}

#[test]
fn a_back_end_that_refuses_is_started_all_the_same() {
    // SHM-82
    let refuse = message(ADD_MEM_REG, VERSION_1 | REPLY, &1u64.to_ne_bytes());
    let bench = offering(BOTH).on(ADD_MEM_REG, move |_| Answer::Bytes(refuse.clone(), None)).start();
    bench.start().unwrap();
    assert_eq!(added(&bench.seen()).len(), 2);
    bench.assert_works();
}

#[test]
fn without_answers_a_request_with_one_follows() {
    // SHM-82
    let bench = offering(BOTH).without(PROTOCOL_F_REPLY_ACK).start();
    let seen = bench.asked(|| bench.start().unwrap());
    let at = ids(&seen).iter().position(|&id| id == SET_MEM_TABLE).unwrap();
    assert_eq!(ids(&seen)[at + 1..at + 5], [ADD_MEM_REG, GET_MAX_MEM_SLOTS, ADD_MEM_REG, GET_MAX_MEM_SLOTS]);
}

#[test]
fn its_regions_come_before_the_mappings_of_others_and_take_slots() {
    // SHM-80, SHM-82: RAM takes one slot here, the regions two; one is left.
    let mut devices = Devices::new();
    let owner = devices.owner(Setup::default()).start();
    let mut recipient = offering(PROTOCOL_F_SHMEM_ADDRESSES);
    recipient.offer.slots = 4;
    let recipient = devices.recipient(recipient).start();
    for page in 0..2 {
        assert_eq!(owner.map(writable(page_at(page)), &file_of(1, 1)), 0);
    }
    recipient.start().unwrap();
    let own = [0, 7].map(|shmid| recipient.shmem().region(shmid).unwrap().start());
    assert_eq!(added(&recipient.seen()), [own[0], own[1], address(&owner, 0)]);
    // The owner did not ask for it, and is told nothing.
    owner.start().unwrap();
    assert!(added(&owner.seen()).is_empty());
}
