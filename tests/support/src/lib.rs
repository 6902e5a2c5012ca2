//! What the tests, the fuzz targets and the benchmark share: the other ends of hotslot.
//!
//! | module | what it is |
//! |---|---|
//! | [`names`], [`wire`] | the numbers of vhost-user, and its messages as bytes on a socket |
//! | [`backend`], [`files`], [`full_disk`] | a scripted back-end, and what it maps |
//! | [`mod@bench`] | a device of the library in this process, and the scripted back-end behind it |
//! | [`huge_pages`] | a reservation of them |
//! | [`fuse`] | a file system whose server leaves requests unanswered |
//! | [`fuse_request`] | what a guest asks a virtio-fs device, as bytes |
//! | [`recorder`], [`machine`] | the machine of such a device: it records its mappings, or a vCPU of KVM sees them |
//! | [`guest`], [`monitor`], [`image`] | a running `hotslot`, and the small guest in it |
//! | [`gdb`] | a debugger |
//! | [`program`], [`torture`] | a running `hotslot-backend` |
//! | [`driver`] | the front-end of the `vhost` crate, and a driver with one queue |
//! | [`picture`] | what a picture must hold to: nothing overlaps |
//! | [`child`], [`built`], [`terminal`] | a program that runs, where cargo built it, what it runs on |
//! | [`kvm`], [`host`], [`process`], [`wait`] | whether `/dev/kvm` opens; what is in use of the host, and by a process; deadlines |
//!
//! Nothing here encodes or decodes a message by hotslot's own codec, so that no error in that codec can hide.

// A test that cannot go on ends with a panic.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

pub mod backend;
pub mod bench;
pub mod built;
pub mod child;
#[cfg(feature = "full")]
pub mod driver;
pub mod files;
pub mod full_disk;
pub mod fuse;
pub mod fuse_request;
pub mod gdb;
#[cfg(feature = "full")]
pub mod guest;
pub mod host;
pub mod huge_pages;
pub mod image;
pub mod kvm;
#[cfg(feature = "full")]
pub mod machine;
#[cfg(feature = "full")]
pub mod monitor;
pub mod names;
#[cfg(feature = "full")]
pub mod picture;
pub mod process;
pub mod program;
pub mod recorder;
pub mod terminal;
pub mod torture;
pub mod wait;
pub mod wire;
