//! An x86-64 machine without firmware: a kernel finds its registers, its boot parameters and ACPI tables in
//! place.
//!
//! [`layout`] has every address. [`boot`] places and loads the kernel, whose formats [`kernel`] knows, and
//! the initramfs; `pvh` is for other kernels than Linux; [`regs`], [`msr`] and [`cpuid`] make the processors'
//! first state as data; [`acpi`] describes the devices; [`reset`] tells a panic from a reset.

pub mod acpi;
pub mod boot;
pub mod cpuid;
mod initramfs;
pub mod kernel;
pub mod layout;
pub mod msr;
mod pvh;
pub mod regs;
pub mod reset;
