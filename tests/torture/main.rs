//! `hotslot-backend torture`: against the front-end of the `vhost` crate, which shows that it knows of no
//! other, and against hotslot with a small guest, which must survive all of it.
//!
//! The numbers are those of the contract's assertions.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod deaths;
mod foreign;
mod misbehaviour;
mod requests;

use hotslot_test_support::process::{Confinement, confinements};
use hotslot_test_support::torture::Torture;
use hotslot_test_support::wait::eventually;

#[test]
fn its_threads_are_confined_once_it_listens() {
    let torture = Torture::start(&[]);
    let confined = Confinement { filter: true, no_new_privs: true };
    eventually("each thread is confined", || {
        let threads = confinements(torture.pid());
        threads.contains_key("front-ends") && threads.values().flatten().all(|thread| *thread == confined)
    });
}
