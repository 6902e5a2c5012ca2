//! The devices inside the VMM: a serial port, the ways in which a guest ends the machine, and what tells it
//! that there is no PCI bus.

pub mod debug_exit;
pub mod i8042;
pub mod pci_ports;
pub mod power;
pub mod pvpanic;
pub mod serial;
