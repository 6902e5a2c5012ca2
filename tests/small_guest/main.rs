//! Guests of a few dozen instructions on this machine's `/dev/kvm`: what a guest, a back-end and a user see
//! of a running hotslot. The test is the guest's driver (`support/guest.rs`) and the back-end
//! (`support/backend.rs`).
//!
//! The numbers are those of the contract's assertions.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

#[path = "../support/backend.rs"]
mod backend;
#[path = "../support/guest.rs"]
mod guest;
#[path = "../support/image.rs"]
mod image;
#[path = "../support/kvm.rs"]
mod kvm;
#[path = "../support/monitor.rs"]
mod monitor;
#[path = "../protocol/wire.rs"]
mod wire;

mod bad_backends;
mod faults;
mod footprint;
mod lifecycle;
mod machine;
mod mappings;
mod registers;
mod streams;
