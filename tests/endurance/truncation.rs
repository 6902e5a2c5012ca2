//! Truncation (SHM-45): four processors keep on reading and writing mappings whose files the back-end cuts
//! short, to nothing or less, and grows again. What is missing reads as zeroes; nobody waits for it for ever;
//! other devices do not notice.

use std::time::{Duration, Instant};

use hotslot_guest::board::*;
use hotslot_test_support::files::PAGE;
use hotslot_test_support::kvm;
use hotslot_test_support::wire::{MMap, page_at};

use crate::page::Words;
use crate::{Bench, say};

/// Longer than a guest needs for anything here.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: u64 = LONGEST as u64;

/// The mapping at a place.
fn mapping(place: usize) -> MMap {
    MMap { shm_offset: (place * PLACE_WORDS * 8) as u64, len: PAGES * PAGE, flags: 1, ..MMap::default() }
}

/// A guest that reads and writes mappings at all places, and their files.
fn start(interrupts: bool) -> (Bench, Vec<Words>) {
    let board = Words::new(PAGE_WORDS);
    board.set(INTERRUPTS, interrupts.into());
    let bench = Bench::small_with(board);
    let files = (0..PLACES).map(|place| {
        let file = Words::new(LONGEST * PAGE_WORDS);
        for index in 0..LONGEST * PAGE_WORDS {
            file.set(index, word(1, BACKEND, place * PLACE_WORDS + index));
        }
        assert_eq!(bench.window.map(mapping(place), file.file()), 0);
        bench.board.set(STATES + place, state(MAY_BE_CUT, LONGEST, 1));
        file
    });
    let files = files.collect();
    bench.wait();
    (bench, files)
}

/// Waits until every processor has made so many more accesses.
fn go_on(bench: &Bench, accesses: u64) {
    let now = || std::array::from_fn::<_, CPUS, _>(|cpu| bench.report(cpu, ACCESSES));
    let (start, before) = (Instant::now(), now());
    while now().iter().zip(before).any(|(now, before)| now - before < accesses) {
        let log = || bench.guest.log();
        assert!(start.elapsed() < PATIENCE, "processors stand still: {before:?}, {:?}\n{}", now(), log());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn files_are_cut_while_all_processors_use_them(interrupts: bool) {
    let (bench, files) = start(interrupts);
    go_on(&bench, 100);
    assert_eq!(bench.sum(ZEROES), 0);
    let mut state_of_chance = 1;
    let mut below = |end: u64| {
        state_of_chance = random(state_of_chance);
        (state_of_chance >> 33) % end
    };
    // By pieces, to nothing, larger again, faster than anybody could look.
    for _ in 0..300 {
        let file = files[below(PLACES as u64) as usize].file();
        for _ in 0..1 + below(3) {
            file.set_len(below(PAGES + 1) * PAGE).unwrap();
        }
        if below(4) == 0 {
            go_on(&bench, 1);
        }
    }
    files.iter().for_each(|file| file.file().set_len(0).unwrap());
    go_on(&bench, 1000);
    bench.assert_no_errors();
    assert!(bench.sum(ZEROES) > 0);
    // Other devices, and the device itself.
    let other = Words::new(PAGE_WORDS);
    assert_eq!(bench.board_device.map(page_at(1), other.file()), 0);
    // Zeroes, or already a hole.
    bench.board.set(STATES, state(MAY_BE_CUT, 0, 1));
    assert_eq!(bench.window.unmap(mapping(0)), 0);
    bench.board.set(STATES, state(UNMAPPED, 0, 2));
    go_on(&bench, 100);
    bench.assert_no_errors();
    // Logged once a mapping at most, and counted.
    bench.guest.wait_for_map("window: zeroes took the place of ");
    let log = bench.end();
    let warnings = log.matches("ends before the mapping: ").count();
    assert!((1..=PLACES).contains(&warnings), "{log}");
    assert!(log.contains("info: window: zeroes took the place of "), "{log}");
    say(&format!("{warnings} warnings for {PLACES} mappings, each cut often"));
}

#[test]
fn files_are_cut_with_interrupts_off() {
    // SHM-45
    if !kvm::is_here() {
        return;
    }
    files_are_cut_while_all_processors_use_them(false);
}

#[test]
fn files_are_cut_with_interrupts_on() {
    // SHM-45
    if !kvm::is_here() {
        return;
    }
    files_are_cut_while_all_processors_use_them(true);
}
