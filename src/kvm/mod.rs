//! KVM: the machine ([`vm`]), its memory slots ([`slots`]) and its processors ([`vcpu`], [`pause`],
//! [`stats`]).

mod operands;
pub mod paging;
pub mod pause;
pub mod slots;
pub mod stats;
pub mod vcpu;
pub mod vm;
