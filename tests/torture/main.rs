//! `hotslot-backend torture`: against the front-end of the `vhost` crate, which shows that it knows of no
//! other, and against hotslot with a small guest, which has to survive all of it.
//!
//! The numbers are those of the contract's assertions.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

#[path = "../support/guest.rs"]
mod guest;
#[path = "../support/image.rs"]
mod image;
#[path = "../support/kvm.rs"]
mod kvm;
#[path = "../support/monitor.rs"]
mod monitor;
#[path = "../support/torture.rs"]
mod torture;

mod deaths;
mod foreign;

mod misbehaviour;
mod requests;
