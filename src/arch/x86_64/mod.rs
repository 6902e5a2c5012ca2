//! An x86-64 machine without firmware: a kernel finds its registers, its boot parameters and ACPI tables in
//! place.
//!
//! [`layout`] has every address. [`boot`] places and loads the kernel, whose formats [`kernel`] knows;
//! [`regs`], [`msr`] and [`cpuid`] make the processors' first state as data; [`acpi`] describes the devices; [`reset`] tells a panic
//! from a reset.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod msr;
pub mod regs;
pub mod reset;
