//! hotslot.

pub mod bus;
pub mod memory;
pub mod virtio;
