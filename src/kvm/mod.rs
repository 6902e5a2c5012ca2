//! What we use of KVM: the machine ([`vm`]), its memory slots ([`slots`]) and its processors ([`vcpu`]).

pub mod slots;
pub mod vcpu;
pub mod vm;
