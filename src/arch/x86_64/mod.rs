//! An x86-64 machine without firmware: a kernel finds its registers, its boot parameters and ACPI tables in
//! place.
//!
//! [`layout`] has every address. [`boot`] loads the kernel; [`regs`], [`msr`] and [`cpuid`] make the
//! processors' first state as data; [`acpi`] describes the devices.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod regs;
