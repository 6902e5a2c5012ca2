//! `hotslot-backend torture`: against the front-end of the `vhost` crate, which shows that it knows of no
//! other, and against hotslot with a small guest, which must survive all of it.
//!
//! The numbers are those of the contract's assertions.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod deaths;
mod foreign;

mod misbehaviour;
mod requests;
