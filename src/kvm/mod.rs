//! KVM: the machine ([`vm`]), its memory slots ([`slots`]) and its processors ([`vcpu`], [`pause`],
//! [`counters`], [`stats`]; [`prefault`]).

pub mod counters;
mod operands;
pub mod paging;
pub mod pause;
pub mod prefault;
pub mod slots;
pub mod stats;
pub mod vcpu;
pub mod vm;
