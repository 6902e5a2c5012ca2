//! KVM: the virtual machine, its memory slots, its vCPUs.

pub mod slots;
