//! The devices inside the VMM: a serial port, and the ways in which a guest ends the machine.

pub mod debug_exit;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;
