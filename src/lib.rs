//! hotslot.

pub mod arch;
pub mod bus;
pub mod kvm;
pub mod memory;
pub mod size;
pub mod thread;
pub mod virtio;
