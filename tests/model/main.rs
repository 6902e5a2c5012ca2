//! Random sequences of what a back-end and a guest may do, against a plain model of what comes of it: the
//! device behind real sockets, its back-end raw bytes, its guest a processor of KVM's where `/dev/kvm` opens.
//!
//! `HOTSLOT_MODEL_OPERATIONS` says how many operations there are at least; the usual number takes some
//! seconds. A sequence that fails is shortened as far as it goes, and printed. `PROPTEST_RNG_SEED` repeats a
//! run.
//!
//! A program of its own, with one test: what the process has of the host is counted.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod model;
mod operation;
mod run;

use std::cell::RefCell;
use std::io::{Write, stderr};
use std::time::Instant;

use hotslot_test_support::kvm;
use hotslot_test_support::machine::Machine;
use proptest::test_runner::{Config, RngAlgorithm, TestRunner};

use run::Counts;

/// How many operations there are, unless the user says otherwise.
const USUAL: usize = 10_000;

#[test]
fn random_sequences_do_what_a_model_of_intervals_says() {
    // SHM-24, SHM-26, SHM-27, SHM-29, SHM-30, SHM-31, SHM-32, SHM-33, SHM-34, SHM-35, SHM-36, SHM-37, SHM-38,
    // SHM-39, SHM-40, SHM-41, SHM-42, SHM-43, SHM-44, SHM-45, SHM-47, SHM-48, SHM-49, SHM-50, SHM-51, SHM-52,
    // SHM-53, SHM-54, SHM-55, SHM-56, SHM-58, SHM-59, SHM-60, SHM-61, SHM-62, SHM-69, SHM-71, SHM-72, SHM-76,
    // SHM-78
    let wanted = std::env::var("HOTSLOT_MODEL_OPERATIONS")
        .map_or(USUAL, |text| text.parse().expect("HOTSLOT_MODEL_OPERATIONS is a number"));
    let counts = many(wanted);
    // Nothing of what is to be tested is left out.
    let at_least = |count, share| assert!(count > wanted / share, "{counts:?}");
    at_least(counts.mapped, 20);
    at_least(counts.unmapped, 40);
    at_least(counts.refused, 20);
    at_least(counts.filled, 500);
    at_least(counts.resets, 500);
    at_least(counts.deaths, 2000);
}

/// As many operations as are wanted, in sequences.
fn many(wanted: usize) -> Counts {
    let machine = RefCell::new(Machine::new(kvm::is_here()));
    let config = Config {
        cases: 1,
        // By default next to nothing, as it follows from the number of cases. And no longer than a minute.
        max_shrink_iters: 2000,
        max_shrink_time: 60_000,
        failure_persistence: None,
        // Much faster than the usual one, which is cryptographic.
        rng_algorithm: RngAlgorithm::XorShift,
        ..Config::default()
    };
    let mut source = TestRunner::new(config.clone());
    let start = Instant::now();
    let counts = RefCell::new(Counts::default());
    while counts.borrow().operations < wanted {
        let mut runner = TestRunner::new_with_rng(config.clone(), source.new_rng());
        let result = runner.run(&operation::sequence(), |operations| {
            *counts.borrow_mut() += run::run(&mut machine.borrow_mut(), &operations);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    }
    let counts = counts.into_inner();
    // Not `println!`: the test harness would keep it to itself.
    let _ = writeln!(stderr(), "{counts:?} in {:.1} s", start.elapsed().as_secs_f64());
    counts
}
