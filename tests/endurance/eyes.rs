//! Whether the guest would see what must not be: the other tests here are worth nothing if it does not.

use std::time::{Duration, Instant};

use hotslot_guest::board::*;
use hotslot_test_support::files::PAGE;
use hotslot_test_support::kvm;
use hotslot_test_support::wire::MMap;

use crate::Bench;
use crate::page::Words;

const PATIENCE: Duration = Duration::from_secs(30);

/// What is mapped at a place, and what the board says about it.
struct Case {
    what: &'static str,
    /// Nothing is mapped where this says so.
    word: Option<fn(usize) -> u64>,
    writable: bool,
    state: u64,
}

#[test]
fn the_guest_sees_what_must_not_be() {
    if !kvm::is_here() {
        return;
    }
    let right: fn(usize) -> u64 = |index| word(7, BACKEND, index);
    let case = |what, word, writable, state| Case { what, word, writable, state };
    let whole = |kind| state(kind, LONGEST, 7);
    let cases = [
        case("a hole that is none", Some(right), false, whole(UNMAPPED)),
        case("a mapping that is none", None, false, whole(READ_ONLY)),
        case("a mapping that may be cut and is none", None, true, whole(MAY_BE_CUT)),
        case("an old file", Some(right), false, state(READ_ONLY, LONGEST, 8)),
        case("a longer mapping", Some(right), false, state(READ_ONLY, 1, 7)),
        case("a write that got lost", Some(right), false, whole(READ_WRITE)),
        case("a write where none may be", Some(right), true, whole(READ_ONLY)),
        case("poison", Some(|_| POISON), false, whole(CHANGING)),
        case("zeroes", Some(|_| 0), false, whole(CHANGING)),
        case("another place", Some(|index| word(7, BACKEND, index + 1)), false, whole(CHANGING)),
        case(
            "another's write",
            Some(|index| word(7, (index as u64 + 1) % CPUS as u64 + 1, index)),
            false,
            whole(CHANGING),
        ),
    ];
    let bench = Bench::small();
    (0..PLACES).for_each(|place| bench.board.set(STATES + place, whole(UNMAPPED)));
    bench.wait();
    bench.assert_no_errors();
    let file = Words::new(LONGEST * PAGE_WORDS);
    let place = 3;
    for Case { what, word, writable, state: claimed } in cases {
        let errors = bench.sum(ERRORS);
        bench.board.set(STATES + place, whole(CHANGING));
        let mapping = MMap {
            shm_offset: (place * PLACE_WORDS * 8) as u64,
            len: LONGEST as u64 * PAGE,
            flags: writable.into(),
            ..MMap::default()
        };
        if let Some(word) = word {
            for index in 0..LONGEST * PAGE_WORDS {
                file.set(index, word(place * PLACE_WORDS + index));
            }
            assert_eq!(bench.window.map(mapping, file.file()), 0);
        }
        bench.board.set(STATES + place, claimed);
        let start = Instant::now();
        while bench.sum(ERRORS) == errors {
            assert!(start.elapsed() < PATIENCE, "nobody saw {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
        bench.board.set(STATES + place, whole(CHANGING));
        if word.is_some() {
            assert_eq!(bench.window.unmap(mapping), 0);
        }
    }
    bench.end();
}
