//! hotslot.

pub mod bus;
pub mod kvm;
pub mod memory;
pub mod vhost_user;
pub mod virtio;
