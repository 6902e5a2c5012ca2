// The tour of the code, with its reading order, five stories and glossary, is tour.md.
#![doc = include_str!("tour.md")]

pub mod arch;
pub mod bus;
pub mod cli;
pub mod config;
pub mod devices;
pub mod exit;
pub mod kvm;
pub mod memory;
pub mod report;
pub mod sandbox;
pub mod size;
pub mod terminal;
pub mod thread;
pub mod trace;
pub mod vhost_user;
pub mod virtio;
pub mod vmm;

#[doc = include_str!("contract.md")]
pub mod contract {}

#[doc = include_str!("design.md")]
pub mod design {}

#[doc = include_str!("drawings.md")]
pub mod drawings {}
