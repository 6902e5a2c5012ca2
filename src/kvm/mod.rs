//! KVM: the machine ([`vm`]), its memory slots ([`slots`]), its processors ([`vcpu`], [`pause`],
//! [`counters`], [`stats`]), and page tables filled ahead ([`prefault`]).

pub mod counters;
mod operands;
pub mod paging;
pub mod pause;
pub mod prefault;
pub mod slots;
pub mod stats;
pub mod vcpu;
pub mod vm;
