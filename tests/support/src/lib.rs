//! What the tests, the fuzz targets and the benchmark share: the other ends of hotslot.
//!
//! | module | what it is |
//! |---|---|
//! | [`wire`] | vhost-user messages as bytes on a socket, and the specification's numbers |
//! | [`bench`] | a device of the library in this process, and its scripted back-end |
//! | [`recorder`], [`machine`] | the machine of such a device: it records its mappings, or KVM shows them to a vCPU |
//! | [`backend`] | a scripted back-end for a running `hotslot` |
//! | [`guest`], [`monitor`], [`image`] | a running `hotslot`, and the small guest in it |
//! | [`program`], [`torture`] | a running `hotslot-backend` |
//! | [`driver`] | the front-end of the `vhost` crate, and a driver with one queue |
//! | [`kvm`], [`process`] | whether `/dev/kvm` opens; what a process has open |
//!
//! Nothing here encodes or decodes a message by hotslot's own codec, so that no error in that codec can hide.

// A test that cannot go on ends with a panic.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

pub mod backend;
pub mod bench;
pub mod built;
pub mod driver;
pub mod guest;
pub mod image;
pub mod kvm;
pub mod machine;
pub mod monitor;
pub mod process;
pub mod program;
pub mod recorder;
pub mod torture;
pub mod wire;
