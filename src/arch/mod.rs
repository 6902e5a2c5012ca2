//! What the machine looks like to a kernel.

pub mod x86_64;
