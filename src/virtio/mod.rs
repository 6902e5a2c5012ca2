//! The virtio transport over MMIO (VIRTIO 1.3, section 4.2), and the trait of a device.
//!
//! Reading order: [`device`] (the trait), [`register_page`] (what the guest reads), [`mmio`] (what its writes
//! do), [`interrupt`]. `status` and `queue` are the rules behind two of the registers, `misuse` names the
//! writes that break a rule. [`kick`] is the eventfd of a queue. [`traced`] records the guest's accesses.

pub mod device;
pub mod interrupt;
pub mod kick;
pub mod kind;
mod misuse;
pub mod mmio;
mod queue;
pub mod register_page;
mod status;
pub mod traced;
