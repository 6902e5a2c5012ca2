//! What a back-end sees of hotslot: its side of the two sockets is bytes, written and read by hand.
//!
//! Each test drives a device as its transport does, against a back-end that follows a script ([`bench`]). The
//! numbers are those of the contract's assertions.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

mod addresses;
mod configuration;
mod framing;
mod handshake;
mod interop;
mod kinds;
mod lifecycle;
mod reconnect;
mod replies;
mod requests;
mod sharing;
mod stopped;
