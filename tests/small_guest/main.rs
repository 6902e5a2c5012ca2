//! Guests of a few dozen instructions on this machine's `/dev/kvm`: what a guest, a back-end and a user see
//! of a running hotslot. The test is the guest's driver (`hotslot_test_support::guest`) and the back-end
//! (`hotslot_test_support::backend`).
//!
//! The numbers are those of the contract's assertions.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod bad_backends;
mod dump;
mod faults;
mod footprint;
mod gdb;
mod huge_pages;
mod lifecycle;
mod machine;
mod mappings;
mod picture;
mod prefault;
mod pvh;
mod reconnect;
mod registers;
mod sandbox;
mod stats;
mod streams;
mod unavailable;
mod waits;
