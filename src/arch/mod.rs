//! The parts of a machine that depend on the processor's architecture.

pub mod x86_64;
