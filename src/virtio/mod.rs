//! The virtio transport over MMIO (VIRTIO 1.3, section 4.2), and what a device is to it.
//!
//! Reading order: [`device`] (the trait), [`register_page`] (what the guest reads), [`mmio`] (what its writes
//! do), [`interrupt`] (what a device tells its driver unasked). `status` and `queue` are the rules behind two
//! of the registers, `misuse` is what breaks a rule.

pub mod device;
pub mod interrupt;
pub mod kind;
mod misuse;
pub mod mmio;
mod queue;
pub mod register_page;
mod status;
