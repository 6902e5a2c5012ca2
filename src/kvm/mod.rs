//! KVM: the machine ([`vm`]), its memory slots ([`slots`]) and its processors ([`vcpu`], [`stats`]).

mod operands;
mod paging;
pub mod slots;
pub mod stats;
pub mod vcpu;
pub mod vm;
