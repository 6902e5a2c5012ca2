//! The few devices that the VMM has itself: a serial port, and ways for the guest to end.

pub mod debug_exit;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;
