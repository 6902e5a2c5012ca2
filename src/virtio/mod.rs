//! The virtio transport over MMIO, and what a device is to it.

pub mod device;
