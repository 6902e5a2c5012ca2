//! hotslot.

pub mod arch;
pub mod bus;
pub mod cli;
pub mod config;
pub mod devices;
pub mod exit;
pub mod kvm;
pub mod memory;
pub mod size;
pub mod terminal;
pub mod thread;
pub mod vhost_user;
pub mod virtio;
pub mod vmm;
